"""Calibration block by block. Oracles: the whole graph run batch by batch with rows written out; what is held between blocks, counted."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from rewriting import graph_of
from zoo import ZOO

from matmorph.errors import InputError
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import bind, evaluate
from matmorph.ir.site import Site, Statistic
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace
from matmorph.passes.statistics import calibrate as calibration
from matmorph.passes.statistics.calibrate import calibrate
from matmorph.passes.statistics.kept import KeptBatches
from matmorph.passes.statistics.stream import Stream, cuts

MOMENTS = frozenset({Statistic.INPUT_SECOND_MOMENT, Statistic.HELD_OUT_MOMENT})
NEVER = 1 << 60


@cache
def traced(name: str) -> tuple[Graph, tuple[dict[str, torch.Tensor], ...]]:
    """A model, and six batches of it, whole texts as they come."""
    model, inputs, axes = ZOO[name].build()
    g = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(6):
        ids = torch.randint(0, 60, inputs["input_ids"].shape, generator=g)
        batches.append({**inputs, "input_ids": ids})
    return trace(model, inputs, axes), tuple(batches)


def sites_of(graph: Graph) -> list[Site]:
    return [site for site in find_sites(graph) if site.form != "embedding" and not site.listed]


def written_out(graph: Graph, batches: Any) -> dict[str, torch.Tensor]:
    """Sums of x x^T over all rows that the mask shows, from one run of the whole graph per batch; linear matmuls alone."""
    found: dict[str, torch.Tensor] = {}
    for batch in batches:
        seen: dict[Any, torch.Tensor] = {}
        plain = [site for site in sites_of(graph) if site.batch is None and site.form == "linear"]
        values = {one.x for site in plain for one in site.applications}
        watch = {value: partial(seen.__setitem__, value) for value in values}
        with torch.no_grad():
            evaluate(graph, bind(graph, (), batch), watch)
        for site in plain:
            for one in site.applications:
                rows = seen[one.x].double()
                mask = batch["attention_mask"].bool()
                shapes = {tuple(mask.shape): mask, (mask.numel(),): mask.reshape(-1)}  # a router reads all tokens in one row
                kept = shapes.get(tuple(rows.shape[:-1]), torch.ones(rows.shape[:-1], dtype=torch.bool))
                rows = rows[kept]
                found[site.path] = found.get(site.path, torch.zeros(())) + rows.T @ rows
    return found


@pytest.mark.parametrize(
    "name", ["bert", "llama", pytest.param("albert", marks=pytest.mark.full), pytest.param("mixtral", marks=pytest.mark.full)]
)
def test_statistics_are_those_of_whole_runs(name: str) -> None:
    graph, batches = traced(name)
    needs = [(site, MOMENTS) for site in sites_of(graph)]
    found = calibrate(graph, needs, batches, NEVER)
    wanted = written_out(graph, batches)
    assert len(wanted) >= 6
    for site, stats in found.items():
        if site.path in wanted:
            assert stats.held_out is not None
            total = stats.second_moment + stats.held_out
            scale = float(wanted[site.path].diagonal().max())
            # products of float32 in another order: 1e-6 of the largest entry
            torch.testing.assert_close(total, wanted[site.path], rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", ["llama", pytest.param("mixtral", marks=pytest.mark.full), pytest.param("bert", marks=pytest.mark.full)])
def test_blocks_one_block_and_files_give_the_same_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, batches = traced(name)
    needs = [(site, MOMENTS) for site in sites_of(graph)]
    assert len(cuts(graph, sites_of(graph))) >= 2
    blocks = calibrate(graph, needs, batches, NEVER)
    files = calibrate(graph, needs, batches, NEVER, hold_above=0)
    monkeypatch.setattr(calibration, "cuts", lambda graph, sites: (len(graph.nodes),))
    whole = calibrate(graph, needs, batches, NEVER)
    for site in whole:
        for one in (blocks[site], files[site]):
            assert torch.equal(one.second_moment, whole[site].second_moment)
            assert torch.equal(one.held_out, whole[site].held_out)  # type: ignore[arg-type]
    assert len(whole) >= 14


RESIDUAL = """graph device=cpu
range b 1..
input %x: float32[b, 6] "x"
parameter %a: float32[6, 6] "a.weight"
parameter %c: float32[6, 6] "c.weight"
parameter %d: float32[6, 6] "d.weight"
parameter %head: float32[40, 6] "head.weight"
%ct: float32[6, 6] = aten.t.default(%c)
%1: float32[b, 6] = aten.linear.default(%x, %a)
%2: float32[b, 6] = aten.relu.default(%1)
%3: float32[b, 6] = aten.mm.default(%2, %ct)
%4: float32[b, 6] = aten.add.Tensor(%1, %3)
%5: float32[b, 6] = aten.linear.default(%4, %d)
%6: float32[b, 40] = aten.linear.default(%5, %head)
output %6 "y"
"""


def test_a_part_ends_where_one_value_goes_on() -> None:
    graph = graph_of(RESIDUAL)
    names = [graph.nodes[end].outputs[0].name for end in cuts(graph, find_sites(graph))[:-1]]
    assert names == ["2", "5", "6"], "behind a, where %1 alone goes on; not within the residual; behind the sum; before the head"
    assert cuts(graph, find_sites(graph))[-1] == len(graph.nodes)


def test_layers_are_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two parts there is the residual stream, and what masks and positions came to; nothing of the layers behind."""
    graph, batches = traced("llama")
    sites = sites_of(graph)
    layers = len({site.layer for site in sites if site.layer is not None})
    ends = cuts(graph, sites)
    assert len(ends) == layers + 1, "each layer, and the head"
    order = {node: index for index, node in enumerate(graph.nodes)}
    for end, layer in zip(ends, range(layers), strict=False):
        own = [order[one.node] for site in sites if site.layer == layer for one in site.applications]
        assert max(own) < end
    held: list[int] = []
    before = KeptBatches.append

    def counted(kept: KeptBatches, values: Mapping[Any, Any]) -> None:
        held.append(
            sum(torch.is_tensor(each) and each.is_floating_point() and each.dim() == 3 and len(each) > 1 for each in values.values())
        )
        before(kept, values)

    monkeypatch.setattr(KeptBatches, "append", counted)
    calibrate(graph, [(site, MOMENTS) for site in sites], batches, NEVER)
    assert len(held) == len(batches) * (1 + len(ends))
    assert max(held) == 1, "one hidden state per batch"


def test_what_nothing_needs_is_not_computed_and_weights_are_read_once_a_part() -> None:
    graph = graph_of(RESIDUAL)
    read: dict[str, int] = {}
    counted = Graph(graph.signature, graph.nodes, graph.outputs, graph.state, graph.ranges)
    sites = {site.path: site for site in find_sites(counted)}
    stream = Stream(counted, {sites[path].applications[0].node: (sites[path].applications[0].x,) for path in ("a", "c", "d")})
    for const in counted.state:

        def load(const: Any = const, plain: Any = const.load) -> torch.Tensor:
            read[const.path] = read.get(const.path, 0) + 1
            return plain()

        stream.exchange({}, {const: load})
    for seed in range(3):
        stream.enter([torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))])
    for end in cuts(counted, sites.values()):
        stream.advance(end)
    assert read == {"a.weight": 1, "c.weight": 1}, "neither the head nor the last matmul, whose outputs nobody looks at"


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matmorph.passes.statistics.kept.tempfile.TemporaryFile", full)
    graph = graph_of(RESIDUAL)
    with pytest.raises(InputError, match=r"temporary files for activations in .*No space left on device"):
        calibrate(graph, [(site, MOMENTS) for site in find_sites(graph)], [(torch.ones(2, 6),)], 10, hold_above=0)


# token weights and massive activations


def test_rows_count_alike_by_the_inverse_of_their_squared_norm() -> None:
    """Oracle: the definition, row by row, in float64; a row of zeros counts nothing, though it is one."""
    graph = graph_of(RESIDUAL)
    site = next(site for site in find_sites(graph) if site.path == "a")
    g = torch.Generator().manual_seed(3)
    batches = [torch.randn(4, 6, generator=g) * torch.tensor([[1.0], [30.0], [0.1], [0.0]]) for _ in range(5)]
    found = calibrate(graph, [(site, MOMENTS)], [(x,) for x in batches], NEVER, token_weights="norm")[site]
    for moment, rows in ((found.second_moment, batches[:4]), (found.held_out, batches[4:])):
        x = torch.cat(rows).double()
        some = x[x.norm(dim=1) > 0]
        unit = some / some.norm(dim=1, keepdim=True)
        wanted = unit.T @ unit * len(x) / float((1 / some.square().sum(1)).sum())
        torch.testing.assert_close(moment, wanted, rtol=0, atol=1e-6 * float(wanted.max()))  # float32 rows
    assert (found.rows, found.held_rows) == (16, 4)
    assert found.weighted


def test_a_token_that_dominates_is_counted_with_its_share() -> None:
    graph = graph_of(RESIDUAL)
    site = next(site for site in find_sites(graph) if site.path == "a")
    g = torch.Generator().manual_seed(4)
    batches = [torch.randn(50, 6, generator=g) for _ in range(5)]
    plain = calibrate(graph, [(site, MOMENTS)], [(x,) for x in batches], NEVER)[site]
    assert plain.massive is None
    for x in batches[:2]:
        x[0] *= 300
    found = calibrate(graph, [(site, MOMENTS)], [(x,) for x in batches], NEVER)[site].massive
    squares = torch.cat(batches).double().square().sum(1)
    assert found is not None
    assert (found.tokens, found.rows) == (2, 250)
    assert found.share == pytest.approx(float(squares.topk(2).values.sum() / squares.sum()), rel=1e-6)  # squares of float32
    assert found.dominates
    assert "2 of 250 rows" in found.note()
