"""Truncated SVD: held to the Eckart-Young theorem, with numpy's LAPACK in float64 as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matmorph.passes.linalg import svd
from matmorph.passes.linalg.svd import GUARD, choose_solver, rank_for_energy, rank_for_error, singular_values, tail_errors, truncated_svd

SOLVERS = ("exact", "gram", "randomized")


def matrix(spectrum: torch.Tensor, m: int, n: int, seed: int) -> torch.Tensor:
    """A random [m, n] matrix in float64 with the given singular values."""
    g = torch.Generator().manual_seed(seed)
    k = len(spectrum)
    u = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    return (u * spectrum.double()) @ v.T


def tail(w: torch.Tensor, rank: int) -> float:
    """Eckart-Young: the smallest Frobenius error at this rank, from numpy."""
    s = np.linalg.svd(w.double().numpy(), compute_uv=False)
    return float(np.sqrt((s[rank:] ** 2).sum()))


def error(w: torch.Tensor, found: svd.Truncated) -> float:
    return float((w.double() - (found.u.double() * found.s.double()) @ found.vh.double()).norm())


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    k = min(m, n)
    decay = draw(st.sampled_from((0.0, 0.5, 1.0, 3.0)))
    live = draw(st.integers(0, k))  # exact rank, 0 included
    spectrum = torch.arange(1, k + 1, dtype=torch.float64) ** -decay * (torch.arange(k) < live)
    seed = draw(st.integers(0, 2**16))
    return matrix(spectrum * draw(st.sampled_from((1e-6, 1.0, 1e6))), m, n, seed), draw(st.integers(1, k)), seed


@settings(max_examples=80, deadline=None)
@given(problem=problems(), solver=st.sampled_from(SOLVERS))
def test_every_solver_reaches_the_eckart_young_tail_in_float64(problem: tuple[torch.Tensor, int, int], solver: svd.Solver) -> None:
    w, rank, seed = problem
    found = truncated_svd(w, rank, solver=solver, seed=seed)
    # float64: 16 eps |W|_F is what the solvers themselves call rounding (3.6e-15); numpy's own tail carries as much again, k times.
    rounding = 32 * 24 * np.finfo(np.float64).eps * float(w.norm())
    assert error(w, found) <= found.guard * tail(w, rank) + rounding
    assert found.guard <= GUARD
    assert found.optimum <= tail(w, rank) + rounding
    gram = found.u.T @ found.u
    torch.testing.assert_close(gram, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-13)  # 24 columns times a few eps


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(96, 96), (256, 80), (80, 256)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_float32_results_are_within_their_guard_of_the_optimum(solver: svd.Solver, shape: tuple[int, int], decay: float) -> None:
    w = matrix(torch.arange(1, 81).double() ** -decay, *shape, seed=3).float()
    found = truncated_svd(w, 8, solver=solver, seed=1)
    # 16 eps(float32) |W|_F is the solvers' floor; the factor's own rounding in u * s @ vh is of the same size.
    rounding = 32 * np.finfo(np.float32).eps * float(w.norm())
    assert error(w, found) <= found.guard * tail(w, 8) + rounding
    assert found.guard <= GUARD == 1.01
    assert found.optimum <= tail(w, 8) + rounding


def test_the_certificate_is_sharp_where_the_iteration_has_converged() -> None:
    w = matrix(torch.arange(1, 257).double() ** -0.5, 300, 256, seed=0).float()
    found = truncated_svd(w, 16, solver="randomized", seed=0)
    assert found.solver == "randomized"
    assert found.optimum >= 0.99 * tail(w, 16)  # 1 / GUARD


def test_a_failed_guard_falls_back_to_the_next_more_exact_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(120, 100, generator=torch.Generator().manual_seed(0))
    assert truncated_svd(w, 4, solver="randomized").solver == "randomized"
    monkeypatch.setattr(svd, "_STEPS", (0,))  # the random start alone captures far too little of a flat spectrum
    found = truncated_svd(w, 4, solver="randomized")
    assert found.solver == "gram"
    assert error(w, found) <= GUARD * tail(w, 4)


def test_squared_condition_number_is_noticed() -> None:
    """s_r = 1e-6 s_1 is lost in a float32 Gram matrix (eps = 1e-7 of the squares): only the exact solver may answer."""
    w = matrix(10.0 ** -torch.arange(0, 40).double(), 64, 40, seed=1).float() + 0
    for solver in SOLVERS:
        found = truncated_svd(w, 4, solver=solver)
        assert error(w, found) <= GUARD * tail(w, 4) + 32 * np.finfo(np.float32).eps * float(w.norm())
    assert truncated_svd(w, 4, solver="gram").solver == "exact"


def test_a_missed_direction_is_found_out() -> None:
    """A start orthogonal to the largest direction: the Cholesky factorisation fails, whatever the Ritz values promise."""
    spectrum = torch.tensor([4.0, 3.0, 2.0] + [0.1] * 37, dtype=torch.float64)
    gram = torch.diag(spectrum**2)
    blind = torch.eye(40, dtype=torch.float64)[:, 1:6]  # everything but the first coordinate
    assert svd._certify(gram, blind, 2)[2] == float("inf")
    seeing = torch.eye(40, dtype=torch.float64)[:, :5]
    assert svd._certify(gram, seeing, 2)[2] == pytest.approx(16 + 9, rel=1e-12)  # exact eigenvectors: no slack but rounding


def test_the_certificate_bounds_the_energy_from_above() -> None:
    g = torch.Generator().manual_seed(5)
    for _ in range(20):
        a = torch.randn(60, 50, generator=g, dtype=torch.float64)
        basis = torch.linalg.qr(a.T @ (a @ torch.randn(50, 20, generator=g, dtype=torch.float64))).Q
        values = torch.linalg.eigvalsh(a.T @ a)
        bound = svd._certify(a.T @ a, basis, 5)[2]
        assert bound >= float(values[-5:].sum()) * (1 - 1e-12)  # float64 rounding of the sum


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_seed_same_bits_and_fixed_signs(solver: svd.Solver) -> None:
    w = matrix(torch.linspace(5, 1, 60), 60, 90, seed=2).float()
    first, second = (truncated_svd(w, 6, solver=solver, seed=7) for _ in range(2))
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.vh, second.vh)
    largest = first.u.gather(0, first.u.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    other = truncated_svd(w, 6, solver="exact")  # singular values 0.07 apart: vectors agree up to rounding, signs included
    torch.testing.assert_close(first.u, other.u, rtol=0, atol=2e-2)


def test_stacks_are_matrices_one_by_one() -> None:
    stack = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(1))
    found = truncated_svd(stack, 4)
    assert [tuple(part.shape) for part in (found.u, found.s, found.vh)] == [(3, 20, 4), (3, 4), (3, 4, 12)]
    for index, w in enumerate(stack):
        assert torch.equal(found.u[index], truncated_svd(w, 4).u)
    assert found.optimum == pytest.approx(np.sqrt(sum(tail(w, 4) ** 2 for w in stack)), rel=1e-5)  # float32 singular values


def test_the_solver_is_chosen_by_size_and_rank() -> None:
    assert choose_solver(128, 4096, 16) == "exact"
    assert choose_solver(768, 768, 64) == "randomized"
    assert choose_solver(768, 3072, 64) == "randomized"
    assert choose_solver(768, 768, 300) == "gram"
    assert truncated_svd(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), 16).solver == "randomized"


@pytest.mark.parametrize(
    ("w", "rank", "solver", "message"),
    [
        (torch.ones(3, 4), 0, "auto", "rank 0 is outside 1..3"),
        (torch.ones(3, 4), 4, "auto", "rank 4 is outside 1..3"),
        (torch.ones(3, 4), 1, "power", "unknown solver 'power'"),
        (torch.ones(3), 1, "auto", "not 1 axes"),
        (torch.tensor([[1.0, float("nan")]]), 1, "auto", "NaN"),
    ],
)
def test_bad_arguments(w: torch.Tensor, rank: int, solver: svd.Solver, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truncated_svd(w, rank, solver=solver)


def test_thread_count_is_restored() -> None:
    before = torch.get_num_threads()
    with svd.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


# ranks from the spectrum


@settings(max_examples=80, deadline=None)
@given(
    s=st.lists(st.floats(0, 100).map(lambda x: round(x, 3)), min_size=1, max_size=12),
    share=st.floats(0.01, 1.0),
)
def test_rank_rules_against_brute_force(s: list[float], share: float) -> None:
    values = np.sort(np.array(s, dtype=np.float64))[::-1]
    total = (values**2).sum()
    slack = 1e-12 * total  # float64 sums in another order
    energy = rank_for_energy(torch.tensor(values.copy()), share)
    kept = np.concatenate([[0.0], (values**2).cumsum()])
    assert kept[energy] >= share * total - slack
    assert energy == 1 or kept[energy - 1] < share * total + slack
    found = rank_for_error(torch.tensor(values.copy()), share)
    assert total - kept[found] <= share**2 * total + slack
    assert found == 1 or total - kept[found - 1] > share**2 * total - slack


def test_energy_counts_squares() -> None:
    s = torch.tensor([3.0, 2.0, 1.0])  # squares 9, 4, 1 of 14; the plain sum would be 3, 2, 1 of 6
    assert rank_for_energy(s, 0.6) == 1  # 9 / 14 = 0.64, but 3 / 6 = 0.5
    assert rank_for_energy(s, 0.93) == 3  # 13 / 14 = 0.9286
    assert rank_for_energy(s, 0.92) == 2
    assert rank_for_error(s, 0.27) == 2  # sqrt(1 / 14) = 0.267
    assert rank_for_error(s, 0.26) == 3


def test_a_stack_takes_the_rank_its_neediest_matrix_needs() -> None:
    s = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert rank_for_energy(s, 0.9) == 3
    assert rank_for_error(s[:1], 0.1) == 1
    assert rank_for_error(s[2:], 0.1) == 1  # nothing to lose: still a rank


def test_tail_errors_are_all_candidates_at_once() -> None:
    w = matrix(torch.tensor([3.0, 2.0, 1.0]), 5, 3, seed=0)
    expected = torch.tensor([1.0, (5 / 14) ** 0.5, (1 / 14) ** 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(tail_errors(singular_values(w)), expected, rtol=1e-12, atol=1e-14)  # float64, 5 x 3
    assert not tail_errors(torch.zeros(3)).any()


def test_singular_values_match_numpy() -> None:
    stack = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.svd(stack.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(stack).numpy(), expected, rtol=1e-12)  # well-conditioned, squared once in float64
