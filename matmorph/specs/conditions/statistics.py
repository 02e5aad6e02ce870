"""`effective_rank`, `outlier_ratio`: numbers that only the weight has. A list of comparisons holds as a whole."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from matmorph.errors import SpecError
from matmorph.ir.site import Site
from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.values import COMPARISONS
from matmorph.specs.kinds import Kind
from matmorph.specs.numbers import COMPARISON_FORMS, Comparison


@dataclass(frozen=True, slots=True, eq=False)
class _StatisticCondition(Condition):
    kind: ClassVar[Kind] = COMPARISONS
    notation: ClassVar[str] = "Comparisons"
    reads_weight: ClassVar[bool] = True

    value: tuple[Comparison, ...]

    @staticmethod
    @abstractmethod
    def measure(weight: torch.Tensor) -> float:
        """The statistic of a finite matrix [out, in] in float64."""

    def test(self, site: Site, context: SelectionContext) -> bool:
        number = self._read(site, context)
        return all(comparison.holds(number) for comparison in self.value)

    def found(self, site: Site, context: SelectionContext) -> str:
        return f"{self._read(site, context):.4g}"

    def _read(self, site: Site, context: SelectionContext) -> float:
        number = context.measured(self.measure, site)
        if number is None:
            message = f"{self.key} reads the weight of {site.path}, and this model is on the meta device"
            raise SpecError(message, at=self.at, keypath=self.keypath)
        return number


@dataclass(frozen=True, slots=True, eq=False)
class EffectiveRankCondition(_StatisticCondition):
    """exp of the Shannon entropy of the singular values divided by their sum (Roy & Vetterli, "The effective rank: a measure of effective
    dimensionality", EUSIPCO 2007, eq. 1-4); between 1 and min(in, out), 0 for a zero matrix."""

    key: ClassVar[str] = "effective_rank"
    doc: ClassVar[str] = f"exp of the entropy of the singular values (reads the weight): {COMPARISON_FORMS}"

    @staticmethod
    def measure(weight: torch.Tensor) -> float:
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
        total = singular.sum()
        share = singular[singular > 0] / total
        return float(torch.exp(-(share * share.log()).sum())) if total > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class OutlierRatioCondition(_StatisticCondition):
    """max |w| / sqrt(mean(w^2)), at least 1; 0 for a zero matrix."""

    key: ClassVar[str] = "outlier_ratio"
    doc: ClassVar[str] = f"largest element over the root mean square (reads the weight): {COMPARISON_FORMS}"

    @staticmethod
    def measure(weight: torch.Tensor) -> float:
        rms = weight.square().mean().sqrt()
        return float(weight.abs().max() / rms) if rms > 0 else 0.0
