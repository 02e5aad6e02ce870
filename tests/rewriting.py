"""What the tests of calibration, rewriting and low_rank share: small graphs as text, their sites, rules, and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from handmade import match_of

from matmorph.errors import Position
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import evaluate
from matmorph.ir.site import Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.text.printing import parse_graph
from matmorph.ir.verify import verify
from matmorph.passes.methods.low_rank.method import LowRank, LowRankSpec
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.rewriting.rewrite import Outcome, rewrite
from matmorph.specs.schema import MethodUse, Rank, Rule

METHODS = {"low_rank": LowRank()}

LINEAR = """graph device=cpu
range batch 1..
input %x: float32[batch, 12] "x"
parameter %fc.weight: float32[10, 12] "fc.weight" trainable
parameter %fc.bias: float32[10] "fc.bias" trainable
%linear: float32[batch, 10] = aten.linear.default(%x, %fc.weight, %fc.bias) @":Net/fc:Linear" layer=0
%relu: float32[batch, 10] = aten.relu.default(%linear) @":Net"
output %relu "output"
"""


def weights_of(text: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights for every constant of a graph's text."""
    g = torch.Generator().manual_seed(seed)
    consts = parse_graph(text).state
    return {c.path: torch.randn([int(d) for d in c.tensor.shape], generator=g).to(c.tensor.torch_dtype) for c in consts}


def graph_of(text: str, weights: Mapping[str, torch.Tensor] | None = None) -> Graph:
    graph = parse_graph(text, weights or weights_of(text))
    verify(graph)
    return graph


def rule_of(*uses: MethodUse, **more: Any) -> Rule:
    return Rule(match=match_of({"path": "**"}), rewrite=uses, name="all", at=Position("s.yaml", 3, 5), **more)


def low_rank(rank: int | dict[str, float] = 4, **more: Any) -> MethodUse:
    """`rank` as in YAML: 4, or {"energy": 0.9, "multiple_of": 4}."""
    limits = dict(rank) if isinstance(rank, dict) else {"fixed": rank}
    beside = {key: limits.pop(key) for key in ("multiple_of", "min", "max") if key in limits}
    ((kind, value),) = limits.items()
    return MethodUse("low_rank", LowRankSpec(Rank(kind, value, **beside), **more))


def rewritten(
    graph: Graph, rule: Rule, stats: Mapping[str, SiteStats] | None = None, methods: Mapping[str, Any] = METHODS
) -> tuple[Graph, tuple[Outcome, ...]]:
    """Every site of the graph under one rule; `stats` by path. The result obeys the laws of the IR."""
    sites = [site for site in find_sites(graph) if site.form != "embedding" and not site.listed]
    known = {site: stats[site.path] for site in sites if stats and site.path in stats}
    result, outcomes = rewrite(graph, [(site, rule) for site in sites], methods, known or None)
    verify(result)
    return result, outcomes


def only_site(graph: Graph) -> Site:
    (site,) = find_sites(graph)
    return site


def run(graph: Graph, *inputs: torch.Tensor) -> Sequence[Any]:
    with torch.no_grad():
        return evaluate(graph, inputs)


def moment(x: torch.Tensor) -> SiteStats:
    """The statistics of rows [n, in], straight from the definition; errors are judged on the same rows."""
    rows = x.double()
    found = rows.T @ rows
    return SiteStats(found, len(rows), held_out=found, held_rows=len(rows))
