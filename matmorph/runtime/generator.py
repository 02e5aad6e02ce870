"""`Generator`: tokens from the decoder of an artefact folder, numpy and ONNX Runtime only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from matmorph.runtime.adapters import LoadedAdapter
from matmorph.runtime.decoder import LOGITS, Decoder
from matmorph.runtime.decoding import Engine, Plan, PromptCache
from matmorph.runtime.errors import ArtifactError, InputMismatch
from matmorph.runtime.feeds import Array, check_feeds
from matmorph.runtime.format.artifact import Manifest
from matmorph.runtime.prompts import Ids, Prompts, padded
from matmorph.runtime.providers import Provider
from matmorph.runtime.sampling import Sampler, Sampling
from matmorph.runtime.session import Session, to_stderr
from matmorph.runtime.special_tokens import SpecialTokens, read_special_tokens


class Generator:
    """The decoder of one artefact folder, loaded. Several threads may generate with it at once, each with its own `PromptCache`.

    `providers`, `threads`, `optimize`, `session_options`, `log`, `verify`: as of `Session`. End and pad tokens are read from the folder's
    generation_config.json, config.json or genai_config.json.

    Raises ArtifactError (folder, manifest or model; a model without a cache, or one with an encoder: see `Seq2SeqGenerator`),
    ProviderError.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        providers: str | Sequence[Provider] | None = None,
        *,
        threads: int | None = None,
        optimize: bool = True,
        session_options: onnxruntime.SessionOptions | None = None,
        log: Callable[[str], None] = to_stderr,
        verify: bool = True,
    ) -> None:
        how: dict[str, Any] = {"threads": threads, "optimize": optimize, "session_options": session_options, "log": log, "verify": verify}
        self._session = Session(folder, providers, **how)
        if self._session.manifest.parts is not None:
            raise ArtifactError(f"{folder}: the model reads with an encoder: matmorph.runtime.Seq2SeqGenerator writes what it answers")
        self._engine = Engine(self._session, Decoder.of(self._session.manifest, str(folder)))
        self._special = read_special_tokens(Path(folder), verify)

    @property
    def session(self) -> Session:
        """For single steps, and for what it says of inputs, outputs and provider."""
        return self._session

    @property
    def manifest(self) -> Manifest:
        """Everything that manifest.json says."""
        return self._session.manifest

    @property
    def special(self) -> SpecialTokens:
        """The end and pad tokens that the folder names."""
        return self._special

    @property
    def max_length(self) -> int | None:
        """Tokens of a sequence that the model has positions for, those of the prompt included; None = no limit of its own."""
        return self._engine.decoder.cache.max_length

    def room(self, prompt: int) -> int | None:
        """New tokens that there are positions for behind a prompt of so many; None = no limit."""
        return None if self.max_length is None else self.max_length - prompt

    def load_adapter(self, path: str | os.PathLike[str]) -> LoadedAdapter:
        """An `.onnx_adapter` file, checked against this model. Raises AdapterError: no adapter, another base, other sizes."""
        return self._session.load_adapter(path)

    def generate(
        self,
        ids: Ids,
        mask: Any = None,
        *,
        max_new_tokens: int,
        eos: int | Sequence[int] | None = None,
        pad: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        adapter: LoadedAdapter | None = None,
        cache: PromptCache | None = None,
    ) -> Array:
        """int64 [rows, at most max_new_tokens]: the new tokens of each row, its end token included, then pads. For the arguments and
        errors see `stream`."""
        how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "adapter": adapter}
        return np.stack(list(self.stream(ids, mask, max_new_tokens=max_new_tokens, eos=eos, pad=pad, cache=cache, **how)), axis=1)

    def stream(
        self,
        ids: Ids,
        mask: Any = None,
        *,
        max_new_tokens: int,
        eos: int | Sequence[int] | None = None,
        pad: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        adapter: LoadedAdapter | None = None,
        cache: PromptCache | None = None,
    ) -> Iterator[Array]:
        """The new token of each row, int64 [rows], step by step until every row has ended.

        ids: prompts of any length as a list of lists, or [rows, tokens] with `mask` (1 at tokens). eos: what ends a row, None = what the
        folder says, [] = nothing does. pad: what rows that have ended give, None = what the folder says, else the first of eos.
        temperature: 0 = the likeliest token; top_k, top_p, seed: see `Sampling`. adapter: from `load_adapter`, None = the base. cache: for
        one prompt, what an earlier call kept of it.

        Raises InputMismatch, before anything runs: prompts or a setting that do not fit, more tokens than `max_length`, end or pad token
        missing. AdapterError for an adapter of another model. ExecutionError where ONNX Runtime refuses.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        sampling.check()
        decoder = self._engine.decoder
        stops, pad = self._special.ends(eos, pad, decoder.vocabulary)
        prompts = padded(ids, mask, decoder.cache.padding, pad, decoder.vocabulary)
        rows = len(prompts.lengths)
        decoder.refuse_long(int(prompts.lengths.max()), prompts.ids.shape[1], max_new_tokens)
        if cache is not None and rows != 1:
            raise InputMismatch(f"a cache keeps one sequence, and there are {rows} prompts")
        self._check(prompts)
        active, kept = self._session.checked_adapter(adapter), PromptCache() if cache is None else cache
        kept.belongs(self, active)
        ends, rules = np.array(stops, np.int64), self._special.rules
        beside = self._engine.bound.of_adapter(active)
        return self._engine.tokens(Plan(prompts, max_new_tokens, ends, pad or 0, Sampler(sampling, rows), rules, kept, beside))

    def _check(self, prompts: Prompts) -> None:
        """The first run's arrays as the manifest wants them; those of an empty cache cost nothing."""
        decoder, rows = self._engine.decoder, len(prompts.ids)
        empty = {slot.past: np.zeros(slot.sized(rows, 0), slot.dtype) for slot in decoder.slots}
        check_feeds(self.manifest, {**self._engine.feeds(prompts.ids, prompts.mask, prompts.positions), **empty})
        logits = next(info.shape for info in self.manifest.outputs if info.name == LOGITS)
        ragged = len(set(prompts.lengths.tolist())) > 1
        if decoder.cache.padding == "right" and ragged and logits[1] == 1:
            raise InputMismatch("this model gives logits of the last place only, where shorter prompts have padding: give one at a time")
