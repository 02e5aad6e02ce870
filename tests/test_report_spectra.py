"""Singular values from the solver to the report: against LAPACK in float64, for every solver, and few enough for a page."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from exporting import Mlp, randn, seeded

import matmorph as mm
from matmorph.passes.linalg import svd
from matmorph.passes.methods.low_rank.method import POINTS, _spectrum


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall from 1 to 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    return u * torch.logspace(0, -3, columns, dtype=torch.float64) @ v.T


@pytest.mark.parametrize(("solver", "known"), [("exact", 60), ("gram", 60), ("randomized", 7)])
@pytest.mark.parametrize("turned", [False, True])
def test_every_solver_gives_the_values_it_knows(solver: svd.Solver, known: int, turned: bool) -> None:
    w = 1e-9 * decaying(80, 60)  # far from 1: the solvers scale it, and must scale back
    found = svd.truncated_svd(w.T if turned else w, 7, solver=solver)
    assert found.solver == solver
    expected = np.linalg.svd(w.numpy(), compute_uv=False)
    assert len(found.spectrum) == known
    # A float64 Gram matrix is off by 1e-16 of the largest eigenvalue, so a value of 1e-3 by 1e-16 / (2 * 1e-3^2), relative.
    np.testing.assert_allclose(found.spectrum.numpy(), expected[:known], rtol=1e-9)


def test_values_that_rounding_hides_are_left_out() -> None:
    w = decaying(80, 60).float()
    w[:, 30:] = 0
    found = svd.truncated_svd(w, 5, solver="gram")
    expected = np.linalg.svd(w.double().numpy(), compute_uv=False)
    assert 5 <= len(found.spectrum) <= 40
    resolved = np.sqrt(np.finfo(np.float32).eps)  # of a Gram matrix in float32
    shown = found.spectrum.numpy()
    large = expected[: len(shown)] > 10 * resolved * expected[0]
    np.testing.assert_allclose(shown[large], expected[: len(shown)][large], rtol=0.02)  # 1 / (2 * 10^2) of the square, with a margin


def test_a_stack_has_roots_of_sums_of_squares() -> None:
    stack = torch.stack([decaying(20, 12, seed) * scale for seed, scale in ((0, 1.0), (1, 2.0))])
    found = svd.truncated_svd(stack, 3)
    expected = np.sqrt((np.linalg.svd(stack.numpy(), compute_uv=False) ** 2).sum(0))
    np.testing.assert_allclose(found.spectrum.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("known", "rank", "size"), [(1, 1, 1), (48, 5, 48), (49, 5, 60), (384, 115, 384), (4096, 4095, 4096), (77, 77, 9000)]
)
def test_a_selection_is_short_sorted_and_has_the_ends_and_the_rank(known: int, rank: int, size: int) -> None:
    values = torch.arange(known, 0, -1, dtype=torch.float64)
    found = _spectrum(values, rank, "W", size)
    assert {1, rank, known} <= set(found.at)
    assert list(found.at) == sorted(set(found.at))
    assert len(found.at) == min(known, len(found.at)) <= POINTS
    assert found.values == tuple(float(known + 1 - number) for number in found.at)
    assert found.size == size


@pytest.mark.parametrize("whiten", [False, True])
def test_the_report_has_them_for_low_rank_alone(whiten: bool) -> None:
    rules = [
        {"name": "a", "match": {"path": "fc1"}, "rewrite": {"low_rank": {"rank": 2, "whiten": whiten}}},
        {"name": "b", "match": {"path": "fc2"}, "rewrite": [{"lora": {"rank": 2}}]},
    ]
    inputs: dict[str, Any] = {"x": randn(3, 5, 8)}
    model = seeded(Mlp)
    report = mm.compile(model, {"version": 1, "name": "t", "rules": rules}, inputs, calibration=[inputs]).report
    first, second = report.sites
    assert second.spectrum is None
    assert first.spectrum is not None
    assert first.spectrum.of == ("W L" if whiten else "W")
    if not whiten:
        expected = np.linalg.svd(model.fc1.weight.detach().double().numpy(), compute_uv=False)
        np.testing.assert_allclose(first.spectrum.values, expected, rtol=1e-4)  # five digits are kept
    assert json.loads(json.dumps(report.to_dict()))["sites"][0]["spectrum"]["at"] == list(range(1, first.spectrum.size + 1))
