"""Time of quantised matmuls under ONNX Runtime over the dense one: each kernel alone, and with a branch of low-rank factors beside it.

Every model is compiled from one torch.nn.Linear (`rewrite: keep` is the dense one), loaded in one process with equal threads and run in
turn; each figure is the median over rounds. `ratio` = time over dense; `branch` = what the factors (LoftQ, rank 16) add to it.
"int8" and "fp32" are the activations (`export.activations`).

    python benchmarks/quantized.py [--sizes 4096] [--tokens 1 16 256] [--kernels u4-int8 ...] [--rounds 15]
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from _common import finish, parser, session_options, tell

import matmorph as mm
from matmorph.cli.demo import medians

RANK = 16
KERNELS: Mapping[str, tuple[dict[str, Any], str]] = {
    "u4-int8": ({"quantizer": "uniform", "bits": 4}, "int8"),
    "u4-fp32": ({"quantizer": "uniform", "bits": 4}, "fp32"),
    "u8-int8": ({"quantizer": "uniform", "bits": 8}, "int8"),
    "u2-int8": ({"quantizer": "uniform", "bits": 2}, "int8"),
    "nf4": ({"quantizer": "nf4"}, "fp32"),
}


def spec(kernel: str, rank: int) -> dict[str, Any]:
    """Codes alone (rank 0), or with factors; "dense" keeps the matmul."""
    rule: dict[str, Any] = {"name": "all", "match": {"op": "matmul"}, "rewrite": "keep", "force": True}
    made: dict[str, Any] = {"version": 1, "name": f"{kernel}-{rank}", "rules": [rule]}
    if kernel == "dense":
        return made
    settings, activations = KERNELS[kernel]
    rule["rewrite"] = {"loftq": {**settings, "rank": rank, "iterations": 1}} if rank else {"quantize": settings}
    return {**made, "export": {"target": ["cpu"], "activations": activations}}


def session(linear: torch.nn.Linear, kernel: str, rank: int, folder: Path, threads: int) -> Any:
    """A plain ONNX Runtime session: the checks of matmorph's own Session would count in a matmul of microseconds."""
    example = torch.randn(4, linear.in_features, generator=torch.Generator().manual_seed(1))
    saved = mm.compile(linear, spec(kernel, rank), (example,), dynamic_shapes=({0: "tokens"},)).save(folder)
    return onnxruntime.InferenceSession(str(saved / "model.onnx"), session_options(threads), providers=["CPUExecutionProvider"])


def measure(size: int, kernels: Sequence[str], tokens: Sequence[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    linear = torch.nn.Linear(size, size)
    rank = min(RANK, size // 2)
    with torch.no_grad():
        linear.weight.normal_(0, size**-0.5, generator=torch.Generator().manual_seed(0))
    keys = [("dense", 0), *((kernel, r) for kernel in kernels for r in (0, rank))]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sessions = {key: session(linear, *key, Path(folder) / f"{key[0]}-{key[1]}", threads) for key in keys}
        name = sessions["dense", 0].get_inputs()[0].name
        for count in tokens:
            x = np.random.default_rng(count).standard_normal((count, size), dtype=np.float32)
            seconds = medians({key: partial(made.run, None, {name: x}) for key, made in sessions.items()}, rounds)
            dense = seconds["dense", 0]
            rows += [_row(size, count, kernel, dense, seconds[kernel, 0], seconds[kernel, rank]) for kernel in kernels]
    return rows


def _row(size: int, tokens: int, kernel: str, dense: float, alone: float, both: float) -> dict[str, Any]:
    return {
        "size": size,
        "tokens": tokens,
        "kernel": kernel,
        "dense_ms": 1e3 * dense,
        "quantized_ms": 1e3 * alone,
        "with_factors_ms": 1e3 * both,
        "ratio": alone / dense,
        "ratio_with_factors": both / dense,
        "branch": (both - alone) / dense,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--sizes", type=int, nargs="+", default=[4096])
    options_of.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    options_of.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    options_of.add_argument("--rounds", type=int, default=15)
    options = options_of.parse_args(arguments)
    if options.tiny:
        options.sizes, options.tokens, options.rounds = [64], [1, 2], 2
    torch.set_num_threads(options.threads)
    say = tell(options)
    rows = []
    for size in options.sizes:
        say(f"{size} x {size} ...")
        rows += measure(size, options.kernels, options.tokens, options.rounds, options.threads)
    finish(options, rows, ["medians of runs in turn, ONNX Runtime on CPU; branch = with factors minus without, over dense"])


if __name__ == "__main__":
    main()
