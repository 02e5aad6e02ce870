"""Mutants of the tensor trains: each plants one plausible mistake in the source, and the checks below must notice.

The checks are a digest of the other tests, against einsum and numpy in float64; unmutated code passes them all.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from mutating import Check, Mutant, killer, mutated, unmutated

MUTANTS = {
    "output and input modes of a core swapped": Mutant(
        "matrix_to_tensor", "[axis for k in range(d) for axis in (k, d + k)]", "[axis for k in range(d) for axis in (d + k, k)]"
    ),
    "modes of a core swapped on the way back": Mutant(
        "tensor_to_matrix", "[*range(0, 2 * d, 2), *range(1, 2 * d, 2)]", "[*range(1, 2 * d, 2), *range(0, 2 * d, 2)]"
    ),
    "cores split in the wrong order": Mutant(
        "split_modes", "core.reshape(core.shape[0], out, in_, core.shape[-1])", "core.reshape(core.shape[0], in_, out, core.shape[-1])"
    ),
    "input modes not reversed": Mutant("vector_tensor_to_weight", "reversed(range(p))", "range(p)"),
    "input modes not reversed on the way in": Mutant("weight_to_vector_tensor", "reversed(shape[:p])", "shape[:p]"),
    "factor with input modes in order": Mutant("two_factors", "reversed(range(1, p + 1))", "range(1, p + 1)"),
    "a core dropped from the input factor": Mutant("two_factors", "train.cores[1:p]", "train.cores[1:p - 1]"),
    "a core dropped from the output factor": Mutant("two_factors", "train.cores[p:-1]", "train.cores[p + 1:-1]"),
    "a core dropped from the sweep": Mutant(
        "sweeps.forward", "[*cores, rest.reshape(rank, -1, 1)]", "[*cores[:-1], rest.reshape(rank, -1, 1)]"
    ),
    "steps not in the order of the edges": Mutant(
        "backward", "([rest.reshape(1, -1, rank), *reversed(cores)], steps[::-1])", "([rest.reshape(1, -1, rank), *reversed(cores)], steps)"
    ),
    "singular values not carried on": Mutant("unfolding._gram", "rest = u.T @ c", "rest = torch.nn.functional.normalize(u.T @ c, dim=1)"),
    "smallest singular vectors kept": Mutant("unfolding._gram", "vectors[:, -rank:]", "vectors[:, :rank]"),
    "Gram matrix of the last block": Mutant(
        "gram_matrix", "lower[start:end, :end] += part[start:end] @ part[:end].T", "lower[start:end, :end] = part[start:end] @ part[:end].T"
    ),
    "Gram matrix of float32": Mutant("gram_matrix", "block.to(dtype)", "block.float().double()"),
    "Gram matrix not mirrored": Mutant("gram_matrix", "lower.tril(-1).T", "lower.triu(1)"),
    "rounding of the Gram matrix left out": Mutant("unfolding._gram", "max(0.0, tail - slack)", "tail"),
    "tail off by one": Mutant("unfolding._gram", "float(tails[rank])", "float(tails[max(0, rank - 1)])"),
    "noise of the Gram matrix trusted": Mutant("unfolding._gram", "error <= GUARD * optimum", "True"),
    "rank chosen by noise": Mutant(
        "unfolding._gram",
        "callable(wanted) and float(tails[rank - 1]) <= _NOISE * total and (rank > 1)",
        "callable(wanted) and float(tails[rank - 1]) < 0",
    ),
    "exact solver keeps the last vectors": Mutant("unfolding._exact", "vectors[:, :rank]", "vectors[:, -rank:]"),
    "budget shared out anew at every edge": Mutant(
        "ErrorBudget.rank", "self.squared - sum((step.error ** 2 for step in done))", "self.squared"
    ),
    "budget for the first edge alone": Mutant(
        "ErrorBudget.rank",
        "(self.squared - sum((step.error ** 2 for step in done))) / (len(self.limits) - len(done))",
        "self.squared - sum((step.error ** 2 for step in done))",
    ),
    "limits forgotten": Mutant("ErrorBudget.rank", "min(rounded, limit)", "min(rounded, c.shape[0], c.shape[1])"),
    "multiples rounded down": Mutant("ErrorBudget.rank", "-(-wanted // self.multiple_of)", "max(1, wanted // self.multiple_of)"),
    "target not squared": Mutant("ErrorBudget.of", "(target * norm) ** 2", "target * norm ** 2"),
    "triangular factor not carried": Mutant("left_orthogonal", "torch.tensordot(carried, core, 1)", "core[:carried.shape[0]]"),
    "clamped from the left only": Mutant("clamp_ranks", "right = inner[k] = min(inner[k], right * modes[k + 1])", "right = inner[k]"),
    "clamped by the modes alone": Mutant(
        "clamp_ranks", "left = inner[k] = min(rank, left * modes[k])", "left, inner[k] = (left * modes[k], min(rank, left * modes[k]))"
    ),
    "scale of a large weight lost": Mutant("tt_svd", "cores[heavy] = cores[heavy] * scale", "pass"),
    "energy taken for an error": Mutant("tensor_train._target", "sqrt(1 - energy)", "energy"),
    "bound from the summed tails": Mutant("Info.bound", "max(self.optima, default=0.0)", "sum(self.optima)"),
    "error from the largest tail": Mutant("Info.error", "sqrt(sum((tail ** 2 for tail in self.tails)))", "max(self.tails)"),
    "NaN let through": Mutant("tt_svd", "not isfinite(peak)", "False"),
    "parameters without the last rank": Mutant("tt_parameters", "edges[k] * mode * edges[k + 1]", "edges[k] * mode * edges[k]"),
    "boundary after the whole": Mutant("boundary", "products.index(in_features) + 1", "products.index(in_features)"),
    "ones always allowed": Mutant("modes.factors", "primes is None or (d > len(primes) and (not ones))", "primes is None"),
    "primes accepted": Mutant("modes.factors", "max(SPREAD * size ** (1 / d), 2)", "size"),
    "input modes paired in order": Mutant("_paired", "sorted(in_, reverse=True)", "sorted(in_)"),
    "padding downwards": Mutant(
        "_at_least", "(n for n in count(size) if factors(n, d, ones=ones))", "(n for n in count(size, -1) if factors(n, d, ones=ones))"
    ),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(cores: tuple[torch.Tensor, ...]) -> np.ndarray:
    """[out, in] of a TT-matrix of three cores, by definition."""
    w = np.einsum("aoib,bpjc,cqkd->opqijk", *(core.double().numpy() for core in cores))
    return w.reshape(prod(w.shape[:3]), -1)


def tensor(cores: tuple[torch.Tensor, ...]) -> np.ndarray:
    """Of a TT-vector of four cores, by definition."""
    return np.einsum("aib,bjc,ckd,dle->ijkl", *(core.double().numpy() for core in cores))


def tails(t: torch.Tensor, rank: tuple[int, ...]) -> list[float]:
    spectra = [np.linalg.svd(t.reshape(prod(t.shape[:k]), -1).numpy(), compute_uv=False) for k in range(1, t.dim())]
    return [float(np.sqrt((s[r:] ** 2).sum())) for s, r in zip(spectra, rank, strict=True)]


T = normal(4, 5, 3, 6)
NORM = float(T.norm())


def check_matrix_form(m: Any) -> None:
    w = normal(24, 30, seed=1)
    modes = m.Modes((2, 3, 4), (5, 3, 2))
    t = m.matrix_to_tensor(w, modes)
    assert tuple(t.shape) == (10, 9, 8)
    assert t[7, 5, 6] == w[1 * 12 + 1 * 4 + 3, 2 * 6 + 2 * 2 + 0]  # 7 = 1 * 5 + 2, 5 = 1 * 3 + 2, 6 = 3 * 2 + 0
    train = m.split_modes(m.tt_svd(t, 99)[0], modes)
    np.testing.assert_allclose(matrix(train.cores), w.numpy(), atol=1e-12)  # float64, full ranks
    np.testing.assert_allclose(m.reconstruct(train).numpy(), w.numpy(), atol=1e-12)
    assert m.round_tt(train)[0].matrix_modes == modes


def check_vector_form(m: Any) -> None:
    w = normal(18, 20, seed=2)
    t = m.weight_to_vector_tensor(w, (4, 5, 3, 6), 20)
    assert tuple(t.shape) == (4, 5, 3, 6)
    np.testing.assert_array_equal(t.permute(2, 3, 1, 0).reshape(18, 20).numpy(), w.numpy())
    assert torch.equal(m.vector_tensor_to_weight(t, 20), w)
    train = m.tt_svd(t, 99)[0]
    down, up = m.two_factors(train, 20)
    np.testing.assert_allclose((down @ up).T.numpy(), w.numpy(), atol=1e-12)
    long = m.tt_svd(normal(2, 3, 2, 2, 5, 3), 4)[0]
    w = m.vector_tensor_to_weight(m.reconstruct(long), 12)
    down, up = m.two_factors(long, 12)
    np.testing.assert_allclose((down @ up).T.numpy(), w.numpy(), atol=1e-12)


def check_ranks(m: Any) -> None:
    for sweep in ("forward", "backward"):
        for ranks in ((2, 3, 2), (4, 9, 5), (1, 1, 1)):
            train, info = m.tt_svd(T, ranks, sweep=sweep)
            error = float(np.linalg.norm(tensor(train.cores) - T.numpy())) / NORM
            assert info.error == pytest.approx(error, rel=1e-9)
            best = tails(T, ranks)
            assert all(found <= limit * (1 + 1e-9) for found, limit in zip(info.optima, best, strict=True))
            first = 0 if sweep == "forward" else -1  # the first unfolding is that of T itself: its tail is met
            assert info.optima[first] == pytest.approx(best[first], rel=1e-9)
            assert max(best) * 0.7 / NORM <= info.bound <= error * (1 + 1e-12)
            assert error <= np.sqrt(sum(limit**2 for limit in best)) / NORM * (1 + 1e-9)
    assert m.clamp_ranks([4, 4, 16], [1, 8]) == (1, 4), "1 * 4 rows on its left"
    assert m.clamp_ranks([16, 4, 4], [8, 1]) == (4, 1), "4 * 1 columns on its right"
    assert m.tt_parameters([4, 5, 3, 6], (2, 3, 2)) == 8 + 30 + 18 + 12


def check_targets(m: Any) -> None:
    for target in (0.3, 0.6):
        train, info = m.tt_svd(T, error=target)
        error = float(np.linalg.norm(tensor(train.cores) - T.numpy())) / NORM
        assert error <= target
        assert prod(info.ranks) < prod((4, 18, 6))
        assert m.tt_svd(T, energy=1 - target**2)[1].ranks == info.ranks
        assert max(m.tt_svd(T, 2, error=target)[1].ranks) == 2
    uneven = normal(2, 40, 40)  # the first edge cannot be cut, the second may use all of the budget
    best = next(rank for rank in range(1, 41) if tails(uneven, (2, rank))[1] <= 0.3 * float(uneven.norm()))
    assert m.tt_svd(uneven, error=0.3)[1].ranks == (2, best)
    cube = normal(12, 10, 12, seed=3)
    info = m.tt_svd(cube, error=0.5)[1]
    assert info.tails[0] ** 2 <= (0.5 * info.norm) ** 2 / 2, "half of the budget for each of two edges"
    rounded = m.tt_svd(cube, error=0.5, multiple_of=5)[1]
    assert all(up >= rank and up in (5, 10, 12) for up, rank in zip(rounded.ranks, info.ranks, strict=True))


def check_rounding(m: Any) -> None:
    train = m.tt_svd(T, (4, 8, 5))[0]
    mixed = m.TensorTrain(tuple(core * 3 for core in train.cores))
    again = m.round_tt(mixed, (4, 8, 5))[0]
    np.testing.assert_allclose(tensor(again.cores), tensor(mixed.cores), atol=1e-11)  # float64, entries of 3^4
    skewed = torch.eye(4, dtype=torch.float64) + torch.ones(4, 4, dtype=torch.float64).triu()  # no orthonormal frame
    first = torch.tensordot(train.cores[0], skewed, 1)
    second = torch.tensordot(torch.linalg.inv(skewed), train.cores[1], 1)
    skew = m.TensorTrain((first, second, *train.cores[2:]))
    small, info = m.round_tt(skew, 3)
    whole = torch.from_numpy(tensor(skew.cores))
    error = float(np.linalg.norm(tensor(small.cores) - whole.numpy()) / whole.norm())
    assert info.error == pytest.approx(error, rel=1e-9)
    assert error <= np.sqrt(sum(limit**2 for limit in tails(whole, (3, 3, 3)))) / float(whole.norm()) * (1 + 1e-9)


def check_scales_and_bad_input(m: Any) -> None:
    for scale in (1e-25, 1e25):
        train, info = m.tt_svd((T * scale).float(), 3)
        assert info.norm == pytest.approx(NORM * scale, rel=1e-5)  # float32 sums
        error = np.linalg.norm(tensor(train.cores) - T.numpy() * scale) / (NORM * scale)
        assert info.error == pytest.approx(error, rel=1e-4)
    with pytest.raises(ValueError, match="NaN"):
        m.tt_svd(T.clone().fill_(float("nan")), 2)


def check_steps(m: Any) -> None:
    spectrum = 10.0 ** -torch.arange(30).double()
    for shape in ((30, 400), (400, 30)):
        u, v = (torch.linalg.qr(normal(size, 30, seed=size)).Q for size in shape)
        c = (u * spectrum) @ v.T
        step = m.left_step(c, 9)
        assert float((c - step.u @ step.rest).norm()) == pytest.approx(float(spectrum[9:].norm()), rel=1e-4)
        assert step.error == pytest.approx(float(spectrum[9:].norm()), rel=1e-4)
        assert step.optimum == pytest.approx(step.error, rel=1e-2)
        assert m.left_step(c, lambda found: int((found <= 4e-20).int().argmax())).u.shape[1] == 10
    assert m.left_step(normal(30, 400), 5).solver == "gram", "nothing here needs a more exact one"
    seen = m.gram_matrix
    types = []
    m.put("gram_matrix", lambda c, dtype: types.append(dtype) or seen(c, dtype))
    for shape in ((30, 400), (400, 30)):
        types.clear()
        m.left_step(normal(*shape).float(), 5)
        assert types == [torch.float32]
        types.clear()
        m.left_step((normal(*shape)[:, :5] @ normal(shape[1], 5).T + 1e-3 * normal(*shape)).float(), 5)
        assert types == [torch.float32, torch.float64]
    m.put("gram_matrix", seen)
    m.put("unfolding._BLOCK", 700)
    c = normal(70, 50)
    np.testing.assert_allclose(m.gram_matrix(c, torch.float64).numpy(), (c @ c.T).numpy(), rtol=0, atol=1e-12)


def check_modes(m: Any) -> None:
    assert m["modes.factors"](4096, 3) == (16, 16, 16)
    assert m["modes.factors"](4099, 3) is None
    assert m.padded_modes(4099, 64, 3).out_features == 4100
    assert m.balanced_modes(768, 3072, 3) == m.Modes((12, 8, 8), (12, 16, 16))
    assert m.balanced_modes(11008, 4096, 3).sizes == (43 * 16, 256, 256)
    assert m.balanced_modes(1024, 1024, 3).sizes == (128, 64, 128)
    assert m.boundary([4, 3, 2], 12) == 2
    assert m["modes.factors"](6, 3) == (3, 2, 1)
    assert m["modes.factors"](6, 3, ones=False) is None


CHECKS: tuple[Check, ...] = (
    check_matrix_form,
    check_vector_form,
    check_ranks,
    check_targets,
    check_rounding,
    check_scales_and_bad_input,
    check_steps,
    check_modes,
)


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed(name: str) -> None:
    assert killer(mutated(MUTANTS[name]), CHECKS), "no check noticed"
