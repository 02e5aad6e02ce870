"""Time and residual of LoftQ (NF4, rank 16, plain) on the 72 linears of a BERT-base, beside PEFT's on the same matrices and threads.

PEFT (0.21) refuses to run LoftQ on a CPU; its own function runs here with the one line that names the device exchanged, as `peft_s`. Where
PEFT or bitsandbytes is not installed those columns are empty. `ours_s`: matmorph's alternation, factors and codes; `residual` =
|W - Q - A B| / |W| over all matrices; `residual_ratio` = ours over PEFT's. PEFT takes minutes: `--matrices` limits both to the first.

The last row is one matrix of 4096 x 11008 in a process of its own, with the growth of its peak memory over the matrix itself.

    python benchmarks/loftq.py [--iterations 1 5] [--matrices 72] [--no-peft]
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import finish, parser, tell

from matmorph.passes.linalg.loftq import loftq
from matmorph.passes.linalg.packing import pack_matmul_bnb4
from matmorph.passes.linalg.parallel import ordered_map
from matmorph.passes.linalg.quantize import Quantizer

RANK = 16
LARGE = (11008, 4096)
Weights = Sequence[torch.Tensor]
Run = Callable[[torch.Tensor, int], float]
"""(weight, iterations) -> |W - Q - A B|."""


def weights_of(count: int, tiny: bool) -> list[torch.Tensor]:
    """The shapes of BERT-base's encoder, layer by layer; normal weights of its initialiser's size with a decaying part of rank 64 added, as
    trained ones have."""
    width, wide = (64, 96) if tiny else (768, 3072)
    shapes = [*[(width, width)] * 4, (wide, width), (width, wide)] * 12
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        left, right = (torch.randn(size, 64, generator=generator) for size in (rows, columns))
        return 0.02 * torch.randn(rows, columns, generator=generator) + 0.004 * (left * torch.logspace(0, -1.5, 64)) @ right.T

    return [draw(*shape) for shape in shapes[:count]]


def ours(weight: torch.Tensor, iterations: int) -> float:
    found = loftq(weight, Quantizer("nf4"), RANK, iterations)
    pack_matmul_bnb4(found.quantized)  # what an export would need
    return found.error * float(weight.norm())


def peft_loftq() -> tuple[Any, str]:
    """PEFT's function with its device line exchanged, None where there is none, and what is to be said of it."""
    try:
        import bitsandbytes  # noqa: F401
        import peft.utils.loftq_utils as module
    except ImportError as error:
        return None, f"PEFT is not compared with: {error.name or error} is not installed (pip install peft bitsandbytes)"
    line = 'compute_device = "xpu" if is_xpu_available() else "cuda"'
    source = inspect.getsource(module.loftq_init)
    if line not in source:
        return None, "PEFT is not compared with: its LoftQ names its device in another way than 0.21 does"
    scope = dict(vars(module))
    exec(compile(source.replace(line, 'compute_device = "cpu"'), "loftq_init on the CPU", "exec"), scope)
    return scope["loftq_init"], "PEFT's LoftQ ran on the CPU with its device line exchanged; one matrix warms each of the two up"


def peft() -> tuple[Run | None, str]:
    """The same as `Run`."""
    init, note = peft_loftq()

    def run(weight: torch.Tensor, iterations: int) -> float:
        base, down, up = init(weight, 4, RANK, iterations)
        return float((weight - base - up @ down).norm())

    return (None if init is None else run), note


def timed(run: Run, weights: Weights, iterations: int, workers: int) -> tuple[float, float]:
    """(seconds, |W - Q - A B| / |W| over all). `workers` matrices at a time, each on one thread, as the compiler runs them; 1 = one after
    the other, all threads for each."""
    run(weights[0], 1)
    start = time.perf_counter()
    errors = list(ordered_map(lambda weight: run(weight, iterations), weights, workers))
    seconds = time.perf_counter() - start
    return seconds, math.sqrt(sum(error**2 for error in errors) / sum(float(weight.norm()) ** 2 for weight in weights))


def measure(weights: Weights, iterations: int, other: Run | None) -> dict[str, Any]:
    seconds, residual = timed(ours, weights, iterations, torch.get_num_threads())
    theirs, bound = timed(other, weights, iterations, 1) if other else (None, None)
    return {
        "matrices": str(len(weights)),
        "iterations": iterations,
        "ours_s": seconds,
        "peft_s": theirs,
        "speed_up": theirs / seconds if theirs else None,
        "residual": residual,
        "residual_ratio": residual / bound if bound else None,
        "memory_x": None,
    }


def measure_large(tiny: bool, threads: int) -> dict[str, Any]:
    """One large matrix: seconds for five iterations, and how many times its size the process grew at its peak."""
    torch.set_num_threads(threads)
    shape = (344, 128) if tiny else LARGE
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    loftq(weight[:256, :256].contiguous(), Quantizer("nf4"), RANK, 1)
    before = _peak_bytes()
    seconds, residual = time.perf_counter(), ours(weight, 5)
    seconds = time.perf_counter() - seconds
    return {
        "matrices": "x".join(map(str, shape)),
        "iterations": 5,
        "ours_s": seconds,
        "peft_s": None,
        "speed_up": None,
        "residual": residual / float(weight.norm()),
        "residual_ratio": None,
        "memory_x": (_peak_bytes() - before) / (4 * weight.numel()),
    }


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def large(options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--inner", "--threads", str(options.threads), *(["--tiny"] if options.tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the measured process failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--iterations", type=int, nargs="+", default=[1, 5])
    options_of.add_argument("--matrices", type=int, default=72, help="how many of the 72 matrices")
    options_of.add_argument("--no-peft", action="store_true", help="do not run PEFT")
    options_of.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = options_of.parse_args(arguments)
    if options.inner:
        print(json.dumps(measure_large(options.tiny, options.threads)))
        return
    torch.set_num_threads(options.threads)
    say = tell(options)
    last = large(options)  # first: a process begins with the peak of the one that made it
    weights = weights_of(2 if options.tiny else options.matrices, options.tiny)
    other, note = (None, "PEFT was not asked for") if options.no_peft else peft()
    rows = []
    for iterations in options.iterations:
        rows.append(measure(weights, iterations, other))
        say(f"T = {iterations}: {rows[-1]['ours_s']:.2f} s")
    rows.append(last)
    finish(options, rows, [note, "memory_x: growth of the peak over the size of the matrix"])


if __name__ == "__main__":
    main()
