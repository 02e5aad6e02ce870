"""Sizes and numbers at the edge: empty weights, weights of 1e30 and 1e-30, endless numbers and texts in a spec: clear words, short time."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.passes.linalg.modes import factors

METHODS: dict[str, dict[str, Any]] = {
    "low_rank": {"low_rank": {"rank": 2}},
    "energy": {"low_rank": {"rank": {"energy": 0.9}}},
    "whitened": {"low_rank": {"rank": 2, "whiten": True}},
    "nf4": {"quantize": {"quantizer": "nf4"}},
    "search": {"quantize": {"quantizer": "uniform", "bits": 4, "scale": "search"}},
    "clipped": {"quantize": {"quantizer": "uniform_clipped", "bits": 4}},
    "loftq": {"loftq": {"quantizer": "nf4", "rank": 2, "whiten": True}},
    "tt": {"tt": {"rank": 2}},
    "lora": {"lora": {"rank": 2}},
    "qlora": {"qlora": {"quantizer": "nf4", "rank": 2}},
}


def errors(method: dict[str, Any], scale: float) -> list[tuple[float, float]]:
    """(weight, output error) of a layer whose weight is scaled by a power of two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(scale)
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    spec = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": method, "force": True}]}
    found = mm.compile(model, spec, (torch.randn(4, 16),), ({0: "batch"},), calibration=[(part,) for part in x.split(20)])
    assert all(row.status == "rewritten" for row in found.report.sites)
    return [(row.weight_error, row.output_error) for row in found.report.sites]


@pytest.mark.parametrize("exponent", [-100, 67, 100])
@pytest.mark.parametrize("name", METHODS)
def test_the_size_of_a_weight_changes_no_relative_error(name: str, exponent: int) -> None:
    """2^67 = 1.5e20, 2^100 = 1.3e30; a power of two scales every float exactly. The second layer then reads inputs of that size."""
    expected, found = errors(METHODS[name], 1.0), errors(METHODS[name], 2.0**exponent)
    for one, other in zip(expected, found, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)  # other solvers and float32 moments in place of float64 ones


@pytest.mark.parametrize(("shapes", "empty"), [((8, 0, 4), ["0", "1"]), ((8, 4, 0), ["1"])])
@pytest.mark.parametrize("rewrite", [METHODS["energy"], METHODS["nf4"], {"tt": {"rank": 1}}, "keep"], ids=str)
def test_an_empty_weight_stays_as_it_is(rewrite: Any, shapes: tuple[int, int, int], empty: list[str], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of initialising nothing
        model = nn.Sequential(nn.Linear(shapes[0], shapes[1]), nn.Linear(shapes[1], shapes[2]))
    spec = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": rewrite, "force": True}]}
    axes = ({0: "batch"},)
    rows = mm.plan(model, spec, (torch.randn(3, 8),), axes).sites
    compiled = mm.compile(model, spec, (torch.randn(3, 8),), axes)
    for found in (rows, compiled.report.sites):
        blocked = {row.path: row.reason for row in found if row.parameters[0] == 0}
        assert list(blocked) == empty
        assert rewrite == "keep" or all(reason.startswith("the weight is empty: ") for reason in blocked.values())


SPEC = "version: 1\nrules:\n  - match: {%s}\n    rewrite: {%s}\n"
LOW = "low_rank: {rank: 4}"
ENDLESS = {
    "value": SPEC % ("op: " + "x" * 300_000, LOW),
    "key": SPEC % ("x" * 300_000 + ": 1", LOW),
    "role": SPEC % ('role: "' + "x" * 300_000 + '"', LOW),
    "path": SPEC % ('path: "' + "x." * 150_000 + '{"', LOW),
    "expression": SPEC % ('path: "re:' + "x" * 300_000 + '("', LOW),
    "alias": "version: *" + "x" * 300_000 + "\n",
    "library": "version: 1\nextends: [" + "x" * 300_000 + "]\n",
    "rank": SPEC % ("op: linear", "low_rank: {rank: " + "1" * 5000 + "}"),
    "ratio": SPEC % ("op: linear", "low_rank: {rank: {ratio: " + "1" * 5000 + "}}"),
    "layer": SPEC % ("layer: " + "1" * 5000, LOW),
    "layers": SPEC % ("layer: 0.." + "1" * 5000, LOW),
    "params": SPEC % ('params: ">= ' + "1" * 5000 + '"', LOW),
    "budget": SPEC % ("op: linear", "low_rank: {rank: auto}") + "budget: {bytes: " + "9" * 5000 + "MB}\n",
    "cores": SPEC % ("op: linear", "tt: {rank: 2, cores: 1000000}"),
    "shape": SPEC % ("op: linear", f"tt_lora: {{rank: 2, shape: [{', '.join(['2'] * 2000)}]}}"),
    "modes": SPEC % ("op: linear", f"tt: {{rank: 2, modes: {{out: [{', '.join(['1'] * 2000)}], in: [{', '.join(['1'] * 2000)}]}}}}"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_is_endless_is_refused_in_few_words(name: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(ENDLESS[name], encoding="utf-8")
    began = time.perf_counter()
    with pytest.raises(SpecError) as caught:
        mm.load_spec(str(path))
    assert time.perf_counter() - began < 10  # under a second each; the margin is for a busy machine
    assert len(str(caught.value)) < 3000
    assert "sys.set_int_max_str_digits" not in str(caught.value)
    assert caught.value.at is not None


def planned(rewrite: dict[str, Any], match: dict[str, Any] | None = None) -> Any:
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64))
    spec = {"version": 1, "rules": [{"match": match or {"op": "linear"}, "rewrite": rewrite}]}
    return mm.plan(model, spec, (torch.randn(3, 8),), ({0: "batch"},))


@pytest.mark.parametrize("method", [
    {"low_rank": {"rank": 10**12}}, {"low_rank": {"rank": {"ratio": 0.5, "min": 10**12}}}, {"lora": {"rank": 10**12}},
    {"loftq": {"quantizer": "nf4", "rank": 10**12}}, {"glora": {"rank": 10**12, "A": "lora"}}, {"glora": {"rank": 10**12, "search": True}},
], ids=str)  # fmt: skip
def test_ranks_that_no_matrix_has(method: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"1000000000000 is above min\(in, out\) of every matched site; the largest is 64 \(1\)"):
        planned(method)


MANY: list[dict[str, Any]] = [
    {"tt": {"rank": 2, "cores": 40}},
    {"tt": {"rank": 2, "cores": 40, "padding": "pad"}},
    {"tt_lora": {"rank": 2, "cores": 40}},
    {"tt_lora": {"rank": 2, "shape": [64, *[1] * 62, 64]}},
]


@pytest.mark.parametrize("method", MANY, ids=str)
def test_many_cores_take_no_time(method: dict[str, Any]) -> None:
    planned(METHODS["low_rank"])  # what is imported on the way counts nothing
    began = time.perf_counter()
    planned(method, {"path": "1"})
    assert time.perf_counter() - began < 20  # about one second; it was over half a minute


def test_factors_of_many_modes_are_the_primes() -> None:
    assert factors(4096, 40) == (*(2,) * 12, *(1,) * 28)
    assert factors(4096, 10**6) == (*(2,) * 12, *(1,) * (10**6 - 12))
    assert factors(4096, 13, ones=False) is None
    assert factors(4096, 12, ones=False) == (2,) * 12
    assert factors(4099, 5) is None
    assert factors(1, 3) == (1, 1, 1)


@pytest.mark.parametrize("name", ["nf4", "search", "clipped", "loftq", "qlora"])
def test_codes_of_a_float64_model_are_refused_in_the_plan(name: str) -> None:
    spec = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": METHODS[name]}]}
    (row,) = mm.plan(nn.Linear(8, 8).double(), spec, (torch.randn(3, 8).double(),), ({0: "batch"},)).sites
    assert row.reason.endswith("codes with float64 rows: convert the model with model.float()")
