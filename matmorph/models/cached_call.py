"""How a language model of transformers is called with its key/value cache: tensors in, tensors out.

`transformers` keeps the cache in an object that a trace cannot take and ONNX cannot name. Here `forward` takes the pairs of keys and values
as nested lists and gives them back, under the names that onnxruntime-genai, optimum and transformers.js expect. The instance's `forward` is
exchanged, and put back, so that modules and parameters keep their names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from matmorph.errors import InputError
from matmorph.ir.cache import find_slots
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import evaluate
from matmorph.models.call_with_cache import BATCH, BEFORE, PAST, PRESENT, WITHOUT, CallWithCache, Pairs
from matmorph.models.decoder_call import decoder_call
from matmorph.models.encoder_decoder_call import encoder_decoder_call
from matmorph.passes.statistics.empty_cache import with_empty_cache
from matmorph.runtime.format.companions import LENGTHS

_NEW_TOKENS = 3
"""Of the example; what lies before them becomes its past."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedCall:
    """`examples`: a call with a past that the model made itself; `text`: the call without one that made it; `axes`: names of dynamic axes;
    `max_length`: tokens that the model has positions for, None = it does not say."""

    examples: Mapping[str, Any]
    text: Mapping[str, torch.Tensor]
    axes: Mapping[str, Any]
    max_length: int | None

    def examples_of(self, graph: Graph) -> list[torch.Tensor]:
        """The examples in `graph.inputs` order for what has become of the model: where heads are gone, the past is what the graph makes."""
        names = [entry.name for entry in graph.signature.inputs]
        known = dict(zip(names, tree_leaves(self.examples), strict=True))
        slots = find_slots(graph)
        if all(known[slot.input].shape[1:2] + known[slot.input].shape[3:] == slot.rest for slot in slots):
            return list(known.values())
        batch = with_empty_cache(graph, self.text)
        with torch.no_grad():
            made = dict(zip(graph.signature.outputs, evaluate(graph, tree_leaves(batch)), strict=True))
        return list({**known, **{slot.input: made[slot.output].contiguous() for slot in slots}}.values())


@contextmanager
def cached_call(module: torch.nn.Module, example_inputs: Any) -> Iterator[CachedCall]:
    """In the block, `module` takes its inputs and `past_key_values`, and gives `logits` and `present`.

    A causal language model: `input_ids`, `attention_mask`, `position_ids` (where its own forward does); a pair {"key", "value"} by layer.
    A model with an encoder: `input_ids` with `attention_mask`, or what else its encoder takes, and `decoder_input_ids`; by layer
    {"decoder": pair}, and `present` has {"decoder": pair, "encoder": pair}, the second of which no new token changes.

    example_inputs: tokens, of which there are four at least in the text that is written, and as wanted their mask, as the model takes them
    without a cache. Raises InputError for other inputs, and for a model that keeps no pair of keys and values per layer.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if PAST not in inspect.signature(module.forward).parameters:
        raise InputError(f"{type(module).__name__} has no cache of keys and values: its forward takes no {PAST}", [WITHOUT])
    seq2seq = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
    call: CallWithCache = (encoder_decoder_call if seq2seq else decoder_call)(module, example_inputs, device)
    with _forward_exchanged(module, call):
        yield _with_past(module, call)


@contextmanager
def _forward_exchanged(module: torch.nn.Module, call: CallWithCache) -> Iterator[None]:
    """No dropout meanwhile, and no `use_cache` in a configuration: the call itself says it."""
    original, own = module.forward, module.__dict__.get("forward")

    def forward(**given: Any) -> dict[str, Any]:
        return call.run(original, given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in (*call.names, PAST)])  # type: ignore[attr-defined]
    found: list[Any] = [part.config for part in module.modules() if getattr(getattr(part, "config", None), "use_cache", None) is True]
    configs = {id(config): config for config in found}
    for config in configs.values():
        config.use_cache = False
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward")
        if own is not None:
            module.__dict__["forward"] = own
        for config in configs.values():
            config.use_cache = True


def _with_past(module: torch.nn.Module, call: CallWithCache) -> CachedCall:
    """The example's first tokens as the past of its last ones."""
    new = min(_NEW_TOKENS, call.length // 2)
    before = _contiguous(call.part(0, call.length - new))
    past = call.nested(_past(module, call, before, call.length - new))
    axis = {0: BATCH, 2: {"name": BEFORE, "min": 0}}
    return CachedCall(
        examples={**_contiguous(call.part(call.length - new, call.length)), PAST: past},
        text=before,
        axes={**call.axes, PAST: tree_map(lambda _: axis, past)},
        max_length=max_length(module),
    )


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _past(module: torch.nn.Module, call: CallWithCache, given: Mapping[str, Any], tokens: int) -> Pairs:
    """What the model keeps of a first call. InputError for a cache of another kind."""
    name = type(module).__name__
    training = [one for one in module.modules() if one.training]
    module.eval()
    try:
        with torch.no_grad():
            past = call.kept(module(**given, **{PAST: []})[PRESENT])
    except InputError:
        raise
    except Exception as error:  # of the model's own code, which met a cache that it has no use for
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{name} does not run with a cache of keys and values: {type(error).__name__}: {reason}", [WITHOUT]) from error
    finally:
        for one in training:
            one.training = True
    for layer, pair in enumerate(past):
        for part, tensor in pair.items():
            if tensor.dim() != 4 or tensor.shape[2] != tokens:
                raise InputError(
                    f"{name} keeps no {part}s of all tokens in layer {layer}: [batch, heads, tokens, size] with {tokens} tokens is wanted, "
                    f"it has {list(tensor.shape)}",
                    [WITHOUT],
                )
    return [{part: tensor.detach().contiguous() for part, tensor in pair.items()} for pair in past]


_RELATIVE = "relative_attention_num_buckets"
"""Of configurations whose model counts distances: their n_positions is what it was trained with, no end of a table."""


def max_length(module: Any) -> int | None:
    """Tokens that the model has positions for, by its configuration; None where that does not say."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if hasattr(text, _RELATIVE):
        return None
    found = (getattr(text, name, None) for name in LENGTHS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
