"""The files of a model that say how text becomes tokens: its tokenizer and its chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matmorph.errors import InputError
from matmorph.runtime.format.artifact import MANIFEST
from matmorph.runtime.format.companions import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from matmorph.runtime.format.folder import StoredFolder
from matmorph.runtime.format.plain import ManifestError, typed
from matmorph.runtime.format.reading import inside, read_json, read_text
from matmorph.text.tokens import Tokens

_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class TextFiles:
    """A folder that has them: an artefact, whose files are held against its manifest, or any other (`stored` None)."""

    folder: Path
    stored: StoredFolder | None

    @classmethod
    def of(cls, folder: Path, tokenizer: Path | None, verify: bool) -> TextFiles:
        """Of `tokenizer` where it is given, else of the artefact. InputError for a folder without a tokenizer.json; ArtifactError."""
        from matmorph.runtime.manifest import open_folder

        home = folder if tokenizer is None else tokenizer
        stored = open_folder(home, verify)[1] if (home / MANIFEST).is_file() else None
        if not (home / TOKENIZER).is_file():
            advice = "name a folder that has one with --tokenizer, or give token ids to matmorph.runtime.Generator"
            raise InputError(f"{home}: has no {TOKENIZER}, so text cannot become tokens", [advice])
        return cls(home, stored)

    def path(self, name: str) -> Path | None:
        """Of a file that may be read, None where there is none. Raises StoredError."""
        if not (self.folder / name).is_file():
            return None
        return inside(self.folder, name) if self.stored is None else self.stored.checked(name)

    def tokens(self) -> Tokens:
        """The tokenizer. Raises InputError where the package is missing or cannot read the file, StoredError."""
        return Tokens(self.path(TOKENIZER) or self.folder / TOKENIZER)

    def json(self, name: str) -> dict[str, Any]:
        """A table; an empty one where the file is missing. Raises StoredError."""
        path = self.path(name)
        return {} if path is None else read_json(path, lambda data: typed(data, dict, "the file"))

    def chat_template(self) -> tuple[str, str] | None:
        """(its file, its text), in the order in which transformers looks; None where there is none. Raises StoredError."""
        path = self.path(CHAT_TEMPLATE)
        if path is not None:
            return str(path), read_text(path)
        for name in (TOKENIZER_CONFIG, "chat_template.json"):
            path = self.path(name)
            text = None if path is None else read_json(path, _template_in)
            if text is not None:
                return str(path), text
        return None

    def named_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and others, which templates write. Raises StoredError."""
        found = {**self.json("special_tokens_map.json"), **self.json(TOKENIZER_CONFIG)}
        texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
        return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def _template_in(data: Any) -> str | None:
    found = typed(data, dict, "the file").get("chat_template")
    if isinstance(found, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get(_DEFAULT)
        if found is None:
            raise ManifestError(f"chat_template: none of its templates is named {_DEFAULT}")
    return None if found is None else str(typed(found, str, "chat_template"))
