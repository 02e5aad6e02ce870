"""What sparse_grad leaves for those who export: its updates put into the weights they change, and how many entries of each may learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from matmorph.errors import SpecError
from matmorph.ir.core import Const, Graph, Value
from matmorph.ir.rewiring import rewired, swept
from matmorph.passes.adapters.reparametrised import folded
from matmorph.passes.adapters.table import joins
from matmorph.passes.adapters.trainables import method_of
from matmorph.passes.methods.sparse_grad import DELTA, SparseGrad, SparseGradSpec
from matmorph.specs.schema import Spec


def updates_of(graph: Graph) -> tuple[Const, ...]:
    """The weights of sparse_grad that train."""
    return tuple(const for const in graph.state if const.trainable and method_of(const) == SparseGrad.name)


def inference_graph(graph: Graph) -> Graph:
    """The graph with one weight per matmul: an update of zeros leaves the weight and its bytes as they are, another one is put into it,
    computed in float64 and rounded once. RewriteError where that leaves the range of the weight's type."""
    for const in updates_of(graph):
        site = const.path.removesuffix(f".{SparseGrad.name}.{DELTA}")
        graph = folded(graph, site, [const]).graph if bool(const.load().any()) else _bare(graph, const)
    return graph


def _bare(graph: Graph, update: Const) -> Graph:
    """Without an update: whoever reads the sum reads the weight."""
    ends, _ = joins(graph, [update])
    beside: dict[Value, Value] = {join.node.output: join.beside for join in ends}
    dropped = {join.node for join in ends}
    nodes = tuple(rewired(node, beside) for node in graph.nodes if node not in dropped)
    return swept(replace(graph, nodes=nodes), graph)


def kept_entries(graph: Graph, spec: Spec) -> Mapping[str, int]:
    """By dotted name of a weight that trains, how many of its entries take part in an update; what is not named takes part whole.

    SpecError where a rule has sparse_grad with several settings for the budget to choose from.
    """
    found: dict[str, int] = {}
    for const in updates_of(graph):
        rule = next(rule for rule in spec.rules if rule.name == const.rule)
        uses = [use for uses in rule.alternatives for use in uses if use.method == SparseGrad.name]
        settings: list[SparseGradSpec] = [use.spec for use in uses]
        if len(set(settings)) > 1:
            raise SpecError(f"rule {rule.name}: any_of has sparse_grad with different settings, which no error tells apart", at=uses[1].at)
        if settings[0].mask == "step":
            found[const.path] = settings[0].count(const.numel)
    return found
