"""Regular expressions whose time is bounded: Python's own matcher tries every way to divide a name, so that `(a+)+$` takes 2^n steps.

The parse is Python's, the matching is by sets: from all places where a part may begin to all places where it may end. A name of n
characters takes at most n^2 steps per part of the expression. What a set of places cannot tell (back-references, atomic groups) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Places: TypeAlias = frozenset[int]
_NOTHING: Places = frozenset()
_IN_WORDS: Mapping[str, str] = {
    "GROUPREF": "a back-reference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}
_CATEGORIES: Mapping[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda c: c.isalnum() or c == "_",
}


class ExpressionError(ValueError):
    """A regular expression that cannot be read; `offset` is where in its text."""

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled expression in Python's notation. ExpressionError on construction where the text cannot be read."""

    pattern: str
    _parts: Any = field(init=False, repr=False, compare=False)
    _ignoring_case: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(self.pattern)
            parts = re._parser.parse(self.pattern)  # type: ignore[attr-defined] # what re itself parses with
        except re.error as error:
            raise ExpressionError(error.msg, error.pos or 0) from None
        except (RecursionError, OverflowError):
            raise ExpressionError("nested too deep, or repeated too often") from None
        _refuse_unknown(parts)
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "_ignoring_case", bool(compiled.flags & re.IGNORECASE))

    def matches(self, name: str) -> bool:
        """Whether the whole name matches."""
        text = name.casefold() if self._ignoring_case else name
        return len(text) in _Matcher(text, self._ignoring_case).through(self._parts, frozenset((0,)))


def _refuse_unknown(parts: Iterable[Any]) -> None:
    for op, argument in parts:
        if str(op) in _IN_WORDS:
            raise ExpressionError(f"{_IN_WORDS[str(op)]} is not possible here, as its time has no bound")
        if str(op) == "SUBPATTERN" and (argument[1] or argument[2]):
            raise ExpressionError("flags of a part are not possible here: write (?i) at the beginning")
        for inner in _inner(str(op), argument):
            _refuse_unknown(inner)


def _inner(op: str, argument: Any) -> Iterable[Any]:
    """The expressions inside a part."""
    if op == "BRANCH":
        return list(argument[1])
    return [argument[-1]] if op in ("SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT") else []


@dataclass(frozen=True, slots=True)
class _Matcher:
    text: str
    ignoring_case: bool

    def through(self, parts: Iterable[Any], places: Places) -> Places:
        """Where a sequence of parts may end that begins at one of the places."""
        for op, argument in parts:
            if not places:
                return _NOTHING
            places = self._part(str(op), argument, places)
        return places

    def _part(self, op: str, argument: Any, places: Places) -> Places:
        if op == "BRANCH":
            return _NOTHING.union(*(self.through(branch, places) for branch in argument[1]))
        if op == "SUBPATTERN":
            return self.through(argument[-1], places)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeated(argument[0], int(argument[1]), argument[2], places)
        if op in ("ASSERT", "ASSERT_NOT"):
            direction, body = argument
            return frozenset(place for place in places if self._seen(direction, body, place) == (op == "ASSERT"))
        if op == "AT":
            return frozenset(place for place in places if self._at(str(argument), place))
        return frozenset(place + 1 for place in places if place < len(self.text) and self._one(op, argument, self.text[place]))

    def _repeated(self, least: int, most: int, body: Any, places: Places) -> Places:
        for _ in range(least):
            further = self.through(body, places)
            if further == places:  # from here on nothing changes
                break
            places = further
        found = frontier = places
        for _ in range(most - least):
            frontier = self.through(body, frontier) - found
            if not frontier:
                break
            found |= frontier
        return found

    def _seen(self, direction: int, body: Any, place: int) -> bool:
        if direction > 0:
            return bool(self.through(body, frozenset((place,))))
        return any(place in self.through(body, frozenset((start,))) for start in range(place + 1))

    def _at(self, where: str, place: int) -> bool:
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return place == 0
        if where in ("AT_END", "AT_END_STRING"):
            return place == len(self.text)
        sides = [0 <= index < len(self.text) and _CATEGORIES["WORD"](self.text[index]) for index in (place - 1, place)]
        return (sides[0] != sides[1]) == (where == "AT_BOUNDARY")

    def _one(self, op: str, argument: Any, character: str) -> bool:
        if op == "ANY":
            return character != "\n"
        if op in ("LITERAL", "NOT_LITERAL"):
            return (character == self._folded(argument)) == (op == "LITERAL")
        first, *rest = argument  # IN
        items = rest if str(first[0]) == "NEGATE" else argument
        return any(self._listed(str(kind), value, character) for kind, value in items) == (items is argument)

    def _listed(self, kind: str, value: Any, character: str) -> bool:
        if kind == "LITERAL":
            return character == self._folded(value)
        if kind == "RANGE":
            forms = {character, character.upper()} if self.ignoring_case else {character}
            return any(value[0] <= ord(form) <= value[1] for form in forms if len(form) == 1)
        wanted = str(value).removeprefix("CATEGORY_")
        return _CATEGORIES[wanted.removeprefix("NOT_")](character) != wanted.startswith("NOT_")

    def _folded(self, code: int) -> str:
        return chr(code).casefold() if self.ignoring_case else chr(code)
