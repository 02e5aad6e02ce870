"""`pattern`, with `claim` beside it: the matmul is one that an occurrence of a piece of the graph claims."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from matmorph.errors import did_you_mean
from matmorph.specs.conditions.base import Condition, Language, SelectionContext
from matmorph.specs.conditions.values import TEXT, OneOrMore, as_given, render
from matmorph.specs.kinds import JsonSchema, Kind
from matmorph.specs.pattern import Pattern, parse_pattern
from matmorph.specs.tree import Scalar, SeqTree, Tree, describe

if TYPE_CHECKING:
    from matmorph.ir.site import Site
    from matmorph.specs.pattern_match import Occurrence


@dataclass(frozen=True)
class _PatternText:
    expected: str = "a pattern"

    def read(self, tree: Tree) -> Pattern:
        if not isinstance(tree, Scalar):
            raise tree.error(f"a pattern is a text of lines like `g = matmul(x)`, got {describe(tree)}")
        return parse_pattern(tree)

    def schema(self) -> JsonSchema:
        return TEXT


_CLAIM = OneOrMore("the name of a captured matmul", TEXT, as_given)


def _claimed(tree: Tree, pattern: Pattern) -> tuple[str, ...]:
    if isinstance(tree, SeqTree) and not tree.items:
        raise tree.error("the pattern claims nothing; name at least one captured matmul, or leave claim out to claim all")
    items = _CLAIM.read(tree)
    for item in items:
        if item.text not in pattern.matmuls:
            known = did_you_mean(item.text, pattern.matmuls) or f"; captured matmuls: {', '.join(pattern.matmuls)}"
            raise item.error(f"{item.text!r} is no captured matmul of the pattern{known}")
    return tuple(dict.fromkeys(item.text for item in items))


@dataclass(frozen=True, slots=True, eq=False)
class PatternCondition(Condition):
    """`claim`: the captured matmuls that the rule owns."""

    key: ClassVar[str] = "pattern"
    doc: ClassVar[str] = "lines such as `g = matmul(x)`: a piece of the graph; names on the left are captured"
    kind: ClassVar[Kind] = _PatternText()
    beside: ClassVar[Mapping[str, tuple[Kind, str]]] = types.MappingProxyType(
        {"claim": (_CLAIM, "captured matmuls that the rule owns; all of them by default")}
    )

    value: Pattern
    claim: tuple[str, ...]

    @classmethod
    def read(cls, tree: Tree, beside: Mapping[str, Tree], language: Language) -> Self:
        pattern: Pattern = cls.kind.read(tree)
        claim = _claimed(beside["claim"], pattern) if "claim" in beside else pattern.matmuls
        return cls(tree.at, tree.keypath, f"{cls.key}: {render(tree)}", pattern, claim)

    def test(self, site: Site, context: SelectionContext) -> bool:
        return bool(self.claiming(site, context))

    def claiming(self, site: Site, context: SelectionContext) -> tuple[Occurrence, ...]:
        found = context.occurrences(self.value)
        return tuple(occurrence for occurrence in found if any(occurrence.captures[name] is site for name in self.claim))

    def found(self, site: Site, context: SelectionContext) -> str:
        found = context.occurrences(self.value)
        names = {name for occurrence in found for name, captured in occurrence.captures.items() if captured is site}
        shown = ", ".join(name for name in self.value.captures if name in names)
        total = f"{len(found)} occurrence{'s' * (len(found) != 1)}"
        if not names:
            return f"in none of the pattern's {total}"
        return f"captured as {shown}" if names & set(self.claim) else f"captured as {shown}, which is not claimed"

    def nearby(self, sites: Sequence[Site], context: SelectionContext) -> str:
        found = context.occurrences(self.value)
        if found:
            return f"found {len(found)} times"
        counts = context.operator_counts(self.value)
        return f"found nowhere; the graph has {', '.join(f'{count} {op}' for op, count in counts.items())}"
