"""Mutants of block pruning: each plants one plausible mistake in the source, and the checks below must notice.

The checks are a digest of the other tests: masks by hooks on the original module, numpy's least squares, formulas written out.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mutating import Check, Mutant, killer, mutated, unmutated
from pruning import matrix, positions_of, run, silenced, traced
from test_taylor import USE, causal, oracle
from torch.utils._pytree import tree_flatten

from matmorph.ir.build import Builder
from matmorph.ir.evaluate import evaluate
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.methods.protocol import SiteStats
from matmorph.specs.notations import Width
from matmorph.specs.schema import Train

MUTANTS = {
    "heads in the order of their scores": Mutant("_largest", "torch.sort(order, dim=-1).values", "order"),
    "the smallest stay": Mutant("_largest", "descending=True", "descending=False"),
    "peak of a head forgotten": Mutant("_head_scores", "heads.mean(1) + _PEAK / dim * heads.amax(1)", "heads.mean(1)"),
    "heads of a group apart": Mutant("_head_scores", "each.reshape(groups, -1).sum(1)", "each[:groups]"),
    "pairs scored by q alone": Mutant("_pair_scores", "sides['q'] * sides['k']", "sides['q'] * sides['q']"),
    "energies not of the data": Mutant("_output_energy", "w @ found.second_moment.double().cpu()", "w"),
    "effects on the loss cancel out": Mutant("taylor", "(x.double() * gradient.double()).abs()", "x.double() * gradient.double()"),
    "gradients alone": Mutant("taylor", "x.double() * gradient.double()", "gradient.double()"),
    "mean loss of each batch": Mutant("loss_gradients", "held[behind.count].to(held[behind.loss])", "held[behind.loss] * 0 + 1"),
    "roots of effects on the loss": Mutant("_root", "torch.clone if score == 'taylor' else torch.sqrt", "torch.sqrt"),
    "effects of the inputs of q and k": Mutant("_output_taylor", "_stats(site, stats).output_taylor", "_stats(site, stats).input_taylor"),
    "queries before groups": Mutant("find_blocks._axes", "product(group, queries, *dims)", "product(queries, group, *dims)"),
    "fused parts in another order": Mutant("find_blocks._axes", "Concat(tuple(own))", "Concat(tuple(own[::-1]))"),
    "neighbours are rotary pairs": Mutant("find_blocks._axes", "(Atom(2), atom(half, QK))", "(atom(half, QK), Atom(2))"),
    "dimensions of values by those of keys": Mutant("find_blocks._axes", "atom(heads.value_dim, V)", "atom(heads.value_dim, QK)"),
    "k and v left whole": Mutant("make_patch", "block.producers", "block.producers[:1]"),
    "biases left whole": Mutant("_Shop.cut_producer", "bias not in self.consts", "False"),
    "cosines left whole": Mutant("_Shop.edit_region", "self._block.sides", "self._block.sides[:0]"),
    "literals left as they are": Mutant("_Shop.edit_region", "self._block.literals", "self._block.literals[:0]"),
    "layouts mixed up": Mutant("_Shop.cut_producer", "0 if site.layout == 'oi' else 1", "1 if site.layout == 'oi' else 0"),
    "softmax scale recomputed": Mutant("axis_rules._attention", "node.attrs.get('scale') is None", "False"),
    "scale of the new dimension": Mutant("axis_rules._attention", "int(size_of(q[-1]))", "int(size_of(q[-1])) // 2"),
    "choices of the other head": Mutant("positions", "index.reshape(shape)", "index.flip(0).reshape(shape)"),
    "every fused part is the first": Mutant("positions", "start + positions(part, kept)", "positions(part, kept)"),
    "refit pushes the wrong way": Mutant(
        "refit", "exact[:, kept] + torch.cholesky_solve(target, lower).T", "exact[:, kept] - torch.cholesky_solve(target, lower).T"
    ),
    "refit forgets what was there": Mutant(
        "refit", "exact[:, kept] + torch.cholesky_solve(target, lower).T", "torch.cholesky_solve(target, lower).T"
    ),
    "refit without the cross moment": Mutant("refit", "moment[removed][:, kept]", "moment[removed][:, removed][:, :len(kept)]"),
    "schedule without rounding up": Mutant("prune_schedule", "-(-wanted // multiple_of)", "wanted // multiple_of"),
    "schedule in equal steps of the target": Mutant("prune_schedule", "width - target", "target"),
    "widths round down": Mutant("transact._target", "-(-wanted // step)", "wanted // step"),
    "odd dimensions": Mutant("_step", "dims if dims % 2 == 0 else 2 * dims", "dims"),
}


@cache
def source(name: str) -> tuple[Any, Any, Any, Any]:
    model, inputs, graph = traced(name)
    return model, inputs, graph, find_sites(graph)


def pruned(m: Any, name: str, kind: str, stats: Any = None, **settings: Any) -> tuple[Any, list[Any]]:
    """The graph with all blocks of a kind at half their width, and the patches."""
    _, _, graph, sites = source(name)
    method = m.Transact()
    spec = m.TransactSpec(Width("ratio", 0.5), **{"score": "weight", "compensate": "none", "multiple_of": 2, **settings})
    builder = Builder(graph)
    patches = []
    for block in m.find_blocks(graph, sites):
        if block.kind == kind:
            assert method.check(block, spec) is None
            [choice] = method.choices(block, spec)
            patches.append(method.build(block, spec, choice, stats or {}, builder))
    return m.narrowed(graph, [SimpleNamespace(patch=patch, reject=None) for patch in patches]), patches


def assert_masked(name: str, graph: Any, patches: list[Any], producers: bool) -> None:
    model, inputs, before, _ = source(name)
    old = {const.path: const.load().detach() for const in before.state}
    new = {const.path: const.load().detach() for const in graph.state}
    columns, rows = {}, {}
    for patch in patches:
        site = patch.block.consumer
        io = site.layout == "io"
        columns[site.path] = positions_of(matrix(new[site.const.path], io).T, matrix(old[site.const.path], io).T)
        for producer in patch.block.producers:
            site = producer.site
            kept = positions_of(matrix(new[site.const.path], site.layout == "io"), matrix(old[site.const.path], site.layout == "io"))
            rows[site.path] = kept
            if site.bias is not None:
                assert torch.equal(new[site.bias.path], old[site.bias.path][kept])
    for kept in (*columns.values(), *rows.values()):
        assert kept == sorted(kept)
    with silenced(model, columns, rows if producers else {}):
        expected = run(model, inputs)
    with torch.no_grad():
        given = evaluate(graph, tree_flatten(inputs)[0])[0]
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-11)  # float64


def check_mlp(m: Any) -> None:
    for name in ("phi3", "gpt2"):
        assert_masked(name, *pruned(m, name, "mlp"), producers=False)


def check_heads(m: Any) -> None:
    for name in ("llama", "gpt2", "phi3"):
        assert_masked(name, *pruned(m, name, "attention"), producers=False)


def check_dimensions(m: Any) -> None:
    for name in ("llama", "gpt2", "bert"):
        graph, patches = pruned(m, name, "attention", unit="head_dims")
        assert_masked(name, graph, patches, producers=True)
        assert all(patch.weight.shape == (32, 16) for patch in patches)
        new = {const.path: const.tensor.shape for const in graph.state}
        for patch in patches:
            for producer in patch.block.producers:
                assert producer.site.out_features == 2 * new[producer.site.const.path][0 if producer.site.layout == "oi" else 1]


def check_scale(m: Any) -> None:
    graph, _ = pruned(m, "mha", "attention", unit="head_dims")
    [node] = [node for node in graph.nodes if "scaled_dot_product" in node.op]
    assert node.attrs["scale"] == pytest.approx(8**-0.5, rel=1e-15)


def second_moment(width: int, seed: int) -> SiteStats:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(100, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    return SiteStats(x.T @ x, 100)


def check_scores(m: Any) -> None:
    _, _, graph, sites = source("llama")
    block = next(block for block in m.find_blocks(graph, sites) if block.kind == "attention")
    stats = {site: second_moment(site.in_features, k) for k, site in enumerate(block.sites)}
    scores = m.block_scores(block, "activation", ("heads", "v", "qk"), stats)
    s = stats[block.consumer].second_moment.diagonal().sqrt().numpy().reshape(4, 8)
    heads = s.mean(1) + 10 / 8 * s.max(1)
    np.testing.assert_allclose(scores["heads"].numpy(), heads.reshape(2, 2).sum(1), rtol=1e-12)  # float64
    np.testing.assert_allclose(scores["v"].numpy() ** 2, (s**2).reshape(2, 2, 8).sum(1), rtol=1e-12)
    sums = {}
    for part in "qk":
        site = next(site for site in block.sites if site.role == f"attention.{part}")
        w = site.weight().detach()
        sums[part] = ((w @ stats[site].second_moment) * w).sum(1).reshape(-1, 2, 4).sum((0, 1)).numpy()
    np.testing.assert_allclose(scores["qk"].numpy(), np.sqrt(sums["q"] * sums["k"]), rtol=1e-12)


def check_choices(m: Any) -> None:
    two_heads = m["axes.product"](m["axes.Atom"](2, m.HEADS), m["axes.Atom"](4, m["axes.V"]))
    own = m.positions(two_heads, {m["axes.V"]: torch.tensor([[0, 1], [1, 3]])})  # each head its own dimensions
    assert own.tolist() == [0, 1, 5, 7]
    scores = {"width": torch.tensor([1.0, 4.0, 2.0, 4.0, 3.0])}
    kept = m.kept_units(m.Block("mlp", None, (), None), scores, {"width": 3})
    assert kept["width"].tolist() == [1, 3, 4]


def check_taylor(m: Any) -> None:
    model, _, graph, sites = source("llama")
    block = next(block for block in m.find_blocks(graph, sites) if block.kind == "attention")
    found = m.taylor(graph, block.sites, causal("llama"), 100, Train("causal_lm"), USE)
    stats = {site: SiteStats(torch.zeros(0), 0, input_taylor=pair[0], output_taylor=pair[1]) for site, pair in found.items()}
    scores = m.block_scores(block, "taylor", ("v", "qk"), stats)
    expected = oracle(model, [site.path for site in block.sites], causal("llama"))
    features = expected[block.consumer.path][0].reshape(2, 2, 8).sum(1)
    torch.testing.assert_close(scores["v"], features, rtol=1e-9, atol=0)  # float64
    q, k = (expected[site.path][1].reshape(-1, 2, 4).sum((0, 1)) for site in block.sites if site.role[-1] in "qk")
    torch.testing.assert_close(scores["qk"], (q * k).sqrt(), rtol=1e-9, atol=0)


def check_refit(m: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 9, generator=generator, dtype=torch.float64) for rows in (60, 4))
    kept = torch.tensor([0, 2, 3, 7])
    expected = np.linalg.lstsq(x[:, kept].numpy(), (x @ w.T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(m.refit(w, x.T @ x, kept, 0.0, len(x))[0].numpy(), expected, rtol=1e-8)  # float64, well conditioned


def check_widths(m: Any) -> None:
    schedule = m.prune_schedule
    assert schedule(4096, 768, 8, multiple_of=128) == (3712, 3328, 2944, 2560, 2176, 1792, 1280, 768)
    assert schedule(11008, 1536) == (9824, 8640, 7456, 6272, 5088, 3904, 2720, 1536)
    _, _, graph, sites = source("llama")
    blocks = {block.kind: block for block in m.find_blocks(graph, sites)}
    method, spec = m.Transact(), m.TransactSpec
    for kind, width, settings, expected in (
        ("mlp", 0.5, {}, 24), ("attention", 0.3, {}, 16), ("attention", 0.3, {"unit": "head_dims", "multiple_of": 1}, 16),
    ):  # fmt: skip
        [choice] = method.choices(blocks[kind], spec(Width("ratio", width), **settings))
        assert choice.rank == expected


CHECKS: tuple[Check, ...] = (
    check_widths,
    check_refit,
    check_choices,
    check_scores,
    check_taylor,
    check_scale,
    check_mlp,
    check_heads,
    check_dimensions,
)


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


DEEP = ("find_blocks._axes", "axis_rules._attention", "make_patch", "_Shop.cut_producer", "_Shop.edit_region")
"""Mistakes that only whole models show: slow."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full if MUTANTS[name][0] in DEEP else ()) for name in MUTANTS])
def test_every_mutant_is_killed(name: str) -> None:
    assert killer(mutated(MUTANTS[name]), CHECKS), "no check noticed"
