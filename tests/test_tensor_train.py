"""Tensor trains: held to the definition by einsum in float64, to numpy's SVD of every unfolding, and to tensorly's TT-SVD."""

from __future__ import annotations

from itertools import pairwise
from math import prod, sqrt
from string import ascii_lowercase, ascii_uppercase

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train as tensorly_train
from torch import Tensor

from matmorph.passes.linalg import unfolding
from matmorph.passes.linalg.modes import Modes, balanced_modes, balanced_shape, boundary
from matmorph.passes.linalg.svd import GUARD, SOLVERS, Solver
from matmorph.passes.linalg.tensor_train import (
    TensorTrain,
    clamp_ranks,
    full_ranks,
    matrix_to_tensor,
    merge_modes,
    reconstruct,
    round_tt,
    split_modes,
    tensor_to_matrix,
    tt_parameters,
    tt_svd,
    two_factors,
    vector_tensor_to_weight,
    weight_to_vector_tensor,
)
from matmorph.passes.linalg.unfolding import ROUNDING, left_step

EPS64, EPS32 = np.finfo(np.float64).eps, np.finfo(np.float32).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_train(modes: tuple[int, ...], ranks: tuple[int, ...], seed: int = 0) -> TensorTrain:
    edges = (1, *ranks, 1)
    return TensorTrain(tuple(normal(edges[k], mode, edges[k + 1], seed=seed + k) for k, mode in enumerate(modes)))


def decaying(*shape: int, seed: int = 0) -> Tensor:
    """Every unfolding has a decaying spectrum: a train of rank 12 whose k-th rank-one terms shrink, and a little noise."""
    ranks = clamp_ranks(shape, 12)
    cores = random_train(shape, ranks, seed).cores
    scaled = [core * torch.arange(1, core.shape[-1] + 1).double() ** -1.5 for core in cores]
    tensor = by_definition([core.numpy() for core in scaled])
    return torch.from_numpy(tensor / np.linalg.norm(tensor)) + 1e-3 * normal(*shape, seed=seed + 99) / sqrt(prod(shape))


def by_definition(cores: list[np.ndarray]) -> np.ndarray:
    """T(i_1..i_d) = sum over all inner indices of the product of core entries: one einsum over all cores."""
    edges, modes = ascii_uppercase, ascii_lowercase
    terms = ",".join(edges[k] + modes[k] + edges[k + 1] for k in range(len(cores)))
    tensor: np.ndarray = np.einsum(f"{terms}->{modes[: len(cores)]}", *cores, optimize=True)
    return tensor


def tail(tensor: Tensor, edge: int, rank: int) -> float:
    """Eckart-Young: smallest error of any tensor whose unfolding after `edge` modes has this rank."""
    s = np.linalg.svd(tensor.double().reshape(prod(tensor.shape[:edge]), -1).numpy(), compute_uv=False)
    return float(np.sqrt((s[rank:] ** 2).sum()))


def error_of(tensor: Tensor, train: TensorTrain) -> float:
    """Relative, with the train evaluated in float64 by its definition."""
    again = by_definition([core.double().numpy() for core in merge_modes(train).cores])
    norm = float(tensor.double().norm())
    return float(np.linalg.norm(again - tensor.double().numpy())) / norm if norm else float(np.linalg.norm(again))


shapes = st.lists(st.sampled_from((1, 2, 3, 4, 5, 7, 11)), min_size=1, max_size=5).filter(lambda shape: prod(shape) <= 2500)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...]]:
    shape = tuple(draw(shapes))
    seed = draw(st.integers(0, 2**16))
    kinds = {"flat": lambda: normal(*shape, seed=seed), "decaying": lambda: decaying(*shape, seed=seed)}
    kinds["exact"] = lambda: torch.from_numpy(by_definition([c.numpy() for c in random_train(shape, clamp_ranks(shape, 2), seed).cores]))
    kinds["zero"] = lambda: torch.zeros(shape, dtype=torch.float64)
    tensor = kinds[draw(st.sampled_from(tuple(kinds)))]() * draw(st.sampled_from((1e-30, 1e-6, 1.0, 1e20)))
    return tensor, tuple(draw(st.integers(1, 12)) for _ in shape[1:])


def unit_roundoff(tensor: Tensor) -> float:
    """d - 1 <= 4 steps, each within the 16 eps that the solvers call rounding; numpy's einsum and SVD carry as much again."""
    return 2 * 4 * ROUNDING * float(EPS64 if tensor.dtype == torch.float64 else EPS32)


@settings(max_examples=120, deadline=None)
@given(problem=problems(), solver=st.sampled_from(SOLVERS), sweep=st.sampled_from(("auto", "forward", "backward")))
def test_the_error_is_the_root_of_the_squared_tails_and_lies_between_its_bounds(
    problem: tuple[Tensor, tuple[int, ...]], solver: Solver, sweep: str
) -> None:
    tensor, ranks = problem
    train, info = tt_svd(tensor, ranks, solver=solver, sweep=sweep)
    effective = clamp_ranks(tensor.shape, ranks)
    assert train.ranks == info.ranks == info.limits == effective
    assert info.clamped == (effective != ranks)
    assert train.modes == tuple(tensor.shape)
    assert train.parameters == tt_parameters(tensor.shape, ranks)
    rounding = unit_roundoff(tensor)
    error = error_of(tensor, train)
    assert error == pytest.approx(info.error, rel=1e-9, abs=rounding)  # 1e-9: tails of 1e-3 |T| through squares carry 1e-10
    norm = float(tensor.norm())
    tails = [tail(tensor, edge + 1, rank) for edge, rank in enumerate(effective)]
    assert all(found <= best + rounding * norm for found, best in zip(info.optima, tails, strict=True))
    assert info.bound <= error + rounding
    assert error * norm <= GUARD * sqrt(sum(best**2 for best in tails)) + rounding * norm  # quasi-optimal: tails only shrink on the way
    if tails and error > 1e-6:  # below, the proven bound is lost in rounding
        assert info.guard <= GUARD * sqrt(len(tails)) * (1 + 1e-6)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), kind=st.sampled_from((normal, decaying)), sweep=st.sampled_from(("forward", "backward")))
def test_full_ranks_lose_nothing(shape: list[int], seed: int, kind, sweep) -> None:
    tensor = kind(*shape, seed=seed)
    for solver in SOLVERS:
        train, info = tt_svd(tensor, prod(shape), solver=solver, sweep=sweep)
        assert train.ranks == full_ranks(shape) == tuple(min(prod(shape[:k]), prod(shape[k:])) for k in range(1, len(shape)))
        # float64: every step is an orthogonal map of at most 50 columns, a few eps each; twelve digits are left with room to spare
        torch.testing.assert_close(reconstruct(train), tensor, rtol=0, atol=1e-12 * float(tensor.abs().max()))
        assert info.guard == 1.0


@settings(max_examples=40, deadline=None)
@given(shape=shapes.filter(lambda shape: len(shape) <= 3), seed=st.integers(0, 99), sweep=st.sampled_from(("forward", "backward")))
def test_errors_do_not_grow_with_the_rank(shape: list[int], seed: int, sweep) -> None:
    """Proven for three modes: the second unfolding only gains rows, so its singular values only grow."""
    tensor = normal(*shape, seed=seed)
    errors = [error_of(tensor, tt_svd(tensor, rank, sweep=sweep)[0]) for rank in range(1, 8)]
    assert all(after <= before + 1e-12 for before, after in pairwise(errors))  # float64 rounding
    long = decaying(4, 3, 5, 2, 4, 3, seed=seed)
    errors = [error_of(long, tt_svd(long, rank, sweep=sweep)[0]) for rank in range(1, 9)]
    assert all(after <= before + 1e-12 for before, after in pairwise(errors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [normal, decaying])
@pytest.mark.parametrize(
    "shape", [(6, 10, 8), (16, 8, 4, 4, 8), (3, 30, 40), (40, 30, 3), (13, 1, 17, 5), (4, 3, 2, 2, 2, 3, 4), (64, 64)], ids=str
)
def test_tensorly_finds_the_same_error_at_equal_ranks(shape: tuple[int, ...], kind, dtype: torch.dtype) -> None:
    tensor = kind(*shape).to(dtype)
    for rank in (1, 2, 5, 9):
        train, info = tt_svd(tensor, rank, sweep="forward")
        with tensorly.backend_context("pytorch"):
            theirs = tensorly_train(tensor.double(), [1, *info.ranks, 1])
            expected = float((theirs.to_tensor() - tensor.double()).norm() / tensor.double().norm())
        assert error_of(tensor, train) == pytest.approx(expected, abs=1e-6)
        assert info.error == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("target", [0.5, 0.1, 0.02, 1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize("kind", [normal, decaying])
@pytest.mark.parametrize("shape", [(8, 9, 10), (4, 6, 5, 3, 2), (50, 4, 30)], ids=str)
def test_an_error_target_is_kept_with_ranks_that_are_needed(shape: tuple[int, ...], kind, target: float) -> None:
    tensor = kind(*shape).float()
    train, info = tt_svd(tensor, error=target)
    found = error_of(tensor, train)
    assert found <= target * (1 + 1e-6) + 16 * EPS64  # the float64 einsum; float32 work only above 1e-4, where its 1e-7 adds in quadrature
    assert train.cores[0].dtype == (torch.float32 if target >= 1e-4 else torch.float64)
    assert info.ranks == clamp_ranks(shape, info.ranks)
    energy, same = tt_svd(tensor, energy=1 - target**2)
    assert same.ranks == pytest.approx(info.ranks, abs=0 if target >= 1e-3 else 1)  # 1 - target^2 has its own rounding
    assert error_of(tensor, energy) <= target * (1 + 1e-3) + 1e-7


def test_an_error_budget_that_one_edge_leaves_unused_goes_to_the_next() -> None:
    """The first edge of a 2 x .. tensor cannot be cut: the second may then use the whole budget, not half of it."""
    tensor = normal(2, 40, 40)
    info = tt_svd(tensor, error=0.3, sweep="forward")[1]
    assert info.tails[0] == pytest.approx(0.0, abs=1e-12 * info.norm)
    best = next(rank for rank in range(1, 41) if tail(tensor, 2, rank) <= 0.3 * float(tensor.norm()))
    assert info.ranks == (2, best)


def test_limits_and_multiples_beside_a_target() -> None:
    tensor = decaying(8, 8, 8, 8)
    free = tt_svd(tensor, error=0.05)[1]
    capped = tt_svd(tensor, 3, error=0.05)[1]
    assert max(capped.ranks) == 3 < max(free.ranks)
    assert capped.error > 0.05 >= free.error
    rounded = tt_svd(tensor, error=0.05, multiple_of=4)[1]
    assert all(up >= rank and (up % 4 == 0) for up, rank in zip(rounded.ranks, free.ranks, strict=True))
    assert rounded.error <= free.error


def test_a_rank_that_a_narrow_later_edge_makes_idle_is_removed() -> None:
    """Cutting the last edges to rank 1 leaves earlier ones wider than their neighbours allow."""
    tensor = normal(6, 2, 3)
    train, info = tt_svd(tensor, [6, 1], error=0.01, sweep="forward")
    assert info.ranks == train.ranks == (2, 1)
    assert error_of(tensor, train) == pytest.approx(info.error, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "rank", "parameters"),
    [
        ([12, 8, 8, 2, 2, 2, 8, 12], 4, 576),
        ([64, 4, 3, 3, 4, 64], 5, 990),
        *(
            ([16, 8, 8, 4, 4, 8, 8, 16], rank, count)
            for rank, count in ((2, 224), (4, 768), (5, 1160), (6, 1632), (8, 2816), (10, 4320), (12, 6144))
        ),
        ([16, 8, 4, 4, 4, 4, 8, 16], 5, 960),
        ([16, 16, 4, 2, 2, 16, 16], 5, 1160),
        ([16, 4, 4, 3, 2, 2, 2, 2, 3, 4, 4, 16], 5, 910),
        ([16, 4, 4, 3, 2, 2, 2, 2, 4, 4, 16], 5, 835),
        ([16, 4, 4, 4, 2, 2, 2, 2, 4, 4, 4, 16], 5, 960),
        ([16, 4, 4, 4, 2, 2, 2, 2, 4, 4, 16], 5, 860),
        ([16, 4, 4, 4, 2, 2, 2, 2, 2, 2, 4, 4, 4, 16], 5, 1060),
        ([16, 4, 4, 4, 2, 2, 2, 2, 2, 4, 4, 16], 5, 910),
        ([32, 4, 6, 8, 6, 48], 6, 1344),
    ],
    ids=str,
)
def test_parameter_counts_of_the_papers(shape: list[int], rank: int, parameters: int) -> None:
    """The TT-LoRA authors' shapes: sum of r_{k-1} k_i r_k, none of these ranks is clamped."""
    assert tt_parameters(shape, rank) == parameters
    assert clamp_ranks(shape, rank) == (rank,) * (len(shape) - 1)
    edges = (1, *clamp_ranks(shape, rank), 1)
    cores = tuple(torch.zeros(edges[k], mode, edges[k + 1]) for k, mode in enumerate(shape))
    assert TensorTrain(cores).parameters == parameters


@pytest.mark.parametrize(
    ("layers", "per_layer", "model"),
    [
        (12, 2 * tt_parameters([12, 8, 8, 2, 2, 2, 8, 12], 4), 13_824),  # RoBERTa-base, q and v
        (12, 2 * tt_parameters([64, 4, 3, 3, 4, 64], 5), 23_760),
        *(
            (32, 2 * tt_parameters([16, 8, 8, 4, 4, 8, 8, 16], rank), count)  # LLaMA-2-7B
            for rank, count in ((2, 14_336), (4, 49_152), (5, 74_240), (6, 104_448), (8, 180_224), (10, 276_480), (12, 393_216))
        ),
        (16, 960 + 1160, 33_920),  # Llama-3.2-1B
        (28, 910 + 835, 48_860),  # Llama-3.2-3B
        (32, 960 + 860, 58_240),  # Llama-3.1-8B
        (80, 1060 + 910, 157_600),  # Llama-3.1-70B
    ],
)
def test_parameter_counts_of_whole_models(layers: int, per_layer: int, model: int) -> None:
    assert layers * per_layer == model


def test_two_percent_of_lora() -> None:
    """ "TT-LoRA uses only 2 % of LoRA's parameters": Llama-3.2-1B, rank 16 on q (2048 x 2048) and v (512 x 2048) of 16 layers."""
    lora = 16 * 16 * ((2048 + 2048) + (512 + 2048))
    assert lora == 1_703_936
    assert round(100 * 33_920 / lora, 2) == 1.99


def test_ranks_are_clamped_to_what_the_modes_and_the_neighbours_allow() -> None:
    assert clamp_ranks([64, 16, 9, 64], 100) == (64, 100, 64)
    assert full_ranks([64, 16, 9, 64]) == (64, 576, 64)
    assert clamp_ranks([16, 8, 8, 16], 99) == (16, 99, 16)
    assert clamp_ranks([4, 4, 16], [1, 8]) == (1, 4), "1 * 4 rows on its left"
    assert clamp_ranks([16, 4, 4], [8, 1]) == (4, 1), "4 * 1 columns on its right"
    assert clamp_ranks([5], []) == clamp_ranks([5], 3) == ()
    assert clamp_ranks([1, 7, 1], 4) == (1, 1)
    assert tt_parameters([1, 7, 1], 4) == 9
    info = tt_svd(normal(4, 4, 4), 99)[1]
    assert (info.ranks, info.limits, info.clamped) == ((4, 4), (4, 4), True)


@settings(max_examples=60, deadline=None)
@given(out=st.integers(1, 60), in_=st.integers(1, 60), d=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_tt_matrix_reconstructs_by_its_definition(out: int, in_: int, d: int, seed: int) -> None:
    """W[(o_1..o_d), (i_1..i_d)] = G_1[:, o_1, i_1, :] ... for any size that splits, primes and ones included."""
    try:
        modes = balanced_modes(out, in_, d)
    except ValueError:
        return
    w = normal(out, in_, seed=seed)
    torch.testing.assert_close(tensor_to_matrix(matrix_to_tensor(w, modes), modes), w, rtol=0, atol=0)
    train = split_modes(tt_svd(matrix_to_tensor(w, modes), 3)[0], modes)
    assert train.matrix_modes == modes
    assert train.modes == modes.sizes
    letters = "abcdefgh"
    terms = [f"{letters[k]}{'opqr'[k]}{'ijkl'[k]}{letters[k + 1]}" for k in range(d)]
    oracle = np.einsum(f"{','.join(terms)}->{'opqr'[:d]}{'ijkl'[:d]}", *(core.numpy() for core in train.cores), optimize=True)
    # float64: sums of at most 3^3 products of entries of size |W|
    torch.testing.assert_close(reconstruct(train), torch.from_numpy(oracle.reshape(out, in_)), rtol=0, atol=1e-12 * float(w.norm()))
    exact = split_modes(tt_svd(matrix_to_tensor(w, modes), error=0.0)[0], modes)
    torch.testing.assert_close(reconstruct(exact), w, rtol=0, atol=1e-12 * float(w.norm()))


def contraction_of_the_papers(x: np.ndarray, cores: list[np.ndarray], p: int) -> np.ndarray:
    """arXiv 2504.21190: x viewed as (m_p .. m_1), the last axis met first; output modes are appended."""
    modes = [core.shape[1] for core in cores]
    state = x.reshape(len(x), 1, *reversed(modes[:p]))
    for core in cores[:p]:
        state = np.einsum("br...m,rmp->bp...", state, core)
    for core in cores[p:]:
        state = np.einsum("br...,rnp->bp...n", state, core)
    return state.reshape(len(x), -1)


@pytest.mark.parametrize(
    ("shape", "in_features"),
    [((4, 3, 2, 2, 5), 12), ((4, 3, 2, 2, 5), 24), ((6, 4, 4, 6), 24), ((7, 3), 7), ((2, 3, 5, 1, 7), 30)],
    ids=str,
)
def test_a_vector_shape_means_what_the_papers_contract(shape: tuple[int, ...], in_features: int) -> None:
    p = boundary(shape, in_features)
    train = random_train(shape, clamp_ranks(shape, 3))
    cores = [core.numpy() for core in train.cores]
    tensor = by_definition(cores)
    w = vector_tensor_to_weight(reconstruct(train), in_features)
    axes = [*range(p, len(shape)), *reversed(range(p))]
    np.testing.assert_allclose(w.numpy(), tensor.transpose(axes).reshape(-1, in_features), rtol=0, atol=1e-12)  # float64, entries near 10
    x = normal(5, in_features, seed=7)
    y = contraction_of_the_papers(x.numpy(), cores, p)
    np.testing.assert_allclose(y, (x @ w.T).numpy(), rtol=0, atol=1e-11)  # sums of 24 such entries
    down, up = two_factors(train, in_features)
    assert (down.shape, up.shape) == ((in_features, train.ranks[p - 1]), (train.ranks[p - 1], w.shape[0]))
    torch.testing.assert_close((x @ down) @ up, x @ w.T, rtol=0, atol=1e-11)
    torch.testing.assert_close(weight_to_vector_tensor(w, shape, in_features), reconstruct(train), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 48), in_=st.integers(1, 48), d=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=st.integers(0, 99))
def test_any_weight_goes_through_the_vector_form_and_back(out: int, in_: int, d: tuple[int, int], seed: int) -> None:
    try:
        shape = balanced_shape(out, in_, *d)
    except ValueError:
        return
    w = normal(out, in_, seed=seed)
    tensor = weight_to_vector_tensor(w, shape, in_)
    assert torch.equal(vector_tensor_to_weight(tensor, in_), w)
    train = tt_svd(tensor, error=0.0)[0]
    down, up = two_factors(train, in_)
    torch.testing.assert_close((down @ up).T, w, rtol=0, atol=1e-12 * float(w.norm()))  # float64 through a dozen orthogonal maps
    y = contraction_of_the_papers(np.eye(in_), [core.numpy() for core in train.cores], boundary(shape, in_))
    np.testing.assert_allclose(y.T, w.numpy(), rtol=0, atol=1e-12 * float(w.norm()))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, wide=st.integers(1, 9), rank=st.integers(1, 6), seed=st.integers(0, 99), scale=st.sampled_from((1e-30, 1.0, 1e20)))
def test_rounding_is_a_tt_svd_of_the_train(shape: list[int], wide: int, rank: int, seed: int, scale: float) -> None:
    modes = tuple(shape)
    train = random_train(modes, (wide,) * (len(modes) - 1), seed)
    train = TensorTrain((train.cores[0] * scale, *train.cores[1:]))
    tensor = torch.from_numpy(by_definition([core.numpy() for core in train.cores]))
    rounded, info = round_tt(train, rank)
    effective = tuple(map(min, clamp_ranks(modes, rank), clamp_ranks(modes, wide)))
    assert rounded.ranks == info.ranks == clamp_ranks(modes, effective)
    assert info.norm == pytest.approx(float(tensor.norm()), rel=1e-12)
    assert error_of(tensor, rounded) == pytest.approx(info.error, abs=1e-12)  # float64 sweeps over at most five cores
    direct = tt_svd(tensor, info.ranks, sweep="backward")[1]
    assert info.error == pytest.approx(direct.error, abs=1e-10)  # equal up to rotations inside equal singular values
    fine, fine_info = round_tt(train, error=0.2)
    assert error_of(tensor, fine) <= 0.2 + 1e-12
    assert all(less <= full for less, full in zip(fine_info.ranks, train.ranks, strict=True))


def test_rounding_without_a_target_drops_what_is_not_needed() -> None:
    modes = (4, 5, 6, 3)
    small = random_train(modes, (2, 3, 2))
    padded = TensorTrain(
        tuple(torch.nn.functional.pad(core, (0, 4 if k < 3 else 0, 0, 0, 0, 4 if k > 0 else 0)) for k, core in enumerate(small.cores))
    )
    rounded, info = round_tt(padded)
    assert padded.ranks == (6, 7, 6)
    assert rounded.ranks == (2, 3, 2)
    assert info.error < 1e-14
    torch.testing.assert_close(reconstruct(rounded), reconstruct(small), rtol=0, atol=1e-12)  # float64, entries of size 10
    matrix = split_modes(padded, Modes((2, 5, 3, 1), (2, 1, 2, 3)))
    again = round_tt(matrix)[0]
    assert again.matrix_modes == matrix.matrix_modes
    torch.testing.assert_close(reconstruct(again), reconstruct(matrix), rtol=0, atol=1e-12)
    single = TensorTrain(tuple(core.float() for core in padded.cores))
    assert round_tt(single)[0].cores[0].dtype == torch.float32
    zero = TensorTrain(tuple(torch.zeros_like(core) for core in padded.cores))
    assert round_tt(zero)[0].ranks == (1, 1, 1)


def test_cores_are_orthonormal_but_one() -> None:
    tensor = decaying(6, 5, 4, 7)
    for sweep in ("forward", "backward"):
        train, info = tt_svd(tensor, 4, sweep=sweep)
        cores = train.cores[:-1] if sweep == "forward" else train.cores[1:]
        for core in cores:
            flat = core.reshape(-1, core.shape[-1]).T if sweep == "forward" else core.reshape(core.shape[0], -1)
            torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat), dtype=torch.float64), rtol=0, atol=1e-13)  # a few eps
        assert info.sweep == sweep


def test_the_cheaper_end_is_taken_when_it_saves_half() -> None:
    assert tt_svd(normal(4, 8, 32), 2)[1].sweep == "forward"
    assert tt_svd(normal(32, 8, 4), 2)[1].sweep == "backward"
    assert tt_svd(normal(8, 8, 8), 2)[1].sweep == "forward"


def test_a_small_rank_of_a_large_matrix_needs_no_large_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """1024 x 1024, rank 8: LAPACK may see Gram matrices of the short side and thin factors, never an unfolding."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name in ("svd", "eigh", "qr", "svdvals", "eigvalsh", "cholesky_ex"):
        real = getattr(torch.linalg, name)

        def counted(a: Tensor, *args, _real=real, _name=name, **more):
            seen.append((_name, tuple(a.shape)))
            return _real(a, *args, **more)

        monkeypatch.setattr(torch.linalg, name, counted)
    modes = balanced_modes(1024, 1024, 3)
    w = normal(1024, 1024).float()
    info = tt_svd(matrix_to_tensor(w, modes), 8)[1]
    assert info.solvers == ("gram", "gram")
    shapes = {name: {shape for known, shape in seen if known == name} for name, _ in seen}
    assert modes.sizes == (128, 64, 128), "unfoldings of 128 x 8192, and of 8 * 64 x 128 with 8 vectors to orthonormalise"
    assert shapes == {"eigh": {(128, 128)}, "qr": {(512, 8)}}


def test_gram_matrices_are_summed_in_float64_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for side in (7, 70, 200):  # one, two and four bands
        c = normal(side, 1000).float()
        expected = c.double().numpy() @ c.double().numpy().T
        for block in (side, 70 * side, 1 << 20):
            monkeypatch.setattr(unfolding, "_BLOCK", block)
            np.testing.assert_allclose(
                unfolding.gram_matrix(c, torch.float64).numpy(), expected, rtol=0, atol=1e-11
            )  # float64 sums of a thousand


@pytest.mark.parametrize("shape", [(30, 400), (400, 30)], ids=str)
def test_what_a_gram_matrix_cannot_see_goes_to_the_exact_solver(shape: tuple[int, int]) -> None:
    """Tails of 1e-10 |C| in float64: eigenvalues of the Gram matrix are noise there."""
    spectrum = 10.0 ** -torch.arange(30).double()
    u, v = (torch.linalg.qr(normal(size, 30, seed=size)).Q for size in shape)
    c = (u * spectrum) @ v.T
    step = left_step(c, 9)
    assert step.solver == "exact"
    assert step.error == pytest.approx(float(spectrum[9:].norm()), rel=1e-5)  # 1e-9 of |C| to five digits: eps / 1e-9 = 2e-7
    assert 0.99 * step.error < step.optimum <= step.error
    assert float((c - step.u @ step.rest).norm()) == pytest.approx(step.error, rel=1e-5)
    assert left_step(c, 3).solver == "gram"
    assert left_step(c, lambda tails: int((tails <= (2e-10) ** 2).int().argmax())).u.shape == (shape[0], 10)


@pytest.mark.parametrize("shape", [(30, 3000), (3000, 30)], ids=str)
@pytest.mark.parametrize(("size", "types"), [(0.3, ["float32"]), (1e-3, ["float32", "float64"])], ids=["large", "small"])
def test_float32_work_is_kept_only_where_it_is_proven_good(
    shape: tuple[int, int], size: float, types: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tail of 1e-3 |C| is 1e-6 of the energy: the rounding of a float32 Gram matrix could hide all of it."""
    used: list[str] = []
    real = unfolding.gram_matrix
    monkeypatch.setattr(unfolding, "gram_matrix", lambda c, dtype: used.append(str(dtype)[6:]) or real(c, dtype))
    u, v = (torch.linalg.qr(normal(length, 30, seed=length)).Q for length in shape)
    spectrum = torch.cat([torch.ones(4), size * torch.ones(26) / sqrt(26)]).double()
    c = ((u * spectrum) @ v.T).float()
    step = left_step(c, 4)
    assert used == types
    assert step.solver == "gram"
    best = tail(c, 1, 4) if shape[0] < shape[1] else tail(c.T.contiguous(), 1, 4)
    assert step.optimum <= best <= step.error * (1 + 1e-5)  # float32 norms
    assert step.error <= GUARD * step.optimum
    assert float((c.double() - step.u.double() @ step.rest.double()).norm()) == pytest.approx(step.error, rel=1e-3)  # 1e-7 / 1e-3, squared


def test_a_wide_unfolding_of_small_rank_is_iterated_on() -> None:
    """Beyond 512 on the short side the solver of low_rank takes over, with its certificate."""
    c = normal(600, 700).float()
    step = left_step(c, 4)
    assert step.solver == "randomized"
    best = tail(c, 1, 4)  # [600, 700] is its own unfolding
    assert step.optimum <= best * (1 + 1e-5)  # float32 norms
    assert best * (1 - 1e-5) <= step.error <= GUARD * best
    assert float((c.double() - step.u.double() @ step.rest.double()).norm()) == pytest.approx(step.error, rel=1e-5)
    assert left_step(c, 4, solver="gram").solver == "gram"


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_seed_same_bits(solver: Solver) -> None:
    tensor = decaying(12, 10, 14).float()
    first, second = (tt_svd(tensor, 5, solver=solver, seed=3)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))


def test_types_of_weights() -> None:
    w = decaying(6, 5, 4)
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert tt_svd(w.to(dtype), 3)[0].cores[1].dtype == expected
    view = w.permute(2, 0, 1)
    torch.testing.assert_close(reconstruct(tt_svd(view, 30)[0]), view, rtol=0, atol=1e-13)  # float64, entries below 1
    trained = torch.nn.Parameter(w)
    train = tt_svd(trained, 3)[0]
    assert not train.cores[0].requires_grad
    assert not round_tt(TensorTrain(tuple(map(torch.nn.Parameter, train.cores))), 2)[0].cores[0].requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": [3]}, r"3 modes have 2 inner ranks, not 1: \[3\]"),
        ({"ranks": [1, 3, 3, 1]}, "3 modes have 2 inner ranks, not 4"),
        ({"ranks": 0}, r"ranks are at least 1, not \[0, 0\]"),
        ({"ranks": [2, -1]}, "ranks are at least 1"),
        ({}, "ranks, an error or an energy are needed"),
        ({"error": 0.1, "energy": 0.9}, "an error or an energy, not both"),
        ({"error": 1.0}, "an error is at least 0 and below 1, not 1.0"),
        ({"error": -0.1}, "an error is at least 0"),
        ({"error": float("nan")}, "an error is at least 0"),
        ({"energy": 0.0}, "an energy is above 0 and at most 1"),
        ({"energy": 1.5}, "an energy is above 0 and at most 1"),
        ({"error": 0.1, "multiple_of": 0}, "multiple_of is at least 1, not 0"),
        ({"ranks": 2, "solver": "fast"}, "unknown solver 'fast': one of auto, exact, gram, randomized"),
    ],
    ids=str,
)
def test_wrong_arguments_are_said(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tt_svd(normal(3, 4, 5), **arguments)


def test_wrong_tensors_are_said() -> None:
    bad = normal(3, 4, 5)
    for value in (float("nan"), float("inf")):
        bad[1, 2, 3] = value
        with pytest.raises(ValueError, match="NaN or infinity in the tensor"):
            tt_svd(bad, 2)
    with pytest.raises(ValueError, match="NaN or infinity in the cores"):
        round_tt(TensorTrain((torch.full((1, 3, 1), float("nan")),)), 1)
    for shape in ((0, 3), ()):
        with pytest.raises(ValueError, match="a tensor with entries is needed"):
            tt_svd(torch.zeros(shape), 1)
    with pytest.raises(ValueError, match=r"the modes make a matrix of \[6, 6\], not \[6, 5\]"):
        matrix_to_tensor(normal(6, 5), Modes((2, 3), (3, 2)))
    with pytest.raises(ValueError, match=r"the modes make a matrix of \[5, 6\], not \[6, 6\]"):
        weight_to_vector_tensor(normal(6, 6), [2, 3, 5], 6)
    with pytest.raises(ValueError, match="no first modes"):
        weight_to_vector_tensor(normal(6, 6), [4, 9], 6)
    with pytest.raises(ValueError, match=r"rank 5 is outside 1\.\.4"):
        left_step(normal(4, 9), 5)


def test_cores_have_to_fit_together() -> None:
    for cores in (
        (torch.zeros(1, 3, 2), torch.zeros(3, 3, 1)),
        (torch.zeros(2, 3, 1),),
        (torch.zeros(1, 3, 2),),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            TensorTrain(cores)
    for cores in ((torch.zeros(1, 3, 1), torch.zeros(1, 2, 2, 1)), (torch.zeros(1, 1),), ()):
        with pytest.raises(ValueError, match="cores have 3 axes each, or 4 each"):
            TensorTrain(cores)
    matrix = split_modes(tt_svd(normal(4, 4), 2)[0], Modes((2, 2), (2, 2)))
    with pytest.raises(ValueError, match="a TT-matrix has no border"):
        two_factors(matrix, 4)
    with pytest.raises(ValueError, match="has no output modes after in_features = 16"):
        two_factors(merge_modes(matrix), 16)


def test_zero_weights_become_zero_trains() -> None:
    for arguments in ({"ranks": 3}, {"error": 0.1}, {"energy": 0.99}):
        train, info = tt_svd(torch.zeros(4, 5, 6), **arguments)
        assert not bool(reconstruct(train).any())
        assert (info.error, info.bound, info.guard, info.norm) == (0.0, 0.0, 1.0, 0.0)
    assert tt_svd(torch.zeros(4, 5, 6), error=0.1)[1].ranks == (1, 1)


def test_one_mode_is_the_vector_itself() -> None:
    vector = normal(9)
    train, info = tt_svd(vector, 3)
    assert torch.equal(reconstruct(train), vector)
    assert (info.ranks, info.tails, info.error, info.guard) == ((), (), 0.0, 1.0)
    assert torch.equal(reconstruct(round_tt(train)[0]), vector)
