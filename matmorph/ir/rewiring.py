"""Rewiring: what a node reads and makes exchanged for something else, and what nothing reads any more taken out.

Nothing is mutated: each function gives new nodes or a new graph, and the old ones where nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor

from matmorph.ir.core import Arg, Const, Graph, Node, Value, map_values, mapped_arguments, values_in
from matmorph.ir.types import TensorType, dtype_name

Change: TypeAlias = Mapping[Any, Value]
"""What stands for a value from now on. Keys are Values; a mapping of Consts alone is one too, which the type of a key cannot say."""


def rewired(node: Node, change: Change) -> Node:
    """The node with values exchanged, in what it reads and in what it makes; itself where it has none of them. Sub-graphs stay as they
    are: what they read enters through their operator."""
    if change.keys().isdisjoint(node.inputs()) and change.keys().isdisjoint(node.outputs):
        return node
    args, attrs = mapped_arguments(node, lambda value: change.get(value, value))
    return replace(node, args=args, attrs=attrs, outputs=tuple(change.get(value, value) for value in node.outputs))


def exchanged(graph: Graph, change: Mapping[Const, Const]) -> Graph:
    """The graph with some of its weights replaced by others, wherever they are read."""
    return replace(
        graph,
        nodes=tuple(rewired(node, change) for node in graph.nodes),
        outputs=rewired_outputs(graph, change),
        state=tuple(change.get(const, const) for const in graph.state),
    )


def rewired_outputs(graph: Graph, change: Change) -> tuple[Arg, ...]:
    """What the graph gives, with values exchanged."""
    return tuple(map_values(output, lambda value: change.get(value, value)) for output in graph.outputs)


def loaded(const: Const, tensor: Tensor, name: str | None = None) -> Const:
    """The weight with other numbers, and another dotted name where one is given; its bytes are nobody else's."""
    path = name or const.path
    type = TensorType(dtype_name(tensor.dtype), tuple(tensor.shape))
    names = (path,) if name else const.names
    return replace(const, name=name or const.name, type=type, load=lambda: tensor, names=names, storage=f"{path} (changed)")


def needed(nodes: Sequence[Node], results: Iterable[Arg]) -> tuple[Node, ...]:
    """Nodes that the results depend on."""
    wanted = set(values_in(tuple(results)))
    kept: list[Node] = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outputs):
            kept.append(node)
            wanted.update(node.inputs())
    return tuple(reversed(kept))


def swept(graph: Graph, before: Graph) -> Graph:
    """Without nodes that nobody reads any more, in turn, and weights likewise: somebody read them in `before`, or reads them in `graph` and
    goes too. What nobody reads in either stays, as `state` may name weights that no node reads."""
    was_read = _read(before) | _read(graph)
    wanted = set(values_in(graph.outputs))
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if not wanted.isdisjoint(node.outputs) or was_read.isdisjoint(node.outputs):
            kept.append(node)
            wanted.update(node.inputs())
    state = tuple(const for const in graph.state if const in wanted or const not in was_read)
    return replace(graph, nodes=tuple(reversed(kept)), state=state)


def _read(graph: Graph) -> set[Value]:
    """Values that a node reads or that are results."""
    return {value for node in graph.nodes for value in node.inputs()} | set(values_in(graph.outputs))
