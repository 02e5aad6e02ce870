"""How a causal language model of transformers is called with its key/value cache: tensors in, tensors out.

`transformers` keeps the cache in an object that a trace cannot take and ONNX cannot name. Here `forward` takes the pairs of keys and values
as nested lists and gives them back, under the names that onnxruntime-genai, optimum and transformers.js expect. The instance's `forward` is
exchanged, and put back, so that modules and parameters keep their names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from matmorph.errors import InputError
from matmorph.ir.cache import find_slots
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import evaluate
from matmorph.ir.without_cache import MASK, POSITIONS, positions_of
from matmorph.passes.statistics.empty_cache import with_empty_cache

IDS, PAST, PRESENT = "input_ids", "past_key_values", "present"
BATCH, NEW, BEFORE = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{BEFORE} + {NEW}"
_NEW_TOKENS = 3
"""Of the example; what lies before them becomes its past."""
_WITHOUT = "compile it without a cache: --no-cache, or cache=False"


@dataclass(frozen=True, slots=True, eq=False)
class CachedCall:
    """`examples`: a call with a past that the model made itself; `text`: tokens and mask that it is a part of; `axes`: names of its dynamic
    axes; `max_length`: tokens that the model has positions for, None = it does not say."""

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
        before = known[slots[0].input].shape[slots[0].axis]
        batch = with_empty_cache(graph, {name: tensor[:, :before] for name, tensor in self.text.items()})
        with torch.no_grad():
            made = dict(zip(graph.signature.outputs, evaluate(graph, tree_leaves(batch)), strict=True))
        return list({**known, **{slot.input: made[slot.output].contiguous() for slot in slots}}.values())


@contextmanager
def cached_call(module: torch.nn.Module, example_inputs: Any) -> Iterator[CachedCall]:
    """In the block, `module` takes `input_ids`, `attention_mask`, `position_ids` (where its own forward does) and `past_key_values`, a
    [{"key", "value"}] per layer, and gives {"logits", "present": [{"key", "value"}]}.

    example_inputs: `input_ids` [batch, tokens] of at least four tokens and, as wanted, `attention_mask`, as the model takes them without a
    cache. Raises InputError for other inputs, and for a model that keeps no pair of keys and values per layer.
    """
    given = _examples(example_inputs, next((p.device for p in module.parameters()), torch.device("cpu")))
    parameters = inspect.signature(module.forward).parameters
    if PAST not in parameters or IDS not in parameters:
        raise InputError(f"{type(module).__name__} has no cache of keys and values: its forward takes no {PAST}", [_WITHOUT])
    with _forward_exchanged(module, POSITIONS in parameters):
        yield _call(module, given, POSITIONS in parameters)


def _examples(given: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Two rows at least, and a mask."""
    named = _named(given)
    others = [name for name in named if name not in (IDS, MASK)]
    if others:
        raise InputError(f"a model with a cache is called with {IDS} and {MASK}, not with {', '.join(others)}", [_WITHOUT])
    ids = torch.as_tensor(named[IDS], device=device)
    if ids.dim() != 2 or ids.shape[1] < 4:
        raise InputError(f"{IDS} of the example has shape {tuple(ids.shape)}; a cache needs [batch, tokens] with four tokens or more")
    mask = torch.as_tensor(named[MASK], device=device).to(torch.int64) if MASK in named else _left_padded(ids)
    if mask.shape != ids.shape:
        raise InputError(f"{MASK} of the example has shape {tuple(mask.shape)}, and {IDS} {tuple(ids.shape)}")
    return {IDS: ids, MASK: mask} if len(ids) > 1 else {IDS: ids.repeat(2, 1), MASK: mask.repeat(2, 1)}


def _named(given: Any) -> Mapping[str, Any]:
    leaves = given if isinstance(given, Mapping | tuple | list) else (given,)
    named = leaves if isinstance(leaves, Mapping) else dict(zip((IDS, MASK), leaves, strict=False))
    if IDS not in named:
        raise InputError(f"a model with a cache is called with {IDS}; given: {', '.join(map(str, named)) or 'nothing'}", [_WITHOUT])
    return named


def _left_padded(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[1:, : ids.shape[1] // 4] = 0
    return mask


@contextmanager
def _forward_exchanged(module: torch.nn.Module, positions: bool) -> Iterator[None]:
    """No dropout meanwhile, and no `use_cache` in a configuration: the call itself says it."""
    original, own = module.forward, module.__dict__.get("forward")
    names = (IDS, MASK, *((POSITIONS,) if positions else ()))

    def forward(**call: Any) -> dict[str, Any]:
        cache = _filled(call[PAST])
        answer = original(**{name: call[name] for name in names}, **{PAST: cache}, use_cache=True)
        return {"logits": answer.logits, PRESENT: _pairs(type(module).__name__, cache)}

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in (*names, PAST)])  # type: ignore[attr-defined]
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


def _filled(pairs: Sequence[Mapping[str, torch.Tensor]]) -> Any:
    """A cache of these pairs. Made without a configuration: one that forgets what has left a window counts tokens in Python, which a trace
    takes for constants; the window stays in the mask."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for pair in pairs:
        layer = DynamicLayer()
        layer.keys, layer.values = pair["key"], pair["value"]
        layer.dtype, layer.device, layer.is_initialized = pair["key"].dtype, pair["key"].device, True
        cache.layers.append(layer)
    return cache


def _pairs(name: str, cache: Any) -> list[dict[str, torch.Tensor]]:
    """What the layers of a cache hold. InputError for another kind of layer."""
    from transformers.cache_utils import DynamicLayer

    odd = next((k for k, layer in enumerate(cache.layers) if not isinstance(layer, DynamicLayer) or not layer.is_initialized), None)
    if odd is not None or not cache.layers:
        what = f"layer {odd} of its cache is a {type(cache.layers[odd]).__name__}" if odd is not None else "its cache stays empty"
        raise InputError(f"{name} keeps no pair of keys and values per layer: {what}", [_WITHOUT])
    return [{"key": layer.keys, "value": layer.values} for layer in cache.layers]


def _call(module: torch.nn.Module, given: Mapping[str, torch.Tensor], positions: bool) -> CachedCall:
    """The example's first tokens as the past of its last ones."""
    ids, mask = given[IDS], given[MASK]
    new = min(_NEW_TOKENS, ids.shape[1] // 2)
    where = positions_of(mask)

    def call(tokens: slice, seen: int | None, past: Any) -> dict[str, Any]:
        found = {IDS: ids[:, tokens], MASK: mask[:, :seen], **({POSITIONS: where[:, tokens]} if positions else {})}
        return {**{name: tensor.contiguous() for name, tensor in found.items()}, PAST: past}

    past = _past(module, call(slice(None, -new), -new, []))
    before = {"name": BEFORE, "min": 0}
    axes = {IDS: {0: BATCH, 1: NEW}, MASK: {0: BATCH, 1: TOTAL}, **({POSITIONS: {0: BATCH, 1: NEW}} if positions else {})}
    return CachedCall(
        examples=call(slice(-new, None), None, past),
        text=given,
        axes={**axes, PAST: [{part: {0: BATCH, 2: before} for part in pair} for pair in past]},
        max_length=max_length(module),
    )


def _past(module: torch.nn.Module, call: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    """What the model keeps of a first call. InputError for a cache of another kind."""
    name = type(module).__name__
    training = [one for one in module.modules() if one.training]
    module.eval()
    try:
        with torch.no_grad():
            past: list[dict[str, torch.Tensor]] = module(**call)[PRESENT]
    except InputError:
        raise
    except Exception as error:  # of the model's own code, which met a cache that it has no use for
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{name} does not run with a cache of keys and values: {type(error).__name__}: {reason}", [_WITHOUT]) from error
    finally:
        for one in training:
            one.training = True
    tokens = call[IDS].shape[1]
    for layer, pair in enumerate(past):
        for part, tensor in pair.items():
            if tensor.dim() != 4 or tensor.shape[2] != tokens:
                raise InputError(
                    f"{name} keeps no {part}s of all tokens in layer {layer}: [batch, heads, tokens, size] with {tokens} tokens is wanted, "
                    f"it has {list(tensor.shape)}",
                    [_WITHOUT],
                )
    return [{part: tensor.detach().contiguous() for part, tensor in pair.items()} for pair in past]


def max_length(module: Any) -> int | None:
    """Tokens that the model has positions for, by its configuration; None where that does not say."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"))
    return next((value for value in found if isinstance(value, int) and value > 0), None)
