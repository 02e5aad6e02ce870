"""Bases of gradients: numpy's singular vectors of the stack's unfoldings, energies in both orientations of the input mode; mutants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mutating import Mutant, killer, mutated, unmutated

import matmorph.passes.linalg.hosvd as real

EXACT = 1e-12
"""Float64 products of orthogonal matrices of size 64: some hundred roundings of 1e-16."""


def structured(out: int, into: int, count: int, seed: int = 0) -> torch.Tensor:
    """[count, out, in]: gradients of a layer that reads and writes few directions of its own, which are no axes, with noise."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (out, into))
    scales = [np.exp(-np.arange(size) / 6) for size in (out, into)]
    cores = rng.standard_normal((count, out, into)) * scales[0][:, None] * scales[1]
    noise = rng.standard_normal((count, out, into)) * 1e-3
    return torch.from_numpy(left @ cores @ right.T + noise)


def grams(module: Any, gradients: torch.Tensor) -> real.GradientGrams:
    found = module.GradientGrams.of(*gradients.shape[1:])
    for gradient in gradients:
        found.add(gradient)
    return found


def unfoldings(module: Any) -> None:
    """Columns are the left singular vectors of the unfoldings, up to sign, in order."""
    gradients = structured(8, 12, 5)
    bases = grams(module, gradients).bases()
    for basis, unfolded in ((bases.u, gradients.permute(1, 0, 2)), (bases.v, gradients.permute(2, 0, 1))):
        vectors = np.linalg.svd(unfolded.reshape(len(unfolded), -1).numpy(), full_matrices=False)[0]
        # squares of singular values down to 1e-6 of the largest are told apart by 1e-10 of it
        assert np.abs(np.abs(vectors.T @ basis.numpy()) - np.eye(len(vectors))).max() < 1e-6


def inverse(module: Any) -> None:
    bases = grams(module, structured(8, 12, 5)).bases()
    w = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (bases.restored(bases.rotated(w)) - w).abs().max() < EXACT
    stack = torch.stack([w, 2 * w])
    assert (bases.rotated(stack)[1] - 2 * bases.rotated(w)).abs().max() < EXACT
    assert abs(float(bases.rotated(w).norm() - w.norm())) < EXACT


def diagonal(module: Any) -> None:
    """In its own bases the stack's sums are diagonal, the largest first: the mark of the right orientation of both modes."""
    gradients = structured(8, 12, 5)
    bases = grams(module, gradients).bases()
    rotated = bases.rotated(gradients)
    for sums in (torch.einsum("nab,ncb->ac", rotated, rotated), torch.einsum("nba,nbc->ac", rotated, rotated)):
        values = sums.diagonal()
        assert (sums - values.diag()).abs().max() < 1e-10 * values[0]
        assert bool((values[:-1] >= values[1:]).all())


def energies(module: Any) -> tuple[float, float, float]:
    """Top-1 % energy of (raw, the orientation of the official code, the right one), mean over the stack."""
    gradients = structured(64, 96, 12)
    bases = grams(module, gradients).bases()
    count = round(0.01 * 64 * 96)
    official = bases.u.T @ gradients @ bases.v.T  # u2^T G u3^T: its linear applies U^T where the HOSVD needs U
    each = (gradients, official, bases.rotated(gradients))
    raw, wrong, right = (float(np.mean([module.top_share(g, count) for g in stack])) for stack in each)
    return raw, wrong, right


def orientation(module: Any) -> None:
    raw, wrong, right = energies(module)
    # Measured .157, .519 and .945 here; for gradients made in the same way .14, .53 and .94 are known.
    assert raw < 0.2 < 0.45 < wrong < 0.6 < 0.93 < right


def selection(module: Any) -> None:
    scores = torch.tensor([[3.0, 1.0, 3.0], [0.0, 3.0, 2.0]])
    assert module.top_entries(scores, 2).tolist() == [0, 2]  # of equals the first
    assert module.top_entries(scores, 4).tolist() == [0, 2, 4, 5]
    assert module.top_share(torch.tensor([[3.0, -4.0], [0.0, 0.0]]), 1) == pytest.approx(16 / 25, abs=EXACT)
    assert module.top_share(torch.zeros(2, 2), 1) == 0.0


def nothing(module: Any) -> None:
    found = module.GradientGrams.of(3, 2).bases()
    assert torch.equal(found.u, torch.eye(3, dtype=torch.float64))
    assert torch.equal(found.v, torch.eye(2, dtype=torch.float64))


def experts(module: Any) -> None:
    """A stack adds up as its members do."""
    gradients = structured(4, 6, 3)
    together = module.GradientGrams.of(4, 6)
    together.add(gradients)
    apart = grams(module, gradients)
    assert together.count == apart.count == 3
    assert torch.equal(together.out, apart.out)
    assert torch.equal(together.into, apart.into)


def signs(module: Any) -> None:
    bases = grams(module, structured(8, 12, 5)).bases()
    again = grams(module, -structured(8, 12, 5)).bases()
    assert torch.equal(bases.u, again.u)
    for basis in (bases.u, bases.v):
        assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())


CHECKS: tuple[Callable[[Any], None], ...] = (
    unfoldings, inverse, diagonal, orientation, selection, nothing, experts, signs,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_bases(check: Callable[[Any], None]) -> None:
    check(real)


MUTANTS = {
    "input mode turned the wrong way round": Mutant(
        "Bases.rotated", "self.u.T @ gradient.double() @ self.v", "self.u.T @ gradient.double() @ self.v.T"
    ),
    "output mode turned the wrong way round": Mutant("Bases.rotated", "self.u.T @ gradient.double()", "self.u @ gradient.double()"),
    "and back the wrong way": Mutant("Bases.restored", "self.u @ theta.double() @ self.v.T", "self.u @ theta.double() @ self.v"),
    "modes exchanged": Mutant("GradientGrams.add", "self.out += one @ one.T", "self.out += one[:, :len(one)].T @ one[:, :len(one)]"),
    "smallest first": Mutant("_eigenvectors", "torch.linalg.eigh(gram).eigenvectors.flip(-1)", "torch.linalg.eigh(gram).eigenvectors"),
    "rows for columns": Mutant(
        "_eigenvectors", "torch.linalg.eigh(gram).eigenvectors.flip(-1)", "torch.linalg.eigh(gram).eigenvectors.flip(-1).T"
    ),
    "only the last gradient counts": Mutant("GradientGrams.add", "self.into += one.T @ one", "self.into = one.T @ one"),
    "signs as they come": Mutant("_eigenvectors", "torch.where(largest < 0, -1.0, 1.0)", "1.0"),
    "smallest scores": Mutant("top_entries", "descending=True", "descending=False"),
    "magnitudes for squares": Mutant("top_share", "gradient.double().square", "gradient.double().abs"),
    "a zero gradient": Mutant(
        "top_share",
        "float(squares.topk(count).values.sum()) / total if total else 0.0",
        "float(squares.topk(count).values.sum()) / total if True else 0.0",
    ),
    "a basis of nothing": Mutant("_eigenvectors", "not bool(gram.any())", "False"),
}


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(unmutated(MUTANTS.values()), [passes_all]) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name: str) -> None:
    with mutated(MUTANTS[name]) as m, pytest.raises((AssertionError, ZeroDivisionError)):
        passes_all(m)


def passes_all(module: Any) -> None:
    for check in CHECKS:
        check(module)
