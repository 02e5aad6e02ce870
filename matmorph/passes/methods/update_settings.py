"""Settings that updates of a rank share."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledRankSpec:
    """A rank, and what the update is multiplied by."""

    rank: int = field(metadata={"doc": "inner size of the factors", "minimum": 1})
    alpha: float | None = field(
        default=None,
        metadata={
            "doc": "the factors' product is scaled by alpha / rank (rslora: alpha / sqrt(rank)); 1 without it",
            "exclusive_minimum": 0,
        },
    )
    rslora: bool = field(default=False, metadata={"doc": "scale by alpha / sqrt(rank), which keeps large ranks learning"})

    def __post_init__(self) -> None:
        if self.rslora and self.alpha is None:
            raise ValueError("rslora scales alpha by sqrt(rank): give alpha")

    @property
    def adapter_scale(self) -> float:
        """alpha / rank, under rslora alpha / sqrt(rank); 1 without alpha."""
        return 1.0 if self.alpha is None else self.alpha / (sqrt(self.rank) if self.rslora else self.rank)
