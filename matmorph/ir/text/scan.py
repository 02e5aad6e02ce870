"""The scanner that the text form's readers share: a place in a text, tokens by regular expression, errors with line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from matmorph.errors import InputError

_BLANK = re.compile(r"(?:[ \t]|#[^\n]*)*")
_BLANK_LINES = re.compile(r"(?:\s|#[^\n]*)*")


@dataclass(slots=True)
class Scanner:
    """A place in a text, and what may come next."""

    text: str
    at: int = 0

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        start = self.text.rfind("\n", 0, at) + 1
        line = self.text[start:].split("\n", 1)[0]
        number, column = self.text.count("\n", 0, at) + 1, at - start + 1
        raise InputError(f"graph text, line {number}, column {column}: {message}", [line, " " * (column - 1) + "^"])

    def lines(self) -> None:
        """Skips blanks, line ends and comments."""
        self.at = _BLANK_LINES.match(self.text, self.at).end()  # type: ignore[union-attr]

    def blanks(self) -> None:
        self.at = _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]

    def take(self, pattern: str) -> str | None:
        """The next token if it matches, blanks before it skipped."""
        self.blanks()
        found = re.compile(pattern).match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found[0]

    def expect(self, pattern: str, what: str) -> str:
        found = self.take(pattern)
        if found is None:
            rest = self.text[self.at :].split("\n", 1)[0]
            self.fail(f"expected {what}, found {rest[:30]!r}" if rest else f"expected {what}, found the end of the line")
        return found

    def string(self) -> str:
        self.blanks()
        if self.text[self.at : self.at + 1] != '"':
            self.expect("(?!)", "a string in double quotes")
        found = self.json()
        return str(found)

    def json(self) -> Any:
        self.blanks()
        try:
            found, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            self.fail(error.msg, error.pos)
        return found

    def series(self, closing: str, item: Callable[[], Any]) -> list[Any]:
        """Items up to `closing`, with commas between them, over as many lines as there are."""
        found: list[Any] = []
        self.lines()
        while self.take(closing) is None:
            if found:
                self.expect(",", "`,` or the end of the list")
                self.lines()
            found.append(item())
            self.lines()
        return found
