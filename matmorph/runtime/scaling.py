"""The loss scale of half-precision training: as large as the gradient's range allows, found while training.

Micikevicius et al. 2018, section 3.2; the constants are those of torch.amp.GradScaler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from matmorph.runtime.errors import InputMismatch

START, GROWTH_INTERVAL, LARGEST = 2.0**16, 2000, 2.0**24
MAX_SKIPS: Mapping[str, int] = {"fp32": 0, "fp16": 20, "bf16": 20, "keep": 20}
"""Updates in a row that may be skipped because the gradient is not finite, by precision."""


@dataclass(frozen=True, slots=True)
class LossScale:
    """`good`: updates in a row with a finite gradient at this `value`. A power of two, so that scaling rounds nothing."""

    value: float = 1.0
    dynamic: bool = False
    good: int = 0

    def after(self, skipped: bool) -> LossScale:
        """Halved after a gradient that was not finite, doubled after 2000 that were."""
        if not self.dynamic:
            return self
        if skipped:
            return replace(self, value=max(1.0, self.value / 2), good=0)
        if self.good + 1 < GROWTH_INTERVAL:
            return replace(self, good=self.good + 1)
        return replace(self, value=min(LARGEST, self.value * 2), good=0)

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "dynamic": self.dynamic, "good": self.good}


def initial_scale(asked: float | None, precision: str) -> LossScale:
    """A given scale stays; None is dynamic for float16, whose range is small, and 1 for the others. Raises InputMismatch unless above 0."""
    if asked is not None:
        if not 0 < asked < float("inf"):
            raise InputMismatch(f"loss_scale must be a finite number above 0, got {asked!r}")
        return LossScale(float(asked))
    return LossScale(START, dynamic=True) if precision in ("fp16", "keep") else LossScale()
