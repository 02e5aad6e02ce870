"""The networkx view holds every read, with its place."""

from __future__ import annotations

import networkx as nx

from matmorph.ir.text.printing import parse_graph
from matmorph.ir.view import to_networkx

TEXT = """graph device=cpu
range batch 1..
input %x: float32[batch, 4] "x"
parameter %w: float32[4, 4] "w"
parameter %unused: float32[2] "unused"
%linear: float32[batch, 4] = aten.linear.default(%x, %w, None)
%cat: float32[batch, 12] = aten.cat.default([%linear, %x, %linear], 1)
%a: float32[batch, 6], %b: float32[batch, 6] = aten.split.Tensor(%cat, 6, 1)
output %a "first"
output %a "again"
output None "none"
"""


def test_nodes_and_edges() -> None:
    graph = parse_graph(TEXT)
    view = to_networkx(graph)
    linear, cat, split = graph.nodes
    assert nx.is_directed_acyclic_graph(view)
    assert nx.is_bipartite(view.subgraph(set(view) - {graph.state[1]}))
    assert {thing.name for thing, data in view.nodes(data=True) if data["kind"] == "const"} == {"w", "unused"}
    assert view.nodes[linear] == {"kind": "node", "label": "aten.linear.default"}
    assert view.edges[graph.inputs[0], linear]["positions"] == ((0,),)
    assert view.edges[graph.state[0], linear]["positions"] == ((1,),)
    assert view.edges[linear.output, cat]["positions"] == ((0, 0), (0, 2))
    assert [view.edges[split, value]["positions"] for value in split.outputs] == [((0,),), ((1,),)]


def test_outputs_are_marked_and_nothing_else() -> None:
    graph = parse_graph(TEXT)
    view = to_networkx(graph)
    assert {thing.name: data["outputs"] for thing, data in view.nodes(data=True) if "outputs" in data} == {"a": (0, 1)}


def test_a_keyword_read_has_its_name() -> None:
    text = 'graph device=cpu\ninput %x: float32[] "x"\n%y: float32[] = aten.clamp.Tensor(%x, max=%x)\noutput %y "output"\n'
    graph = parse_graph(text)
    assert to_networkx(graph).edges[graph.inputs[0], graph.nodes[0]]["positions"] == ((0,), ("max",))
