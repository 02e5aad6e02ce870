"""Batches of a model with a cache: whole texts, behind an empty one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_unflatten

from matmorph.ir.cache import find_slots
from matmorph.ir.core import Graph, Value
from matmorph.ir.without_cache import MASK, POSITIONS, positions_of


def with_empty_cache(graph: Graph, batch: Any) -> Any:
    """The batch with what it lacks: a cache without a token in it, positions counted from the mask, a mask that shows all. The batch itself
    for a model that keeps no cache, and where it brings a past of its own."""
    pasts = {slot.input: slot for slot in find_slots(graph)}
    if not pasts:
        return batch
    rest = [entry for entry in graph.signature.inputs if entry.name not in pasts]
    leaves = batch if isinstance(batch, Mapping | tuple | list) else (batch,)
    named = dict(leaves) if isinstance(leaves, Mapping) else dict(zip((entry.name for entry in rest), leaves, strict=False))
    roots = {name.partition(".")[0] for name in pasts}
    if roots & named.keys() or not named or (not isinstance(leaves, Mapping) and len(leaves) > len(rest)):
        return batch
    first = torch.as_tensor(next(iter(named.values())))
    if MASK not in named and first.dim() and any(entry.name == MASK for entry in rest):
        named[MASK] = torch.ones_like(first, dtype=torch.int64)
    values = {
        entry.name: _empty(entry.value, pasts[entry.name].axis, first)
        if entry.name in pasts and entry.value is not None
        else named.get(entry.name)
        for entry in graph.signature.inputs
    }
    if values.get(POSITIONS) is None and POSITIONS in values:
        values[POSITIONS] = positions_of(torch.as_tensor(named[MASK]))
    if any(leaf is None for leaf in values.values()):
        return batch  # whoever binds it says what is missing
    args, kwargs = tree_unflatten([torch.as_tensor(leaf) for leaf in values.values()], graph.signature.in_spec)
    more = {name: leaf for name, leaf in named.items() if name not in values}
    return (args, kwargs) if args and kwargs else args or {**kwargs, **more}


def _empty(value: Value, axis: int, first: torch.Tensor) -> torch.Tensor:
    """Zeros without a token, for as many rows as the batch has."""
    sizes = [0 if k == axis else len(first) if k == 0 else int(size) for k, size in enumerate(value.tensor.shape)]
    return torch.zeros(sizes, dtype=value.tensor.torch_dtype)
