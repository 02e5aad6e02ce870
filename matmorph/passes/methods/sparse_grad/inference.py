"""What sparse_grad leaves for inference: its updates put into the weights they change."""

from __future__ import annotations

from matmorph.ir.computed import folded
from matmorph.ir.core import Const, Graph
from matmorph.ir.joins import bare


def updates_of(graph: Graph, method: str) -> tuple[Const, ...]:
    """The weights of the method that train."""
    return tuple(const for const in graph.state if const.trainable and const.method == method)


def inference_graph(graph: Graph, method: str) -> Graph:
    """The graph with one weight per matmul: an update of zeros leaves the weight and its bytes as they are, another one is put into it,
    computed in float64 and rounded once. RewriteError where that leaves the range of the weight's type."""
    for const in updates_of(graph, method):
        graph = folded(graph, const.site or const.path, [const]).graph if bool(const.load().any()) else bare(graph, [const])
    return graph
