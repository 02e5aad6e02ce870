"""Where a graph attends to its cache: as one operator, or written out as products around a softmax. Found by dataflow from the cache's
slots; whether it is what it looks like is for the proofs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matmorph.ir.cache import Slot, find_slots
from matmorph.ir.core import Graph, Node, Value
from matmorph.ir.op_reading import operands_of
from matmorph.ir.op_table import LAYOUT_OPS, OPERATORS, PRODUCTS, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.types import Dim

_PASSED = LAYOUT_OPS | of_kind("part", "dropout")
_NEAR = 64
"""Nodes before a softmax among which its product is looked for: a scale, a cap, a sink, conversions, and those that make the mask."""


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """One attention over the cache: its query [B, N, S, D], its slots, `result` [B, N, S, E]. `operator`: the node, where it is one;
    `weights`: the softmax, where it is written out."""

    query: Value
    key: Slot
    value: Slot
    result: Value
    operator: Node | None
    weights: Value | None
    node: Node

    @property
    def length(self) -> Dim:
        """New tokens."""
        return self.key.new.tensor.shape[self.key.axis]

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries, and of keys and values."""
        return int(self.query.tensor.shape[1]), int(self.key.past.tensor.shape[1])

    @property
    def size(self) -> int:
        """Of a head's query and key."""
        return int(self.query.tensor.shape[-1])


def find_cores(graph: Graph) -> tuple[Core, ...]:
    """The attentions over slots of the cache, in order."""
    makers = graph.producers()
    slots = {slot.present: slot for slot in find_slots(graph)}
    found = []
    for node in graph.nodes:
        kind = OPERATORS[base_name(node.op)].kind if base_name(node.op) in OPERATORS else None
        if kind == "attention" and len(node.outputs) == 1:
            query, key, value = node.args[:3]
            pair = slots.get(_source(key, makers)), slots.get(_source(value, makers))
            if pair[0] is not None and pair[1] is not None:
                found.append(Core(query, pair[0], pair[1], node.output, node, None, node))
        elif base_name(node.op) in PRODUCTS:
            core = _written_out(node, makers, slots)
            found += [core] if core is not None else []
    return tuple(core for core in found if _is_regular(core))


def _written_out(node: Node, makers: dict[Value, Node], slots: dict[Value, Slot]) -> Core | None:
    """The core whose last product this is."""
    first, second = (node.args[at] for at in PRODUCTS[base_name(node.op)])
    value = slots.get(_source(second, makers))
    weights = makers.get(_source(first, makers))
    if value is None or weights is None or base_name(weights.op) not in of_kind("softmax"):
        return None
    for product in _products_near(weights, makers):
        query, key = (product.args[at] for at in PRODUCTS[base_name(product.op)])
        slot = slots.get(_source(key, makers))
        if slot is not None:
            return Core(query, slot, value, node.output, None, weights.output, node)
    return None


def _products_near(node: Node, makers: dict[Value, Node]) -> Iterator[Node]:
    waiting, seen = [node], {node}
    for _ in range(_NEAR):
        if not waiting:
            return
        current = waiting.pop(0)
        if base_name(current.op) in PRODUCTS:
            yield current
            continue
        for value in current.inputs():
            maker = makers.get(value)
            if maker is not None and maker not in seen:
                seen.add(maker)
                waiting.append(maker)


def _source(value: Value, makers: dict[Value, Node]) -> Value:
    """What is only laid out anew to be the value."""
    while (node := makers.get(value)) is not None and base_name(node.op) in _PASSED:
        operand = next(iter(operands_of(node).values()), None)
        if operand is None:
            break
        value = operand
    return value


def _is_regular(core: Core) -> bool:
    """Heads of a fixed number and size, tokens third."""
    shapes = [core.query.tensor.shape, core.key.past.tensor.shape, core.value.past.tensor.shape]
    fixed = all(len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int) for shape in shapes)
    return fixed and core.key.axis == core.value.axis == 2 and core.query.tensor.shape[2] == core.length and core.size == shapes[1][3]
