"""What alternatives of a site have in common is found once, and prices do not know of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from exporting import randn, seeded
from torch import Tensor, nn

from matmorph.ir.site import Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace
from matmorph.passes.budget.offers import energies_of, measured, offer
from matmorph.passes.linalg.curves import directions
from matmorph.passes.methods import method_table, quantized_base, weights
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.sizes import exported_sizes
from matmorph.specs.load import load_spec

METHODS = {name: method() for name, method in method_table().items()}
CODES = {"quantizer": "uniform", "bits": "auto", "block_size": 16, "zero_point": True, "scale": "search"}
SETTINGS = ({}, {"scale": "weighted", "rounding": "gptq"})


def moment(width: int, seed: int) -> Tensor:
    x = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scaled = x * torch.logspace(0, -1, width, dtype=torch.float64)
    return scaled.T @ scaled


def priced(codes: dict[str, Any]) -> tuple[Site, Any, SiteStats]:
    alternatives = [
        {"low_rank": {"rank": "auto", "whiten": True}},
        {"loftq": {**CODES, **codes, "rank": "auto", "whiten": True}},
        {"quantize": {**CODES, **codes}},
    ]
    rule = {"name": "r", "match": {"op": "matmul"}, "rewrite": {"any_of": alternatives}, "pays": {"time": False}}
    spec = load_spec({"version": 1, "rules": [rule], "budget": {"bytes": "30%"}}, method_table())
    graph = trace(seeded(lambda: nn.Sequential(nn.Linear(48, 32))), (randn(3, 48),), ({0: "batch"},))
    (site,) = find_sites(graph)
    stats = SiteStats(moment(48, 1), 192, output_moment=moment(32, 2), held_out=moment(48, 3), held_rows=192)
    return site, offer(site, spec.stages[0].rules[0], METHODS, exported_sizes(graph, "keep"), spec.export), stats


@pytest.mark.parametrize("codes", SETTINGS)
def test_each_factorisation_and_each_rounding_is_done_once(codes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    site, one, stats = priced(codes)
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        found = getattr(module, name)

        def call(*given: Any, **named: Any) -> Any:
            calls.append(name)
            return found(*given, **named)

        monkeypatch.setattr(module, name, call)

    for module, name in ((weights, "whitening_factor"), (quantized_base, "curvature"), (quantized_base, "quantized_or_refused")):
        counted(module, name)
    (found,) = measured([one], METHODS, {site: stats})
    assert calls.count("whitening_factor") == 2  # inputs and outputs
    assert calls.count("curvature") == bool(codes)
    assert calls.count("quantized_or_refused") == 3  # 2, 4 and 8 bits
    assert stats.shared is None, "nothing stays behind"
    assert found.energies == energies_of(site, stats)


@pytest.mark.parametrize("codes", SETTINGS)
def test_prices_are_those_of_each_alternative_alone(codes: dict[str, Any]) -> None:
    site, one, stats = priced(codes)
    (found,) = measured([one], METHODS, {site: stats})
    for option in found.options:
        assert option.source is not None
        number, choice = option.source
        use = one.rule.alternatives[number][0]
        (alone,) = METHODS[use.method].errors(site, use.spec, [choice], stats)  # type: ignore[attr-defined]
        for name in ("weight_error", "output_error", "felt_error"):
            assert getattr(option.error, name) == pytest.approx(getattr(alone, name), rel=1e-9)  # float64


def test_a_felt_error_is_the_definition() -> None:
    """|C^T (W - W') L| / |C^T W L| with C C^T the damped moment of the gradients, for codes alone."""
    site, one, stats = priced({})
    (found,) = measured([one], METHODS, {site: stats})
    w = site.weight().detach().double()
    g = stats.output_moment + 1e-2 * stats.output_moment.diagonal().mean() * torch.eye(32)  # type: ignore[union-attr]
    option = next(option for option in found.options if option.uses[0].method == "quantize" and option.uses[0].spec.bits == 4)
    quantizer = quantized_base.quantizer_for(site, option.uses[0].spec)
    e = w - quantized_base.quantize(site.weight().detach(), quantizer).dequantize().double()
    sizes = [float(((g @ m) * (m @ stats.judged)).sum().sqrt()) for m in (e, w)]
    assert option.error.felt_error == pytest.approx(sizes[0] / sizes[1], rel=1e-6)  # float64; the Cholesky factor of g


def test_the_first_directions_are_those_of_all() -> None:
    w, h, g = randn(20, 30).double(), moment(30, 4), moment(20, 5)
    lower, c = (torch.linalg.cholesky(m) for m in (h, g))
    for given in ((w, lower, c), (w.T.contiguous(), c, lower)):
        every, few = directions(*given), directions(*given, most=5)
        for metric in ((None, None), (given[1] @ given[1].T, None), (given[1] @ given[1].T, given[2])):
            torch.testing.assert_close(few.relative_errors(*metric), every.relative_errors(*metric)[:6], rtol=1e-9, atol=1e-12)  # float64


def test_nothing_is_kept_where_nothing_is_priced() -> None:
    _, _, stats = priced({})
    calls: list[int] = []
    for _ in range(2):
        stats.once("key", lambda: calls.append(1))
    assert len(calls) == 2
    kept = replace(stats, shared={})
    assert [kept.once("key", lambda: 7), kept.once("key", lambda: 8)] == [7, 7]
