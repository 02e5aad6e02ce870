"""The kinds of value that several conditions take, and how a value is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matmorph.errors import SpecError, did_you_mean
from matmorph.specs.globs import Glob, GlobError
from matmorph.specs.kinds import JsonSchema
from matmorph.specs.numbers import parse_comparison
from matmorph.specs.tree import MapTree, Scalar, SeqTree, Tree, describe

TEXT: JsonSchema = {"type": "string", "minLength": 1}


@dataclass(frozen=True)
class OneOrMore:
    """A text, or a list of at least one. `expected` names one of them, `item` is its schema, `parse` gives its value (or SpecError)."""

    expected: str
    item: JsonSchema
    parse: Callable[[Scalar], Any]

    def read(self, tree: Tree) -> tuple[Any, ...]:
        items = tree.items if isinstance(tree, SeqTree) else (tree,)
        if not items:
            raise tree.error(f"expected {self.expected}, got an empty list")
        return tuple([self.parse(item) for item in [self._text(item) for item in items]])

    def _text(self, item: Tree) -> Scalar:
        if not isinstance(item, Scalar) or not item.text or (item.plain and item.text in ("null", "~")):
            raise item.error(f"expected {self.expected}, got {describe(item)}")
        return item

    def schema(self) -> JsonSchema:
        return {"oneOf": [self.item, {"type": "array", "items": self.item, "minItems": 1}]}


def as_text(item: Scalar) -> str:
    return item.text


def as_given(item: Scalar) -> Scalar:
    """The text with its place, for a condition that judges it later."""
    return item


def as_glob(item: Scalar) -> Glob:
    try:
        return Glob(item.text)
    except GlobError as error:
        raise SpecError(f"not a glob: {error}", at=item.place(error.offset), keypath=item.keypath) from None


def as_word(what: str, known: tuple[str, ...]) -> Callable[[Scalar], str]:
    """Parses one word of a closed set."""

    def parse(item: Scalar) -> str:
        if item.text not in known:
            raise item.error(f"unknown {what} {item.text!r}{did_you_mean(item.text, known) or '; known: ' + ', '.join(known)}")
        return item.text

    return parse


def parsed(parse: Callable[[str], Any]) -> Callable[[Scalar], Any]:
    """`parse` with the place of the text in its ValueError."""

    def placed(item: Scalar) -> Any:
        try:
            return parse(item.text)
        except ValueError as error:
            raise item.error(str(error)) from None

    return placed


COMPARISONS = OneOrMore("a comparison", {"type": ["string", "number"]}, parsed(parse_comparison))


def render(tree: Tree) -> str:
    """A value as flow text, for people: `{role: mlp.*, layer: 0..5}`; of a text with several lines the first."""
    if isinstance(tree, MapTree):
        return "{" + ", ".join(f"{key}: {render(item)}" for key, item in tree.items.items()) + "}"
    if isinstance(tree, SeqTree):
        return "[" + ", ".join(map(render, tree.items)) + "]"
    lines = tree.text.strip().splitlines() if isinstance(tree, Scalar) else []
    return f"{lines[0]} ..." if len(lines) > 1 else "".join(lines)
