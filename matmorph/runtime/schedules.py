"""Learning rate schedules: functions of (update, updates in all) that give a factor of the learning rate. Updates count from 0.

    trainer.fit(loader, epochs=3, schedule=linear(warmup=0.06))

`warmup`: a number of updates (int), or a share of all of them (float below 1). It rises from 0, as in transformers; `final` is the factor
at the end, which the last update does not reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from matmorph.runtime.errors import InputMismatch

Schedule = Callable[[int, int], float]


def constant(warmup: int | float = 0) -> Schedule:
    """1 after the warm-up. Raises InputMismatch for a warm-up that is no number of updates and no share."""
    return _warmed(warmup, 1.0, lambda share: 1.0)


def linear(warmup: int | float = 0, final: float = 0.0) -> Schedule:
    """From 1 straight down to `final`. Raises InputMismatch as `constant`, and for a `final` outside 0 ... 1."""
    return _warmed(warmup, final, lambda share: 1.0 - share)


def cosine(warmup: int | float = 0, final: float = 0.0) -> Schedule:
    """From 1 down to `final` along half a cosine (Loshchilov and Hutter 2017, without restarts). Raises InputMismatch as `linear`."""
    return _warmed(warmup, final, lambda share: 0.5 * (1.0 + math.cos(math.pi * share)))


SCHEDULES: Mapping[str, Callable[[int | float], Schedule]] = {"constant": constant, "linear": linear, "cosine": cosine}
"""By name, for command lines."""


def _warmed(warmup: int | float, final: float, shape: Callable[[float], float]) -> Schedule:
    if warmup < 0 or (isinstance(warmup, float) and warmup >= 1):
        raise InputMismatch(f"warmup must be a number of updates (an int), or a share from 0 to below 1, got {warmup!r}")
    if not 0 <= final <= 1:
        raise InputMismatch(f"final must be from 0 to 1, got {final!r}")

    def factor(update: int, total: int) -> float:
        rising = round(warmup * total) if isinstance(warmup, float) else warmup
        if update < rising:
            return update / rising
        share = min(1.0, (update - rising) / max(1, total - rising))
        return final + (1.0 - final) * shape(share)

    return factor
