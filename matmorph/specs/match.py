"""A parsed `match:` of a rule: an immutable tree of conditions, and what it says of a site (`specs.selectors` reads it).

Conditions that read weights are asked last, and only where the others leave the answer open. Some conditions are implied: they hold
unless the match names their key somewhere outside a `not`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from matmorph.errors import Position
from matmorph.specs.conditions.base import Clause, Condition, SelectionContext
from matmorph.specs.conditions.nesting import GroupClause, MappingClause, NotClause
from matmorph.specs.tree import MapTree

if TYPE_CHECKING:
    from matmorph.ir.site import Site
    from matmorph.specs.pattern_match import Occurrence


@dataclass(frozen=True, slots=True)
class Verdict:
    """`failed`: the parts that should all hold (those of `use` and `all` one by one) and do not, in the order of the spec."""

    matched: bool
    failed: tuple[Clause, ...] = ()

    def __bool__(self) -> bool:
        return self.matched


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A parsed `match`. `at` and `keypath` are those of the mapping `written`, `root` its conditions, `implied` those that hold unless
    named."""

    at: Position | None
    keypath: str
    root: MappingClause
    implied: tuple[Condition, ...]
    written: MapTree = field(repr=False)

    def test(self, site: Site, context: SelectionContext) -> Verdict:
        """Whether the site matches, else everything that fails; weights are read only where nothing cheaper fails."""
        implied = tuple(condition for condition in self.implied if not condition.test(site, context))
        matched = self.root.holds(site, context, read=not implied)
        if matched and not implied:
            return Verdict(True)
        failed = tuple(clause for clause in self.conjuncts() if clause.holds(site, context, read=False) is False)
        if matched is False and not failed:
            failed = tuple(clause for clause in self.conjuncts() if not clause.holds(site, context))
        return Verdict(False, failed + implied)

    def conjuncts(self) -> tuple[Clause, ...]:
        """The parts that must all hold, named selections and `all` opened up; the implied ones are not among them."""
        return tuple(_conjuncts(self.root))

    def claiming(self, site: Site, context: SelectionContext) -> tuple[Occurrence, ...]:
        """The occurrences of its patterns (those outside every `not`) that claim the site, each once."""
        found = (leaf.claiming(site, context) for leaf, positive in leaves(self.root) if positive)
        return tuple(dict.fromkeys(occurrence for occurrences in found for occurrence in occurrences))

    @property
    def asks_for_inserted(self) -> bool:
        """Whether it names rules of earlier stages, so that it is about matmuls that those inserted."""
        return any(leaf.earlier_rules for leaf, _ in leaves(self.root))


def _conjuncts(clause: Clause) -> Iterator[Clause]:
    if isinstance(clause, GroupClause) and clause.conjunctive:
        for child in clause.children:
            yield from _conjuncts(child)
    else:
        yield clause


def leaves(clause: Clause, positive: bool = True) -> Iterator[tuple[Condition, bool]]:
    """The conditions of a tree in order, and whether each stands un-negated (under an even number of `not`)."""
    if isinstance(clause, NotClause):
        yield from leaves(clause.child, not positive)
    elif isinstance(clause, GroupClause):
        for child in clause.children:
            yield from leaves(child, positive)
    elif isinstance(clause, Condition):
        yield clause, positive


EVERYTHING = Match(None, "", MappingClause(None, "", "", ()), (), MapTree(None, "", {}, {}))
"""Of a rule that is made for a matmul which is chosen already."""
