"""The language model of an artefact folder, called with tokens and answering with logits, whatever it keeps between calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matmorph.runtime.decoder import IDS, LOGITS, MASK, POSITIONS
from matmorph.runtime.errors import ArtifactError, ExecutionError, InputMismatch
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.artifact import Manifest, TensorInfo
from matmorph.runtime.format.companions import CONFIG, LENGTHS
from matmorph.runtime.format.plain import typed
from matmorph.runtime.manifest import open_folder, read_json, stored_errors
from matmorph.runtime.providers import Provider
from matmorph.runtime.session import Session, to_stderr
from matmorph.runtime.whole_call import with_empty_cache

_MASKED = "ForMaskedLM"


class TextModel:
    """One folder's model, loaded. A model with a cache is called behind an empty one.

    Raises ArtifactError: no artefact; no causal language model that takes tokens alone and gives logits for each of them. ProviderError.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        providers: str | Sequence[Provider] | None = None,
        *,
        threads: int | None = None,
        log: Callable[[str], None] = to_stderr,
        verify: bool = True,
    ) -> None:
        manifest, _ = open_folder(folder, verify)
        config = _config(Path(folder), verify)
        self._where = str(folder)
        self._logits = _checked(self._where, manifest, config)
        self.max_length = _max_length(manifest, config)
        self._session = Session(folder, providers, threads=threads, log=log, verify=verify)
        self._names = {info.name for info in manifest.inputs}

    @property
    def vocabulary(self) -> int | None:
        """Number of words that there are logits for, None where the manifest does not say."""
        last = self._logits.shape[-1]
        return last if isinstance(last, int) else None

    @property
    def provider(self) -> str:
        return self._session.provider

    def refuse(self, longest: int, highest: int) -> None:
        """Raises InputMismatch for windows of more tokens than the model has positions for, and for ids that it has no logits for."""
        if self.max_length is not None and longest > self.max_length:
            raise InputMismatch(f"{self._where}: a window of {longest} tokens, and the model has positions for {self.max_length}")
        if self.vocabulary is not None and highest >= self.vocabulary:
            fault = f"the text has the token {highest}, and the model has logits for {self.vocabulary} words (0 to {self.vocabulary - 1})"
            raise InputMismatch(f"{self._where}: {fault}: the tokenizer is not this model's")

    def logits(self, ids: Array) -> Array:
        """[tokens, words] for int64 ids [tokens]. Raises InputMismatch, ExecutionError."""
        row = ids[None]
        given = {IDS: row, MASK: np.ones_like(row), POSITIONS: np.arange(row.shape[1])[None]}
        feeds = with_empty_cache(self._session.manifest, {name: array for name, array in given.items() if name in self._names})
        found: Array = self._session.run(feeds)[LOGITS]
        if found.shape[:2] != row.shape:
            raise ExecutionError(f"{self._where}: gives logits of shape {found.shape} for {row.shape[1]} tokens")
        logits: Array = found[0]
        return logits


def _config(folder: Path, verify: bool) -> dict[str, Any]:
    """config.json, empty where there is none."""
    if not (folder / CONFIG).is_file():
        return {}
    with stored_errors():
        path = open_folder(folder, verify)[1].checked(CONFIG)
    found: dict[str, Any] = read_json(path, lambda data: typed(data, dict, "the file"))
    return found


def _checked(where: str, manifest: Manifest, config: dict[str, Any]) -> TensorInfo:
    """The output that holds logits for each token."""
    pasts = {slot.past for slot in manifest.cache.slots} if manifest.cache else set()
    inputs = {info.name for info in manifest.inputs}
    logits = next((info for info in manifest.outputs if info.name == LOGITS), None)
    if IDS not in inputs or logits is None or len(logits.shape) != 3:
        gives = ", ".join(info.name for info in manifest.outputs)
        fault = f"one takes {IDS} and gives {LOGITS} for each token; this takes {', '.join(sorted(inputs - pasts))} and gives {gives:.80}"
        raise ArtifactError(f"{where}: is no language model: {fault}")
    unknown = inputs - pasts - {IDS, MASK, POSITIONS}
    if unknown:
        raise ArtifactError(f"{where}: the model takes {', '.join(sorted(unknown))} too, which a text has no value for")
    if logits.shape[1] == 1:
        what = "export: {logits: last}"
        raise ArtifactError(f"{where}: gives logits of the last token alone ({what}); compile it without that to evaluate it on a text")
    names = config.get("architectures")
    masked = next((name for name in names if str(name).endswith(_MASKED)), None) if isinstance(names, list) else None
    if masked is not None:
        raise ArtifactError(f"{where}: is a {masked}, which sees the tokens that it predicts: there is no perplexity of it")
    return logits


def _max_length(manifest: Manifest, config: dict[str, Any]) -> int | None:
    """Tokens that there are positions for, by whatever says so."""
    text = config.get("text_config")
    tables = [config, *([text] if isinstance(text, dict) else [])]
    known = [value for table in tables for key in LENGTHS if isinstance(value := table.get(key), int) and value > 0]
    width = next(info.shape[1] for info in manifest.inputs if info.name == IDS and len(info.shape) > 1)
    if isinstance(width, str) and width in manifest.ranges and (high := manifest.ranges[width].high) is not None:
        known.append(high)
    if manifest.cache is not None and manifest.cache.max_length is not None:
        known.append(manifest.cache.max_length)
    return min(known, default=None)
