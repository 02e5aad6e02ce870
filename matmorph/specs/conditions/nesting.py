"""What joins conditions: a mapping, `all` and `use` hold when all their parts do, `any` when one does, `not` when its mapping does not.

Three-valued (Kleene) logic: a group reads weights only while its cheap parts leave it open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from matmorph.errors import did_you_mean
from matmorph.specs.conditions.base import Clause, Language, SelectionContext
from matmorph.specs.conditions.values import TEXT, OneOrMore, as_given, render
from matmorph.specs.kinds import JsonSchema, known_keys
from matmorph.specs.tree import MapTree, Scalar, SeqTree, Tree, describe

if TYPE_CHECKING:
    from matmorph.ir.site import Site


@dataclass(frozen=True, slots=True, eq=False)
class GroupClause(Clause):
    """Several parts: all must hold, or any of them where not `conjunctive`."""

    conjunctive: ClassVar[bool] = True

    children: tuple[Clause, ...] = field(repr=False)

    def holds(self, site: Site, context: SelectionContext, *, read: bool = True) -> bool | None:
        deciding = not self.conjunctive
        answers = [child.holds(site, context, read=False) for child in self.children]
        if deciding in answers:
            return deciding
        if None not in answers:
            return self.conjunctive
        if not read:
            return None
        undecided = (child for child, answer in zip(self.children, answers, strict=True) if answer is None)
        return deciding if any(child.holds(site, context) == deciding for child in undecided) else self.conjunctive


@dataclass(frozen=True, slots=True, eq=False)
class MappingClause(GroupClause):
    """A mapping of conditions: a whole match, a named selection, what stands under `not` and in the lists of `any` and `all`."""

    @classmethod
    def schema(cls) -> JsonSchema:
        return {"$ref": "#/$defs/match"}

    @classmethod
    def read(cls, tree: Tree, beside: Mapping[str, Tree], language: Language) -> Self:
        entries = language.entries
        mapping = known_keys(tree, [name for key, entry in entries.items() for name in (key, *entry.beside)], "a mapping of conditions")
        given = mapping.items
        if not given:
            raise tree.error("no condition is given; {op: matmul} matches every weight matmul")
        for key, entry in entries.items():
            for name in entry.beside:
                if name in given and key not in given:
                    raise mapping.key_error(name, f"{name} goes with {key}, and there is none")
        children = []
        for key in given:
            if key in entries:
                beside_it = {name: given[name] for name in entries[key].beside if name in given}
                children.append(entries[key].read(given[key], beside_it, language))
        return cls(tree.at, tree.keypath, render(tree), tuple(children))


@dataclass(frozen=True, slots=True, eq=False)
class UseClause(GroupClause):
    key: ClassVar[str] = "use"
    doc: ClassVar[str] = "named selections that must match too"

    @classmethod
    def schema(cls) -> JsonSchema:
        return _NAMES.schema()

    @classmethod
    def read(cls, tree: Tree, beside: Mapping[str, Tree], language: Language) -> Self:
        children = tuple([_selection(item, language) for item in _NAMES.read(tree)])
        return cls(tree.at, tree.keypath, f"{cls.key}: {render(tree)}", children)


_NAMES = OneOrMore("the name of a selection", TEXT, as_given)


def _selection(item: Scalar, language: Language) -> Clause:
    name, named, using = item.text, language.named, language.using
    if name in using:
        raise item.error(f"the selection uses itself: {' -> '.join((*using[using.index(name) :], name))}")
    if name not in named:
        known = did_you_mean(name, named) or (f"; selections: {', '.join(named)}" if named else "; the spec has no select")
        raise item.error(f"unknown selection {name!r}{known}")
    selection: Tree = named[name]
    if not isinstance(selection, MapTree):
        raise selection.error(f"a selection is a mapping of conditions, got {describe(selection)}")
    return MappingClause.read(selection, {}, Language(language.entries, named, (*using, name)))


@dataclass(frozen=True, slots=True, eq=False)
class NotClause(Clause):
    key: ClassVar[str] = "not"
    doc: ClassVar[str] = "conditions that do not all hold"

    child: MappingClause

    @classmethod
    def schema(cls) -> JsonSchema:
        return MappingClause.schema()

    @classmethod
    def read(cls, tree: Tree, beside: Mapping[str, Tree], language: Language) -> Self:
        if not isinstance(tree, MapTree):
            raise tree.error(f"not takes one mapping of conditions (not: {{any: [...]}} for several), got {describe(tree)}")
        return cls(tree.at, tree.keypath, f"{cls.key}: {render(tree)}", MappingClause.read(tree, {}, language))

    def holds(self, site: Site, context: SelectionContext, *, read: bool = True) -> bool | None:
        inner = self.child.holds(site, context, read=read)
        return None if inner is None else not inner


@dataclass(frozen=True, slots=True, eq=False)
class _ListClause(GroupClause):
    """A list of mappings."""

    @classmethod
    def schema(cls) -> JsonSchema:
        return {"type": "array", "items": MappingClause.schema(), "minItems": 1}

    @classmethod
    def read(cls, tree: Tree, beside: Mapping[str, Tree], language: Language) -> Self:
        if not isinstance(tree, SeqTree) or not tree.items:
            raise tree.error(f"{cls.key} takes a list of mappings, got {describe(tree)}")
        children = []
        for item in tree.items:
            if not isinstance(item, MapTree):
                raise item.error(f"{cls.key} takes a list of mappings, got {describe(item)}")
            children.append(MappingClause.read(item, {}, language))
        return cls(tree.at, tree.keypath, f"{cls.key}: {render(tree)}", tuple(children))


@dataclass(frozen=True, slots=True, eq=False)
class AnyClause(_ListClause):
    key: ClassVar[str] = "any"
    doc: ClassVar[str] = "at least one of these matches"
    conjunctive: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, eq=False)
class AllClause(_ListClause):
    key: ClassVar[str] = "all"
    doc: ClassVar[str] = "each of these matches"
