"""Where what some weights make is added to something else, and the graph without it.

An adapter's nodes end in one `add` per application: one operand comes from the adapter's weights, the other is the matmul beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from matmorph.errors import InputError, VerifyError
from matmorph.ir.core import Const, Graph, Node, Value, values_in
from matmorph.ir.rewiring import rewired, rewired_outputs, swept


@dataclass(frozen=True, slots=True, eq=False)
class Join:
    """Where an adapter meets what it stands beside: `node` adds `update` to `beside`."""

    node: Node
    update: Value
    beside: Value


def joins(graph: Graph, factors: Collection[Const]) -> tuple[tuple[Join, ...], frozenset[Value]]:
    """(where the results of these weights are added, all values that come from them on the way). VerifyError where one is not added."""
    tainted: set[Value] = set(factors)
    found: list[Join] = []
    for node in graph.nodes:
        touched = [value for value in node.inputs() if value in tainted]
        if not touched:
            continue
        if node.op == "aten.add.Tensor" and len(touched) == 1 and not node.attrs:
            beside = next(value for value in node.inputs() if value not in tainted)
            found.append(Join(node, touched[0], beside))
            continue
        tainted.update(node.outputs)
    if not found or any(value in tainted for value in values_in(graph.outputs)):
        raise VerifyError(f"the weights {', '.join(const.path for const in factors)} are not added to a matmul")
    return tuple(found), frozenset(tainted)


def without(graph: Graph, factors: Collection[Const]) -> Graph:
    """The graph as it is without what these weights add; the node beside takes the name of the sum."""
    ends, tainted = joins(graph, factors)
    dropped = {join.node for join in ends}
    names: dict[Value, Value] = {}
    for join in ends:  # the sum's value goes to what makes the other operand; sums of sums in turn
        names[join.beside] = join.node.output
    for value in names:
        while names[value] in names:
            names[value] = names[names[value]]
    kept = [rewired(node, names) for node in graph.nodes if node not in dropped and tainted.isdisjoint(node.outputs)]
    state = tuple(const for const in graph.state if const not in factors)
    return swept(replace(graph, nodes=tuple(kept), outputs=rewired_outputs(graph, names), state=state), graph)


def bare(graph: Graph, factors: Collection[Const]) -> Graph:
    """The graph in which whoever reads a sum with what these weights add reads the other operand: the sum of something that is no matmul,
    or that others read too."""
    ends, _ = joins(graph, factors)
    beside: dict[Value, Value] = {join.node.output: join.beside for join in ends}
    dropped = {join.node for join in ends}
    nodes = tuple(rewired(node, beside) for node in graph.nodes if node not in dropped)
    return swept(replace(graph, nodes=nodes), graph)


def consts_of(graph: Graph, names: Iterable[str]) -> tuple[Const, ...]:
    """Weights by dotted name. InputError for one that the graph does not have: it was merged, or the table is another model's."""
    known = {const.path: const for const in graph.state}
    wanted = tuple(names)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise InputError(f"the graph has no weight {missing[0]}: its adapters were merged already, or the table belongs to another model")
    return tuple(known[name] for name in wanted)
