// Runs a compiled model.onnx in Node.js and compares every output with what torch gave when it was compiled.
//
//   npm install && python vectors.py FOLDER > cases.json && node run.mjs FOLDER cases.json
//
// Exit code 1 where an output is further off than 1e-5 of the larger of 1 and the largest expected value.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as ort from "onnxruntime-node";

const TOLERANCE = 1e-5;
const arrays = { float32: Float32Array, float64: Float64Array, int32: Int32Array, int64: BigInt64Array, bool: Uint8Array };
const [folder, casesFile] = process.argv.slice(2);
if (!casesFile) {
  console.error("usage: node run.mjs FOLDER CASES.json");
  process.exit(2);
}

function tensor({ dtype, shape, data }) {
  const values = dtype === "int64" ? data.map(BigInt) : data.map(Number);
  return new ort.Tensor(dtype, arrays[dtype].from(values), shape);
}

// onnxruntime-node finds model.onnx.data beside the file that it is given by path.
const session = await ort.InferenceSession.create(join(folder, "model.onnx"));
let worst = 0;
for (const { inputs, outputs } of JSON.parse(readFileSync(casesFile, "utf8"))) {
  const feeds = Object.fromEntries(Object.entries(inputs).map(([name, given]) => [name, tensor(given)]));
  const results = await session.run(feeds);
  for (const [name, expected] of Object.entries(outputs)) {
    const largest = expected.data.reduce((most, value) => Math.max(most, Math.abs(Number(value))), 1);
    const far = expected.data.reduce((most, value, at) => Math.max(most, Math.abs(Number(value) - Number(results[name].data[at]))), 0);
    worst = Math.max(worst, far / largest);
  }
}
console.log(`onnxruntime-node agrees to ${worst.toExponential(2)} (tolerance ${TOLERANCE})`);
process.exit(worst <= TOLERANCE ? 0 : 1);
