"""The number language of selectors: comparisons (`>= 100k`, `% 64 == 0`, `100..200`, `768`) and layers (`0..5`, `last 2`, `every 2`)."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

_UNITS: Mapping[str, int] = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_OPERATORS: Mapping[str, Callable[[Fraction, Fraction], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_NUMBER = r"(?P<{0}>\d+(?:_\d+)*(?:\.\d+)?(?:e[+-]?\d{{1,3}})?)(?P<{0}_unit>[kKMGB]?)"
_COMPARED = re.compile(r"(?P<op>>=|<=|==|!=|>|<)?\s*" + _NUMBER.format("value"))
_MODULO = re.compile(r"%\s*" + _NUMBER.format("modulus") + r"\s*(?P<op>==|!=)\s*" + _NUMBER.format("value"))
_BETWEEN = re.compile(_NUMBER.format("low") + r"\s*\.\.\s*" + _NUMBER.format("high"))

_DIGITS = 40

COMPARISON_FORMS = '768, ">= 100k", "< 3M", "100..200" or "% 64 == 0"'
LAYER_FORMS = "0..5, [0, 2, 5], 3, last 2 or every 2"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison with a number. `modulus` None: the number itself is compared, else its remainder; `high` is the end of a range."""

    text: str
    op: str
    value: Fraction
    modulus: Fraction | None = None
    high: Fraction | None = None

    def holds(self, number: float) -> bool:
        """Whether the number satisfies this comparison; integers are compared exactly."""
        exact = Fraction(number)
        if self.high is not None:
            return self.value <= exact <= self.high
        return _OPERATORS[self.op](exact if self.modulus is None else exact % self.modulus, self.value)


def _refuse_long(text: str) -> None:
    digits = max((len(run) for run in re.findall(r"[0-9_]+", text)), default=0)
    if digits > _DIGITS:
        raise ValueError(f"a number of {digits:,} digits; at most {_DIGITS}")


def parse_comparison(text: str) -> Comparison:
    """Reads one comparison. k, M, G (or B) multiply by 10^3, 10^6, 10^9; a range includes both ends. ValueError: anything else."""
    stripped = text.strip()
    _refuse_long(stripped)
    if found := _MODULO.fullmatch(stripped):
        modulus, value = _value(found, "modulus"), _value(found, "value")
        if not modulus:
            raise ValueError("a remainder of a division by 0")
        return Comparison(stripped, found["op"], value, modulus=modulus)
    if found := _BETWEEN.fullmatch(stripped):
        low, high = _value(found, "low"), _value(found, "high")
        if low > high:
            raise ValueError(f"the range {stripped} is empty")
        return Comparison(stripped, "..", low, high=high)
    if found := _COMPARED.fullmatch(stripped):
        return Comparison(stripped, found["op"] or "==", _value(found, "value"))
    raise ValueError(f"expected {COMPARISON_FORMS}, got {stripped!r}")


def _value(found: re.Match[str], name: str) -> Fraction:
    return Fraction(found[name]) * _UNITS[found[f"{name}_unit"]]


@dataclass(frozen=True, slots=True)
class Layers:
    """A set of layer indices: those from `low` to `high`, or the last `last`, or every `every`-th beginning with 0."""

    text: str
    low: int = 0
    high: int | None = None
    last: int | None = None
    every: int = 1

    def holds(self, layer: int, layers: int) -> bool:
        """Whether `layer` (from 0) of `layers` layers in all belongs to the set."""
        low = self.low if self.last is None else layers - self.last
        return low <= layer and (self.high is None or layer <= self.high) and layer % self.every == 0


def parse_layers(text: str) -> Layers:
    """Reads `0..5` (both included), `3`, `last 2` or `every 2`. ValueError: anything else."""
    stripped = " ".join(text.split())
    _refuse_long(stripped)
    if re.fullmatch(r"\d+", stripped):
        return Layers(stripped, low=int(stripped), high=int(stripped))
    if found := re.fullmatch(r"(\d+) ?\.\. ?(\d+)", stripped):
        low, high = int(found[1]), int(found[2])
        if low > high:
            raise ValueError(f"the range {stripped} is empty")
        return Layers(stripped, low=low, high=high)
    if found := re.fullmatch(r"(last|every) (\d+)", stripped):
        if not int(found[2]):
            raise ValueError(f"{stripped}: the number must be 1 or more")
        return Layers(stripped, last=int(found[2])) if found[1] == "last" else Layers(stripped, every=int(found[2]))
    raise ValueError(f"expected {LAYER_FORMS}, got {stripped!r}")
