"""Gradients in the middle of a graph, in segments and parts: the same as in one pass, with less in memory; and KL as a measure of them.

Oracles: one pass over the whole batch, and explicit Hessians and finite differences in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exporting import randn, seeded
from torch import Tensor, nn
from torch.nn import functional

from matmorph.errors import SpecError
from matmorph.ir.core import Graph, Value
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace
from matmorph.passes.budget.offers import Offer, scale_of
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.statistics import probes
from matmorph.passes.statistics.backward import Backward, division, independent
from matmorph.passes.statistics.moment_store import MomentStore
from matmorph.passes.statistics.probes import Probe, divergence, output_of, probe_of, relative_change
from matmorph.passes.statistics.sensitivity import fisher, of_output
from matmorph.specs.schema import Calibration, Train

WORDS, WIDTH, HUGE = 46, 16, 1 << 40
AXES = {0: "batch", 1: "seq"}


class Speaker(nn.Module):
    """Residual blocks over a table that is the head too."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 64) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(64, WIDTH) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        unseen = torch.triu(torch.ones(x.shape[1], x.shape[1], device=x.device), 1) + (1 - attention_mask)[:, None]
        for mix, up, down in zip(self.mix, self.up, self.down, strict=True):
            shares = torch.softmax(mix(x) @ x.transpose(1, 2) / 4 - 1e4 * unseen, -1)
            x = x + shares @ x
            x = x + down(functional.gelu(up(x)))
        return x @ self.table.weight.T


def batch(seed: int, rows: int = 6, length: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(0, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def speaker() -> Graph:
    return trace(seeded(Speaker), batch(0), {"input_ids": AXES, "attention_mask": AXES})


def divided(graph: Graph, limit: int) -> Any:
    given = batch(1)
    return division(graph, graph.nodes, [next(iter(output_values(graph)))], [given[e.name] for e in graph.signature.inputs], limit)


def output_values(graph: Graph) -> list[Value]:
    return [value for value in graph.outputs if isinstance(value, Value)]


# ---- memory


@pytest.mark.parametrize("draw", [relative_change, divergence])
def test_parts_and_segments_give_what_one_pass_gives(speaker: Graph, draw: Any) -> None:
    sites, data = find_sites(speaker), [batch(1), batch(2)]
    assert len(divided(speaker, 20_000).cuts) > 2
    assert len(divided(speaker, 20_000).parts) > 1
    assert divided(speaker, HUGE).cuts == (0,)
    probe = Probe(output_of(speaker, None)[1], draw)
    whole, bounded = (of_output(speaker, sites, data, 12, probe, 3, limit=limit) for limit in (HUGE, 20_000))
    for site in sites:
        for sums in ("slopes", "lookups"):  # sums of float32 products in another order
            assert getattr(bounded, sums)[site] == pytest.approx(getattr(whole, sums)[site], rel=1e-6)
        error = float((bounded.moments[site] - whole.moments[site]).norm() / whole.moments[site].norm())
        assert error <= 1e-6


def test_labels_go_with_their_samples(speaker: Graph) -> None:
    sites = find_sites(speaker)
    data = [{**one, "labels": one["input_ids"]} for one in (batch(1), batch(2))]
    whole, bounded = (fisher(speaker, sites, data, 9, Train("causal_lm"), limit=limit) for limit in (HUGE, 20_000))
    for site in sites:
        error = float((bounded.moments[site] - whole.moments[site]).norm() / whole.moments[site].norm())
        assert error <= 1e-6  # as above


def test_a_segment_keeps_what_goes_on_and_no_more(speaker: Graph) -> None:
    """By autograd's own account of what it saves: in one pass all layers, in segments one of them."""
    output = output_of(speaker, None)[1]
    inputs = dict(zip(speaker.inputs, (batch(1)[entry.name] for entry in speaker.signature.inputs), strict=True))

    def most(cuts: tuple[int, ...]) -> int:
        held = peak = 0

        class Counted:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal held, peak
                self.tensor, self.size = tensor, tensor.numel()
                held += self.size
                peak = max(peak, held)

            def __del__(self) -> None:
                nonlocal held
                held -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Counted, lambda one: one.tensor):
            Backward.of(speaker.nodes, values, (output,)).run(inputs, cuts, lambda held: {output: torch.ones_like(held[output])}, ignore)
        return peak

    def ignore(value: Value, tensor: Tensor, gradient: Tensor | None) -> None:
        assert gradient is not None

    values = [application.output for site in find_sites(speaker) for application in site.applications]
    assert most(divided(speaker, 20_000).cuts) < 0.6 * most((0,))  # three layers and a head; the largest segment is a layer or less


def test_a_value_that_is_read_in_two_segments_sums_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            return torch.tanh(self.b(torch.tanh(first))) * first

    net, x = seeded(Twice).double(), randn(3, 4).double()
    graph = trace(net, {"x": x}, {"x": {0: "batch"}})
    output = output_of(graph, None)[1]
    found: dict[str, Tensor] = {}

    def keep(value: Value, _: Tensor, gradient: Tensor | None) -> None:
        assert gradient is not None
        found[value.name] = gradient

    values = [site.applications[0].output for site in find_sites(graph)]
    cuts = tuple(range(len(graph.nodes)))
    Backward.of(graph.nodes, values, (output,)).run({graph.inputs[0]: x}, cuts, lambda held: {output: torch.ones_like(held[output])}, keep)
    first = net.a(x).detach().requires_grad_()
    second = net.b(torch.tanh(first))
    wanted = torch.autograd.grad((torch.tanh(second) * first).sum(), [first, second])
    for value, gradient in zip(values, wanted, strict=True):
        torch.testing.assert_close(found[value.name], gradient, rtol=1e-12, atol=0)  # float64


def test_samples_that_know_of_one_another_are_not_parted() -> None:
    class Batched(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.fc, self.kind = nn.Linear(4, 4), kind

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return {"apart": y * 2, "mean": y - y.mean(0), "products": torch.softmax(y @ y.T, -1) @ y}[self.kind]

    for kind in ("apart", "mean", "products"):
        graph = trace(seeded(lambda kind=kind: Batched(kind)), {"x": randn(5, 4)}, {"x": {0: "batch"}})
        assert independent(graph.nodes, "batch") == (kind == "apart")
        assert len(division(graph, graph.nodes, output_values(graph), [randn(5, 4)], 16).parts) == (5 if kind == "apart" else 1)


def test_matrices_in_a_file_are_those_in_memory() -> None:
    held, filed = (MomentStore({"a": 3, "b": 5}, spill) for spill in (HUGE, 0))
    for store in (held, filed):
        store.add("a", torch.arange(9.0).reshape(3, 3))
        store.add("b", torch.eye(5))
        store.add("a", torch.ones(3, 3))
        store.scale(0.5)
    assert torch.equal(filed["a"], (torch.arange(9, dtype=torch.float64).reshape(3, 3) + 1) / 2)
    assert all(torch.equal(held[key], filed[key]) for key in ("a", "b"))
    assert list(filed) == ["a", "b"]


# ---- KL


def exact_kl(graph: Graph, given: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """G with the mean over v taken exactly: the sum over v = e_k, one row of the output at a time."""
    output, sites = output_of(graph, None)[1], find_sites(graph)
    total: dict[str, Tensor] = {site.path: torch.zeros(site.out_features, site.out_features, dtype=torch.float64) for site in sites}
    rows, classes = given["x"].shape[0], 7
    for row in range(rows):
        for k in range(classes):
            v = torch.zeros(rows, classes, dtype=torch.float64)
            v[row, k] = 1
            monkeypatch.setattr(probes, "_normal", lambda z, _, v=v: v.clone())
            for site, moment in of_output(graph, sites, [given], rows, Probe(output, divergence), 0).moments.items():
                total[site.path] += moment
    return total


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))


def test_kl_is_half_the_hessian_of_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = seeded(Classifier).double(), 2 * randn(3, 5).double()
    graph = trace(net, {"x": x}, {"x": {0: "batch"}})
    found = exact_kl(graph, {"x": x}, monkeypatch)
    wanted = {"hidden": torch.zeros(6, 6, dtype=torch.float64), "head": torch.zeros(7, 7, dtype=torch.float64)}
    for row in x:
        p = torch.log_softmax(net(row), -1).detach()

        def kl(z: Tensor, p: Tensor = p) -> Tensor:
            return (p.exp() * (p - torch.log_softmax(z, -1))).sum()

        z = net.hidden(row).detach()
        wanted["hidden"] += torch.autograd.functional.hessian(lambda z, kl=kl: kl(net.head(torch.tanh(z))), z) / 6
        wanted["head"] += torch.autograd.functional.hessian(kl, net(row).detach()) / 6
    for path, moment in wanted.items():  # at the minimum of KL its Hessian is the Gauss-Newton matrix; 3 rows, and a half
        torch.testing.assert_close(found[path], moment, rtol=1e-10, atol=1e-14)  # float64


def test_kl_predicts_the_divergence_of_a_changed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, so that nothing is taken as independent: tr(G E x x^T E^T) against KL of the model with W + E, a small E."""
    net, x = seeded(Classifier).double(), 2 * randn(1, 5).double()
    graph = trace(net, {"x": randn(2, 5).double()}, {"x": {0: "batch"}})
    g = exact_kl(graph, {"x": x}, monkeypatch)["hidden"]
    error = 1e-4 * torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        before = torch.log_softmax(net(x), -1)
        net.hidden.weight += error
        after = torch.log_softmax(net(x), -1)
    moved = (error @ x.T)[:, 0]
    happened = float((before.exp() * (before - after)).sum())
    assert float(moved @ g @ moved) == pytest.approx(happened, rel=1e-3)  # the next order is 1e-4 of it


def test_a_shift_of_all_logits_is_not_seen() -> None:
    z = randn(4, 3, 9)
    gradient, rows = divergence(z, None, torch.Generator().manual_seed(0))
    assert rows == 12
    assert float(gradient.sum(-1).abs().max()) <= 1e-6  # of entries about 0.3, float32


def test_tokens_that_are_padding_count_nothing() -> None:
    kept = torch.tensor([[True, True, False], [True, False, False]])
    gradient, rows = divergence(randn(2, 3, 9), kept, torch.Generator().manual_seed(0))
    assert rows == 3
    assert torch.equal(gradient.abs().sum(-1) > 0, kept)


def test_an_output_over_the_words_that_go_in_is_a_distribution(speaker: Graph) -> None:
    assert probe_of(speaker, Calibration(sensitivity="output")).draw is divergence
    other = trace(seeded(Classifier), {"x": randn(3, 5)}, {"x": {0: "batch"}})
    assert probe_of(other, Calibration(sensitivity="output")).draw is relative_change
    assert probe_of(other, Calibration(sensitivity="kl")).draw is divergence
    single = trace(seeded(lambda: nn.Sequential(nn.Linear(5, 1))), (randn(3, 5),), None)
    with pytest.raises(SpecError, match="kl compares distributions over classes, and the output has no axis of them"):
        probe_of(single, Calibration(sensitivity="kl"))


def test_the_same_seed_draws_the_same_numbers(speaker: Graph) -> None:
    sites, probe = find_sites(speaker), probe_of(speaker, Calibration(sensitivity="kl"))
    first, again, other = (of_output(speaker, sites, [batch(1)], 6, probe, seed, limit=20_000) for seed in (1, 1, 2))
    assert all(torch.equal(first.moments[site], again.moments[site]) for site in sites)
    assert not any(torch.equal(first.moments[site], other.moments[site]) for site in sites)


class Tied(nn.Module):
    """No more than a table and what it is read by."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.turn = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.tanh(self.turn(self.table(input_ids))) @ self.table.weight.T


def test_a_tied_table_counts_both_of_its_uses() -> None:
    """What is predicted of random errors of the whole table, of its rows as they go in and of the head alone, against KL in float64."""
    net = seeded(Tied).double()
    ids = batch(3, 24, 8)["input_ids"]
    graph = trace(net, {"input_ids": ids}, {"input_ids": AXES})
    site = next(site for site in find_sites(graph) if site.gathers)
    probe = probe_of(graph, Calibration(sensitivity="output"))
    draws = [of_output(graph, [site], [{"input_ids": ids}], 24, probe, seed) for seed in range(20)]
    w = net.table.weight.detach().clone()
    hidden = torch.tanh(net.turn(w[ids])).detach().flatten(0, 1)
    stats = SiteStats(hidden.T @ hidden, len(hidden))
    scales = [scale_of(Offer(site, None, ()), stats, found) for found in draws]  # type: ignore[arg-type]
    head, rows = (sum(getattr(one, name) for one in scales) / 20 for name in ("other", "looked_up"))

    def happened(into: float, out: float) -> float:
        total = 0.0
        for seed in range(40):
            error = 1e-3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            with torch.no_grad():
                before = torch.log_softmax(hidden @ w.T, -1)
                changed = torch.tanh(net.turn((w + into * error)[ids])).flatten(0, 1)
                after = torch.log_softmax(changed @ (w + out * error).T, -1)
            total += float((before.exp() * (before - after)).sum()) / len(hidden)
        return total / 40

    # the relative squares of such errors, on outputs and on the weight
    outputs = 1e-6 * float(stats.second_moment.trace()) * WORDS / float(((w @ stats.second_moment) * w).sum())
    weight = 1e-6 * w.numel() / float(w.square().sum())
    assert rows * weight == pytest.approx(happened(1, 0), rel=0.2)  # 20 draws of 192 rows, 40 errors
    assert head * outputs == pytest.approx(happened(0, 1), rel=0.4)  # inputs and gradients of the head are not independent
    assert head * outputs + rows * weight == pytest.approx(happened(1, 1), rel=0.4)
