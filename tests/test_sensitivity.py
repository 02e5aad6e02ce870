"""`calibration.sensitivity`: what is felt behind a site, factors fitted to it, and budgets shared out by it.

Oracles: torch's own gradients of the module, and every error computed from the dense matrices in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exporting import randn, seeded
from torch import Tensor, nn

from matmorph.errors import InputError, SpecError
from matmorph.ir.core import Graph
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.to_torch import to_torch
from matmorph.ir.tracing.trace import trace
from matmorph.passes.linalg.curves import directions
from matmorph.passes.linalg.loftq import loftq
from matmorph.passes.linalg.quantize import Quantizer, quantize
from matmorph.passes.linalg.whiten import project, whitening_factor
from matmorph.passes.methods import method_table
from matmorph.passes.pipeline import Compilation, compile_graph
from matmorph.passes.rewriting.row_view import apply, row_view, undo
from matmorph.passes.statistics import sensitivity as felt
from matmorph.passes.statistics.probes import Probe, output_of, relative_change
from matmorph.specs.load import load_spec
from matmorph.specs.schema import Calibration, Spec, Train

METHODS = {name: method() for name, method in method_table().items()}


class Net(nn.Module):
    """Two branches of one width: the output hears `loud` a hundred times as well as `quiet`."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet, self.head = nn.Linear(24, 32), nn.Linear(24, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.loud(x)) + 0.01 * torch.relu(self.quiet(x))
        return {"hidden": hidden, "answer": self.head(hidden)}


DATA = [{"x": randn(8, 5, 24) * scale} for scale in (1.0, 2.0, 0.5)]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(seeded(Net), {"x": randn(3, 5, 24)}, {"x": {0: "batch", 1: "seq"}})


def spec(rewrite: Any, calibration: Any, budget: Any = None, **top: Any) -> Spec:
    rule = {"name": "r", "match": {"op": "matmul"}, "rewrite": rewrite}
    given = {"version": 1, "rules": [rule], "calibration": calibration, **({"budget": budget} if budget else {}), **top}
    return load_spec(given, method_table())


def compiled(graph: Graph, loaded: Spec, data: Any = DATA) -> Compilation:
    return compile_graph(graph, loaded, METHODS, "Net", calibration=data)


def relative(graph: Graph, output: str | None) -> Probe:
    return Probe(output_of(graph, output)[1], relative_change)


def gradients(scalar: Any, x: Tensor) -> dict[str, Tensor]:
    """Sum of g g^T over the rows of each linear's output, float64."""
    net, held = seeded(Net), {}
    for name, layer in net.named_children():
        layer.register_forward_hook(lambda _, __, out, name=name: held.setdefault(name, out))
    total = scalar(net(x))
    found = torch.autograd.grad(total, list(held.values()), allow_unused=True)
    flat = {name: None if g is None else g.reshape(-1, g.shape[-1]).double() for name, g in zip(held, found, strict=True)}
    return {name: torch.zeros(16, 16) if g is None else g.T @ g for name, g in flat.items()}


# ---- what is gathered


@pytest.mark.parametrize("output", ["hidden", "answer"])
def test_outputs_are_probed_with_the_seeds_own_normal_numbers(graph: Graph, output: str) -> None:
    sites = find_sites(graph)
    found = felt.of_output(graph, sites, DATA, 20, relative(graph, output), seed=7)
    generator = torch.Generator().manual_seed(7)
    wanted = {site.path: torch.zeros(site.out_features, site.out_features, dtype=torch.float64) for site in sites}
    for batch, count in zip(DATA, (8, 8, 4), strict=True):
        x = batch["x"][:count]

        def scalar(outputs: dict[str, Tensor]) -> Tensor:
            z = outputs[output]
            probed = (z * torch.randn(z.shape, generator=generator)).sum((1, 2))
            return (probed / z.detach().flatten(1).norm(dim=1)).sum()

        for name, moment in gradients(scalar, x).items():
            wanted[name] += moment
    for site in sites:
        wanted[site.path] /= 20
        scale = float(wanted[site.path].abs().max()) or 1.0
        assert float((found.moments[site] - wanted[site.path]).abs().max()) <= 1e-5 * scale  # float32 gradients
        assert found.slopes[site] == pytest.approx(float(wanted[site.path].trace()) / site.out_features, rel=1e-5)


def test_the_prediction_is_the_change_of_the_output(graph: Graph) -> None:
    """A site that the output is linear in: tr(G E H E^T) against |dz|^2 / |z|^2 of the model with W + E, for a random E."""
    site = next(site for site in find_sites(graph) if site.path == "head")
    data = [{"x": randn(64, 5, 24)}]
    draws = [felt.of_output(graph, [site], data, 64, relative(graph, "answer"), seed).moments[site] for seed in range(20)]
    net, error = seeded(Net), 0.1 * torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = net(data[0]["x"])
        net.head.weight += error
        after = net(data[0]["x"])["answer"]
        hidden = before["hidden"].reshape(-1, 32).double()
    e, h = error.double(), hidden.T @ hidden / len(hidden)
    predicted = float(((torch.stack(draws).mean(0) @ e @ h) * e).sum())
    happened = float(((after - before["answer"]).square().sum((1, 2)) / before["answer"].square().sum((1, 2))).mean())
    assert predicted == pytest.approx(happened, rel=0.1)  # 20 draws of 320 rows: G is known to about 1 / sqrt(6400), twice over


def test_fisher_is_the_second_moment_of_the_loss_gradients(graph: Graph) -> None:
    labels = torch.arange(40).reshape(8, 5) % 16
    sites = find_sites(graph)
    found = felt.fisher(graph, sites, [{**DATA[0], "labels": labels}], 8, Train(loss="cross_entropy", output="answer"))

    def scalar(outputs: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs["answer"].reshape(-1, 16), labels.reshape(-1), reduction="sum")

    for site, (name, moment) in zip(sites, gradients(scalar, DATA[0]["x"]).items(), strict=True):
        assert site.path == name
        torch.testing.assert_close(found.moments[site], moment / 8, rtol=1e-4, atol=1e-6)  # float32 gradients


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_rows_that_are_padding_count_nothing() -> None:
    axes = {0: "batch", 1: "seq"}
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    graph = trace(seeded(Masked), {"x": randn(2, 3, 6), "attention_mask": mask}, {"x": axes, "attention_mask": axes})
    sites = find_sites(graph)

    def moments(last: float) -> list[Tensor]:
        x = randn(2, 3, 6)
        x[1, 1:] = last
        found = felt.of_output(graph, sites, [{"x": x, "attention_mask": mask}], 2, relative(graph, None), 0)
        return [found.moments[site] for site in sites]

    for one, other in zip(moments(0.0), moments(1e3), strict=True):
        assert torch.equal(one, other)
        assert bool(one.any())


@pytest.mark.parametrize(
    ("layer", "x"), [(nn.Conv2d(6, 8, 1), randn(2, 6, 3, 4)), (nn.Linear(6, 8), randn(2, 3, 6))], ids=["conv1x1", "linear"]
)
def test_a_gradient_becomes_rows_as_the_output_was_made_of_rows(layer: nn.Module, x: Tensor) -> None:
    (site,) = find_sites(trace(nn.Sequential(layer).eval(), (x,), None))
    view = row_view(site, site.applications[0])
    rows = apply(view.enter, x)
    out = torch.arange(float(rows[..., 0].numel() * 8)).reshape(*rows.shape[:-1], 8)
    assert torch.equal(undo(view.leave, apply(view.leave, out)), out)


def test_a_wide_head_keeps_only_its_trace(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(felt, "WIDEST", 16)
    sites = find_sites(graph)
    found = felt.of_output(graph, sites, DATA, 8, relative(graph, "answer"), 0)
    assert {site.path for site in found.moments} == {"head"}
    assert set(found.slopes) == set(sites)


# ---- factors and curves


def problem(m: int, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W, H, L, C) in float64: inputs and gradients with directions of very different size."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(4 * k, k, generator=g, dtype=torch.float64) * torch.logspace(0, -2, k, dtype=torch.float64) for k in (n, m))
    h = x.T @ x / len(x)
    return torch.randn(m, n, generator=g, dtype=torch.float64), h, *(whitening_factor(s, 1, 1e-4).factor for s in (h, y.T @ y / len(y)))


@pytest.mark.parametrize(("m", "n"), [(9, 6), (6, 9), (7, 7)])
def test_weighted_factors_reach_the_tail_of_cwl(m: int, n: int) -> None:
    for seed in range(5):
        w, _, lower, c = problem(m, n, seed)
        u, s, _ = np.linalg.svd((c.T @ w @ lower).numpy(), full_matrices=False)
        for rank in range(1, min(m, n) + 1):
            down, up = project(w, torch.from_numpy(u[:, :rank].copy()), c)
            left = (c.T @ (w - (down @ up).T) @ lower).norm()
            assert float(left) == pytest.approx(float(np.sqrt((s[rank:] ** 2).sum())), abs=1e-9 * s[0])  # float64, cond(C) about 1e2
            torch.testing.assert_close(down.norm(dim=0), up.norm(dim=1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_curves_are_the_errors_of_every_rank_in_every_metric(weighted: bool) -> None:
    w, h, lower, c = problem(8, 6, 1)
    found = directions(w, lower, c if weighted else None)
    eye = torch.eye(8, dtype=torch.float64)
    metrics = {"weight": (None, None), "output": (h, None), "felt": (h, c)}
    for moment, weighting in metrics.values():
        curve = found.relative_errors(moment, weighting)
        left = eye if weighting is None else weighting
        for rank in range(7):
            down, up = project(w, found.u[:, :rank], found.weighting)
            errors = [left.T @ (w - (down @ up).T), left.T @ w]
            inner = torch.eye(6, dtype=torch.float64) if moment is None else moment
            error, whole = (float(((e @ inner) * e).sum().clamp_min(0).sqrt()) for e in errors)
            assert float(curve[rank]) == pytest.approx(error / whole, abs=1e-6)  # squares in float64: the root of 1e-12


def test_loftq_minimises_what_is_felt() -> None:
    w, _, lower, c = problem(32, 24, 2)
    quantizer = Quantizer("uniform", 2, 16)
    found = loftq(w, quantizer, 4, 1, whitening=whitening_factor(lower @ lower.T, 1, 0.0), weighting=c)
    rest = w - quantize(w, quantizer).dequantize().double()
    tail = np.linalg.svd((c.T @ rest @ lower).numpy(), compute_uv=False)[4:]
    whole = float((c.T @ w @ lower).norm())
    assert found.error == pytest.approx(float(np.sqrt((tail**2).sum())) / whole, rel=1e-3)  # GUARD of the low-rank step, scales in float32
    dense = found.quantized.dequantize().double() + found.A @ found.B
    assert float((c.T @ (w - dense) @ lower).norm()) / whole == pytest.approx(found.error, rel=1e-5)


# ---- through the pipeline

OUTPUT = {"sensitivity": "output", "output": "answer"}
AUTO = {"any_of": [{"low_rank": {"rank": "auto", "whiten": True, "damping": 1e-4}}, "keep"]}
HALF = {"parameters": "50%", "of": "matched"}


def change(graph: Graph, done: Compilation) -> float:
    """Relative, of the answer, on the calibration data."""
    x = torch.cat([batch["x"] for batch in DATA])
    with torch.no_grad():
        wanted, found = seeded(Net)(x)["answer"], to_torch(done.graph)(x=x)["answer"]
    return float((found - wanted).norm() / wanted.norm())


def parameters(done: Compilation) -> dict[str, int]:
    return {row.path: row.parameters[1] for row in done.report.sites}


def test_the_budget_goes_where_it_is_heard(graph: Graph) -> None:
    many = [{"x": randn(80, 5, 24) * scale} for scale in (1.0, 2.0, 0.5, 1.0, 2.0)]  # rows to choose by, beside those of the fit
    plain, ours = (compiled(graph, spec(AUTO, calibration, HALF), many) for calibration in ({}, OUTPUT))
    assert parameters(ours)["quiet"] < parameters(plain)["quiet"]
    assert parameters(ours)["loud"] > parameters(plain)["loud"]
    assert sum(parameters(ours).values()) <= (768 + 768 + 512) // 2
    assert change(graph, ours) < 0.8 * change(graph, plain)


def test_factors_are_fitted_to_what_is_heard(graph: Graph) -> None:
    low_rank = {"low_rank": {"rank": 6, "whiten": True, "damping": 1e-4}}
    plain, ours = (compiled(graph, spec(low_rank, calibration)) for calibration in ({}, OUTPUT))
    assert change(graph, ours) < change(graph, plain)
    for one, other in zip(ours.report.sites, plain.report.sites, strict=True):
        fitted = [row.sample.fitted_error if row.sample is not None else None for row in (one, other)]
        assert fitted[0] >= fitted[1] * (1 - 1e-5)  # on the rows of the fit whitening alone is best; float32 factors
        assert one.bound is None, "the bound is that of plain whitening"


def test_all_methods_are_compared_in_one_measure(graph: Graph) -> None:
    codes = {"quantizer": "uniform", "bits": "auto", "block_size": 16}
    mixed = {
        "any_of": [
            {"low_rank": {"rank": "auto", "whiten": True}},
            {"tt": {"rank": "auto", "cores": 2}},
            {"loftq": {**codes, "rank": 2, "whiten": True}},
            {"quantize": codes},
        ]
    }
    done = compiled(graph, spec(mixed, OUTPUT, {"bytes": "35%", "of": "matched"}))
    (decision,) = done.decisions
    for offer in decision.offers:
        assert all(option.error.felt_error is not None for option in offer.options if option.uses)
    assert change(graph, done) < change(graph, compiled(graph, spec(mixed, {}, {"bytes": "35%", "of": "matched"}))) * 1.1
    (row,) = [row for row in done.report.sites if row.path == "quiet"]
    assert row.bytes[1] == min(row.bytes[1] for row in done.report.sites if row.path != "head")


def test_fisher_shares_a_budget_out(graph: Graph) -> None:
    labelled = [{**batch, "labels": torch.zeros(8, 5, dtype=torch.int64)} for batch in DATA]
    train = {"loss": "cross_entropy", "output": "answer"}
    done = compiled(graph, spec(AUTO, {"sensitivity": "fisher"}, HALF, train=train), labelled)
    assert parameters(done)["quiet"] < parameters(done)["loud"]


def test_the_seed_decides_and_repeats(graph: Graph) -> None:
    first, again = (compiled(graph, spec(AUTO, OUTPUT, HALF)).decisions[0] for _ in range(2))
    assert first.allocation == again.allocation
    other = compiled(graph, spec(AUTO, OUTPUT, HALF, seed=5)).decisions[0]
    assert other.allocation.objective != first.allocation.objective


# ---- wrong input


@pytest.mark.parametrize(
    ("calibration", "data", "message"),
    [
        ({"sensitivity": "output", "output": "anser"}, DATA, "no output of floating-point numbers called anser; did you mean answer?"),
        ({"sensitivity": "output"}, None, "output needs calibration data and none was given"),
    ],
)
def test_what_cannot_be_gathered_is_said(graph: Graph, calibration: Any, data: Any, message: str) -> None:
    rewrite = {"any_of": [{"low_rank": {"rank": "auto"}}, "keep"]}
    with pytest.raises(SpecError, match=message.replace("?", r"\?")):
        compiled(graph, spec(rewrite, calibration, HALF), data)


def test_batches_without_labels_are_named(graph: Graph) -> None:
    train = {"loss": "cross_entropy", "output": "answer"}
    with pytest.raises(SpecError, match="fisher needs labels, and calibration batch 1 has no labels"):
        compiled(graph, spec(AUTO, {"sensitivity": "fisher"}, HALF, train=train))


def test_an_output_belongs_to_one_kind_of_sensitivity() -> None:
    with pytest.raises(SpecError, match="output goes with sensitivity: output or kl, and it is none"):
        spec(AUTO, {"output": "answer"}, HALF)


def test_gradients_that_are_not_finite_are_refused(graph: Graph) -> None:
    site = next(site for site in find_sites(graph) if site.path == "head")
    labels = torch.full((8, 5, 16), float("inf"))
    with pytest.raises(InputError, match="NaN or infinity at head"):
        felt.fisher(graph, [site], [{**DATA[0], "labels": labels}], 8, Train(loss="mse", output="answer"))


def test_the_defaults_ask_for_nothing(graph: Graph) -> None:
    assert Calibration() == Calibration(256, "none", None)
    assert felt.sensitivity(graph, Calibration(), spec(AUTO, {}, HALF), find_sites(graph), DATA, None) is None
