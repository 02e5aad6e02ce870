"""End, pad and start tokens, and which may come at all, as a folder's configurations name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from matmorph.runtime.errors import InputMismatch
from matmorph.runtime.format.companions import CONFIG, GENAI, GENERATION
from matmorph.runtime.format.plain import typed
from matmorph.runtime.manifest import open_folder, read_json, stored_errors
from matmorph.runtime.token_rules import TokenRules

Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`eos`: each of them ends a sequence; `pad`; `start`: what a decoder behind an encoder begins with; the rest as of `TokenRules`. None
    where nothing names one."""

    eos: tuple[int, ...] | None = None
    pad: int | None = None
    start: int | None = None
    first: int | None = None
    never: tuple[int, ...] | None = None
    not_first: tuple[int, ...] | None = None

    @property
    def rules(self) -> TokenRules:
        """Which tokens may come."""
        return TokenRules(self.first, self.never or (), self.not_first or ())

    def or_else(self, other: SpecialTokens) -> SpecialTokens:
        """What is not named here is taken from there."""
        pairs = ((getattr(self, one.name), getattr(other, one.name)) for one in fields(self))
        return SpecialTokens(*(there if here is None else here for here, there in pairs))

    def ends(self, eos: int | Sequence[int] | None, pad: int | None, vocabulary: int | None) -> tuple[tuple[int, ...], int | None]:
        """(ids that end a row, what an ended row gives), as given or else as named here. Raises InputMismatch where nothing names an end,
        and for what is no token of the vocabulary."""
        stops = self.eos if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        if stops is None:
            raise InputMismatch("the folder names no end token: give eos=, or eos=[] where nothing ends a row")
        given = pad if pad is not None else self.pad
        for name, tokens in (("eos", stops), ("pad", () if given is None else (given,))):
            for token in tokens:
                check_token(name, token, vocabulary)
        return stops, given if given is not None or not stops else stops[0]


def check_token(name: str, token: Any, vocabulary: int | None) -> None:
    """Raises InputMismatch for what is no token of the vocabulary. `name`: what the message calls it."""
    if not isinstance(token, int | np.integer) or not 0 <= token < (vocabulary or np.inf):
        raise InputMismatch(f"{name} is {token!r}, no token id of this model ({vocabulary} of them)")


def read_special_tokens(folder: Path, verify: bool) -> SpecialTokens:
    """Raises ArtifactError for a file that was changed or cannot be read."""
    stored = open_folder(folder, verify)[1]
    found = SpecialTokens()
    for name, read in _HOMES.items():
        if (folder / name).is_file():
            with stored_errors():
                path = stored.checked(name)
            found = found.or_else(read_json(path, read))
    return found


def _top(data: Any) -> SpecialTokens:
    return _tokens(typed(data, dict, "the file"))


def _config(data: Any) -> SpecialTokens:
    """A model of text and images says what its text has in a table of its own."""
    return _top(data).or_else(_tokens(_table(data, "text_config")))


def _genai(data: Any) -> SpecialTokens:
    return _tokens(_table(typed(data, dict, "the file"), "model"))


_HOMES: Mapping[str, Callable[[Any], SpecialTokens]] = {GENERATION: _top, CONFIG: _config, GENAI: _genai}
"""The files that may name the tokens, and how; the first that does is right."""


def _tokens(table: Table) -> SpecialTokens:
    start = _one(table, "decoder_start_token_id")
    return SpecialTokens(
        eos=_several(table, "eos_token_id"),
        pad=_one(table, "pad_token_id"),
        start=start,
        first=None if start is None else _one(table, "forced_bos_token_id"),
        never=_several(table, "suppress_tokens"),
        not_first=_several(table, "begin_suppress_tokens"),
    )


def _one(table: Table, key: str) -> int | None:
    """A token; -1 is how some say that there is none."""
    found = table.get(key)
    token = -1 if found is None else typed(found, int, key)
    return token if token >= 0 else None


def _several(table: Table, key: str) -> tuple[int, ...] | None:
    found = table.get(key)
    listed = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(token for one in listed if (token := typed(one, int, key)) >= 0) or None


def _table(data: Table, key: str) -> Table:
    found = data.get(key)
    return {} if found is None else typed(found, dict, key)
