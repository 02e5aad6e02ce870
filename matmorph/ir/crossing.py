"""A graph with an encoder and a cache, cut in two: the encoder, which reads once, and the decoder, which is run again for each token.

The cut goes through the results that no new token changes: keys and values of attention over what was read. Names play no part in finding
them; what the decoder takes in their place is called as the past is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from matmorph.ir.cache import Slot, find_slots, reads_size, where_sized
from matmorph.ir.core import Arg, Const, Graph, Input, Node, Signature, Value
from matmorph.ir.op_table import of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.rewiring import needed, rewired, rewired_outputs
from matmorph.ir.types import TensorType, dim_symbols

_COSTLY = of_kind("matmul", "linear", "einsum", "convolution", "attention", "contraction", "recurrent")


@dataclass(frozen=True, slots=True, eq=False)
class Crossing:
    """`value`: what the encoder gives as its output `made`, and the decoder takes as its input `taken`."""

    value: Value
    made: str
    taken: str


@dataclass(frozen=True, slots=True, eq=False)
class Halves:
    """`encoder`: from what is read to the crossings; `decoder`: from the crossings, new tokens and the past to the other results."""

    encoder: Graph
    decoder: Graph
    crossings: tuple[Crossing, ...]


def find_halves(graph: Graph) -> Halves | str | None:
    """The graph in two, each with the inputs that it reads; None for a graph without a cache or without such results, and why where what
    is read reaches the decoder by another way than these too, so that it would be computed again for each token."""
    slots = find_slots(graph)
    if not slots:
        return None
    moving = _moving(graph, slots)
    crossings = _crossings(graph, slots, moving)
    if not crossings:
        return None
    encoder = _half(
        graph, [(one.made, one.value) for one in crossings], [entry for entry in graph.signature.inputs if entry.value not in moving]
    )
    fresh = {one.value: replace(one.value, name=one.taken.replace(".", "_")) for one in crossings}
    made = {one.made for one in crossings}
    left = replace(graph, nodes=tuple(rewired(node, fresh) for node in graph.nodes if fresh.keys().isdisjoint(node.outputs)))
    named = zip(graph.signature.outputs, rewired_outputs(graph, fresh), strict=True)
    inputs = [*graph.signature.inputs, *(Input(one.taken, fresh[one.value]) for one in crossings)]
    decoder = _half(left, [(name, out) for name, out in named if name not in made], inputs)
    again = next((node for node in decoder.nodes if base_name(node.op) in _COSTLY and moving.isdisjoint(node.outputs)), None)
    if again is not None:
        where = again.origin.path or "the model itself"
        return f"{where} ({again.op}) reads what the encoder read, beside the keys and values that were made of it"
    return Halves(encoder, decoder, crossings)


def _moving(graph: Graph, slots: Sequence[Slot]) -> set[Value]:
    """Values that new tokens or the past change. A number of rows is none, off whichever input it is read."""
    axes = dim_symbols([slot.total for slot in slots])
    found = {value for value in graph.inputs if isinstance(value.type, TensorType) and axes & dim_symbols(value.tensor.shape)}
    for node in graph.nodes:
        if reads_size(node) and not axes & dim_symbols([node.args[0].tensor.shape[node.args[1]]]):
            continue
        if not found.isdisjoint(node.inputs()):
            found.update(node.outputs)
    return found


def _crossings(graph: Graph, slots: Sequence[Slot], moving: set[Value]) -> tuple[Crossing, ...]:
    """In the order of the results. One value under two names crosses once."""
    past, present = (name.partition(".")[0] for name in (slots[0].input, slots[0].output))
    found: dict[Value, Crossing] = {}
    for name, value in graph.results:
        if value not in moving and not isinstance(value, Const) and value not in graph.inputs:
            root, dot, rest = name.partition(".")
            found.setdefault(value, Crossing(value, name, f"{past}.{rest}" if root == present and dot else f"{past}.{name}"))
    return tuple(found.values())


def _half(graph: Graph, results: Sequence[tuple[str, Arg]], inputs: Iterable[Input]) -> Graph:
    """The part of the graph that the results need, with the inputs among these that it reads."""
    outputs = tuple(out for _, out in results)
    nodes = needed(graph.nodes, outputs)
    read = {value for node in nodes if not reads_size(node) for value in node.inputs()} | {out for out in outputs if isinstance(out, Value)}
    kept = [entry for entry in inputs if entry.value in read]
    values = [entry.value for entry in kept if entry.value is not None]
    nodes = tuple(_resized(node, values) for node in nodes)
    names = [name for name, _ in results]
    half = replace(
        graph,
        signature=Signature.of_keywords(kept, names),
        nodes=nodes,
        outputs=outputs,
        state=tuple(const for const in graph.state if const in read),
    )
    return replace(half, ranges={name: limits for name, limits in graph.ranges.items() if name in half.symbols()})


def _resized(node: Node, values: Sequence[Value]) -> Node:
    """A size read off an input that is left."""
    if not reads_size(node) or node.args[0] in values or isinstance(node.args[0], Const):
        return node
    found = where_sized(values, node.args[0].tensor.shape[node.args[1]])
    return node if found is None else replace(node, args=found)
