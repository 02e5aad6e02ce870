"""`equalise: true`: the equalised model is the source in float64, where scales go, what refuses them, and what they bring."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from exporting import randn
from torch import Tensor, nn
from torch.nn import functional

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import evaluate
from matmorph.ir.site import Site, Statistic
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace
from matmorph.passes.linalg.equalise import ALPHAS, channel_scales
from matmorph.passes.methods import all_methods, method_table
from matmorph.passes.rewriting.equalise import Equalised, equalise
from matmorph.passes.statistics.calibrate import calibrate
from matmorph.specs.load import load_spec

CODES = {"quantizer": "uniform", "bits": 4, "block_size": 16, "zero_point": True, "equalise": True}
MOMENT = frozenset({Statistic.INPUT_SECOND_MOMENT})


class Norm(nn.Module):
    """RMS norm, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Layer(nn.Module):
    """A gated MLP behind a norm, and a head behind another, with loud channels."""

    def __init__(self, layer_norm: bool = False, bias: bool = True, also: str = "") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            make: Any = nn.LayerNorm if layer_norm else Norm
            self.norm, self.last = make(32), make(32)
            self.gate, self.up = nn.Linear(32, 48, bias=bias), nn.Linear(32, 48, bias=bias)
            self.down, self.head = nn.Linear(48, 32, bias=bias), nn.Linear(32, 24, bias=False)
        self.also = also
        with torch.no_grad():
            self.norm.weight[[3, 17, 20]] *= 5
            self.up.weight[[5, 30]] *= 5

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        up = self.up(y)
        z = self.down(functional.silu(self.gate(y)) * up)
        if self.also == "norm":
            z = z + y
        if self.also == "up":
            z = z + up[..., :32]
        return self.head(self.last(x + z))


def traced(model: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Graph, Tensor]:
    x = randn(9, 32).to(dtype)
    return trace(model.to(dtype).eval(), {"x": x}, {"x": {0: "rows"}}), x


def equalised(graph: Graph, x: Tensor, **settings: Any) -> tuple[Equalised, tuple[Site, ...]]:
    spec = load_spec({"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": {"quantize": {**CODES, **settings}}}]}, method_table())
    sites = tuple(find_sites(graph))
    stats = calibrate(graph, [(site, MOMENT) for site in sites], [{"x": x}], len(x))
    return equalise(graph, sites, [(site, spec.rules[0]) for site in sites], stats, all_methods()), sites


def compiled(model: nn.Module, equal: bool, **settings: Any) -> mm.Compiled:
    rewrite = {"quantize": {**CODES, "equalise": equal, **settings}}
    spec = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": rewrite}]}
    return mm.compile(model.eval(), spec, (randn(4, 32),), dynamic_shapes=({0: "rows"},), calibration=[(randn(64, 32),) for _ in range(5)])


@pytest.mark.parametrize(("layer_norm", "bias"), [(False, True), (False, False), (True, True)])
def test_only_where_the_numbers_lie_changes(layer_norm: bool, bias: bool) -> None:
    """The function is the source's to float64's rounding; every weight that takes part is another one."""
    graph, x = traced(Layer(layer_norm, bias))
    (found, sites), before = equalised(graph, x), evaluate(graph, [x])[0]
    after = evaluate(found.graph, [x])[0]
    assert float((after - before).abs().max()) <= 1e-12 * float(before.abs().max())
    old = {const.path: const.load() for const in graph.state}
    changed = {const.path for const in found.graph.state if not torch.equal(const.load(), old[const.path])}
    assert {"norm.weight", "gate.weight", "up.weight", "down.weight"} <= changed
    assert ("up.bias" in changed) == bias
    assert "gate.bias" not in changed
    assert all("equalised" in found.notes[site.path] for site in sites)


def test_statistics_are_those_of_the_equalised_graph() -> None:
    graph, x = traced(Layer())
    found, _ = equalised(graph, x)
    sites = tuple(find_sites(found.graph))
    fresh = calibrate(found.graph, [(site, MOMENT) for site in sites], [{"x": x}], len(x))
    by_path = {site.path: stats for site, stats in found.stats.items()}
    for site in sites:
        moment = fresh[site].second_moment
        assert float((by_path[site.path].second_moment - moment).abs().max()) <= 1e-10 * float(moment.abs().max())


@pytest.mark.parametrize(
    "settings", [{}, {"scale": "weighted"}, {"rounding": "gptq"}, {"bits": 8, "block_size": "channel", "zero_point": False}]
)
def test_codes_are_better_and_the_report_says_so(settings: dict[str, Any]) -> None:
    model, x = Layer(), randn(200, 32)
    with torch.no_grad():
        exact = model(x)
        errors = [float((compiled(Layer(), equal, **settings)(x) - exact).norm() / exact.norm()) for equal in (False, True)]
    assert errors[1] < (1.0 if settings.keys() & {"rounding", "scale"} else 0.95) * errors[0]  # these have made up for most of it
    rows = {row.path: row for row in compiled(Layer(), True, **settings).report.sites}
    assert re.match(
        r"equalised: channels by their root mean square to the power of [\d.]+, the other side in norm\.weight; error", rows["up"].notes[0]
    )
    assert "the other side in up.weight, up.bias" in rows["down"].notes[0]


def test_powers_of_two_where_the_type_is_narrow() -> None:
    s = channel_scales(torch.tensor([1.0, 4.0, 9.0, 0.0]), 0.7, exact=True)
    assert torch.equal(torch.frexp(s)[0], torch.full((4,), 0.5, dtype=torch.float64))
    model = Layer(bias=False)
    graph, x = traced(model, torch.bfloat16)
    found, _ = equalised(graph, x)
    old = {const.path: const.load() for const in graph.state}
    for const in found.graph.state:
        ratio = const.load().double() / old[const.path].double()
        assert torch.equal(torch.frexp(ratio)[0], torch.full_like(ratio, 0.5)), const.path


def test_the_scales_of_the_paper() -> None:
    """s = rms^alpha over the root of the smallest times the largest; no channel is scaled by nothing."""
    power = torch.tensor([4.0, 1.0, 0.25])
    wanted = np.array([2.0, 1.0, 0.5]) ** 0.5
    np.testing.assert_allclose(channel_scales(power, 0.5).numpy(), wanted / np.sqrt(wanted.max() * wanted.min()), rtol=1e-12)
    assert ALPHAS[0] == 0
    assert torch.equal(channel_scales(power, 0.0), torch.ones(3, dtype=torch.float64))
    assert torch.equal(channel_scales(torch.zeros(3), 1.0), torch.ones(3, dtype=torch.float64))
    assert bool(torch.isfinite(1 / channel_scales(torch.tensor([1.0, 0.0]), 1.0)).all())


# what refuses them


class Two(nn.Module):
    """One linear behind `before`."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 16)
            self.extra = nn.Parameter(torch.rand(32) + 0.5)
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return self.before(self, x)


REFUSED: dict[str, tuple[Any, str]] = {
    "an input": (lambda m, x: m.second(x), "its input (%x) is an input or a result of the model"),
    "a bend": (lambda m, x: m.second(torch.relu(m.first(x))), "relu (%relu) makes its input and has no weight per channel"),
    "a residual": (lambda m, x: m.second(y := x * m.extra) + y.sum(), "sum (%sum_1) reads the same input"),
    "a square": (lambda m, x: m.second((y := m.first(x)) * y), "mul (%mul) makes its input from one value twice"),
    "a weight of two": (lambda m, x: m.second(x * m.extra) + m.extra[:16], "which is no weight of its own"),
    "twice": (lambda m, x: m.second(x * m.extra) + m.second(2 * x * m.extra), "its weight is applied several times"),
    "a sum of two": (lambda m, x: m.second(m.first(x) + x), "add (%add) makes its input and has no weight per channel"),
    "with a factor": (lambda m, x: m.second(torch.add(m.first(x), m.extra, alpha=2)), "makes its input and has no weight per channel"),
    "moved axes": (lambda m, x: m.second(m.first(x).reshape(-1, 2, 16).flip(-1).reshape(-1, 32)), "makes its input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_equalised_is_named(name: str) -> None:
    model, reason = Two(REFUSED[name][0]).eval(), REFUSED[name][1]
    rule = {"match": {"path": "second"}, "rewrite": {"quantize": CODES}}
    x = randn(6, 32)
    planned = mm.plan(model, {"version": 1, "rules": [rule]}, (x,), dynamic_shapes=({0: "rows"},))
    made = mm.compile(model, {"version": 1, "rules": [rule]}, (x,), dynamic_shapes=({0: "rows"},), calibration=[(x,)])
    for report in (planned, made.report):
        (note,) = [note for row in report.sites if row.path == "second" for note in row.notes if note.startswith("not equalised: ")]
        assert reason in note
    plain = {"match": {"path": "second"}, "rewrite": {"quantize": {**CODES, "equalise": False}}}
    other = mm.compile(model, {"version": 1, "rules": [plain]}, (x,), dynamic_shapes=({0: "rows"},), calibration=[(x,)])
    assert torch.equal(made(x), other(x))


def test_a_reader_that_does_not_ask_keeps_all_as_they_are() -> None:
    rule = {"match": {"path": "up"}, "rewrite": {"quantize": CODES}}
    made = mm.compile(Layer().eval(), {"version": 1, "rules": [rule]}, (randn(64, 32),), calibration=[(randn(64, 32),)])
    (note,) = [note for row in made.report.sites if row.path == "up" for note in row.notes if "equalised" in note]
    assert note.startswith("not equalised: linear (%")
    assert note.endswith("reads the same input")


def test_readers_elsewhere() -> None:
    graph, x = traced(Layer(also="norm"))
    found, _ = equalised(graph, x)
    assert found.notes["up"].startswith("not equalised: add (%")
    assert found.notes["down"].startswith("equalised")
    graph, x = traced(Layer(also="up"))
    found, _ = equalised(graph, x)
    assert found.notes["up"].startswith("equalised")
    assert "silu (%" in found.notes["down"]
    assert "reads the same input" in found.notes["down"]


def test_a_rule_that_makes_something_else_of_the_matmul_before() -> None:
    rules = [
        {"match": {"path": "up"}, "rewrite": {"low_rank": {"rank": 8}}},
        {"match": {"path": "down"}, "rewrite": {"quantize": CODES}},
    ]
    made = mm.compile(Layer().eval(), {"version": 1, "rules": rules}, (randn(64, 32),), calibration=[(randn(64, 32),)])
    assert any("up before it is rewritten by a rule without equalise" in note for row in made.report.sites for note in row.notes)


@pytest.mark.parametrize(
    "spec",
    [
        {"rules": [{"match": {"op": "linear"}, "rewrite": {"quantize": {**CODES, "bits": "auto"}}}], "budget": {"bytes": "50%"}},
        {"rules": [{"match": {"op": "linear"}, "rewrite": {"any_of": [{"quantize": CODES}, "keep"]}}], "budget": {"bytes": "50%"}},
    ],
)
def test_codes_that_a_budget_decides(spec: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="equalise is for codes that are known"):
        mm.plan(Layer().eval(), {"version": 1, **spec}, (randn(4, 32),))


def test_it_needs_data() -> None:
    rule = {"match": {"op": "linear"}, "rewrite": {"quantize": CODES}}
    with pytest.raises(SpecError, match=re.escape("quantize needs calibration data (input_second_moment) and none was given")):
        mm.compile(Layer().eval(), {"version": 1, "rules": [rule]}, (randn(4, 32),))


def test_a_table_that_is_only_looked_up() -> None:
    model = nn.Sequential(nn.Embedding(40, 32), Norm(32), nn.Linear(32, 8)).eval()
    rule = {"match": {"op": ["matmul", "embedding"]}, "rewrite": {"quantize": CODES}}
    ids = torch.arange(40).reshape(4, 10)
    made = mm.compile(model, {"version": 1, "rules": [rule]}, (ids,), calibration=[(ids,)])
    notes = {row.path: row.notes[0] for row in made.report.sites}
    assert notes["0"] == "not equalised: rows of a table are looked up, and sum no channels"
    assert notes["2"].startswith(("equalised", "not equalised: no scales are better than none"))
