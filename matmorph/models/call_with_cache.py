"""What `cached_call` must know of a kind of model, and the object that transformers keeps its pairs of keys and values in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch

from matmorph.errors import InputError

PAST, PRESENT, LOGITS = "past_key_values", "present", "logits"
BATCH, NEW, BEFORE = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{BEFORE} + {NEW}"
WITHOUT = "compile it without a cache: --no-cache, or cache=False"

Pairs: TypeAlias = Sequence[Mapping[str, torch.Tensor]]
"""{"key", "value"} by layer, each [batch, heads, tokens, size]."""


class CallWithCache(Protocol):
    """`names`: inputs beside the past, in their order; `axes`: names of their dynamic axes; `length`: tokens of the example's text."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def axes(self) -> Mapping[str, Any]: ...

    @property
    def length(self) -> int: ...

    def part(self, start: int, stop: int) -> Mapping[str, torch.Tensor]:
        """The inputs beside the past of a call whose new tokens are these of the text."""
        ...

    def run(self, original: Callable[..., Any], call: Mapping[str, Any]) -> dict[str, Any]:
        """Logits and what is present, by the model's own forward."""
        ...

    def kept(self, present: Sequence[Mapping[str, Any]]) -> Pairs:
        """The pairs that become a past."""
        ...

    def nested(self, pairs: Pairs) -> list[Any]:
        """The pairs as the input has them."""
        ...


def filled(pairs: Pairs) -> Any:
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


def kept_once() -> Any:
    """An empty cache whose layers take what comes first as it is, where a DynamicLayer puts an empty constant in front of it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Once(DynamicLayer):  # type: ignore[misc]  # of a package without types
        is_initialized: bool

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.is_initialized:
                return super().update(key_states, value_states, *args, **kwargs)
            self.keys, self.values = key_states, value_states
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            return key_states, value_states

    cache = DynamicCache()
    cache.layer_class_to_replicate = Once
    return cache


def pairs_of(name: str, cache: Any) -> list[dict[str, torch.Tensor]]:
    """What the layers of a cache hold. InputError for another kind of layer. `name`: of the model, for the message."""
    from transformers.cache_utils import DynamicLayer

    odd = next((k for k, layer in enumerate(cache.layers) if not isinstance(layer, DynamicLayer) or not layer.is_initialized), None)
    if odd is not None or not cache.layers:
        what = f"layer {odd} of its cache is a {type(cache.layers[odd]).__name__}" if odd is not None else "its cache stays empty"
        raise InputError(f"{name} keeps no pair of keys and values per layer: {what}", [WITHOUT])
    return [{"key": layer.keys, "value": layer.values} for layer in cache.layers]


def inputs_by_name(inputs: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """Example inputs by name; positional ones take `names`."""
    leaves = inputs if isinstance(inputs, Mapping | tuple | list) else (inputs,)
    return leaves if isinstance(leaves, Mapping) else dict(zip(names, leaves, strict=False))


def given(found: Mapping[str, Any], name: str, device: torch.device) -> torch.Tensor:
    """The example's tensor of that name. InputError without one."""
    if name not in found:
        raise InputError(f"a model with a cache is called with {name}; given: {', '.join(map(str, found)) or 'nothing'}", [WITHOUT])
    return torch.as_tensor(found[name], device=device)


def tokens_of(found: Mapping[str, Any], name: str, device: torch.device) -> torch.Tensor:
    """Token ids that become a past and what is new. InputError for none, and for too few."""
    ids = given(found, name, device)
    if ids.dim() != 2 or ids.shape[1] < 4:
        raise InputError(f"{name} of the example has shape {tuple(ids.shape)}; a cache needs [batch, tokens] with four tokens or more")
    return ids


def mask_of(
    found: Mapping[str, Any], name: str, ids: torch.Tensor, ids_name: str, otherwise: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The mask of tokens, int64; `otherwise` of the ids where none is given. InputError for another shape."""
    mask = torch.as_tensor(found[name], device=ids.device).to(torch.int64) if name in found else otherwise(ids)
    if mask.shape != ids.shape:
        raise InputError(f"{name} of the example has shape {tuple(mask.shape)}, and {ids_name} {tuple(ids.shape)}")
    return mask


def refuse_others(found: Mapping[str, Any], known: Sequence[str]) -> None:
    """InputError for inputs that a call with a cache does not have."""
    others = [name for name in found if name not in known]
    if others:
        raise InputError(f"a model with a cache is called with {' and '.join(known)}, not with {', '.join(others)}", [WITHOUT])


def two_rows(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """At least two, or a trace takes the number of rows for a constant."""
    return {name: tensor if len(tensor) > 1 else torch.cat([tensor, tensor]) for name, tensor in tensors.items()}
