"""What a manifest says of a graph's key/value cache."""

from __future__ import annotations

from matmorph.ir.cache import Slot, find_slots
from matmorph.ir.cache_ops import CODED
from matmorph.ir.core import Graph
from matmorph.passes.sizes import cache_bytes
from matmorph.runtime.format.cache import CacheInfo, CacheSlot


def cache_info(graph: Graph, precision: str, max_length: int | None, compact: bool = False, shared: bool = False) -> CacheInfo | None:
    """Of the graph as it is exported; None where it keeps no cache. `max_length`: tokens that the model has positions for. `compact`: rows
    of the cache have no gaps; `shared`: its past and present may be one buffer."""
    size = cache_bytes(graph, precision)
    if size is None:
        return None
    return CacheInfo(
        slots=tuple(CacheSlot(slot.input, slot.output, slot.axis, _scales(graph, slot)) for slot in find_slots(graph)),
        padding="right" if compact else "any",
        share_buffer=shared,
        max_length=max_length,
        bytes_per_token=size,
    )


def _scales(graph: Graph, slot: Slot) -> str | None:
    """The input with the scales of its codes."""
    if slot.join.op != CODED or slot.past is not slot.join.args[0]:
        return None
    return next(entry.name for entry in graph.signature.inputs if entry.value is slot.join.args[1])
