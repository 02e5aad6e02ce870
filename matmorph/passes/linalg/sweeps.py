"""Sweeps over the edges of a tensor train: from a tensor (TT-SVD), or over the cores of a train (rounding).

Each edge is cut by `unfolding.left_step`; all cores before it are orthonormal, so the squared errors of the cuts add up. A budget of
squared error is handed out in equal shares, and what a step leaves unused goes to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from matmorph.passes.linalg.svd import one_thread
from matmorph.passes.linalg.unfolding import ChooseRank, UnfoldingStep, frobenius

Sweep = Literal["forward", "backward"]
EdgeCut = Callable[[Tensor, int | ChooseRank], UnfoldingStep]
Swept = tuple[list[Tensor], list[UnfoldingStep]]
"""Cores in their order, steps in the order of the edges."""

_MUCH_CHEAPER = 2.0
"""The usual sweep is forward; the other one has to save at least half."""


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """`squared`: largest sum of squared tails, or None where the ranks are given; `limits`: those ranks, or the upper limits."""

    norm: float
    squared: float | None
    limits: tuple[int, ...]
    multiple_of: int

    @classmethod
    def of(cls, tensor: Tensor, target: float, limits: tuple[int, ...], multiple_of: int) -> ErrorBudget:
        if multiple_of < 1:
            raise ValueError(f"multiple_of is at least 1, not {multiple_of}")
        norm = frobenius(tensor)
        return cls(norm, (target * norm) ** 2 if target >= 0 else None, limits, multiple_of)

    def rank(self, edge: int, c: Tensor, done: Sequence[UnfoldingStep]) -> int | ChooseRank:
        """For the unfolding `c` of `edge` after the steps `done`: each step may leave over an equal share of what is left of the budget."""
        limit = min(self.limits[edge], c.shape[0], c.shape[1])
        if self.squared is None:
            return limit
        share = (self.squared - sum(step.error**2 for step in done)) / (len(self.limits) - len(done))

        def choose(tails: Tensor) -> int:
            wanted = max(1, int((tails <= max(0.0, share)).int().argmax()))
            rounded: int = -(-wanted // self.multiple_of) * self.multiple_of
            return min(rounded, limit)

        return choose


def forward(tensor: Tensor, budget: ErrorBudget, cut: EdgeCut) -> Swept:
    """Cores from the first; each step is one edge."""
    cores: list[Tensor] = []
    steps: list[UnfoldingStep] = []
    rest, rank = tensor, 1
    for edge, mode in enumerate(tensor.shape[:-1]):
        c = rest.reshape(rank * mode, -1)
        steps.append(cut(c, budget.rank(edge, c, steps)))
        cores.append(steps[-1].u.reshape(rank, mode, -1))
        rest, rank = steps[-1].rest, steps[-1].u.shape[1]
    return [*cores, rest.reshape(rank, -1, 1)], steps


def backward(tensor: Tensor, budget: ErrorBudget, cut: EdgeCut) -> Swept:
    """Cores from the last: the same steps on transposed unfoldings. Steps in the order of the edges."""
    cores: list[Tensor] = []
    steps: list[UnfoldingStep] = []
    rest, rank = tensor, 1
    for edge in reversed(range(tensor.dim() - 1)):
        mode = tensor.shape[edge + 1]
        c = rest.reshape(-1, mode * rank).T
        steps.append(cut(c, budget.rank(edge, c, steps)))
        cores.append(steps[-1].u.T.reshape(-1, mode, rank))
        rest, rank = steps[-1].rest.T, steps[-1].u.shape[1]
    return [rest.reshape(1, -1, rank), *reversed(cores)], steps[::-1]


def left_orthogonal(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same tensor with orthonormal cores but the last, which carries the norm."""
    done: list[Tensor] = []
    carried = cores[0].new_ones(1, 1)
    for core in cores:
        moved = torch.tensordot(carried, core, 1)
        if len(done) == len(cores) - 1:
            return [*done, moved]
        with one_thread():
            q, carried = torch.linalg.qr(moved.reshape(-1, moved.shape[-1]))
        done.append(q.reshape(*moved.shape[:-1], -1))
    return done


def truncated(cores: Sequence[Tensor], budget: ErrorBudget, cut: EdgeCut) -> Swept:
    """From the last core to the first; all cores but the last are orthonormal, so a step's error is that of the tensor."""
    done: list[Tensor] = []
    steps: list[UnfoldingStep] = []
    current = cores[-1]
    for edge in reversed(range(len(cores) - 1)):
        mode, rank = current.shape[1:]
        c = current.reshape(-1, mode * rank).T
        steps.append(cut(c, budget.rank(edge, c, steps)))
        done.append(steps[-1].u.T.reshape(-1, mode, rank))
        current = torch.tensordot(cores[edge], steps[-1].rest.T, 1)
    return [current, *reversed(done)], steps[::-1]


def cheaper_sweep(modes: Sequence[int], ranks: Sequence[int]) -> Sweep:
    """Forward, unless a sweep from the last core costs less than half of that."""
    return "forward" if _cost(modes, ranks) <= _MUCH_CHEAPER * _cost(modes[::-1], ranks[::-1]) else "backward"


def _cost(modes: Sequence[int], ranks: Sequence[int]) -> float:
    """Multiply-adds of a sweep from the first core: the Gram matrix of each unfolding's shorter side."""
    left, rest, total = 1, prod(modes), 0.0
    for mode, rank in zip(modes[:-1], ranks, strict=True):
        rest //= mode
        total += float(min(left * mode, rest)) * (left * mode) * rest
        left = rank
    return total


SWEEPS: Mapping[Sweep, Callable[[Tensor, ErrorBudget, EdgeCut], Swept]] = {"forward": forward, "backward": backward}
