"""`Seq2SeqGenerator`: what a model with an encoder writes after what it has read, numpy and ONNX Runtime only.

The encoder runs once; what it gives stays in the memory of its provider and goes into each run of the decoder as it lies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from matmorph.runtime.adapters import LoadedAdapter
from matmorph.runtime.bound import BoundSession
from matmorph.runtime.decoder import MASK, POSITIONS, Decoder
from matmorph.runtime.decoding import Engine, Plan, PromptCache
from matmorph.runtime.errors import ArtifactError, InputMismatch
from matmorph.runtime.feeds import Array, check_feeds
from matmorph.runtime.format.artifact import Manifest
from matmorph.runtime.manifest import read_manifest
from matmorph.runtime.prompts import Ids, padded
from matmorph.runtime.providers import Provider
from matmorph.runtime.sampling import Sampler, Sampling
from matmorph.runtime.session import Session, to_stderr
from matmorph.runtime.special_tokens import SpecialTokens, check_token, read_special_tokens


class Seq2SeqGenerator:
    """The encoder and the decoder of one artefact folder, loaded. Several threads may generate with it at once.

    `providers`, `threads`, `optimize`, `session_options`, `log`, `verify`: as of `Session`. Start, end and pad tokens are read from the
    folder's generation_config.json or config.json, and so are the token that is forced to come first and those that never come.

    Raises ArtifactError (folder, manifest or model; a model without an encoder), ProviderError.
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
        self._manifest = read_manifest(folder)
        parts = self._manifest.parts
        if parts is None:
            raise ArtifactError(f"{folder}: the model has no encoder of its own; matmorph.runtime.Generator continues texts")
        how: dict[str, Any] = {"threads": threads, "optimize": optimize, "session_options": session_options, "verify": verify}
        self._encoder = BoundSession(Session(folder, providers, log=log, part="encoder", **how))
        told: list[str] = []  # where it runs, the encoder's session has said
        session = Session(folder, providers, log=told.append, part="decoder", **how)
        read = {info.name for info in parts.encoder.inputs}
        self._names = {one.made: one.taken for one in parts.handed}
        self._shared = [info.name for info in parts.decoder.inputs if info.name in read]
        pasts = {slot.past for slot in session.manifest.cache.slots} if session.manifest.cache is not None else set()
        beside = {*self._names.values(), *self._shared}
        ids = [info.name for info in parts.decoder.inputs if info.name not in {*pasts, *beside, MASK, POSITIONS}]
        if len(ids) != 1:
            raise ArtifactError(f"{folder}: of the decoder's inputs {', '.join(ids) or 'none'} takes tokens, where one should")
        self._engine = Engine(session, Decoder.of(session.manifest, str(folder), ids[0], beside))
        self._special = read_special_tokens(Path(folder), verify)

    @property
    def manifest(self) -> Manifest:
        """Everything that manifest.json says, of the whole model."""
        return self._manifest

    @property
    def special(self) -> SpecialTokens:
        """The start, end and pad tokens that the folder names."""
        return self._special

    @property
    def provider(self) -> str:
        """The execution provider that loaded and comes first, as ONNX Runtime calls it."""
        return self._engine.bound.session.provider

    @property
    def max_length(self) -> int | None:
        """Tokens that the decoder has positions for, those it starts with included; None = no limit of its own."""
        return self._engine.decoder.cache.max_length

    def room(self, read: int) -> int | None:
        """New tokens that there are positions for behind the start token, however much was `read`; None = no limit."""
        return None if self.max_length is None else self.max_length - 1

    def load_adapter(self, path: str | os.PathLike[str]) -> LoadedAdapter:
        """An `.onnx_adapter` file, checked against this model. Raises AdapterError: no adapter, another base, other sizes."""
        return self._engine.bound.session.load_adapter(path)

    def generate(
        self,
        inputs: Ids,
        mask: Any = None,
        *,
        max_new_tokens: int,
        start: int | Sequence[int] | None = None,
        eos: int | Sequence[int] | None = None,
        pad: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        adapter: LoadedAdapter | None = None,
    ) -> Array:
        """int64 [rows, at most max_new_tokens]: the new tokens of each row, without those it started with, its end token included, then
        pads. For the arguments and errors see `stream`."""
        how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "adapter": adapter}
        steps = self.stream(inputs, mask, max_new_tokens=max_new_tokens, start=start, eos=eos, pad=pad, **how)
        return np.stack(list(steps), axis=1)

    def stream(
        self,
        inputs: Ids,
        mask: Any = None,
        *,
        max_new_tokens: int,
        start: int | Sequence[int] | None = None,
        eos: int | Sequence[int] | None = None,
        pad: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        adapter: LoadedAdapter | None = None,
    ) -> Iterator[Array]:
        """The new token of each row, int64 [rows], step by step until every row has ended. The encoder runs at the first step.

        inputs: what the encoder reads. Token ids of any length as a list of lists, or [rows, tokens] with `mask` (1 at tokens); where it
        reads features, the array of them, rows first. start: tokens that every row begins with, None = what the folder says. The rest as of
        `Generator.stream`.

        Raises InputMismatch, before anything runs: inputs or a setting that do not fit, more tokens than `max_length`, a start, end or pad
        token missing. AdapterError for an adapter of another model. ExecutionError where ONNX Runtime refuses.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        sampling.check()
        decoder = self._engine.decoder
        stops, pad = self._special.ends(eos, pad, decoder.vocabulary)
        read = self._read(inputs, mask, pad)
        rows, begin = len(next(iter(read.values()))), self._start(start)
        prompts = padded([begin] * rows, None, "any", pad, decoder.vocabulary)
        decoder.refuse_long(len(begin), len(begin), max_new_tokens)
        active = self._engine.bound.session.checked_adapter(adapter)
        ends, rules = np.array(stops, np.int64), self._special.rules
        sampler = Sampler(sampling, rows)

        def steps() -> Iterator[Array]:
            beside = {**self._engine.bound.of_adapter(active), **self._encoded(read, active)}
            yield from self._engine.tokens(Plan(prompts, max_new_tokens, ends, pad or 0, sampler, rules, PromptCache(), beside))

        return steps()

    # ---- before anything runs

    def _read(self, inputs: Any, mask: Any, pad: int | None) -> dict[str, Array]:
        """The encoder's arrays as its manifest wants them."""
        info = self._encoder.session.inputs[0]
        if np.dtype(info.dtype).kind == "f":
            if mask is not None:
                raise InputMismatch(f"mask: the encoder reads {info.name}, all of it")
            return check_feeds(self._encoder.session.manifest, {info.name: inputs})
        prompts = padded(inputs, mask, "right", pad, None)
        arrays = {info.name: prompts.ids, MASK: prompts.mask}
        names = [one.name for one in self._encoder.session.inputs if one.name in arrays]
        return check_feeds(self._encoder.session.manifest, {name: arrays[name] for name in names})

    def _start(self, start: int | Sequence[int] | None) -> list[int]:
        given = self._special.start if start is None else start
        if given is None:
            raise InputMismatch("the folder names no token to start with: give start=")
        found = [given] if isinstance(given, int | np.integer) else list(given)
        if not found:
            raise InputMismatch("start: a decoder begins with one token at least")
        for token in found:
            check_token("start", token, self._engine.decoder.vocabulary)
        return [int(token) for token in found]

    # ---- the run

    def _encoded(self, read: dict[str, Array], adapter: LoadedAdapter | None) -> dict[str, onnxruntime.OrtValue]:
        """What the decoder takes of the encoder, and of what that takes too."""
        made = self._encoder.once(read, adapter)
        handed = {taken: made[name] for name, taken in self._names.items()}
        return {**handed, **{name: onnxruntime.OrtValue.ortvalue_from_numpy(read[name]) for name in self._shared}}
