"""Mutants of gradients in bounded memory and of the probes: each plants one plausible mistake, and the checks below must notice.

They are a digest of `test_bounded_gradients`; unmutated code passes them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exporting import randn, seeded
from mutating import Mutant, killer, mutated, unmutated
from test_bounded_gradients import AXES, HUGE, Classifier, Speaker, batch
from torch import Tensor

from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace
from matmorph.passes.methods.protocol import Error, SiteStats
from matmorph.specs.schema import Train

MUTANTS = {
    "gradients from behind are lost": Mutant("_segment", "known[value].requires_grad", "seeds and known[value].requires_grad"),
    "what goes on is dropped": Mutant("_read_later", "later = frozenset(ends)", "later = frozenset()"),
    "a border is differentiated by nothing": Mutant(
        "_segment", "value in moving and _is_float(held)", "value in values and _is_float(held)"
    ),
    "labels stay whole": Mutant("slice_samples", "tensor[slice(*part)] if cut else tensor", "tensor"),
    "the last samples are left out": Mutant("division", "count * k // pieces", "(count - 1) * k // pieces"),
    "anything may be parted": Mutant("independent", "sum(here) != before", "False"),
    "a double axis may be parted": Mutant("independent", "sum(here) != before", "any(here) != before"),
    "p in the place of its root": Mutant("divergence", "p.sqrt()", "p"),
    "the mean is not taken off": Mutant("divergence", "row.sum(-1, keepdim=True)", "0.0 * row.sum(-1, keepdim=True)"),
    "no half": Mutant("divergence", "sqrt(0.5)", "1.0"),
    "padding counts": Mutant("divergence", "v.mul_(kept.unsqueeze(-1))", "v"),
    "padding is a row": Mutant("divergence", "float(kept.sum())", "float(kept.numel())"),
    "words are never found": Mutant("is_vocabulary", "output.tensor.shape[-1] in {site.out_features for site in tables}", "False"),
    "the size of padding counts": Mutant("relative_change", "answer if rows is None else answer * rows", "answer"),
    "numbers of the part, not of the sample": Mutant("_normal", "v if v.dim() else (v,)", "(v,)"),
    "lookups are outputs": Mutant("_Sums.take", "self._lookups if leave is None else self._squares", "self._squares"),
    "lookups are a part of G": Mutant("_Sums.take", "site in self._moments and leave is not None", "site in self._moments"),
    "of all rows together": Mutant(
        "scale_of",
        "felt.lookups[site] * square(readable(site, site.weight())) / site.out_features",
        "felt.lookups[site] * square(readable(site, site.weight()))",
    ),
    "rows are not counted": Mutant("ErrorScale.of", "self.looked_up * (option.error.weight_error or 0.0) ** 2", "0.0"),
    "sums of the last matrix": Mutant("MomentStore.__getitem__", "self._starts[key]", "0"),
    "not divided": Mutant("_Sums.over", "self._moments.scale(share)", "self._moments.scale(1.0)"),
}


def check_parts(m: Any) -> None:
    graph = trace(seeded(Speaker), batch(0), {"input_ids": AXES, "attention_mask": AXES})
    sites, data = find_sites(graph), [batch(1), batch(2)]
    output = m.output_of(graph, None)[1]
    labelled = [{**one, "labels": one["input_ids"]} for one in data]
    for draw in (m.relative_change, m.divergence):
        found = [m.of_output(graph, sites, data, 12, m.Probe(output, draw), 3, limit=limit) for limit in (HUGE, 20_000)]
        same(sites, *found)
    same(sites, *(m.fisher(graph, sites, labelled, 9, Train("causal_lm"), limit=limit) for limit in (HUGE, 20_000)))
    assert m.is_vocabulary(graph, output)


def same(sites: Any, whole: Any, bounded: Any) -> None:
    for site in sites:
        assert bounded.slopes[site] == pytest.approx(whole.slopes[site], rel=1e-6)  # sums of float32 products in another order
        assert float((bounded.moments[site] - whole.moments[site]).norm()) <= 1e-6 * float(whole.moments[site].norm())


def check_mixing(m: Any) -> None:
    class Mixed(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.T, -1) @ super().forward(x - x.mean(0))

    for module, apart in ((Mixed(4, 4), False), (torch.nn.Linear(4, 4), True)):
        graph = trace(module.eval(), (randn(3, 4),), ({0: "batch"},))
        assert m.independent(graph.nodes, "batch") == apart


def check_products(m: Any) -> None:
    class Products(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x)[:, None] * x[None])

    assert not m.independent(trace(Products(4, 4).eval(), (randn(3, 4),), ({0: "batch"},)).nodes, "batch")


def check_divergence(m: Any) -> None:
    """The mean of (S v)(S v)^T over many v is half of diag(p) - p p^T."""
    z = 2 * randn(1, 1, 5).double()
    p = torch.softmax(z[0, 0], -1)
    v, rows = m.divergence(z.expand(1, 40_000, 5).contiguous(), None, torch.Generator().manual_seed(0))
    assert rows == 40_000
    assert float((v[0].T @ v[0] / rows - (p.diag() - p.outer(p)) / 2).abs().max()) <= 0.01  # of numbers up to 0.1, at 1 / sqrt(40 000)
    kept = torch.tensor([[True, False]])
    for draw in (m.divergence, m.relative_change):
        z = torch.stack([torch.ones(4), 1e6 * torch.ones(4)])[None]
        v, units = draw(z, kept, torch.Generator().manual_seed(0))
        assert units == 1
        assert float(v[0, 0].norm()) > 0.1  # about 1 and 0.6; by the size of the other row as well it would be 1e-6
        assert float(v[0, 1].abs().max()) == 0


def check_store(m: Any) -> None:
    store = m.MomentStore({"a": 2, "b": 3}, 0)
    store.add("b", torch.ones(3, 3))
    assert float(store["a"].sum()) == 0


def check_table(m: Any) -> None:
    """By the definitions, of a table that is the head too."""
    graph = trace(seeded(Speaker), batch(0), {"input_ids": AXES, "attention_mask": AXES})
    sites = find_sites(graph)
    (table,) = (site for site in sites if site.gathers)
    found = m.of_output(graph, sites, [batch(1)], 6, m.Probe(m.output_of(graph, None)[1], m.divergence), 0)
    assert {site for site in sites if found.lookups[site] > 0} == {table}
    assert found.slopes[table] == pytest.approx(float(found.moments[table].trace()) / table.out_features, rel=1e-6)  # float32 squares
    w = table.weight().detach().double()
    stats = SiteStats(torch.eye(table.in_features, dtype=torch.float64), 1, output_moment=found.moments[table])
    scale = m.scale_of(m.Offer(table, None, ()), stats, found)
    assert scale.looked_up == pytest.approx(found.lookups[table] * float(w.square().sum(1).mean()), rel=1e-6)  # float32 weights
    option = m.Option("", (), None, None, Error(0.5, 0.5, 0.0))
    assert scale.of(option, True) == pytest.approx(0.25 * scale.looked_up)


def check_rows(m: Any) -> None:
    """Twice the rows is the same mean."""
    graph = trace(seeded(Classifier), {"x": randn(3, 5)}, {"x": {0: "batch"}})
    sites = find_sites(graph)
    probe = m.Probe(m.output_of(graph, None)[1], m.divergence)
    one, two = (m.of_output(graph, sites, [{"x": randn(1, 5).expand(n, 5)}], n, probe, 0) for n in (500, 1000))
    for site in sites:
        assert two.slopes[site] == pytest.approx(one.slopes[site], rel=0.2)  # 500 draws, of up to 42 squares each
        assert float(two.moments[site].trace()) == pytest.approx(two.slopes[site] * site.out_features, rel=1e-6)  # float32 squares


CHECKS = (check_store, check_table, check_mixing, check_products, check_divergence, check_rows, check_parts)


@pytest.mark.full
def test_the_checks_pass_on_the_code_as_it_is() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mistake_is_seen(mutant: Mutant) -> None:
    assert killer(mutated(mutant), CHECKS), "no check noticed"
