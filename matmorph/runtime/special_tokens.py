"""End and pad tokens as a folder's configurations name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matmorph.runtime.format.companions import CONFIG, GENAI, GENERATION
from matmorph.runtime.format.plain import typed
from matmorph.runtime.manifest import open_folder, read_json, stored_errors

Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`eos`: each of them ends a sequence, None where nothing names one; `pad`: likewise."""

    eos: tuple[int, ...] | None = None
    pad: int | None = None

    def or_else(self, other: SpecialTokens) -> SpecialTokens:
        """What is not named here is taken from there."""
        return SpecialTokens(other.eos if self.eos is None else self.eos, other.pad if self.pad is None else self.pad)


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
    eos, pad = table.get("eos_token_id"), table.get("pad_token_id")
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    found = tuple(token for end in ends if (token := typed(end, int, "eos_token_id")) >= 0)  # -1 is how some say that there is none
    padding = -1 if pad is None else typed(pad, int, "pad_token_id")
    return SpecialTokens(found or None, padding if padding >= 0 else None)


def _table(data: Table, key: str) -> Table:
    found = data.get(key)
    return {} if found is None else typed(found, dict, key)
