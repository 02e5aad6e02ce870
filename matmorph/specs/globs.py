"""Globs over dotted names: `*` stays within one component, `**` takes zero or more of them, `{a,b}` are alternatives.

Every other character stands for itself, so the brackets of a slice (`in_proj[0:64]`) need no escape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

MAX_ALTERNATIVES = 1000
MAX_LENGTH = 4096
"""Characters of a glob: names of modules are shorter, and reading one takes time with the square of it."""


class GlobError(ValueError):
    """A glob that cannot be read; `offset` is where in its text."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def expand_braces(text: str) -> tuple[str, ...]:
    """The alternatives of a brace form: `a.{b,c{d,e}}` gives a.b, a.cd, a.ce. GlobError: unbalanced braces, too many alternatives."""
    alternatives, end = _sequence(text, 0, nested=False)
    if end < len(text):
        raise GlobError("this } closes nothing", end)
    return alternatives


def _sequence(text: str, start: int, *, nested: bool) -> tuple[tuple[str, ...], int]:
    """Alternatives of `text[start:]` up to a `,` or `}` that belongs to the brace around it, and where it ended."""
    found: tuple[str, ...] = ("",)
    position = start
    while position < len(text):
        character = text[position]
        if character == "}" or (nested and character == ","):
            return found, position
        if character == "{":
            choices, position = _braces(text, position)
        else:
            choices, position = (character,), position + 1
        found = tuple(head + tail for head in found for tail in choices)
        if len(found) > MAX_ALTERNATIVES:
            raise GlobError(f"more than {MAX_ALTERNATIVES} alternatives", start)
    return found, position


def _braces(text: str, start: int) -> tuple[tuple[str, ...], int]:
    """Alternatives of the brace that opens at `start`, and the position behind its end."""
    choices: tuple[str, ...] = ()
    position = start
    while True:
        item, position = _sequence(text, position + 1, nested=True)
        choices += item
        if position >= len(text):
            raise GlobError("this { is not closed", start)
        if text[position] == "}":
            return choices, position + 1


@dataclass(frozen=True)
class Glob:
    """A compiled glob. `alternatives` are its brace-free forms, in order. GlobError on construction when the text cannot be read."""

    text: str
    alternatives: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.text:
            raise GlobError("an empty glob matches nothing", 0)
        if len(self.text) > MAX_LENGTH:
            raise GlobError(f"a glob of {len(self.text):,} characters: at most {MAX_LENGTH:,} are read", 0)
        object.__setattr__(self, "alternatives", tuple(dict.fromkeys(expand_braces(self.text))))
        for alternative in self.alternatives:
            if "" in alternative.split("."):
                raise GlobError(f"a component of {alternative!r} is empty", 0)

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile("|".join(_regex_of(alternative) for alternative in self.alternatives))

    def matches(self, name: str) -> bool:
        """Whether the whole dotted name matches one of the alternatives."""
        return self._regex.fullmatch(f".{name}" if name else "") is not None


def _regex_of(glob: str) -> str:
    """The regular expression of a brace-free glob; each component of the name is preceded by its dot, the first one too."""
    parts = glob.split(".")
    once = [part for part, before in zip(parts, ["", *parts], strict=False) if not part == before == "**"]  # two say what one says, slowly
    return "".join(r"(?:\.[^.]+)*" if part == "**" else r"\." + _component(part) for part in once)


def _component(part: str) -> str:
    wild = {"**": ".*", "*": "[^.]*"}
    return "".join(wild.get(piece, re.escape(piece)) for piece in re.split(r"(\*\*|\*)", part))
