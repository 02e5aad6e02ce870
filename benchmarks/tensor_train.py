"""Time and error of TT-SVD on a 4096 x 4096 matrix, modes 16^3 x 16^3, rank 16, beside tensorly's on the same tensor and threads.

Two matrices: `train` has unfoldings with a decaying spectrum (a tensor train whose rank-one terms shrink like k^-1, and noise), `matrix`
decaying singular values of its own (s_k = 1 / k), which a tensor train represents badly. tensorly (torch backend, float32) runs with its
default `truncated_svd`, a full SVD of each unfolding, and with `randomized_svd`. Both start from the same tensor, run in turn, and are
compared by the error of the reconstruction in float64: `error_ratio` = ours over theirs, `guard` = proven upper bound on ours over the
smallest possible. The contraction of trains under ONNX Runtime is timed by `tensor_train_plans.py`.

    python benchmarks/tensor_train.py [--rank 16] [--rounds 3]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from _common import finish, parser, tell

from matmorph.passes.linalg.modes import Modes, balanced_modes
from matmorph.passes.linalg.tensor_train import TensorTrain, matrix_to_tensor, reconstruct, tt_svd

SIZE, MODES = 4096, 3
DECAY_RANK = 64
Decompose = Callable[[torch.Tensor, int], Callable[[], torch.Tensor]]
"""(tensor, rank) -> what rebuilds the tensor from the train."""


def train_like(modes: Modes, generator: torch.Generator) -> torch.Tensor:
    """A tensor whose unfoldings have decaying spectra, with 1 % of noise."""
    whole = torch.ones(1, 1)
    for size in modes.sizes:
        core = torch.randn(whole.shape[1], size, DECAY_RANK, generator=generator) / torch.arange(1, DECAY_RANK + 1)
        whole = (whole @ core.reshape(core.shape[0], -1)).reshape(-1, DECAY_RANK)
    tensor = whole[:, 0].reshape(modes.sizes)
    noise = torch.randn(modes.sizes, generator=generator)
    return tensor / tensor.norm() + 0.01 * noise / noise.norm()


def matrix_like(modes: Modes, generator: torch.Generator) -> torch.Tensor:
    """The tensor of a matrix with singular values 1 / k."""
    size = modes.out_features
    left, right = (torch.linalg.qr(torch.randn(size, min(size, 256), generator=generator)).Q for _ in range(2))
    return matrix_to_tensor((left / torch.arange(1, left.shape[1] + 1)) @ right.T, modes).contiguous()


def ours(tensor: torch.Tensor, rank: int) -> Callable[[], torch.Tensor]:
    return partial(reconstruct, tt_svd(tensor, rank)[0])


def tensorly(solver: str) -> Decompose | None:
    """None where tensorly is not installed."""
    try:
        from tensorly import backend_context
        from tensorly.decomposition import tensor_train
    except ImportError:
        return None

    random = {"random_state": 0} if solver == "randomized_svd" else {}

    def run(tensor: torch.Tensor, rank: int) -> Callable[[], torch.Tensor]:
        with backend_context("pytorch"):
            found = tensor_train(tensor, [1, *[rank] * (tensor.dim() - 1), 1], svd=solver, **random)
        return partial(reconstruct, TensorTrain(tuple(found.factors)))

    return run


def in_turn(runs: Mapping[str, Decompose], tensor: torch.Tensor, rank: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """(median seconds, relative error) of each. A small tensor warms each up: a full run of the peer takes many seconds."""
    small = tensor[:8, :8, :8].contiguous()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    errors: dict[str, float] = {}
    for run in runs.values():
        run(small, 2)
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            rebuild = run(tensor, rank)
            seconds[name].append(time.perf_counter() - start)
            errors[name] = float((rebuild() - tensor).double().norm() / tensor.double().norm())
    return {name: median(values) for name, values in seconds.items()}, errors


def measure(name: str, tensor: torch.Tensor, rank: int, rounds: int) -> list[dict[str, Any]]:
    peers = {solver: run for solver in ("truncated_svd", "randomized_svd") if (run := tensorly(solver))}
    seconds, errors = in_turn({"ours": ours, **peers}, tensor, rank, rounds)
    info = tt_svd(tensor, rank)[1]
    shared = {"tensor": name, "rank": rank, "ours_s": seconds["ours"], "ours_error": errors["ours"], "guard": info.guard}
    return [
        {
            **shared,
            "peer": peer,
            "peer_s": seconds.get(peer),
            "peer_error": errors.get(peer),
            "speed_up": seconds[peer] / seconds["ours"] if peer in peers else None,
            "error_ratio": errors["ours"] / errors[peer] if peer in peers else None,
        }
        for peer in (peers or {"none": None})
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--rank", type=int, default=16)
    options_of.add_argument("--rounds", type=int, default=3)
    options = options_of.parse_args(arguments)
    size, rank, rounds = (64, 4, 2) if options.tiny else (SIZE, options.rank, options.rounds)
    torch.set_num_threads(options.threads)
    say = tell(options)
    modes = balanced_modes(size, size, MODES)
    rows = []
    for name, make in (("train", train_like), ("matrix", matrix_like)):
        say(f"{name}: {size} x {size}, modes {modes.out} x {modes.in_} ...")
        rows += measure(name, make(modes, torch.Generator().manual_seed(0)), rank, rounds)
    notes = [f"{size} x {size}, modes {list(modes.out)} x {list(modes.in_)}; medians of {rounds} runs in turn"]
    if tensorly("truncated_svd") is None:
        notes.append("tensorly is not compared with: it is not installed (pip install tensorly)")
    finish(options, rows, notes)


if __name__ == "__main__":
    main()
