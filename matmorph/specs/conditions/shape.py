"""`in_features`, `out_features`, `params`: numbers that follow from the shape of the matrix. A list of comparisons holds as a whole."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.values import COMPARISONS
from matmorph.specs.kinds import Kind
from matmorph.specs.numbers import COMPARISON_FORMS, Comparison

if TYPE_CHECKING:
    from matmorph.ir.site import Site


@dataclass(frozen=True, slots=True, eq=False)
class _ShapeCondition(Condition):
    kind: ClassVar[Kind] = COMPARISONS
    notation: ClassVar[str] = "Comparisons"

    value: tuple[Comparison, ...]

    @staticmethod
    @abstractmethod
    def number(site: Site) -> int:
        """What is compared."""

    def test(self, site: Site, context: SelectionContext) -> bool:
        number = self.number(site)
        return all(comparison.holds(number) for comparison in self.value)

    def found(self, site: Site, context: SelectionContext) -> str:
        return f"{self.number(site):,}"

    def nearby(self, sites: Sequence[Site], context: SelectionContext) -> str:
        numbers = [self.number(site) for site in sites]
        return f"here from {min(numbers):,} to {max(numbers):,}"


@dataclass(frozen=True, slots=True, eq=False)
class InFeaturesCondition(_ShapeCondition):
    key: ClassVar[str] = "in_features"
    doc: ClassVar[str] = f"input width: {COMPARISON_FORMS}"

    @staticmethod
    def number(site: Site) -> int:
        return site.in_features


@dataclass(frozen=True, slots=True, eq=False)
class OutFeaturesCondition(_ShapeCondition):
    key: ClassVar[str] = "out_features"
    doc: ClassVar[str] = f"output width: {COMPARISON_FORMS}"

    @staticmethod
    def number(site: Site) -> int:
        return site.out_features


@dataclass(frozen=True, slots=True, eq=False)
class ParamsCondition(_ShapeCondition):
    key: ClassVar[str] = "params"
    doc: ClassVar[str] = f"elements of the matrix: {COMPARISON_FORMS}"

    @staticmethod
    def number(site: Site) -> int:
        return site.parameters
