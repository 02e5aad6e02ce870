"""Time of a low-rank matmul under ONNX Runtime over the dense one, beside the ratio of their FLOPs.

Both models are compiled from one torch.nn.Linear (the dense one with `rewrite: keep`), loaded in one process with equal threads and run
in turn; each figure is the median over rounds. `over` = time ratio / FLOP ratio: 1 would be all that the arithmetic promises.

    python benchmarks/low_rank.py [--sizes 1024 4096] [--ranks 16 64 256] [--tokens 1 16 256] [--rounds 15]
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from _common import finish, parser, session_options, tell

import matmorph as mm
from matmorph.cli.demo import medians


def spec(rank: int | None) -> dict[str, Any]:
    """Low-rank of a fixed rank, also where it does not pay; None = dense."""
    if rank is None:
        return {"version": 1, "name": "dense", "rules": [{"name": "keep", "match": {"op": "matmul"}, "rewrite": "keep"}]}
    rewrite = {"low_rank": {"rank": rank, "whiten": False}}
    return {"version": 1, "name": f"rank-{rank}", "rules": [{"name": "low", "match": {"op": "matmul"}, "rewrite": rewrite, "force": True}]}


def session(linear: torch.nn.Linear, rank: int | None, folder: Path, threads: int) -> Any:
    """A plain ONNX Runtime session: the checks of matmorph's own Session would count in a matmul of microseconds."""
    example = torch.randn(4, linear.in_features, generator=torch.Generator().manual_seed(1))
    saved = mm.compile(linear, spec(rank), (example,), dynamic_shapes=({0: "tokens"},)).save(folder)
    return onnxruntime.InferenceSession(str(saved / "model.onnx"), session_options(threads), providers=["CPUExecutionProvider"])


def measure(size: int, ranks: Sequence[int], tokens: Sequence[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    linear = torch.nn.Linear(size, size)
    with torch.no_grad():
        linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sessions = {rank: session(linear, rank, Path(folder) / f"rank-{rank}", threads) for rank in (None, *ranks)}
        name = sessions[None].get_inputs()[0].name
        for count in tokens:
            x = np.random.default_rng(count).standard_normal((count, size), dtype=np.float32)
            seconds = medians({rank: partial(made.run, None, {name: x}) for rank, made in sessions.items()}, rounds)
            for rank in ranks:
                rows.append(_row(size, rank, count, seconds[None], seconds[rank]))
    return rows


def _row(size: int, rank: int, tokens: int, dense: float, low: float) -> dict[str, Any]:
    flops = 2 * rank / size  # rank * (in + out) over in * out
    ratio = low / dense
    return {
        "size": size,
        "rank": rank,
        "tokens": tokens,
        "dense_ms": 1e3 * dense,
        "low_rank_ms": 1e3 * low,
        "time_ratio": ratio,
        "flop_ratio": flops,
        "over": ratio / flops,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    options_of.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    options_of.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    options_of.add_argument("--rounds", type=int, default=15)
    options = options_of.parse_args(arguments)
    if options.tiny:
        options.sizes, options.ranks, options.tokens, options.rounds = [32], [4], [1, 2], 2
    torch.set_num_threads(options.threads)
    say = tell(options)
    rows = []
    for size in options.sizes:
        say(f"{size} x {size} ...")
        rows += measure(size, options.ranks, options.tokens, options.rounds, options.threads)
    finish(options, rows, ["over = time ratio / FLOP ratio; medians of runs in turn, ONNX Runtime on CPU"])


if __name__ == "__main__":
    main()
