"""A model with an encoder called with its cache: of the text that is written, and of what the encoder has read.

The keys and values over the encoder's states stand among the results, so that a file of the encoder and one of the decoder can be cut
apart there (`ir.crossing`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from matmorph.ir.without_cache import MASK
from matmorph.models.call_with_cache import (
    BATCH,
    LOGITS,
    NEW,
    PAST,
    PRESENT,
    Pairs,
    filled,
    given,
    inputs_by_name,
    kept_once,
    mask_of,
    pairs_of,
    refuse_others,
    tokens_of,
    two_rows,
)

DECODER_IDS = "decoder_input_ids"
READ = "encoder_sequence_length"
DECODER, ENCODER = "decoder", "encoder"
"""Parts of a layer's cache: of the tokens written, and of what was read."""


@dataclass(frozen=True, slots=True, eq=False)
class _EncoderDecoderCall:
    model: str
    read: Mapping[str, torch.Tensor]
    ids: torch.Tensor
    axes: Mapping[str, Any]

    @property
    def names(self) -> Sequence[str]:
        return (*self.read, DECODER_IDS)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def part(self, start: int, stop: int) -> Mapping[str, torch.Tensor]:
        return {**self.read, DECODER_IDS: self.ids[:, start:stop]}

    def run(self, original: Callable[..., Any], call: Mapping[str, Any]) -> dict[str, Any]:
        from transformers.cache_utils import EncoderDecoderCache

        cache = EncoderDecoderCache(filled([layer[DECODER] for layer in call[PAST]]), kept_once())
        answer = original(**{name: call[name] for name in self.names}, **{PAST: cache}, use_cache=True)
        parts = {DECODER: cache.self_attention_cache, ENCODER: cache.cross_attention_cache}
        layers = zip(*(pairs_of(self.model, part) for part in parts.values()), strict=True)
        return {LOGITS: answer.logits, PRESENT: [dict(zip(parts, layer, strict=True)) for layer in layers]}

    def kept(self, present: Sequence[Mapping[str, Any]]) -> Pairs:
        return [layer[DECODER] for layer in present]

    def nested(self, pairs: Pairs) -> list[Any]:
        return [{DECODER: pair} for pair in pairs]


def encoder_decoder_call(module: torch.nn.Module, example_inputs: Any, device: torch.device) -> _EncoderDecoderCall:
    """Of a model whose encoder reads its `main_input_name`, tokens with a mask or features, and whose decoder writes after
    `decoder_input_ids`. Raises InputError."""
    main = str(getattr(module, "main_input_name", "input_ids"))
    parameters = inspect.signature(module.forward).parameters
    inputs = [name for name in parameters if name in (main, MASK, DECODER_IDS)]
    found = inputs_by_name(example_inputs, inputs)
    ids = tokens_of(found, DECODER_IDS, device)
    first = given(found, main, device)
    words = not first.dtype.is_floating_point
    refuse_others(found, (main, *((MASK,) if words else ()), DECODER_IDS))
    read = {main: first, **({MASK: mask_of(found, MASK, first, main, torch.ones_like)} if words else {})}
    axis = {0: BATCH, 1: READ} if words else {0: BATCH}
    rows = two_rows({**read, DECODER_IDS: ids})
    return _EncoderDecoderCall(
        type(module).__name__,
        {name: rows[name] for name in read},
        rows[DECODER_IDS],
        {**{name: axis for name in read}, DECODER_IDS: {0: BATCH, 1: NEW}},
    )
