"""Queries, keys and values of quantised projections as one product, where GroupQueryAttention takes the three side by side.

The rows of codes, scales, zero points and biases lie one after the other, so the product is the same to the bit. In the file one weight
`layers.0.attention.{q,k,v}.weight` stands for three. Only products of one kind that read one value are joined, whose results nothing but
the attention reads, and whose weights nothing else reads: an adapter beside one of them keeps all three apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from matmorph.exporters.onnx.emit import DOMAIN

PRODUCT, ATTENTION = "MatMulNBits", "GroupQueryAttention"

Joined = dict[str, tuple[str, ...]]
"""The names of the weights, in order, that a joined one is made of."""


def join_projections(model: ir.Model) -> Joined:
    """Joins them in the main graph in place, whose weights have no values yet; what each new weight is made of."""
    joined: Joined = {}
    for node in model.graph:
        if node.op_type == ATTENTION and node.domain == DOMAIN and (products := _products(node)) is not None:
            joined |= _join(model.graph, node, products)
    return joined


def _products(attention: ir.Node) -> list[ir.Node] | None:
    """The products that make queries, keys and values, where they may be one."""
    found = []
    for value in attention.inputs[:3]:
        node = value.producer() if value is not None else None
        if value is None or node is None or node.op_type != PRODUCT or len(value.uses()) != 1 or value.is_graph_output():
            return None
        found.append(node)
    first, *others = found
    alike = all(node.inputs[0] is first.inputs[0] and _kind(node) == _kind(first) for node in others)
    return found if alike and len(set(found)) == len(found) and all(map(_owns_weights, found)) else None


def _kind(node: ir.Node) -> tuple[object, ...]:
    """All but how many rows it has."""
    numbers = {name: attribute.value for name, attribute in node.attributes.items() if name != "N"}
    rows = [None if value is None or value.shape is None else (value.dtype, *value.shape[1:]) for value in node.inputs[1:]]
    return sorted(numbers.items()), rows


def _owns_weights(node: ir.Node) -> bool:
    """Whether what it multiplies with are weights of the file, whole rows of each, that nothing else reads."""
    rows = node.attributes.get_int("N")
    return all(
        value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is None
        and len(value.uses()) == 1
        and value.shape is not None
        and value.shape[0] == rows
        for value in node.inputs[1:]
        if value is not None
    )


def _join(graph: ir.Graph, attention: ir.Node, products: Sequence[ir.Node]) -> Joined:
    first = products[0]
    joined: Joined = {}
    rows = sum(node.attributes.get_int("N", 0) for node in products)
    for index, value in enumerate(first.inputs):
        if index == 0 or value is None:
            continue
        parts = [node.inputs[index] for node in products]
        names = tuple(str(part.name) for part in parts if part is not None)
        whole = ir.Value(name=joined_name(names), type=value.type, shape=ir.Shape([rows, *(value.shape or ())[1:]]))
        joined[str(whole.name)] = names
        graph.initializers[str(whole.name)] = whole
        for node in products:
            node.replace_input_with(index, None)
        first.replace_input_with(index, whole)
        for name in names:
            del graph.initializers[name]
    first.attributes.add(ir.AttrInt64("N", rows))
    result = first.outputs[0]
    result.shape = None if result.shape is None else ir.Shape([*result.shape[:-1], rows])
    for index in (1, 2):
        attention.replace_input_with(index, None)
    for node in products[1:]:
        graph.remove(node, safe=True)
    return joined


def joined_name(names: Sequence[str]) -> str:
    """`a.{q,k,v}.weight` of a.q.weight, a.k.weight and a.v.weight."""
    split = [name.split(".") for name in names]
    shortest = min(map(len, split))
    front = next((k for k in range(shortest) if len({tuple(parts[: k + 1]) for parts in split}) > 1), shortest)
    back = next((k for k in range(shortest - front) if len({tuple(parts[len(parts) - k - 1 :]) for parts in split}) > 1), 0)
    middles = [".".join(parts[front : len(parts) - back]) for parts in split]
    return ".".join([*split[0][:front], "{" + ",".join(middles) + "}", *split[0][len(split[0]) - back :]])
