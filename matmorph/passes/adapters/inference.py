"""The graph that is exported to run, as the methods that put something into it want it."""

from __future__ import annotations

from matmorph.ir.core import Graph
from matmorph.passes.methods.protocol import Methods, named_method


def inference_graph(graph: Graph, methods: Methods) -> Graph:
    """Without what only training needs (`Method.for_inference`). InputError where a method that made a weight is not installed."""
    for name in dict.fromkeys(const.method for const in graph.state if const.method is not None):
        graph = named_method(methods, name).for_inference(graph)
    return graph
