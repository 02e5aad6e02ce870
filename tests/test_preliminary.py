"""The preliminary phase: streamed sums of gradients against the formula in numpy, float64; what it refuses; mutants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from mutating import Mutant, mutated, unmutated
from rewriting import LINEAR, graph_of, only_site, rule_of, weights_of

from matmorph.errors import InputError, SpecError
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.methods.sparse_grad.method import SparseGrad, SparseGradSpec
from matmorph.passes.statistics import weight_gradients as real
from matmorph.specs.notations import Count
from matmorph.specs.schema import MethodUse, Train

METHODS: dict[str, Any] = {"sparse_grad": SparseGrad()}
WEIGHTS = {name: tensor.double().numpy() for name, tensor in weights_of(LINEAR).items()}
FLOAT32 = 1e-5
"""Gradients in float32, sums of 9 terms of size 1; the bases of two computations differ by as much over the gap of their values."""


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(9, 12, generator=g), "labels": torch.randn(9, 10, generator=g)} for _ in range(count)]


def gradient(batch: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Of mean (relu(x W^T + b) - label)^2 by W."""
    x, labels = (batch[name].double().numpy() for name in ("x", "labels"))
    y = x @ WEIGHTS["fc.weight"].T + WEIGHTS["fc.bias"]
    error = 2 * (np.maximum(y, 0) - labels) * (y > 0) / y.size
    return error.T @ x


def found(module: Any, data: Sequence[Any], train: Train | None = None, progress: Any = None, **settings: Any) -> Any:
    graph = graph_of(LINEAR)
    site = only_site(graph)
    rule = rule_of(MethodUse("sparse_grad", SparseGradSpec(**{"steps": len(data), "keep": Count(12, percent=False), **settings})))
    stats = {site: SiteStats(torch.eye(12), 1)}
    result = module.with_gradients(graph, [(site, rule)], METHODS, stats, data, train or Train(loss="mse"), progress)
    assert torch.equal(result[site].second_moment, torch.eye(12))
    return result[site].gradients


def bases(module: Any) -> None:
    """The sums over the first `steps` batches are diagonal in them, largest first; nothing else was computed."""
    stack = np.stack([gradient(batch) for batch in batches()[:3]])
    stats = found(module, batches()[:3])
    for basis, sums in (
        (stats.bases.u.numpy(), np.einsum("nab,ncb->ac", stack, stack)),
        (stats.bases.v.numpy(), np.einsum("nba,nbc->ac", stack, stack)),
    ):
        turned = basis.T @ sums @ basis
        assert np.abs(turned - np.diag(np.diag(turned))).max() < FLOAT32 * turned[0, 0]
    assert stats.scores is None


def first_batches(module: Any) -> None:
    """Batches after the last step are not read."""
    fewer, all_ = found(module, batches()[:2]), found(module, [*batches()[:2], {"x": None}], steps=2)
    assert torch.equal(fewer.bases.u, all_.bases.u)
    assert not torch.equal(fewer.bases.u, found(module, batches()).bases.u)


def scores(module: Any) -> None:
    stats = found(module, batches(), mask="fixed")
    u, v = stats.bases.u.numpy(), stats.bases.v.numpy()
    wanted = np.mean([np.abs(u.T @ gradient(batch) @ v) for batch in batches()], axis=0)
    assert np.abs(stats.scores.numpy() - wanted).max() < FLOAT32 * wanted.max()
    bare = found(module, batches(), mask="fixed", basis="none")
    wanted = np.mean([np.abs(gradient(batch)) for batch in batches()], axis=0)
    assert np.abs(bare.scores.numpy() - wanted).max() < FLOAT32 * wanted.max()
    assert bare.bases is None
    assert bare.shares is None


def shares(module: Any) -> None:
    """Of the first batch, raw and in the bases."""
    stats = found(module, batches())
    g = gradient(batches()[0])
    turned = stats.bases.u.numpy().T @ g @ stats.bases.v.numpy()
    for actual, one in zip(stats.shares, (g, turned), strict=True):
        assert actual == pytest.approx(np.sort((one**2).reshape(-1))[-12:].sum() / (one**2).sum(), abs=FLOAT32)


def refusals(module: Any) -> None:
    def refused(kind: type[Exception], message: str, data: Sequence[Any], **settings: Any) -> None:
        with pytest.raises(kind) as caught:
            found(module, data, **settings)
        assert message in str(caught.value)

    refused(SpecError, "takes the gradients of 5 batches, and the calibration data has 4", batches(), steps=5)
    refused(SpecError, "takes the gradients of 9 batches, and the calibration data has 4", batches(), steps=9, basis="none", mask="fixed")
    refused(SpecError, "calibration batch 2 has no labels", [batches()[0], {"x": batches()[1]["x"]}])
    refused(SpecError, "calibration batch 1 has no labels", [batches()[0]["x"]])
    bad = batches()
    bad[1]["labels"] = bad[1]["labels"] * torch.inf
    refused(InputError, "the gradient of the loss by fc is NaN or infinite on calibration batch 2", bad)


def progress(module: Any) -> None:
    seen: list[tuple[int, int | None]] = []
    found(module, batches(3), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3), (1, 1)]


def settings(module: Any) -> None:
    """Nothing is asked for without need, and without a loss that is an error of the spec."""
    graph = graph_of(LINEAR)
    claims = [(only_site(graph), rule_of(MethodUse("sparse_grad", SparseGradSpec(basis="none"))))]
    stats = {claims[0][0]: SiteStats(torch.eye(12), 1)}
    assert module.with_gradients(graph, claims, METHODS, stats, [None], Train(loss="mse")) is stats
    module.refuse_without_train(claims, METHODS, None)
    claims = [(claims[0][0], rule_of(MethodUse("sparse_grad", SparseGradSpec())))]
    module.refuse_without_train(claims, METHODS, Train(loss="mse"))
    with pytest.raises(SpecError, match="rule all: sparse_grad takes gradients of a loss, and the spec has none"):
        module.refuse_without_train(claims, METHODS, None)
    assert module.asks_for_gradients([MethodUse("sparse_grad", SparseGradSpec())], METHODS)


CHECKS: tuple[Callable[[Any], None], ...] = (bases, first_batches, scores, shares, refusals, progress, settings)


@pytest.mark.parametrize("check", CHECKS)
def test_preliminary(check: Callable[[Any], None]) -> None:
    check(real)


MUTANTS = {
    "the last gradient alone": Mutant("_bases", "number < one.wanted.steps", "number == 2"),
    "one batch too many": Mutant("_Source.gradients", "islice(self.batches, steps)", "islice(self.batches, steps + 1)"),
    "sums for means": Mutant("weight_gradients._stats", "found.total / found.batches", "found.total"),
    "signed sums": Mutant("weight_gradients._add", "found.total + rotated.abs()", "found.total + rotated"),
    "scores without the basis": Mutant(
        "weight_gradients._add", "gradient if found.bases is None else found.bases.rotated(gradient)", "gradient"
    ),
    "scores of the first batch": Mutant(
        "_sums", "one.wanted.steps if one.wanted.scores else min(one.wanted.steps, 1)", "min(one.wanted.steps, 1)"
    ),
    "energies exchanged": Mutant(
        "weight_gradients._add",
        "(top_share(gradient, wanted.count), top_share(rotated, wanted.count))",
        "(top_share(rotated, wanted.count), top_share(gradient, wanted.count))",
    ),
    "fewer batches than asked for": Mutant("_Source.gradients", "done < steps and short is not None", "False"),
    "labels of one's own": Mutant("labelled_batch", "missing", "False", nth=1),
    "anything is a gradient": Mutant("_Source._of_batch", "not bool(torch.isfinite(gradient).all())", "False"),
    "no loss is needed": Mutant(
        "refuse_without_train", "_asked(claims, methods) if train is None else []", "_asked(claims, methods) if False else []"
    ),
    "at other weights": Mutant("_Source.gradients", "const.load().detach", "const.load().detach().neg"),
}
NOTICED_BY = {
    "the last gradient alone": bases, "one batch too many": first_batches, "sums for means": scores, "signed sums": scores,
    "scores without the basis": scores, "scores of the first batch": scores, "energies exchanged": shares,
    "fewer batches than asked for": refusals, "labels of one's own": refusals, "anything is a gradient": refusals,
    "no loss is needed": settings, "at other weights": bases,
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name: str) -> None:
    killers = (AssertionError, KeyError, NameError, TypeError, SpecError, InputError, torch.linalg.LinAlgError, pytest.fail.Exception)
    with mutated(MUTANTS[name]) as m, pytest.raises(killers):
        NOTICED_BY[name](m)


def test_the_checks_pass_on_the_real_code() -> None:
    with unmutated(MUTANTS.values()) as m:
        for check in CHECKS:
            check(m)
