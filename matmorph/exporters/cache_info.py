"""What a manifest says of a graph's key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from matmorph.ir.cache import Slot, find_slots
from matmorph.ir.core import Graph
from matmorph.ir.types import element_size
from matmorph.runtime.format.artifact import TensorInfo
from matmorph.runtime.format.cache import CacheInfo, CacheSlot


def cache_info(graph: Graph, max_length: int | None, compact: bool = False, shared: bool = False) -> CacheInfo | None:
    """Of the graph as it is exported; None where it keeps no cache. `max_length`: tokens that the model has positions for. `compact`: rows
    of the cache have no gaps; `shared`: its past and present may be one buffer."""
    slots = find_slots(graph)
    if not slots:
        return None
    return CacheInfo(
        slots=tuple(CacheSlot(slot.input, slot.output, slot.axis) for slot in slots),
        padding="right" if compact else "any",
        share_buffer=shared,
        max_length=max_length,
        bytes_per_token=bytes_per_token(slots),
    )


def bytes_per_token(slots: tuple[Slot, ...]) -> int:
    """Of all slots, for one row of a batch; those of a size that is not fixed do not count."""
    return sum(slot.bytes_per_token or 0 for slot in slots)


def as_written(cache: CacheInfo, inputs: Sequence[TensorInfo]) -> CacheInfo:
    """With the bytes of the types that the file has."""
    ports = {info.name: info for info in inputs}
    sizes = []
    for slot in cache.slots:
        port = ports[slot.past]
        rest = [dim for axis, dim in enumerate(port.shape) if axis not in (0, slot.axis) and isinstance(dim, int)]
        sizes.append(prod(rest) * element_size(port.dtype))
    return replace(cache, bytes_per_token=sum(sizes))
