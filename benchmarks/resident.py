"""Resident memory of an ONNX Runtime session of a compiled model, over that of an empty session, beside the size of its file.

Each model is loaded in a process of its own: growth = resident memory after loading it and one run, minus the same for a graph of one Add.

    python benchmarks/resident.py [--specs quantize-u4 low-rank-60-plain] [--threads N] [--json]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import finish, parser, tell

import matmorph as mm
from matmorph.models.resolve import Model, minilm

PROBE = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
ids = np.ones((1, 8), np.int64)
session.run(None, {entry.name: ids for entry in session.get_inputs()})
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


class Empty(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids + 1


def resident(model: Path, threads: int) -> int:
    """Bytes, the smallest of three processes."""
    command = [sys.executable, "-c", PROBE, str(model / "model.onnx"), str(threads)]
    return min(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) for _ in range(3))


class Toy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(64, 64)
        self.head = torch.nn.Linear(64, 64)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(input_ids))


def subject(tiny: bool, ids: torch.Tensor) -> Model:
    axes = {"input_ids": {0: "batch", 1: "seq"}}
    return Model(Toy().eval(), {"input_ids": ids}, axes) if tiny else minilm()


def toy_spec(name: str) -> dict[str, Any]:
    return {"version": 1, "name": name, "rules": [{"name": "all", "match": {"op": "linear"}, "rewrite": {"low_rank": {"rank": 8}}}]}


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--specs", nargs="+", default=["quantize-u4", "low-rank-60-plain"])
    options = options_of.parse_args(arguments)
    if not Path("/proc/self/status").exists():
        raise SystemExit("resident memory is read from /proc, which this system does not have")
    say = tell(options)
    ids = torch.ones(2, 8, dtype=torch.int64)
    model = subject(options.tiny, ids)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        keep = {"version": 1, "name": "empty", "rules": [{"name": "none", "match": {"op": "matmul"}, "optional": True, "rewrite": "keep"}]}
        empty = mm.compile(Empty(), keep, (ids,), dynamic_shapes=({0: "batch", 1: "seq"},)).save(Path(folder) / "empty")
        base = resident(empty, options.threads)
        for name in options.specs:
            say(f"{name} ...")
            compiled = mm.compile(
                model.module,
                toy_spec(name) if options.tiny else name,
                model.example_inputs,
                model.dynamic_shapes,
                calibration=model.calibration,
            )
            saved = compiled.save(Path(folder) / name)
            size = sum((saved / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
            growth = resident(saved, options.threads) - base
            rows.append({"spec": name, "file_mb": size / 1e6, "growth_mb": growth / 1e6, "growth_over_file": growth / size})
    finish(options, rows, ["growth: resident memory over a process with an empty session"])


if __name__ == "__main__":
    main()
