"""The simple kinds of value a spec can hold: each reads a tree (SpecError with position) and gives its JSON Schema.

A value means what its key says, never what YAML guesses: `010` is ten where an integer belongs, and text where a name belongs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from matmorph.errors import SpecError, did_you_mean
from matmorph.specs.tree import MapTree, Scalar, SeqTree, Tree, describe

JsonSchema = dict[str, Any]

_INTEGER = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_OTHER_BOOLEANS = {
    word: value for value, words in {"true": "yes on y True TRUE", "false": "no off n False FALSE"}.items() for word in words.split()
}
_LARGEST = 2**63 - 1
NULLS = ("null", "~")
NOTHING = ("", *NULLS)  # plain texts that are no value


class Kind(Protocol):
    """How one value is read. `expected` completes "expected ..., got ..."."""

    @property
    def expected(self) -> str: ...
    def read(self, tree: Tree) -> Any: ...
    def schema(self) -> JsonSchema: ...


def wrong(tree: Tree, expected: str, hint: str = "") -> SpecError:
    """`expected X, got Y` + hint, for the caller to raise."""
    return tree.error(f"expected {expected}, got {describe(tree)}{hint}")


def plain_text(tree: Tree) -> str:
    """The text of an unquoted value; "" for anything else."""
    return tree.text if isinstance(tree, Scalar) and tree.plain else ""


def _unquote_hint(tree: Tree, pattern: re.Pattern[str]) -> str:
    quoted = isinstance(tree, Scalar) and not tree.plain and pattern.fullmatch(tree.text)
    return "; write it without quotes" if quoted else ""


@dataclass(frozen=True)
class Text:
    """Any text: a bare 123 or true is the text it is written as; `null` and nothing are not."""

    expected: str = "text"

    def read(self, tree: Tree) -> str:
        if not isinstance(tree, Scalar) or (tree.plain and tree.text in NOTHING):
            raise wrong(tree, self.expected)
        return tree.text

    def schema(self) -> JsonSchema:
        return {"type": "string"}


@dataclass(frozen=True)
class Name:
    """A text that people refer to: one line, not empty, nothing unprintable."""

    expected: str = "a name on one line"

    def read(self, tree: Tree) -> str:
        text = Text(self.expected).read(tree)
        if not text.strip() or not text.isprintable():
            raise wrong(tree, self.expected)
        return text

    def schema(self) -> JsonSchema:
        return {"type": "string", "minLength": 1}


@dataclass(frozen=True)
class Boolean:
    expected: str = "true or false"

    def read(self, tree: Tree) -> bool:
        text = plain_text(tree)
        if text in ("true", "false"):
            return text == "true"
        raise wrong(tree, self.expected, f"; write {_OTHER_BOOLEANS[text]}" if text in _OTHER_BOOLEANS else "")

    def schema(self) -> JsonSchema:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Null:
    expected: str = "null"

    def read(self, tree: Tree) -> None:
        if plain_text(tree) not in NULLS:
            raise wrong(tree, self.expected)

    def schema(self) -> JsonSchema:
        return {"type": "null"}


@dataclass(frozen=True)
class OneWord:
    """One word of a closed set."""

    words: tuple[str, ...]

    @property
    def expected(self) -> str:
        return self.words[0] if len(self.words) == 1 else f"one of {', '.join(self.words)}"

    def read(self, tree: Tree) -> str:
        text = tree.text if isinstance(tree, Scalar) else None
        if text in self.words:
            return text
        raise wrong(tree, self.expected, did_you_mean(text, self.words) if text else "")

    def schema(self) -> JsonSchema:
        return {"enum": list(self.words)}


@dataclass(frozen=True)
class Limits:
    """The closed (`minimum`, `maximum`) or open (`exclusive_`) ends of a number; names are those of field metadata."""

    minimum: float | None = None
    exclusive_minimum: float | None = None
    maximum: float | None = None
    exclusive_maximum: float | None = None

    def __str__(self) -> str:
        ends = [(">=", self.minimum), (">", self.exclusive_minimum), ("<=", self.maximum), ("<", self.exclusive_maximum)]
        return " and ".join(f"{sign} {end:g}" if abs(end) < 1e6 else f"{sign} {end}" for sign, end in ends if end is not None)

    def hold(self, value: float) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.exclusive_minimum is None or value > self.exclusive_minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.exclusive_maximum is None or value < self.exclusive_maximum)
        )

    def schema(self) -> JsonSchema:
        names = {
            "minimum": "minimum",
            "exclusive_minimum": "exclusiveMinimum",
            "maximum": "maximum",
            "exclusive_maximum": "exclusiveMaximum",
        }
        return {json: getattr(self, name) for name, json in names.items() if getattr(self, name) is not None}


@dataclass(frozen=True)
class Integer:
    """Decimal digits, underscores between them allowed; 010 is ten. At most 64 bits. `choices`: these numbers only."""

    limits: Limits = Limits()
    choices: tuple[int, ...] = ()

    @property
    def expected(self) -> str:
        if len(self.choices) == 1:
            return str(self.choices[0])
        return f"one of {', '.join(map(str, self.choices))}" if self.choices else f"an integer {self.limits}".rstrip()

    def read(self, tree: Tree) -> int:
        text = plain_text(tree)
        if not _INTEGER.fullmatch(text) or len(text) > 32:
            raise wrong(tree, self.expected, _unquote_hint(tree, _INTEGER))
        value = int(text)
        if abs(value) > _LARGEST or not self.limits.hold(value) or (self.choices and value not in self.choices):
            raise wrong(tree, self.expected)
        return value

    def schema(self) -> JsonSchema:
        return {"enum": list(self.choices)} if self.choices else {"type": "integer", **self.limits.schema()}


@dataclass(frozen=True)
class Number:
    """A finite decimal number; `1e-4` needs no point."""

    limits: Limits = Limits()

    @property
    def expected(self) -> str:
        return f"a number {self.limits}".rstrip()

    def read(self, tree: Tree) -> float:
        text = plain_text(tree)
        if not _NUMBER.fullmatch(text):
            hint = _unquote_hint(tree, _NUMBER)
            if text.endswith("%") and _NUMBER.fullmatch(text[:-1]):
                hint = f"; write {float(text[:-1]) / 100:g}"
            raise wrong(tree, self.expected, hint)
        value = float(text)
        if not math.isfinite(value) or not self.limits.hold(value):
            raise wrong(tree, self.expected)
        return value

    def schema(self) -> JsonSchema:
        return {"type": "number", **self.limits.schema()}


@dataclass(frozen=True)
class ListOf:
    """`[a, b]`; where `single`, a bare `a` is a list of one. `length`: exactly so many, else at least `min_items`."""

    item: Kind
    min_items: int = 0
    length: int | None = None
    single: bool = True

    @property
    def expected(self) -> str:
        count = f" of {self.length}" if self.length is not None else ""
        return f"a list{count} (each {self.item.expected})"

    def read(self, tree: Tree) -> tuple[Any, ...]:
        lone = self.single and self.length is None and isinstance(tree, Scalar) and not (tree.plain and tree.text in NOTHING)
        if not lone and not isinstance(tree, SeqTree):
            raise wrong(tree, self.expected)
        items = tree.items if isinstance(tree, SeqTree) else (tree,)
        if self.length is not None and len(items) != self.length:
            raise wrong(tree, self.expected)
        if len(items) < self.min_items:
            raise wrong(tree, f"a list of at least {self.min_items}")
        return tuple(self.item.read(item) for item in items)

    def schema(self) -> JsonSchema:
        item = self.item.schema()
        if self.length is not None:
            return {"type": "array", "items": item, "minItems": self.length, "maxItems": self.length}
        array: JsonSchema = {"type": "array", "items": item, **({"minItems": self.min_items} if self.min_items else {})}
        return {"oneOf": [item, array]} if self.single else array


def known_keys(tree: Tree, keys: Iterable[str], expected: str = "a mapping") -> MapTree:
    """`tree` as a mapping with no key but these; SpecError otherwise, naming the nearest."""
    if not isinstance(tree, MapTree):
        raise wrong(tree, expected)
    allowed = list(keys)
    for key in tree.items:
        if key not in allowed:
            raise tree.key_error(key, f"unknown key{did_you_mean(key, allowed)}", [f"keys here: {', '.join(allowed)}"])
    return tree
