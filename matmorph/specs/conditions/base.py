"""What a condition of a `match` is, and what else stands in its tree.

A condition is one class in one file: its key, the kind of its value, what it means and what it says of a site. Its line in `table` makes
it known; the loader, the JSON Schema, the reference page, selection and `explain` ask the class.
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from matmorph.errors import Position
from matmorph.specs.conditions.values import render
from matmorph.specs.kinds import JsonSchema, Kind
from matmorph.specs.pattern import Pattern
from matmorph.specs.tree import MapTree, Tree

if TYPE_CHECKING:
    from matmorph.ir.site import Site
    from matmorph.specs.pattern_match import Occurrence


class SelectionContext(Protocol):
    """What a condition may look at beside the site."""

    def layers(self, site: Site, /) -> int:
        """The number of layers in the stack of the site (largest layer index + 1)."""

    def occurrences(self, pattern: Pattern, /) -> tuple[Occurrence, ...]:
        """Where the pattern holds in the graph."""

    def operator_counts(self, pattern: Pattern, /) -> Mapping[str, int]:
        """How often the graph has each operator of the pattern."""

    def spectra(self, site: Site, /) -> Sequence[Sequence[float]] | None:
        """The singular values of the site's weight, of each matrix of a stack; None where it has no numbers (meta device). Reads it."""

    def magnitudes(self, site: Site, /) -> Sequence[tuple[float, float]] | None:
        """The largest |w| and the root mean square of each matrix, as `spectra`."""

    def block(self, site: Site, /) -> str | None:
        """The kind of block that the site is part of, whether or not that can be pruned."""


@dataclass(frozen=True, slots=True)
class Language:
    """What a match is read with: its table of keys and the named selections of the spec; `using`: those that led here, outermost first."""

    entries: Mapping[str, type[Clause]]
    named: Mapping[str, MapTree]
    using: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Clause(ABC):
    """A part of a match: a condition, or what joins several. `text` shows it as the spec has it ("role: mlp.*").

    Of the class: `key` in the spec ("" for a mapping of conditions, which has none of its own) and `doc`, what it means; `beside`: further
    keys that it takes from the mapping it stands in, each with kind and meaning; `about`: a paragraph for the reference page; `notation`:
    the heading under which that page explains its values.
    """

    key: ClassVar[str] = ""
    doc: ClassVar[str] = ""
    beside: ClassVar[Mapping[str, tuple[Kind, str]]] = types.MappingProxyType({})
    about: ClassVar[str] = ""
    notation: ClassVar[str] = ""

    at: Position | None
    keypath: str
    text: str

    @classmethod
    @abstractmethod
    def schema(cls) -> JsonSchema:
        """The JSON Schema of its value."""

    @classmethod
    @abstractmethod
    def read(cls, tree: Tree, beside: Mapping[str, Tree], language: Language) -> Self:
        """Reads its value; `beside` holds those of its `beside` keys that are there. SpecError where they do not fit."""

    @classmethod
    def implied(cls, match: MapTree) -> Condition | None:
        """What holds where a match nowhere names the key (outside a `not`)."""
        return None

    @abstractmethod
    def holds(self, site: Site, context: SelectionContext, *, read: bool = True) -> bool | None:
        """Whether the site satisfies it. `read` False never touches a weight: None then means that the weights decide."""

    def nearby(self, sites: Sequence[Site], context: SelectionContext) -> str:
        """What the model has where it looks, for a rule that matches nothing: "" where there is nothing to say. At least one site."""
        return ""


@dataclass(frozen=True, slots=True, eq=False)
class Condition(Clause):
    """What one key asks of a site. `kind` reads the value; `reads_weight`: asked last, and only where the others leave the answer open."""

    kind: ClassVar[Kind]
    reads_weight: ClassVar[bool] = False

    value: Any = field(repr=False)

    @classmethod
    def schema(cls) -> JsonSchema:
        return cls.kind.schema()

    @classmethod
    def read(cls, tree: Tree, beside: Mapping[str, Tree], language: Language) -> Self:
        return cls(tree.at, tree.keypath, f"{cls.key}: {render(tree)}", cls.kind.read(tree))

    def holds(self, site: Site, context: SelectionContext, *, read: bool = True) -> bool | None:
        return None if self.reads_weight and not read else self.test(site, context)

    @abstractmethod
    def test(self, site: Site, context: SelectionContext) -> bool:
        """Whether the site satisfies it."""

    @abstractmethod
    def found(self, site: Site, context: SelectionContext) -> str:
        """What the site has there, for people."""

    def unmatched(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """Alternatives of its value that no site satisfies while others do: likely slips of the pen."""
        return ()

    def claiming(self, site: Site, context: SelectionContext) -> tuple[Occurrence, ...]:
        """The occurrences of a pattern that claim the site."""
        return ()

    @property
    def earlier_rules(self) -> tuple[str, ...]:
        """Rules of earlier stages that it names: it is about matmuls that those inserted."""
        return ()
