"""`effective_rank`, `outlier_ratio`: numbers that only the weight has; of a stack of experts the largest. A list of comparisons holds as a
whole."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, fsum, log
from typing import TYPE_CHECKING, ClassVar

from matmorph.errors import SpecError
from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.values import COMPARISONS
from matmorph.specs.kinds import Kind
from matmorph.specs.numbers import COMPARISON_FORMS, Comparison

if TYPE_CHECKING:
    from matmorph.ir.site import Site


@dataclass(frozen=True, slots=True, eq=False)
class _StatisticCondition(Condition):
    kind: ClassVar[Kind] = COMPARISONS
    notation: ClassVar[str] = "Comparisons"
    reads_weight: ClassVar[bool] = True

    value: tuple[Comparison, ...]

    @staticmethod
    @abstractmethod
    def numbers(site: Site, context: SelectionContext) -> list[float] | None:
        """The statistic of each matrix of the weight; None where that has no numbers."""

    def test(self, site: Site, context: SelectionContext) -> bool:
        number = self._read(site, context)
        return all(comparison.holds(number) for comparison in self.value)

    def found(self, site: Site, context: SelectionContext) -> str:
        return f"{self._read(site, context):.4g}"

    def _read(self, site: Site, context: SelectionContext) -> float:
        found = self.numbers(site, context)
        if found is None:
            message = f"{self.key} reads the weight of {site.path}, and this model is on the meta device"
            raise SpecError(message, at=self.at, keypath=self.keypath)
        return max(found)


@dataclass(frozen=True, slots=True, eq=False)
class EffectiveRankCondition(_StatisticCondition):
    """exp of the Shannon entropy of the singular values divided by their sum (Roy & Vetterli, "The effective rank: a measure of effective
    dimensionality", EUSIPCO 2007, eq. 1-4); between 1 and min(in, out), 0 for a zero matrix."""

    key: ClassVar[str] = "effective_rank"
    doc: ClassVar[str] = f"exp of the entropy of the singular values (reads the weight): {COMPARISON_FORMS}"

    @staticmethod
    def numbers(site: Site, context: SelectionContext) -> list[float] | None:
        spectra = context.spectra(site)
        return None if spectra is None else [_effective_rank(values) for values in spectra]


def _effective_rank(values: Sequence[float]) -> float:
    total = fsum(values)
    return exp(-fsum(value / total * log(value / total) for value in values if value > 0)) if total > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class OutlierRatioCondition(_StatisticCondition):
    """max |w| / sqrt(mean(w^2)), at least 1; 0 for a zero matrix."""

    key: ClassVar[str] = "outlier_ratio"
    doc: ClassVar[str] = f"largest element over the root mean square (reads the weight): {COMPARISON_FORMS}"

    @staticmethod
    def numbers(site: Site, context: SelectionContext) -> list[float] | None:
        found = context.magnitudes(site)
        return None if found is None else [largest / rms if rms > 0 else 0.0 for largest, rms in found]
