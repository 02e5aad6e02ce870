"""A Graph with other weights in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from matmorph.ir.core import Const, Graph, Node, Value, map_values


def exchanged(graph: Graph, change: Mapping[Const, Const]) -> Graph:
    """The graph with some of its weights replaced by others, wherever they are read."""

    def swap(value: Value) -> Value:
        return change.get(value, value) if isinstance(value, Const) else value

    return replace(
        graph,
        nodes=tuple(mapped(node, swap) for node in graph.nodes),
        outputs=tuple(map_values(output, swap) for output in graph.outputs),
        state=tuple(change.get(const, const) for const in graph.state),
    )


def mapped(node: Node, swap: Callable[[Value], Value]) -> Node:
    """The node with what it reads and makes swapped; itself where nothing of it changes."""
    if not any(swap(value) is not value for value in (*node.inputs(), *node.outputs)):
        return node
    return replace(
        node,
        args=map_values(node.args, swap),
        attrs={name: map_values(arg, swap) for name, arg in node.attrs.items()},
        outputs=tuple(swap(value) for value in node.outputs),
    )
