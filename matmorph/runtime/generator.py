"""`Generator`: tokens from the decoder of an artefact folder, numpy and ONNX Runtime only.

The whole prompt goes through the model once, then one token at a time; what the model keeps of earlier tokens stays in the memory of its
provider. Inputs are bound, so an adapter is bound like any other input (ONNX Runtime looks at `RunOptions` in plain runs only).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from matmorph.runtime.adapters import LoadedAdapter
from matmorph.runtime.decoder import IDS, LOGITS, MASK, POSITIONS, Decoder
from matmorph.runtime.device import Device
from matmorph.runtime.errors import ExecutionError, InputMismatch, first_line
from matmorph.runtime.feeds import Array, check_feeds
from matmorph.runtime.format.artifact import Manifest
from matmorph.runtime.key_values import KeyValues, empty_cache
from matmorph.runtime.prompts import Ids, Prompts, padded
from matmorph.runtime.providers import Provider
from matmorph.runtime.sampling import Sampler, Sampling
from matmorph.runtime.session import Session, to_stderr
from matmorph.runtime.special_tokens import SpecialTokens, read_special_tokens


@dataclass(frozen=True, slots=True)
class _Kept:
    """A cache and the ids that it holds, where it is of one sequence."""

    values: KeyValues
    ids: tuple[int, ...] = ()


class PromptCache:
    """What a generator keeps of one sequence between calls: give the same object again, and of ids that begin as the last ones did only
    the rest is computed. For one generator and one sequence."""

    def __init__(self) -> None:
        self._owner: Generator | None = None
        self._adapter: LoadedAdapter | None = None
        self._kept: _Kept | None = None  # both of its parts change at once, wherever a call is interrupted

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that it holds."""
        return () if self._kept is None else self._kept.ids

    def _belongs(self, owner: Generator, adapter: LoadedAdapter | None) -> None:
        """Raises InputMismatch for one of another generator. What another adapter made is forgotten."""
        if self._owner not in (None, owner):
            raise InputMismatch("the cache was filled by another generator")
        if self._adapter is not adapter:
            self._kept = None
        self._owner, self._adapter = owner, adapter


@dataclass(frozen=True, slots=True)
class _Plan:
    """One checked call. `stops`: ids that end a row, `pad`: what an ended row gives."""

    prompts: Prompts
    new: int
    stops: Array
    pad: int
    sampler: Sampler
    adapter: LoadedAdapter | None
    cache: PromptCache


class Generator:
    """The decoder of one artefact folder, loaded. Several threads may generate with it at once, each with its own `PromptCache`.

    `providers`, `threads`, `optimize`, `session_options`, `log`, `verify`: as of `Session`. End and pad tokens are read from the folder's
    generation_config.json, config.json or genai_config.json.

    Raises ArtifactError (folder, manifest or model; a model without a cache), ProviderError.
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
        self._decoder = Decoder.of(self._session.manifest, str(folder))
        self._special = read_special_tokens(Path(folder), verify)
        self._device = Device.of(self._session.inference)

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
        return self._decoder.cache.max_length

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
        stops, pad = self._ends(eos, pad)
        prompts = padded(ids, mask, self._decoder.cache.padding, pad, self._decoder.vocabulary)
        rows = len(prompts.lengths)
        self._refuse_long(int(prompts.lengths.max()), prompts.ids.shape[1], max_new_tokens)
        if cache is not None and rows != 1:
            raise InputMismatch(f"a cache keeps one sequence, and there are {rows} prompts")
        ends, active = np.array(stops, np.int64), self._session.checked_adapter(adapter)
        plan = _Plan(prompts, max_new_tokens, ends, pad or 0, Sampler(sampling, rows), active, PromptCache() if cache is None else cache)
        self._check(plan)
        plan.cache._belongs(self, active)
        return self._tokens(plan)

    # ---- before anything runs

    def _ends(self, eos: int | Sequence[int] | None, pad: int | None) -> tuple[tuple[int, ...], int | None]:
        stops = self._special.eos if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        if stops is None:
            raise InputMismatch("the folder names no end token: give eos=, or eos=[] where nothing ends a row")
        given = pad if pad is not None else self._special.pad
        for name, tokens in (("eos", stops), ("pad", () if given is None else (given,))):
            for token in tokens:
                if not isinstance(token, int | np.integer) or not 0 <= token < (self._decoder.vocabulary or np.inf):
                    raise InputMismatch(f"{name} is {token!r}, no token id of this model ({self._decoder.vocabulary} of them)")
        return stops, given if given is not None or not stops else stops[0]

    def _refuse_long(self, longest: int, width: int, new: int) -> None:
        if new < 1:
            raise InputMismatch(f"max_new_tokens is {new}; it must be 1 or more")
        limit = self.max_length
        if limit is not None and width + new > limit:
            raise InputMismatch(f"a prompt of {longest} tokens and {new} new ones are {longest + new}; the model has positions for {limit}")

    def _check(self, plan: _Plan) -> None:
        """The first run's arrays as the manifest wants them; those of an empty cache cost nothing."""
        rows = len(plan.prompts.ids)
        empty = {slot.past: np.zeros(slot.sized(rows, 0), slot.dtype) for slot in self._decoder.slots}
        check_feeds(self.manifest, {**self._feeds(plan.prompts.ids, plan.prompts.mask, plan.prompts.positions), **empty})
        logits = next(info.shape for info in self.manifest.outputs if info.name == LOGITS)
        ragged = len(set(plan.prompts.lengths.tolist())) > 1
        if self._decoder.cache.padding == "right" and ragged and logits[1] == 1:
            raise InputMismatch("this model gives logits of the last place only, where shorter prompts have padding: give one at a time")

    # ---- the run

    def _tokens(self, plan: _Plan) -> Iterator[Array]:
        step = _Steps(self, plan)
        token = plan.sampler.next(step.prompt())
        ended = np.zeros(len(token), bool)
        for number in range(1, plan.new + 1):
            token = np.where(ended, plan.pad, token)
            ended |= np.isin(token, plan.stops)
            yield token
            if ended.all() or number == plan.new:
                return
            token = plan.sampler.next(step.token(token, number))

    def _feeds(self, ids: Array, mask: Array, positions: Array) -> dict[str, Array]:
        taken = {IDS: True, MASK: self._decoder.takes_mask, POSITIONS: self._decoder.takes_positions}
        arrays = {IDS: ids, MASK: mask, POSITIONS: positions}
        return {name: np.ascontiguousarray(array) for name, array in arrays.items() if taken[name]}

    def _run(self, binding: Any) -> Sequence[onnxruntime.OrtValue]:
        try:
            self._session.inference.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            raise ExecutionError(f"{self._session.provider}: {first_line(error)}") from error
        found: Sequence[onnxruntime.OrtValue] = binding.get_outputs()
        return found


class _Steps:
    """The runs of one call."""

    def __init__(self, owner: Generator, plan: _Plan) -> None:
        self._owner, self._plan = owner, plan
        self._binding = owner.session.inference.io_binding()
        if plan.adapter is not None:
            for name, value in plan.adapter.values.items():
                self._binding.bind_ortvalue_input(name, value)
        rows, width = plan.prompts.ids.shape
        self._mask = np.ones((rows, width + plan.new), np.int64)
        self._mask[:, :width] = plan.prompts.mask

    def prompt(self) -> Array:
        """Logits [rows, tokens of the vocabulary] behind the last token of each prompt."""
        prompts = self._plan.prompts
        rows, width = prompts.ids.shape
        kept = self._reused()
        done = len(kept.ids)
        logits = self._run(kept, prompts.ids[:, done:], prompts.positions[:, done:], width)
        last = prompts.lengths - 1 if self._owner._decoder.cache.padding == "right" else np.full(rows, width - 1)
        found: Array = logits[np.arange(rows), np.minimum(last - done, logits.shape[1] - 1)]
        return found

    def token(self, ids: Array, number: int) -> Array:
        """Logits behind the token of each row that is the `number`th new one."""
        prompts, kept = self._plan.prompts, self._plan.cache._kept
        if kept is None:
            raise InputMismatch("the cache was given to another call while this one went on")
        return self._run(kept, ids[:, None], (prompts.lengths + number - 1)[:, None], prompts.ids.shape[1] + number)[:, -1]

    def _reused(self) -> _Kept:
        """The cache as far as it holds the prompt. One token is left to compute, for its logits."""
        plan, owner = self._plan, self._owner
        rows, width = plan.prompts.ids.shape
        kept = plan.cache._kept
        same = 0 if kept is None else _common(kept.ids, plan.prompts.ids[0, :-1])
        if kept is None or not same:
            return _Kept(empty_cache(owner._decoder, rows, owner._device, width + plan.new - 1))
        return kept if same == len(kept.ids) else _Kept(kept.values.cropped(same), kept.ids[:same])

    def _run(self, kept: _Kept, ids: Array, positions: Array, total: int) -> Array:
        binding = self._binding
        for name, array in self._owner._feeds(ids, self._mask[:, :total], positions).items():
            binding.bind_cpu_input(name, array)
        binding.bind_output(LOGITS)
        kept.values.bind(binding, total)
        logits, *presents = self._owner._run(binding)
        self._plan.cache._kept = _Kept(kept.values.after(presents), (*kept.ids, *ids[0].tolist()) if len(ids) == 1 else ())
        found: Array = np.from_dlpack(logits)
        return found


def _common(kept: Sequence[int], row: Array) -> int:
    """How many ids both begin with."""
    most = min(len(kept), row.size)
    differs = np.flatnonzero(np.array(kept[:most], np.int64) != row[:most])
    return int(differs[0]) if differs.size else most
