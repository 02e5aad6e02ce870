"""Inputs that say what attention may look at, found by dataflow: what reaches the mask of an attention, or the operand of a softmax,
without a matrix product or a table in between. Names play no part."""

from __future__ import annotations

from collections.abc import Iterator

from matmorph.ir.core import Graph, Node, Value, values_in
from matmorph.ir.op_reading import operands_of
from matmorph.ir.op_table import LAYOUT_OPS, OPERATORS, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.types import TensorType

_PASSED = LAYOUT_OPS | of_kind("elementwise", "part", "pick", "join", "reduction")
"""Operators that a mask goes through on its way: comparisons, broadcasts, look-ups by position, sums of several masks."""


def attention_masks(graph: Graph) -> tuple[Value, ...]:
    """Boolean and integer inputs of two axes or more, in order, that decide what some attention of the graph sees."""
    makers = {value: node for node in graph.nodes for value in node.outputs}
    waiting = [value for node in graph.nodes for value in _biases(node)]
    reached: set[Value] = set()
    while waiting:
        value = waiting.pop()
        if value in reached:
            continue
        reached.add(value)
        node = makers.get(value)
        if node is not None and base_name(node.op) in _PASSED:
            waiting.extend(_operands(node))
    return tuple(value for value in graph.inputs if value in reached and _is_discrete(value))


def _biases(node: Node) -> Iterator[Value]:
    """What is added to, or selects among, the scores of a node."""
    operator = OPERATORS.get(base_name(node.op))
    if operator is None:
        return
    if operator.kind == "attention":
        yield from values_in((*node.args[3:], node.attrs.get("attn_mask")))
    if operator.kind == "softmax":
        yield from values_in(node.args[0])


def _operands(node: Node) -> Iterator[Value]:
    if OPERATORS[base_name(node.op)].kind == "join":
        return values_in(node.args[0])
    return iter(operands_of(node).values())


def _is_discrete(value: Value) -> bool:
    kind = value.type
    return isinstance(kind, TensorType) and len(kind.shape) > 1 and not kind.torch_dtype.is_floating_point
