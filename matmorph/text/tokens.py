"""Text to token ids and back, by the package `tokenizers`; back piece by piece, as ids come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matmorph.errors import InputError

_PACKAGE = "the package tokenizers, which text needs, is not installed"
_ANY = "a"
"""A text."""


class Tokens:
    """A tokenizer.json, read."""

    def __init__(self, path: Path) -> None:
        """Raises InputError where the package is missing or cannot read the file."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise InputError(_PACKAGE, ["install it with: pip install 'matmorph[llm]'"]) from error
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the package's Rust code is no Exception
            raise InputError(f"{path}: the package tokenizers cannot read it: {' '.join(str(error).split())[:300]}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def ids(self, text: str, special: bool) -> list[int]:
        """`special`: with what the tokenizer puts around a text; what a chat template made has it already."""
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return found

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        """(ids of a text, without what the tokenizer puts around it; for each the place in the text where it ends)."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return found.ids, [end for _, end in found.offsets]

    def prefix(self) -> list[int]:
        """What the tokenizer puts before a text, such as the token that begins one."""
        plain, around = self.ids(_ANY, special=False), self.ids(_ANY, special=True)
        places = (k for k in range(len(around) - len(plain) + 1) if around[k : k + len(plain)] == plain)
        return around[: next(places, 0)]

    def name(self, token: int) -> str:
        """A token as the vocabulary spells it."""
        found = self._tokenizer.id_to_token(token)
        return str(token) if found is None else str(found)

    def text(self, ids: Sequence[int]) -> str:
        """Without special tokens. Bytes that are no character are shown as U+FFFD."""
        found: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return found

    def pieces(self) -> Pieces:
        """For ids that come one by one."""
        return Pieces(self)


class Pieces:
    """The text of ids as they come. A character may be spread over several tokens, and a token may change how the text before it ends, so a
    piece is given once the text up to it is whole; all pieces and the rest together are the text of all ids."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._ids: list[int] = []
        self._start, self._seen = 0, 0  # ids before `start` are done; what is between them and `seen` has been given

    def piece(self, token: int) -> str:
        """What can be said now; often the token's own text, "" in the middle of a character."""
        self._ids.append(token)
        given = self._tokens.text(self._ids[self._start : self._seen])
        now = self._tokens.text(self._ids[self._start :])
        if now.endswith("\ufffd") or not now.startswith(given) or len(now) <= len(given):
            return ""
        self._start, self._seen = self._seen, len(self._ids)
        return now[len(given) :]

    def rest(self) -> str:
        """What was held back, at the end."""
        given = self._tokens.text(self._ids[self._start : self._seen])
        return self._tokens.text(self._ids[self._start :]).removeprefix(given)
