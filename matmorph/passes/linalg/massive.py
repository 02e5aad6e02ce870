"""Massive activations: tokens whose norm dominates a second moment (Sun et al., "Massive activations in large language models", arXiv
2402.17762). Such a moment is nearly of rank 1, and what is fitted to it knows little of all other tokens.

Norms are counted in steps of half an octave of their squares, so that any number of rows takes the same room; what is said of a median is
right to one such step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TIMES = 100.0
"""Times the median squared norm from which on a token is massive."""
DOMINANT = 0.5
"""Share of the sum of all squared norms from which on massive tokens are said to dominate a moment."""
_STEPS = 2
_BINS = 1024
_NONE = _BINS // 2


@dataclass(frozen=True, slots=True)
class Massive:
    """`tokens` of `rows` that are massive, and their share of the trace of the second moment."""

    tokens: int
    rows: int
    share: float

    @property
    def dominates(self) -> bool:
        return self.share >= DOMINANT

    def note(self) -> str:
        return (
            f"massive activations: {self.tokens:,} of {self.rows:,} rows, each of at least {TIMES:g} x the median squared norm, make "
            f"{self.share:.1%} of the second moment of its input"
        )


class Norms:
    """How many rows have which squared norm, and their sum, by steps."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.float64)
        self._sums = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, squares: Tensor) -> None:
        """`squares`: squared norms [n]; rows of zeros count nothing."""
        some = squares[squares > 0].double().cpu()
        steps = (torch.log2(some) * _STEPS).floor().clamp(-_NONE, _NONE - 1).nan_to_num(_NONE - 1).long() + _NONE
        self._counts += torch.bincount(steps, minlength=_BINS)
        self._sums += torch.bincount(steps, weights=some, minlength=_BINS)

    def massive(self) -> Massive | None:
        """None where no row is."""
        rows, total = float(self._counts.sum()), float(self._sums.sum())
        if not rows:
            return None
        median = int((self._counts.cumsum(0) >= rows / 2).int().argmax())
        first = median + 1 + int(torch.tensor(TIMES).log2() * _STEPS)
        tokens = int(self._counts[first:].sum())
        return Massive(tokens, int(rows), float(self._sums[first:].sum()) / total) if tokens else None
