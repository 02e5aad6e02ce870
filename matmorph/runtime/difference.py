"""How far an answer lies from the one that was seen: the measure of every check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from matmorph.runtime.feeds import Array
from matmorph.runtime.format.cache import LEVELS, CacheInfo
from matmorph.runtime.format.cases import Case


def case_differences(cache: CacheInfo | None, case: Case, answers: Mapping[str, Array]) -> Iterator[tuple[str, float]]:
    """Each output of the case and how far its answer is off; infinite where there is none. Codes of a cache have a measure of their own."""
    codes = {slot.present for slot in cache.slots if slot.scales is not None} if cache is not None else set()
    for name, expected in case.outputs.items():
        measure = code_difference if name in codes else difference
        yield name, measure(answers[name], expected, case.compared.get(name)) if name in answers else float("inf")


def difference(actual: Array, expected: Array, where: Array | None = None) -> float:
    """max |actual - expected| / max(1, max |expected|), in float64; infinite where shapes differ. `where`: bool that broadcasts to them:
    what is compared.

    Integers and booleans must be equal (0 or infinite). NaN and infinities must stand at the same places.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if where is not None:
        places = np.broadcast_to(where, expected.shape)
        return difference(actual[places], expected[places])
    if expected.dtype.kind not in "fc":
        return 0.0 if np.array_equal(actual, expected) else float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)) or not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    left, right = actual[finite].astype(wide), expected[finite].astype(wide)
    return float(np.abs(left - right).max() / max(1.0, np.abs(right).max()))


def code_difference(actual: Array, expected: Array, where: Array | None = None) -> float:
    """Of codes of a cache: how far the numbers behind them are apart at the least, as a share of the largest of their token. A number
    that lies between two codes may take either, so one step is nothing; infinite where shapes or types differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    steps = np.abs(actual.astype(np.int64) - expected.astype(np.int64))
    shown = steps if where is None else steps[np.broadcast_to(where, steps.shape)]
    return max(0, int(shown.max(initial=0)) - 1) / LEVELS
