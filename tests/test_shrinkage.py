"""Shrinkage of a second moment. Oracles: the paper's own iteration, whose limit the closed form is; the definition of the cosines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matmorph.passes.linalg.shrinkage import effective_rank, oas, shrinkage_damping
from matmorph.passes.linalg.whiten import project, relative_output_error, whitening_factor


def rows_of(count: int, features: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, features)) * np.geomspace(1, 0.05, features)


def iterated(s: np.ndarray, n: int) -> float:
    """Chen et al. 2010, eq. 21 and 22, run until it stands still: the oracle's formula with the estimate in the place of the truth."""
    p, rho = len(s), 0.5  # 1 stands still wherever the limit is
    target = np.trace(s) / p * np.eye(p)
    for _ in range(20_000):
        sigma = (1 - rho) * s + rho * target
        cross, trace = np.trace(sigma @ s), np.trace(sigma) ** 2
        now = ((1 - 2 / p) * cross + trace) / ((n + 1 - 2 / p) * cross + (1 - n / p) * trace)
        now = min(now, 1.0)
        if abs(now - rho) < 1e-15:
            break
        rho = now
    return rho


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 200), features=st.integers(2, 24), seed=st.integers(0, 2**16))
def test_it_is_the_limit_of_the_papers_iteration(count: int, features: int, seed: int) -> None:
    x = rows_of(count, features, seed)
    s = x.T @ x / count
    wanted = iterated(s, count)
    # the iteration contracts towards its limit; where that is 1 its steps shrink like 1 / k^2, so 20 000 of them leave up to 5e-5
    assert oas(torch.from_numpy(s), count) == pytest.approx(wanted, abs=1e-6 if wanted < 0.999 else 1e-4)


def test_it_vanishes_with_rows_and_leaves_nothing_of_one() -> None:
    found = [oas(torch.from_numpy(x.T @ x), len(x)) for x in (rows_of(count, 16, 0) for count in (1, 16, 160, 1600, 16000, 160_000))]
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1e-4  # about (1 + effective rank) / rows
    assert shrinkage_damping(torch.eye(1), 5) == 0.0, "one feature has no other to be told from"
    assert oas(torch.eye(4), 10) == 0.0, "a multiple of the identity is its own target"
    assert oas(torch.eye(4), 0) == 1.0


def test_without_a_damping_whitening_shrinks() -> None:
    """(1 - rho) S + rho F over 1 - rho, of each matrix of a stack by its own rows."""
    few, many = (torch.from_numpy(rows_of(count, 8, count)) for count in (12, 600))
    for x in (few, many):
        s = (x.T @ x) / len(x)
        rho = iterated(s.numpy(), len(x))
        lower = whitening_factor(x.T @ x, len(x)).factor
        shrunk = s + rho / (1 - rho) * s.diagonal().mean() * torch.eye(8)
        torch.testing.assert_close(lower @ lower.T, shrunk, rtol=1e-5, atol=1e-12)  # the iteration above stops at 1e-6
    stack = whitening_factor(torch.stack([few.T @ few, many.T @ many]), torch.tensor([12, 600]))
    assert float(stack.shift[0] * 612 / 12) == pytest.approx(float(whitening_factor(few.T @ few, 12).shift), rel=1e-12)
    assert float(stack.shift[1] * 612 / 600) == pytest.approx(float(whitening_factor(many.T @ many, 600).shift), rel=1e-12)


def test_one_row_is_plain_svd() -> None:
    """With one row there is no second moment to go by: the factors are those of the weight itself."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(12, 8, generator=generator, dtype=torch.float64), torch.randn(1, 8, generator=generator, dtype=torch.float64)
    whitening = whitening_factor(x.T @ x, 1)
    assert whitening.notes == ()
    u, values, vh = np.linalg.svd(w.numpy())
    down, up = project(w, torch.linalg.svd(w @ whitening.factor).U[:, :3])
    expected = (u[:, :3] * values[:3]) @ vh[:3]
    np.testing.assert_allclose((down @ up).T.numpy(), expected, atol=1e-4)  # shrinkage stops at 1 - 1e-6


def test_shrunk_factors_are_better_on_other_rows_than_damped_ones() -> None:
    """Fewer rows than features: the point of it."""
    rows, fresh = (torch.from_numpy(rows_of(count, 64, seed)) for count, seed in ((32, 1), (20_000, 2)))
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def error(damping: float | None, on: torch.Tensor) -> float:
        factor = whitening_factor(rows.T @ rows, len(rows), damping).factor
        down, up = project(w, torch.linalg.svd(w @ factor).U[:, :16])
        return relative_output_error(w, (down @ up).T, on.T @ on)

    assert error(None, fresh) < error(1e-4, fresh)
    assert error(1e-4, rows) < 0.5 * error(1e-4, fresh), "what is fitted to rows says too little on them"


@pytest.mark.parametrize(("count", "features"), [(1, 20), (7, 20), (20, 20), (2000, 20)])
def test_effective_rank_is_that_of_the_cosines(count: int, features: int) -> None:
    x = rows_of(count, features, 5)
    unit = x / np.linalg.norm(x, axis=0)
    values = np.linalg.eigvalsh(unit.T @ unit)
    expected = values.sum() ** 2 / (values**2).sum()
    wide = np.concatenate([x, np.zeros((count, 3))], axis=1)  # dead features are none
    for one in (x, wide):
        assert effective_rank(torch.from_numpy(one.T @ one)) == pytest.approx(expected, rel=1e-9)  # float64, size 23
    assert expected <= min(count, features) * (1 + 1e-12)
    assert effective_rank(torch.zeros(3, 3)) == 0.0
