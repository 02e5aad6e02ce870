"""A text file as one row of token ids, of which no more is read than is wanted.

The text is taken as it is: a corpus that was split into words (` @-@ ` of WikiText) is joined by whoever gives it. Documents follow one
another as they do in the file, and what the tokenizer puts around a text stays away: whoever cuts the row puts it before each piece.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matmorph.errors import InputError
from matmorph.text.tokens import Tokens

Ids = NDArray[np.int64]

_BYTES_PER_TOKEN = 6
"""Of a guess, which is doubled until it was enough; English has four to five."""
_LEAST = 1 << 14
_UNSETTLED = 256
"""Characters at the end of a part of a text whose tokens may change with what follows: longer than any token."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """`ids`: of the text, without special tokens. `whole`: whether the file has no more. `prefix`: what the tokenizer puts before one."""

    ids: Ids
    whole: bool
    prefix: tuple[int, ...]


def read_corpus(path: Path, tokens: Tokens, most: int | None = None) -> Corpus:
    """The first `most` tokens of a UTF-8 file, None = all. They are those of the whole text, wherever reading stops.

    Raises InputError for a file that is missing, empty, or no text.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'is no file' if path.exists() else 'no such text file'}")
    size = path.stat().st_size
    wanted = size if most is None else min(size, max(_LEAST, most * _BYTES_PER_TOKEN))
    while True:
        whole = wanted >= size
        ids = _ids(_start(path, wanted, whole), tokens, whole)
        if whole or (most is not None and len(ids) > most):
            break
        wanted = min(size, 2 * wanted)
    if not len(ids):
        raise InputError(f"{path}: is empty: there is no text in it")
    found = np.array(ids[:most], np.int64)
    return Corpus(found, whole and len(found) == len(ids), tuple(tokens.prefix()))


def _start(path: Path, size: int, whole: bool) -> str:
    """The text of the first bytes. Characters that are cut are left out."""
    with path.open("rb") as file:
        data = file.read(size).removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise InputError(f"{path}: is binary, not text: it has zero bytes")
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from error


def _ids(text: str, tokens: Tokens, whole: bool) -> list[int]:
    if whole:
        return tokens.ids(text, special=False)
    ids, ends = tokens.spans(text)
    settled = sum(end <= len(text) - _UNSETTLED for end in ends)
    return ids[:settled]
