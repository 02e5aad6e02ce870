"""Quantised MiniLM by ONNX Runtime's own tools and by ours: size, Spearman on the STS benchmark (dev), time over dense, seconds to make.

ONNX Runtime's: 4-bit round to nearest (asymmetric, blocks of 32), 4-bit HQQ, dynamic int8. Ours: 4-bit with searched scales, LoftQ with
whitened factors of rank 16, 8-bit without and with 8-bit activations, in blocks (int8) and per output channel (w8a8). All on the 36 linears
of the encoder, weights only but for the int8 ones; embeddings stay as they are. All models run in turn, equal threads, medians. ONNX
Runtime's tools read torch's own export.

    python benchmarks/ort_quantizers.py [--data DIR] [--models NAME ...] [--json]
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from _common import data_folder, finish, parser, session_options, tell
from sts import CALIBRATION, calibration, dev_pairs, score

import matmorph as mm
from matmorph.cli.demo import TIMING_BATCH, TIMING_ROUNDS, medians
from matmorph.models.resolve import Model, calibration_sentences, minilm, tokenize

BLOCK = 32
PRODUCTS = ("MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
OURS: Mapping[str, dict[str, Any]] = {
    "matmorph u4": {"quantize": {"quantizer": "uniform", "bits": 4, "block_size": BLOCK, "zero_point": True, "scale": "search"}},
    "matmorph u4 + r16": {
        "loftq": {"quantizer": "uniform", "bits": 4, "block_size": BLOCK, "zero_point": True, "scale": "search", "rank": 16, "whiten": True}
    },
    "matmorph u8": {"quantize": {"quantizer": "uniform", "bits": 8, "block_size": BLOCK}},
    "matmorph u8 int8": {"quantize": {"quantizer": "uniform", "bits": 8, "block_size": BLOCK}},
    "matmorph w8a8": {"quantize": {"quantizer": "uniform", "bits": 8, "block_size": "channel"}},
}
INT8 = ("matmorph u8 int8", "matmorph w8a8")
"""Activations in 8 bits too, as dynamic quantisation has them."""


def export(model: Model, path: Path) -> None:
    """torch's own export, as a user of ONNX Runtime's tools would make it."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.module,
            (),
            str(path),
            kwargs=dict(model.example_inputs),
            dynamo=True,
            input_names=list(model.example_inputs),
            output_names=["last_hidden_state"],
            dynamic_shapes=_shapes(model),
            external_data=False,
        )


def _shapes(model: Model) -> Any:
    dims: dict[str, Any] = {}
    named = {
        name: {axis: dims.setdefault(word, torch.export.Dim(word, min=2, max=512)) for axis, word in axes.items()}
        for name, axes in model.dynamic_shapes.items()
    }
    return named


def four_bit(config: Any) -> Callable[[Path, Path], None]:
    def run(source: Path, target: Path) -> None:
        from onnxruntime.quantization import matmul_nbits_quantizer

        made = getattr(matmul_nbits_quantizer, config[0])(block_size=BLOCK, **config[1])
        with contextlib.redirect_stdout(io.StringIO()):
            quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(onnx.load(source), block_size=BLOCK, algo_config=made)
            quantizer.process()
        onnx.save(quantizer.model.model, target)

    return run


def dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8)


PEERS: Mapping[str, Callable[[Path, Path], None]] = {
    "ORT u4 rtn": four_bit(("DefaultWeightOnlyQuantConfig", {"is_symmetric": False})),
    "ORT u4 hqq": four_bit(("HQQWeightOnlyQuantConfig", {})),
    "ORT dynamic int8": dynamic,
}


def ours(name: str, model: Model, batches: Any, folder: Path) -> Path:
    rule = {"name": "blocks", "expect": 36, "match": {"role": ["attention.*", "mlp.*"]}, "rewrite": OURS[name]}
    spec: dict[str, Any] = {"version": 1, "name": "blocks", "rules": [rule], "calibration": {"samples": CALIBRATION}}
    spec["export"] = {"target": ["cpu"], "activations": "int8" if name in INT8 else "fp32"}
    compiled = mm.compile(model.module, spec, model.example_inputs, dynamic_shapes=model.dynamic_shapes, calibration=batches)
    return compiled.save(folder / "out", force=True) / "model.onnx"


def session_of(path: Path, threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), sess_options=session_options(threads), providers=["CPUExecutionProvider"])


def row(name: str, make: Callable[[], Path], data: Any, threads: int) -> tuple[dict[str, Any], onnxruntime.InferenceSession]:
    """All but the time of a run, and the session that will be timed."""
    start = time.perf_counter()
    path = make()
    seconds = time.perf_counter() - start
    session = session_of(path, threads)
    nodes = sum(node.op_type in PRODUCTS for node in onnx.load(path, load_external_data=False).graph.node)
    found = {
        "model": name,
        "mb": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6,
        "spearman": score(lambda feeds: session.run(None, dict(feeds))[0], data),
        "make_s": seconds,
        "quantised_nodes": nodes,
    }
    return found, session


def timed(sessions: Mapping[str, onnxruntime.InferenceSession]) -> Mapping[str, float]:
    """Over dense, all of them in turn."""
    feeds = tokenize(calibration_sentences()[:TIMING_BATCH])
    seconds = medians({name: partial(session.run, None, feeds) for name, session in sessions.items()}, TIMING_ROUNDS)
    return {name: one / seconds["dense"] for name, one in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--data", type=Path, help="folder that holds stsb/ (default: MATMORPH_DATA, else ../shared/data)")
    options_of.add_argument("--models", nargs="+", choices=[*PEERS, *OURS], default=[*PEERS, *OURS])
    options = options_of.parse_args(arguments)
    folder = data_folder(options.data, "stsb")
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # the peer's line for every node
    say = tell(options)
    data, samples = dev_pairs(folder, options.tiny)
    pairs = len(data[0])
    model, batches = minilm(), calibration(folder, samples)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "dense" / "dense.onnx"
        source.parent.mkdir()
        export(model, source)
        sessions: dict[str, onnxruntime.InferenceSession] = {}
        makers: dict[str, Callable[[], Path]] = {"dense": lambda: source}
        for name in options.models:
            makers[name] = _maker(name, model, batches, source, Path(place) / name.replace(" ", "-"))
        for name, make in makers.items():
            found, sessions[name] = row(name, make, data, options.threads)
            rows.append(found)
            say(f"{name}: {found['spearman']:.2f}")
        ratios = timed(sessions)
    rows = [{**found, "time_over_dense": ratios[found["model"]]} for found in rows]
    finish(
        options,
        rows,
        [
            f"{pairs} pairs; ONNX Runtime's tools quantise every MatMul with a constant, ours the 36 linears by role",
            "times: all models in turn in one process, medians",
        ],
    )


def _maker(name: str, model: Model, batches: Any, source: Path, folder: Path) -> Callable[[], Path]:
    folder.mkdir()
    if name in OURS:
        return lambda: ours(name, model, batches, folder)

    def make() -> Path:
        PEERS[name](source, folder / "model.onnx")
        return folder / "model.onnx"

    return make


if __name__ == "__main__":
    main()
