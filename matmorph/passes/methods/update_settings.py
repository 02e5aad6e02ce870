"""Settings that updates of a rank share."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Any


def alpha_field() -> Any:
    return field(
        default=None,
        metadata={
            "doc": "the factors' product is scaled by alpha / rank (rslora: alpha / sqrt(rank)); 1 without it",
            "exclusive_minimum": 0,
        },
    )


def rslora_field() -> Any:
    return field(default=False, metadata={"doc": "scale by alpha / sqrt(rank), which keeps large ranks learning"})


def refuse_rslora(rslora: bool, alpha: float | None) -> None:
    """ValueError for a root of nothing."""
    if rslora and alpha is None:
        raise ValueError("rslora scales alpha by sqrt(rank): give alpha")


def scale_of(rank: int, alpha: float | None, rslora: bool) -> float:
    """alpha / rank, under rslora alpha / sqrt(rank); 1 without alpha."""
    return 1.0 if alpha is None else alpha / (sqrt(rank) if rslora else rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledRankSpec:
    """A rank, and what the update is multiplied by."""

    rank: int = field(metadata={"doc": "inner size of the factors", "minimum": 1})
    alpha: float | None = alpha_field()
    rslora: bool = rslora_field()

    def __post_init__(self) -> None:
        refuse_rslora(self.rslora, self.alpha)

    @property
    def adapter_scale(self) -> float:
        """See `scale_of`."""
        return scale_of(self.rank, self.alpha, self.rslora)
