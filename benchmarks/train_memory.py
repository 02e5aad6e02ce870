"""Resident memory of a session that runs forward and backward through quantised products, over the weights' bytes in float32.

A stack of square products forward and the transposed ones back, as a gradient graph has them, nothing trained in between. Each graph is
loaded in a process of its own: load = resident memory after loading it, over a session of one Add; run = the same after a run of 64 rows.

    python benchmarks/train_memory.py [--forms u4 nf4 u8 nf2] [--width N] [--layers N] [--threads N] [--json]
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
from torch import Tensor, nn

from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.ir.quantised.dense import stored_bits
from matmorph.ir.tracing.trace import trace
from matmorph.specs.schema import Export

PROBE = """
import sys, numpy as np, onnxruntime
def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
loaded = resident()
(entry,) = session.get_inputs()
session.run(None, {entry.name: np.ones((64, entry.shape[1]), np.float32)})
print(loaded, resident())
"""


class Layer(nn.Module):
    """One weight [width, width] of random codes, forward and transposed."""

    def __init__(self, form: str, width: int, block: int, seed: int) -> None:
        super().__init__()
        self.form, self.sizes, self.block = form, (width, width), block
        generator = torch.Generator().manual_seed(seed)
        blocks = (width, width // block)
        if form == "fp32":
            self.register_buffer("weight", torch.randn(width, width, generator=generator) / width**0.5)
            return
        shape: tuple[int, ...]
        if form.startswith("u"):
            shape = (*blocks, block * int(form[1:]) // 8)
        else:
            shape = (width * width // 2,) if form == "nf4" else (width * width // block, block * stored_bits(form) // 8)
            blocks = (width * width // block,)
        self.register_buffer("codes", torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
        self.register_buffer("scales", torch.full(blocks, 0.1 / width**0.5))

    def forward(self, x: Tensor, back: bool) -> Tensor:
        if self.form == "fp32":
            return x @ self.weight if back else nn.functional.linear(x, self.weight)
        ours, bias = torch.ops.matmorph, () if back else (None,)
        if self.form.startswith("u"):
            product = ours.matmul_nbits_transposed if back else ours.matmul_nbits
            return product(x, self.codes, self.scales, None, *bias, *self.sizes, int(self.form[1:]), self.block)
        product = ours.matmul_codebook_transposed if back else ours.matmul_codebook
        return product(x, self.codes, self.scales, *bias, self.form, *self.sizes, self.block)


class Stack(nn.Module):
    def __init__(self, form: str, width: int, layers: int) -> None:
        super().__init__()
        block = min(64, width)
        self.layers = nn.ModuleList(Layer(form, width, block, seed) for seed in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, False)
        for layer in reversed(self.layers):
            x = layer(x, True)
        return x


class Empty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def exported(module: nn.Module, width: int, folder: Path) -> Path:
    folder.mkdir()
    export_onnx(trace(module.eval(), {"x": torch.ones(2, width)}, {"x": {0: "rows"}}), folder, Export())
    return folder


def resident(folder: Path, threads: int) -> tuple[int, int]:
    """Bytes after loading and after a run, the smallest of three processes."""
    command = [sys.executable, "-c", PROBE, str(folder / "model.onnx"), str(threads)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    return min(int(run[-2]) for run in runs), min(int(run[-1]) for run in runs)


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--forms", nargs="+", default=["u4", "nf4", "u8", "nf2"], choices=["u2", "u4", "u8", "nf4", "nf3", "nf2"])
    options_of.add_argument("--width", type=int, default=2048)
    options_of.add_argument("--layers", type=int, default=24)
    options = options_of.parse_args(arguments)
    if not Path("/proc/self/status").exists():
        raise SystemExit("resident memory is read from /proc, which this system does not have")
    say = tell(options)
    width, layers = (128, 2) if options.tiny else (options.width, options.layers)
    rows: list[dict[str, Any]] = []
    notes = [
        "load, run: resident memory over a process with an empty session; over_fp32: of the bytes of the weights in float32",
        "fp32 takes more than its weights: ONNX Runtime repacks a weight for each product that reads it",
    ]
    with tempfile.TemporaryDirectory() as place:
        empty = resident(exported(Empty(), width, Path(place) / "empty"), options.threads)
        for form in ["fp32", *options.forms]:
            say(f"{form} ...")
            folder = exported(Stack(form, width, layers), width, Path(place) / form)
            load, run = (after - before for after, before in zip(resident(folder, options.threads), empty, strict=True))
            size = (folder / "model.onnx.data").stat().st_size
            dense = 4 * width * width * layers
            rows.append(
                {
                    "form": form,
                    "parameters_m": width * width * layers / 1e6,
                    "file_mb": size / 1e6,
                    "load_mb": load / 1e6,
                    "run_mb": run / 1e6,
                    "load_over_fp32": load / dense,
                    "run_over_fp32": run / dense,
                }
            )
    finish(options, rows, notes)


if __name__ == "__main__":
    main()
