"""Codes that depend on the calibration data, as settings of quantize, loftq and qlora: what they read, refuse, say and gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from quantizing import METHODS, loftq, parts_of, qlora, quantize, unpack
from rewriting import LINEAR, graph_of, only_site, rewritten, rule_of, weights_of
from torch import nn

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.passes.linalg.quantize import Quantizer
from matmorph.passes.linalg.quantize import quantize as to_codes
from matmorph.passes.linalg.second_order import compensated, curvature
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.methods.quantize.method import Quantize
from matmorph.runtime import Session

GPTQ: dict[str, Any] = {"quantizer": "uniform", "bits": 4, "block_size": 16, "zero_point": True, "scale": "weighted", "rounding": "gptq"}
METHOD_USES = [quantize, loftq, qlora]


class Tied(nn.Module):
    """A table that is also the head, with one linear between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.fc = nn.Embedding(40, 32), nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.tanh(self.fc(self.table(ids))), self.table.weight)


def moment(rows: int, features: int = 12) -> SiteStats:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, features, generator=g) @ torch.randn(features, features, generator=g) * torch.logspace(0, -1.5, features)
    return SiteStats((x.double().T @ x.double()), rows)


def compiled(rewrite: Any, match: Any = None, samples: int = 200) -> mm.Compiled:
    spec = {"version": 1, "rules": [{"match": match or {"op": "linear"}, "rewrite": rewrite, "force": True}]}
    data = torch.randint(0, 40, (samples, 6), generator=torch.Generator().manual_seed(2))
    batches = [(batch,) for batch in data.split(20)]
    return mm.compile(Tied(), spec, (data[:2],), dynamic_shapes=({0: "batch"},), calibration=batches)


@pytest.mark.parametrize("use", METHOD_USES)
def test_the_output_error_falls(use: Any) -> None:
    """On the data that it was fitted to: a third less than rounding to nearest, which is what correlated features of 4 bits give."""
    graph, stats = graph_of(LINEAR), {"fc": moment(200)}
    errors = []
    for settings in ({**GPTQ, "scale": "search", "rounding": "nearest"}, GPTQ):
        _, (outcome,) = rewritten(graph, rule_of(use(**settings), force=True), stats, METHODS)
        errors.append(outcome.sample.fitted_error if outcome.sample and outcome.sample.fitted else outcome.output_error)
    assert errors[1] < 0.67 * errors[0]


@pytest.mark.parametrize("use", METHOD_USES)
@pytest.mark.parametrize("settings", [{"rounding": "gptq"}, {"scale": "weighted"}])
def test_without_data_it_is_an_error_of_the_spec(use: Any, settings: dict[str, Any]) -> None:
    rule = rule_of(use(quantizer="uniform", bits=4, **settings), force=True)
    with pytest.raises(SpecError, match=rf"rule all: {rule.rewrite[0].method} needs calibration data \(input_second_moment of fc\)"):
        rewritten(graph_of(LINEAR), rule, None, METHODS)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="uniform_clipped has one scale for the whole tensor"):
        quantize(quantizer="uniform_clipped", bits=4, rounding="gptq")
    with pytest.raises(ValueError, match="nf4 has neither a zero point nor a scale search"):
        quantize(quantizer="nf4", scale="weighted")


def test_a_singular_moment_is_damped_more_and_the_report_says_so() -> None:
    _, (outcome,) = rewritten(graph_of(LINEAR), rule_of(quantize(**GPTQ), force=True), {"fc": moment(5)}, METHODS)
    assert any(note.startswith("damping raised from 0.01 to ") and "5 rows do not determine 12 features" in note for note in outcome.notes)


def test_a_base_is_made_anew_without_data() -> None:
    settings = Quantize().base_settings(quantize(**GPTQ).spec)
    assert "rounding" not in settings
    assert settings["scale"] == "search"
    assert Quantize().base_again(settings)[1].rounding == "nearest"


@pytest.mark.parametrize("zero_point", [False, True])
def test_three_bits_are_stored_four_wide(zero_point: bool) -> None:
    use = quantize(quantizer="uniform", bits=3, block_size=16, zero_point=zero_point)
    _, (outcome,) = rewritten(graph_of(LINEAR), rule_of(use, force=True), None, METHODS)
    parts, w = parts_of(outcome.consts), weights_of(LINEAR)["fc.weight"]
    codes = unpack(parts["codes"].reshape(10, -1), 4)[:, :12].astype(float)
    zeros = unpack(parts["zero_points"], 4)[:, :1] if zero_point else np.full((10, 1), 8.0)
    levels = (codes - zeros) * parts["scales"].astype(np.float64)
    own = to_codes(w, Quantizer("uniform", 3, 16, zero_point=zero_point))
    np.testing.assert_allclose(levels, own.dequantize().numpy(), rtol=1e-6, atol=0)  # float32
    assert max(len(set(row)) for row in codes) <= 8
    assert outcome.cost.bytes == sum(const.nbytes for const in outcome.consts)
    assert any("3 bits" in note and "4 bits" in note for note in outcome.notes)


def test_a_tied_table_and_its_head_from_one_set_of_codes_under_onnx_runtime(tmp_path: Path) -> None:
    result = compiled({"quantize": {**GPTQ, "bits": 3}}, {"op": ["linear", "embedding"]})
    ids = torch.arange(12).view(2, 6)
    found = Session(result.save(tmp_path / "out")).run({"ids": ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(found["output"]), result(ids), rtol=0, atol=1e-4)  # float32, sums of 32 of size 1
    assert any(note.startswith("an embedding table that is also the head in 3 bits: ") for row in result.report.sites for note in row.notes)
    assert sum(node.op_type == "GatherBlockQuantized" for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node) == 1


def test_a_tied_table_counts_both_uses() -> None:
    """From the definition: the moment under which tr(E H E^T) / tr(W H W^T) + |E|^2 / |W|^2 is measured, times tr(W H W^T)."""
    text = """graph device=cpu
input %i: int64[4] "ids"
parameter %w: float32[30, 32] "wte.weight"
%e: float32[4, 32] = aten.embedding.default(%w, %i)
%y: float32[4, 30] = aten.linear.default(%e, %w)
output %y "output"
"""
    site, spec = only_site(graph_of(text)), quantize(**GPTQ, double_quant=False).spec
    w, stats = site.weight(), moment(400, 32)
    h, exact = stats.second_moment.numpy(), w.double().numpy()
    both = h + np.trace(exact @ h @ exact.T) / np.square(exact).sum() * np.eye(32)
    curved = curvature(torch.from_numpy(both), 400)
    grid = to_codes(w, Quantizer("uniform", 4, 16, zero_point=True, scale="search"), curved.power)
    found, _ = Quantize().solve(site, spec, next(iter(Quantize().choices(site, spec))), stats, w, 0)
    assert torch.equal(found.scales, grid.scales)
    assert torch.equal(found.codes, compensated(w, grid, curved).codes)
    head_alone = compensated(w, grid, curvature(stats.second_moment, 400))
    assert not torch.equal(found.codes, head_alone.codes)


def test_a_table_that_is_only_looked_up_is_rounded_to_nearest() -> None:
    """Errors of its rows never add up, so that nearest is best."""
    text = """graph device=cpu
input %i: int64[4] "ids"
parameter %w: float32[30, 32] "embed.weight"
%e: float32[4, 32] = aten.embedding.default(%w, %i)
output %e "output"
"""
    graph = graph_of(text)
    site = only_site(graph)
    found, notes = Quantize().solve(
        site, quantize(**GPTQ).spec, next(iter(Quantize().choices(site, quantize(**GPTQ).spec))), None, site.weight(), 0
    )
    plain = to_codes(site.weight(), Quantizer("uniform", 4, 16, zero_point=True, scale="search"))
    assert torch.equal(found.codes, plain.codes)
    (price,) = notes
    assert price.startswith(f"an embedding table in 4 bits: {plain.nbytes:,} bytes at a weight error of 0.0")
    assert f"; in 8 bits {Quantizer('uniform', 8, 16, zero_point=True).nbytes((30, 32)):,} at 0.00" in price


class Apart(nn.Module):
    """A table that is only looked up, in front of a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.table(ids)
        return rows, self.head(rows)


@pytest.mark.parametrize("data", [True, False], ids=["beside a matmul that reads data", "alone and without data"])
def test_a_table_that_is_only_looked_up_wants_no_data(data: bool) -> None:
    ids = torch.randint(0, 40, (60, 6), generator=torch.Generator().manual_seed(2))
    match = {"op": ["matmul", "embedding"]} if data else {"op": "embedding"}
    spec = {"version": 1, "rules": [{"match": match, "rewrite": {"quantize": GPTQ}, "force": True}]}
    module = Apart()
    found = mm.compile(module, spec, (ids[:2],), ({0: "batch"},), [(batch,) for batch in ids.split(20)] if data else None)
    assert {row.path: row.status for row in found.report.sites} == {"table": "rewritten", "head": "rewritten" if data else "unclaimed"}
    nearest = to_codes(module.table.weight.detach(), Quantizer("uniform", 4, 16, True, "search")).dequantize()
    assert torch.equal(found(ids[:2])[0], nearest[ids[:2]])
