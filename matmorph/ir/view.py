"""A graph as a networkx graph, for subgraph matching and drawing."""

from __future__ import annotations

import networkx as nx

from matmorph.ir.core import Arg, Graph, Node, Value

Position = tuple[int | str, ...]
"""Where in a node's arguments a value stands: (1,) the second argument, (0, 2) the third item of the first, ("bias",) a keyword."""


def to_networkx(graph: Graph) -> nx.DiGraph:
    """The bipartite graph of Node and Value objects, edges value -> node -> value.

    Node data: `kind` ("node", "input", "const" or "value") and `label` (operator or name). Edge data: `positions`, every place where the
    node reads the value (one edge even if it reads it twice), or (index of the output,) on the way out. Values that are graph outputs
    have `outputs`, the indices under which they leave. Sub-graphs are not entered: what they read enters through their operator.
    """
    found: nx.DiGraph = nx.DiGraph()
    for value in graph.inputs:
        found.add_node(value, kind="input", label=value.name)
    for const in graph.state:
        found.add_node(const, kind="const", label=const.name)
    for node in graph.nodes:
        found.add_node(node, kind="node", label=node.op)
        for value, positions in _reads(node).items():
            found.add_edge(value, node, positions=positions)
        for k, value in enumerate(node.outputs):
            found.add_node(value, kind="value", label=value.name)
            found.add_edge(node, value, positions=((k,),))
    for k, output in enumerate(graph.outputs):
        if isinstance(output, Value):
            found.nodes[output]["outputs"] = (*found.nodes[output].get("outputs", ()), k)
    return found


def _reads(node: Node) -> dict[Value, tuple[Position, ...]]:
    found: dict[Value, tuple[Position, ...]] = {}

    def walk(arg: Arg, place: Position) -> None:
        if isinstance(arg, Value):
            found[arg] = (*found.get(arg, ()), place)
        elif isinstance(arg, tuple | list):
            for k, item in enumerate(arg):
                walk(item, (*place, k))

    for k, arg in enumerate(node.args):
        walk(arg, (k,))
    for name, arg in node.attrs.items():
        walk(arg, (name,))
    return found
