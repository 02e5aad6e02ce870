"""The errors a user can meet. Each prints as plain lines; only `VerifyError` is ever our fault.

`Reject` is not here: it is a value (`matmorph.ir.site.Reject`), expected, and shown in the report.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a spec file: `file` as the user gave it, `line` and `column` counted from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


LONGEST = 2000
"""Characters of a line that a person still reads; a value may have any number of them."""
_LONG_WORD = re.compile(rf"\S{{{LONGEST // 2},}}")


def bounded(line: str) -> str:
    """The line as it is unless it repeats a huge value, of which both ends stay."""
    shorter = _LONG_WORD.sub(lambda found: f"{found[0][:60]}...{found[0][-20:]} ({len(found[0]):,} characters)", line)
    return shorter if len(shorter) <= LONGEST else f"{shorter[: LONGEST - 40]} ... ({len(shorter):,} characters)"


class MatmorphError(Exception):
    """Base of every error that matmorph raises on purpose.

    `message` is one line; `details` are further lines, printed indented below it. `exit_code` is what the CLI ends with:
    1 = a check failed, 2 = the input is wrong.
    """

    exit_code = 2

    def __init__(self, message: str, details: Iterable[str] = ()) -> None:
        self.message = bounded(message)
        self.details = tuple(map(bounded, details))
        super().__init__(self.message)

    def headline(self) -> str:
        return self.message

    def __str__(self) -> str:
        return "\n".join([self.headline(), *(f"  {line}" for line in self.details)])


class SpecError(MatmorphError):
    """The spec, or an argument that belongs to it, is wrong: `FILE:LINE:COL: KEYPATH: message`."""

    def __init__(self, message: str, *, at: Position | None = None, keypath: str = "", details: Iterable[str] = ()) -> None:
        self.at = at
        self.keypath = bounded(keypath)
        super().__init__(message, details)

    def headline(self) -> str:
        parts = [str(self.at) if self.at else "", self.keypath, self.message]
        return ": ".join(part for part in parts if part)


class InputError(MatmorphError, ValueError):
    """A model name, file, folder or option that the user gave cannot be used."""


class TraceError(MatmorphError):
    """The model cannot be traced; names the source line, the reason and what to change."""


class RewriteError(MatmorphError):
    """A rewrite cannot be carried out on this model (for instance NaN in a weight)."""


class ExportError(MatmorphError):
    """The rewritten graph cannot be exported for the requested target."""


class CheckError(MatmorphError):
    """A numeric check failed (tolerance, parity, changed artefact): exit code 1, nothing is written."""

    exit_code = 1


class VerifyError(MatmorphError):
    """A law of the IR is broken: a bug of matmorph (or of a third-party method). `details` show the IR around the fault."""

    exit_code = 1

    def headline(self) -> str:
        return f"internal error (a bug in matmorph, not in your input): {self.message}"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean rank?"`, or an empty string when nothing is near. The word itself is no suggestion."""
    if len(word) > LONGEST:  # nothing is near, and comparing takes the square of its length
        return ""
    near = get_close_matches(word, [choice for choice in choices if choice != word], n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def alternatives(words: Sequence[str]) -> str:
    """`a, b or c`."""
    *most, last = words or ("nothing",)
    return f"{', '.join(most)} or {last}" if most else last
