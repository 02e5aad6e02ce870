"""`inserted_by`: the rule of an earlier stage that made the matmul. Where a match names none, only matmuls of the source model remain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.values import TEXT, OneOrMore, as_text
from matmorph.specs.kinds import Kind
from matmorph.specs.tree import MapTree

if TYPE_CHECKING:
    from matmorph.ir.site import Site


@dataclass(frozen=True, slots=True, eq=False)
class InsertedByCondition(Condition):
    """`value`: names of rules; None among them stands for the source model."""

    key: ClassVar[str] = "inserted_by"
    doc: ClassVar[str] = "rule of an earlier stage that inserted the matmul"
    kind: ClassVar[Kind] = OneOrMore("the name of a rule of an earlier stage", TEXT, as_text)

    value: tuple[str | None, ...]

    @classmethod
    def implied(cls, match: MapTree) -> Self:
        return cls(match.at, match.keypath, "of the source model (implied: no inserted_by is named)", (None,))

    def test(self, site: Site, context: SelectionContext) -> bool:
        return site.const.rule in self.value

    def found(self, site: Site, context: SelectionContext) -> str:
        return f"inserted by {site.const.rule}" if site.const.rule else "of the source model"

    def nearby(self, sites: Sequence[Site], context: SelectionContext) -> str:
        rules = dict.fromkeys(site.const.rule for site in sites if site.const.rule)
        return f"matmuls here were inserted by: {', '.join(rules)}" if rules else "no rule has inserted a matmul so far"

    @property
    def earlier_rules(self) -> tuple[str, ...]:
        return tuple(rule for rule in self.value if rule is not None)
