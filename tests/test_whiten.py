"""Whitening: the factors minimise the output error. Oracle: the SVD of W L and an explicit inverse of L in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matmorph.passes.linalg.svd import truncated_svd
from matmorph.passes.linalg.whiten import project, relative_output_error, relative_weight_error, whitening_factor


def problem(m: int, n: int, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(W [m, n], X [rows, n]) in float64; features of very different size, as activations have."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, n, dtype=torch.float64)
    mixing = torch.randn(n, n, generator=g, dtype=torch.float64)
    return torch.randn(m, n, generator=g, dtype=torch.float64), torch.randn(rows, n, generator=g, dtype=torch.float64) @ mixing * scales


def whitened(w: torch.Tensor, x: torch.Tensor, rank: int, damping: float) -> torch.Tensor:
    """W' [m, n] by the code under test."""
    lower = whitening_factor(x.T @ x, len(x), damping).factor
    down, up = project(w, truncated_svd(w @ lower, rank).u)
    return (down @ up).T


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 16), n=st.integers(1, 16), seed=st.integers(0, 2**16), data=st.data())
def test_whitened_factors_reach_the_tail_of_wl_and_equal_the_published_form(m: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    w, x = problem(m, n, 4 * n, seed)
    h = (x.T @ x).numpy() / len(x)
    lower = np.linalg.cholesky(h + 1e-6 * np.diag(h).mean() * np.eye(n))
    u, s, vh = np.linalg.svd(w.numpy() @ lower, full_matrices=False)
    found = whitened(w, x, rank, 1e-6).numpy()
    optimum, total = np.sqrt((s[rank:] ** 2).sum()), np.linalg.norm(s)
    # cond(L) <= 1e3 by the damping; 1e-16 * 1e3 * n, with room for the Gram-free exact solver: 1e-10 of the whole.
    assert np.linalg.norm((w.numpy() - found) @ lower) == pytest.approx(optimum, abs=1e-10 * total)
    gap = s[rank - 1] - (s[rank] if rank < len(s) else 0.0)
    if gap > 1e-3 * s[0]:  # otherwise the best matrix is not unique
        published = (u[:, :rank] * s[:rank]) @ vh[:rank] @ np.linalg.inv(lower)
        np.testing.assert_allclose(found, published, atol=1e-7 * np.abs(published).max())  # eps / gap * cond(L)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), rank=st.integers(1, 7))
def test_whitened_never_has_a_larger_output_error_than_plain(seed: int, rank: int) -> None:
    w, x = problem(12, 8, 64, seed)
    down, up = project(w, truncated_svd(w, rank).u)
    plain, ours = (down @ up).T, whitened(w, x, rank, 0.0)

    def measured(other: torch.Tensor) -> float:
        return float((x @ (w - other).T).norm() / (x @ w.T).norm())

    assert measured(ours) <= measured(plain) * (1 + 1e-9) + 1e-12  # float64 rounding
    assert relative_output_error(w, ours, x.T @ x) == pytest.approx(measured(ours), rel=1e-6)
    assert relative_weight_error(w, plain) <= relative_weight_error(w, ours) + 1e-12


def test_plain_factors_split_the_singular_values_evenly() -> None:
    w = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = np.linalg.svd(w.numpy(), full_matrices=False)
    down, up = project(w, truncated_svd(w, 4).u)
    assert down.shape == (6, 4)
    assert up.shape == (4, 9)
    np.testing.assert_allclose(np.linalg.norm(down.numpy(), axis=0), np.sqrt(s[:4]), rtol=1e-12)  # |sqrt(S) V| per column
    np.testing.assert_allclose(np.linalg.norm(up.numpy(), axis=1), np.sqrt(s[:4]), rtol=1e-12)
    np.testing.assert_allclose((down @ up).T.numpy(), (u[:, :4] * s[:4]) @ vh[:4], atol=1e-12)


def test_zero_weight_and_zero_directions_give_zero_factors() -> None:
    zero = torch.zeros(5, 4)
    down, up = project(zero, truncated_svd(zero, 2).u)
    assert not down.any()
    assert not up.any()
    assert relative_weight_error(zero, (down @ up).T) == 0.0
    assert relative_output_error(zero, (down @ up).T, torch.eye(4)) == 0.0


def test_dead_features_do_not_break_and_cost_nothing() -> None:
    w, x = problem(6, 8, 40, 3)
    x[:, [2, 5]] = 0.0
    found = whitening_factor(x.T @ x, len(x), 1e-4)
    assert found.notes == ()
    lower = found.factor
    torch.testing.assert_close(lower @ lower.T, x.T @ x / len(x) + found.shift * torch.eye(8), rtol=0, atol=1e-12)  # float64, size 8
    best = np.linalg.svd((x @ w.T).numpy(), compute_uv=False)
    ours = relative_output_error(w, whitened(w, x, 3, 1e-4), x.T @ x)
    # damping 1e-4 of the mean moves the optimum by at most that share of |W|^2: a few per cent of this tail
    assert ours == pytest.approx(np.sqrt((best[3:] ** 2).sum() / (best**2).sum()), rel=0.05)


def test_damping_is_raised_with_a_note_until_cholesky_succeeds() -> None:
    x = torch.zeros(1, 4, dtype=torch.float64)
    x[0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = whitening_factor(x.T @ x, 1, 0.0)
    assert bool(torch.isfinite(found.factor).all())
    assert found.notes[0].startswith("damping raised from 0 to ")
    assert float(found.shift) > 0


def test_no_data_is_plain_svd_with_a_note() -> None:
    found = whitening_factor(torch.zeros(3, 3), 0, 1e-4)
    assert torch.equal(found.factor, torch.eye(3, dtype=torch.float64))
    assert "no calibration data" in found.notes[0]


def test_stacks_share_one_divisor_and_name_their_experts() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 30, 4, generator=g, dtype=torch.float64)
    moments = torch.cat([x.transpose(1, 2) @ x, torch.zeros(1, 4, 4, dtype=torch.float64)])
    found = whitening_factor(moments, torch.tensor([30, 30, 0]), 0.0)
    torch.testing.assert_close(found.factor[0] @ found.factor[0].T, moments[0] / 60, rtol=1e-12, atol=1e-14)  # float64
    assert found.notes == ("expert 2: no calibration data reached this input: plain SVD",)


def test_bad_moments_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        whitening_factor(torch.full((2, 2), float("nan")), 1, 0.1)
    with pytest.raises(ValueError, match="not positive semidefinite"):
        whitening_factor(torch.tensor([[1.0, 1e6], [1e6, 1.0]]), 1, 0.1)
