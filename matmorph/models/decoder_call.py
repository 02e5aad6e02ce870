"""A causal language model called with its cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from matmorph.errors import InputError
from matmorph.ir.without_cache import MASK, POSITIONS, positions_of
from matmorph.models.call_with_cache import (
    BATCH,
    LOGITS,
    NEW,
    PAST,
    PRESENT,
    TOTAL,
    WITHOUT,
    Pairs,
    filled,
    inputs_by_name,
    mask_of,
    pairs_of,
    refuse_others,
    tokens_of,
    two_rows,
)

IDS = "input_ids"


@dataclass(frozen=True, slots=True, eq=False)
class _DecoderCall:
    model: str
    names: Sequence[str]
    text: Mapping[str, torch.Tensor]

    @property
    def length(self) -> int:
        return self.text[IDS].shape[1]

    @property
    def axes(self) -> Mapping[str, Any]:
        known = {IDS: {0: BATCH, 1: NEW}, MASK: {0: BATCH, 1: TOTAL}, POSITIONS: {0: BATCH, 1: NEW}}
        return {name: known[name] for name in self.names}

    def part(self, start: int, stop: int) -> Mapping[str, torch.Tensor]:
        ids, mask = self.text[IDS], self.text[MASK]
        found = {IDS: ids[:, start:stop], MASK: mask[:, :stop], POSITIONS: positions_of(mask)[:, start:stop]}
        return {name: found[name] for name in self.names}

    def run(self, original: Callable[..., Any], call: Mapping[str, Any]) -> dict[str, Any]:
        cache = filled(call[PAST])
        answer = original(**{name: call[name] for name in self.names}, **{PAST: cache}, use_cache=True)
        return {LOGITS: answer.logits, PRESENT: pairs_of(self.model, cache)}

    def kept(self, present: Sequence[Mapping[str, Any]]) -> Pairs:
        return present

    def nested(self, pairs: Pairs) -> list[Any]:
        return list(pairs)


def decoder_call(module: torch.nn.Module, example_inputs: Any, device: torch.device) -> _DecoderCall:
    """Of a model whose own forward takes `input_ids`, `attention_mask` and perhaps `position_ids`. Raises InputError."""
    parameters = inspect.signature(module.forward).parameters
    if IDS not in parameters:
        raise InputError(f"{type(module).__name__} takes no {IDS}, which a model with a cache is called with", [WITHOUT])
    found = inputs_by_name(example_inputs, (IDS, MASK))
    ids = tokens_of(found, IDS, device)
    refuse_others(found, (IDS, MASK))
    text = two_rows({IDS: ids, MASK: mask_of(found, MASK, ids, IDS, _left_padded)})
    return _DecoderCall(type(module).__name__, (IDS, MASK, *((POSITIONS,) if POSITIONS in parameters else ())), text)


def _left_padded(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[1:, : ids.shape[1] // 4] = 0
    return mask
