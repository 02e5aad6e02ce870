"""One call of a decoder: the whole prompt goes through the model once, then one token at a time, and what the model keeps of earlier tokens
stays in the memory of its provider.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnxruntime

from matmorph.runtime.adapters import LoadedAdapter
from matmorph.runtime.bound import BoundSession
from matmorph.runtime.decoder import LOGITS, MASK, POSITIONS, Decoder
from matmorph.runtime.errors import InputMismatch
from matmorph.runtime.feeds import Array
from matmorph.runtime.key_values import KeyValues, empty_cache
from matmorph.runtime.prompts import Prompts
from matmorph.runtime.sampling import Sampler
from matmorph.runtime.session import Session
from matmorph.runtime.token_rules import TokenRules


@dataclass(frozen=True, slots=True)
class KeptCache:
    """A cache and the ids that it holds, where it is of one sequence."""

    values: KeyValues
    ids: tuple[int, ...] = ()


class PromptCache:
    """What a generator keeps of one sequence between calls: give the same object again, and of ids that begin as the last ones did only
    the rest is computed. For one generator and one sequence."""

    def __init__(self) -> None:
        self._owner: object | None = None
        self._adapter: LoadedAdapter | None = None
        self._kept: KeptCache | None = None  # both of its parts change at once, wherever a call is interrupted

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that it holds."""
        return () if self._kept is None else self._kept.ids

    def belongs(self, owner: object, adapter: LoadedAdapter | None) -> None:
        """Raises InputMismatch for one of another generator. What another adapter made is forgotten."""
        if self._owner not in (None, owner):
            raise InputMismatch("the cache was filled by another generator")
        if self._adapter is not adapter:
            self._kept = None
        self._owner, self._adapter = owner, adapter


@dataclass(frozen=True, slots=True)
class Plan:
    """One checked call. `stops`: ids that end a row, `pad`: what an ended row gives, `rules`: which tokens may come, `beside`: inputs that
    stay as they are, by name."""

    prompts: Prompts
    new: int
    stops: Array
    pad: int
    sampler: Sampler
    rules: TokenRules
    cache: PromptCache
    beside: Mapping[str, onnxruntime.OrtValue] = field(default_factory=dict)


class Engine:
    """A session whose cache goes round."""

    def __init__(self, session: Session, decoder: Decoder) -> None:
        self.bound, self.decoder = BoundSession(session), decoder

    def feeds(self, ids: Array, mask: Array, positions: Array) -> dict[str, Array]:
        """Those of a call that the model takes."""
        taken = {self.decoder.ids: True, MASK: self.decoder.takes_mask, POSITIONS: self.decoder.takes_positions}
        arrays = {self.decoder.ids: ids, MASK: mask, POSITIONS: positions}
        return {name: np.ascontiguousarray(arrays[name]) for name, wanted in taken.items() if wanted}

    def tokens(self, plan: Plan) -> Iterator[Array]:
        """The new token of each row, int64 [rows], step by step until every row has ended. Raises ExecutionError."""
        step = _Steps(self, plan)
        token = plan.sampler.next(plan.rules.applied(step.prompt(), 1))
        ended = np.zeros(len(token), bool)
        for number in range(1, plan.new + 1):
            token = np.where(ended, plan.pad, token)
            ended |= np.isin(token, plan.stops)
            yield token
            if ended.all() or number == plan.new:
                return
            token = plan.sampler.next(plan.rules.applied(step.token(token, number), number + 1))


class _Steps:
    """The runs of one call."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine, self._plan = engine, plan
        self._binding = engine.bound.session.inference.io_binding()
        for name, value in plan.beside.items():
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
        last = prompts.lengths - 1 if self._engine.decoder.cache.padding == "right" else np.full(rows, width - 1)
        found: Array = logits[np.arange(rows), np.minimum(last - done, logits.shape[1] - 1)]
        return found

    def token(self, ids: Array, number: int) -> Array:
        """Logits behind the token of each row that is the `number`th new one."""
        prompts, kept = self._plan.prompts, self._plan.cache._kept
        if kept is None:
            raise InputMismatch("the cache was given to another call while this one went on")
        return self._run(kept, ids[:, None], (prompts.lengths + number - 1)[:, None], prompts.ids.shape[1] + number)[:, -1]

    def _reused(self) -> KeptCache:
        """The cache as far as it holds the prompt. One token is left to compute, for its logits."""
        plan, engine = self._plan, self._engine
        rows, width = plan.prompts.ids.shape
        kept = plan.cache._kept
        same = 0 if kept is None else _common(kept.ids, plan.prompts.ids[0, :-1])
        if kept is None or not same:
            return KeptCache(empty_cache(engine.decoder, rows, engine.bound.device, width + plan.new - 1))
        return kept if same == len(kept.ids) else KeptCache(kept.values.cropped(same), kept.ids[:same])

    def _run(self, kept: KeptCache, ids: Array, positions: Array, total: int) -> Array:
        binding = self._binding
        for name, array in self._engine.feeds(ids, self._mask[:, :total], positions).items():
            binding.bind_cpu_input(name, array)
        binding.bind_output(LOGITS)
        kept.values.bind(binding, total)
        logits, *presents = self._engine.bound.run(binding)
        self._plan.cache._kept = KeptCache(kept.values.after(presents), (*kept.ids, *ids[0].tolist()) if len(ids) == 1 else ())
        found: Array = np.from_dlpack(logits)
        return found


def _common(kept: Sequence[int], row: Array) -> int:
    """How many ids both begin with."""
    most = min(len(kept), row.size)
    differs = np.flatnonzero(np.array(kept[:most], np.int64) != row[:most])
    return int(differs[0]) if differs.size else most
