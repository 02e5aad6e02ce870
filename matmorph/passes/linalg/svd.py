"""Truncated singular value decompositions with a proven error guard.

Every solver returns the best rank-r approximation of a matrix up to a factor that it can prove: `Truncated.guard` is an upper bound on
|W - W_r|_F divided by the smallest error any rank-r matrix can reach (Eckart-Young), and never above `GUARD`.

| solver       | what it does                                       | multiply-adds (n, p = short, long side) | taken by "auto"  |
|--------------|----------------------------------------------------|-----------------------------------------|------------------|
| "exact"      | LAPACK gesdd in float64                            | ~ 20 n^2 p                              | n <= 192         |
| "randomized" | Gram matrix, block subspace iteration, certificate | n^2 p + n^3 / 3 + steps * n^2 l         | l <= n / 4       |
| "gram"       | Gram matrix, LAPACK syevd                          | n^2 p + ~ 9 n^3 at a lower speed        | otherwise        |

(l = width of the iterated block, `_width`.) A Gram matrix squares the condition number: in a floating type of precision eps it does not see
singular values below sqrt(eps) * s_1. The guard accounts for that: where the remaining error is so small that rounding could hide 1 % of
it, the next more exact solver takes over ("randomized" -> "gram" -> "exact"). No result is silently worse than `GUARD`.

The certificate of "randomized". Let G = W^T W, P the Ritz vectors with values theta (descending), R = G P - P theta their residuals, and D
the part of G orthogonal to P. If S = s I - (I - PP^T) G (I - PP^T) with s = theta_r has a Cholesky factor, no eigenvalue of D exceeds s,
and the Schur complement gives, in the Loewner order, G <= (theta + R^T S^-1 R) (+) s I. So the r largest eigenvalues of the small matrix
theta + R^T S^-1 R sum up to at least as much as those of G: an upper bound on the energy that any rank-r matrix can capture, hence a lower
bound on the tail. It is deterministic: the random start decides only how many steps are needed (Ky Fan's inequality; Horn and Johnson,
Matrix Analysis, 4.3 and 7.7; block iteration: Halko, Martinsson, Tropp, arXiv 0909.4061).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import floor, isfinite, log2, sqrt

import torch
from torch import Tensor

from matmorph.passes.linalg.choices import SOLVERS, Solver

GUARD = 1.01
"""Every result is within 1 % of the smallest possible Frobenius error, plus rounding (`_ROUNDING` * |W|_F)."""

_EXACT_SIDE = 192
_THREADED = 4 << 20
"""Matrices with fewer elements are multiplied on one thread too: the products are short and the switching costs more than it gives."""
_STEPS = (8, 4, 6, 10)
"""Subspace iteration steps before each look at the certificate, which costs as much as six steps; the first number suffices for a matrix of
independent entries, the slowest that occurs. A failed last look falls back to "gram"."""
_ROUNDING = 16.0
"""Errors below this many machine epsilons times |W|_F are rounding: a result that gets there counts as optimal, and bounds give it away."""


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """`u` [.., m, r], `s` [.., r] descending, `vh` [.., r, n] with W ~ u * s @ vh; column signs are fixed (see `fix_signs`).

    `guard`: proven upper bound on |W - W_r|_F / smallest possible, over the whole stack. `optimum`: proven lower bound on the Frobenius
    error of every rank-r approximation (of the stack: the same rank for each matrix). `solver`: the one whose result this is. `spectrum`
    [k >= r], float64: the singular values it came to know, without those that rounding hides; of a stack, roots of the sums of squares.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    guard: float
    optimum: float
    solver: Solver
    spectrum: Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK with several threads on a busy machine was measured ten times slower than with one (decision M1). Restores the count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def largest(w: Tensor) -> float:
    """The largest magnitude; NaN where an entry is. One pass, no copy."""
    low, high = torch.aminmax(w)
    return float(torch.maximum(-low, high))


def power_of_two(w: Tensor) -> float:
    """What `w` is divided by, exactly, so that its squares stay in the range of float32: 1 for common sizes, zeros, and what is not
    finite."""
    peak = largest(w) if w.numel() else 0.0
    common = not isfinite(peak) or peak == 0 or 1e-12 < peak < 1e12
    return 1.0 if common else 2.0 ** floor(log2(peak))


def truncated_svd(w: Tensor, rank: int, *, solver: Solver = "auto", seed: int = 0) -> Truncated:
    """The best rank-`rank` approximation of `w` [m, n], or of each matrix of a stack [E, m, n], as factors of singular vectors.

    Works in float64 for float64 input and in float32 otherwise. Deterministic for one seed and thread count. Raises ValueError for a rank
    outside 1..min(m, n), an unknown solver, or a NaN or infinity in `w`.
    """
    _check(w, rank, solver)
    work = w if w.dtype == torch.float64 else w.float()
    if w.dim() == 2:
        return _one(work, rank, solver, seed)
    return _stacked([_one(matrix, rank, solver, seed) for matrix in work])


def singular_values(w: Tensor) -> Tensor:
    """All singular values of `w` [.., m, n], descending, float64 [.., min(m, n)].

    From the float64 Gram matrix of the shorter side: values below 1e-8 of the largest are not resolved (relative energy 1e-16)."""
    if w.dim() > 2:
        return torch.stack([singular_values(matrix) for matrix in w])
    a = w.double()
    gram = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
    with one_thread():
        squares = torch.linalg.eigvalsh(gram)
    values: Tensor = squares.clamp_min(0).sqrt().flip(0)
    return values


def tail_errors(s: Tensor) -> Tensor:
    """Relative Frobenius error after each rank: [k + 1] from singular values [k], or [E, k] of a stack cut at the same rank everywhere.

    Entry r is sqrt(sum_{i > r} s_i^2 / sum s_i^2): Eckart-Young, so entry 0 is 1 and the last is 0. All zero for a zero matrix."""
    squares = s.double().square().reshape(-1, s.shape[-1]).sum(0)
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return (tails / tails[0]).sqrt() if tails[0] > 0 else tails


def rank_for_energy(s: Tensor, energy: float) -> int:
    """Smallest r whose sum of s_i^2 reaches `energy` of the total; in a stack the largest rank that any matrix needs. At least 1."""
    return _smallest(s, lambda squares, tails: tails <= (1.0 - energy) * squares.sum())


def rank_for_error(s: Tensor, error: float) -> int:
    """Smallest r whose relative Frobenius error is at most `error`; in a stack the largest rank that any matrix needs. At least 1."""
    return _smallest(s, lambda squares, tails: tails <= error**2 * squares.sum())


def _smallest(s: Tensor, enough: Callable[[Tensor, Tensor], Tensor]) -> int:
    ranks = []
    for row in s.double().reshape(-1, s.shape[-1]):
        squares = row.square()
        tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        ranks.append(int(enough(squares, tails).int().argmax()))
    return max(1, *ranks)


def fix_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of singular vectors are arbitrary: makes the entry of largest magnitude in each column of `u` positive."""
    peaks = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    signs = torch.where(peaks < 0, -1.0, 1.0).to(u.dtype)
    return u * signs, vh * signs.transpose(-2, -1)


def choose_solver(m: int, n: int, rank: int) -> Solver:
    """The "auto" column of the table in this module's docstring."""
    short = min(m, n)
    if short <= _EXACT_SIDE:
        return "exact"
    return "randomized" if _width(short, rank) <= short // 4 else "gram"


def _check(w: Tensor, rank: int, solver: str) -> None:
    if w.dim() not in (2, 3):
        raise ValueError(f"a matrix or a stack of matrices is needed, not {w.dim()} axes")
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: one of {', '.join(SOLVERS)}")
    if not 1 <= rank <= min(w.shape[-2:]):
        raise ValueError(f"rank {rank} is outside 1..{min(w.shape[-2:])}")
    if not isfinite(largest(w)):
        raise ValueError("NaN or infinity in the matrix")


def _one(w: Tensor, rank: int, solver: Solver, seed: int) -> Truncated:
    """One matrix: the chosen solver, then the more exact ones for as long as the guard fails. The work is done on the tall orientation."""
    first = choose_solver(w.shape[0], w.shape[1], rank) if solver == "auto" else solver
    tall = w.shape[0] >= w.shape[1]
    peak = largest(w)
    scale = peak if peak > 0 and not 1e-6 < peak < 1e6 else 1.0  # squares must not leave the range of the type
    unit = w if scale == 1.0 else w / scale
    matrix = unit if tall else unit.T
    with one_thread() if w.numel() < _THREADED else nullcontext():
        found = next(result for name in _FALLBACK[first] if (result := _SOLVERS[name](matrix, rank, seed)) is not None)
    u, vh = (found.u, found.vh) if tall else (found.vh.T, found.u.T)
    u, vh = fix_signs(u, vh)
    values, optimum, spectrum = found.s * scale, found.optimum * scale, found.spectrum * scale
    return Truncated(u.contiguous(), values, vh.contiguous(), found.guard, optimum, found.solver, spectrum)


def _stacked(parts: list[Truncated]) -> Truncated:
    """A stack's guard is that of its worst member; its optimum is the root of the summed squares."""
    known = min(len(part.spectrum) for part in parts)
    return Truncated(
        torch.stack([part.u for part in parts]),
        torch.stack([part.s for part in parts]),
        torch.stack([part.vh for part in parts]),
        max(part.guard for part in parts),
        sqrt(sum(part.optimum**2 for part in parts)),
        parts[-1].solver,
        torch.stack([part.spectrum[:known].square() for part in parts]).sum(0).sqrt(),
    )


def _exact(a: Tensor, rank: int, seed: int) -> Truncated:
    """In float64 whatever the input: it is for small matrices and for those that need it."""
    with one_thread():
        u, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    tail = _norm(s[rank:])
    return Truncated(u[:, :rank].to(a), s[:rank].to(a), vh[:rank].to(a), 1.0, max(0.0, tail - _floor(a, _norm(s))), "exact", s)


def _gram(a: Tensor, rank: int, seed: int) -> Truncated | None:
    """Eigenvectors of a^T a [n, n] for the tall `a`, then a small exact SVD of a V_r. None where rounding could hide too much."""
    gram = a.T @ a
    with one_thread():
        values, vectors = torch.linalg.eigh(gram)
    top = values[-rank:].double().clamp_min(0).sum()
    rest = values[:-rank].double().flip(0)
    seen = rest[rest > torch.finfo(a.dtype).eps * values[-1]].sqrt()
    return _guarded(a, vectors[:, -rank:], float(top) + _slack(a, float(values[-1]), rank), "gram", seen)


def _randomized(a: Tensor, rank: int, seed: int) -> Truncated | None:
    """Block subspace iteration on a^T a with the certificate of the module's docstring. None where the guard fails."""
    n = a.shape[1]
    gram = a.T @ a
    start = torch.randn(n, _width(n, rank), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = _orthonormal(start.to(a))
    for steps in _STEPS:
        for _ in range(steps):
            basis = _orthonormal(gram @ basis)
        ritz, vectors, captured = _certify(gram, basis, rank)
        found = _guarded(a, vectors[:, :rank], captured + _slack(a, ritz, rank), "randomized") if isfinite(captured) else None
        if found is not None:
            return found
    return None


def _certify(gram: Tensor, basis: Tensor, rank: int) -> tuple[float, Tensor, float]:
    """(largest Ritz value, Ritz vectors in descending order, upper bound on the sum of the `rank` largest eigenvalues or inf)."""
    image = gram @ basis
    with one_thread():
        theta, rotation = torch.linalg.eigh(basis.T @ image)
    theta, rotation = theta.flip(0), rotation.flip(1)
    p, image = basis @ rotation, image @ rotation
    residual = image - p * theta
    # (I - PP^T) G (I - PP^T) = G - P Y^T - Y P^T with Y = G P - P (P^T G P) / 2
    y = image - p * (theta / 2)
    shifted = torch.cat([p, y], 1) @ torch.cat([y, p], 1).T - gram
    shifted.diagonal().add_(theta[rank - 1])
    with one_thread():
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed):
            return float(theta[0]), p, float("inf")
        z = torch.linalg.solve_triangular(lower, residual, upper=False)
        bound = torch.linalg.eigvalsh(torch.diag(theta) + z.T @ z)
    return float(theta[0]), p, float(bound[-rank:].double().sum())


def _guarded(a: Tensor, v: Tensor, captured: float, solver: Solver, rest: Tensor | None = None) -> Truncated | None:
    """Rayleigh-Ritz on span(v) [n, r]: an exact SVD of the thin a v, so small singular values keep their accuracy although v came from a
    Gram matrix. `captured`: upper bound on the energy any rank-r matrix captures; `rest`: singular values after the first r, where they are
    known. None where the proven ratio exceeds `GUARD`."""
    image = a @ v
    with one_thread():
        q, small = torch.linalg.qr(image)
        left, s, right = torch.linalg.svd(small, full_matrices=False)
    u, vh = q @ left, right @ v.T
    error, size = _norm(a - (u * s) @ vh), _norm(a)
    spectrum = s.double() if rest is None else torch.cat([s.double(), rest])
    if error <= _floor(a, size):
        return Truncated(u, s, vh, 1.0, 0.0, solver, spectrum)
    optimum = sqrt(max(0.0, size**2 - captured))
    if error > GUARD * optimum:
        return None
    return Truncated(u, s, vh, max(1.0, error / optimum), min(optimum, error), solver, spectrum)


def _norm(a: Tensor) -> float:
    """Frobenius, summed in float64."""
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))


def _floor(a: Tensor, size: float) -> float:
    """Errors below this are rounding, for |a|_F = `size`."""
    return _ROUNDING * torch.finfo(a.dtype).eps * size


def _orthonormal(a: Tensor) -> Tensor:
    with one_thread():
        basis: Tensor = torch.linalg.qr(a).Q
    return basis


def _slack(a: Tensor, largest: float, rank: int) -> float:
    """What rounding can add to a sum of `rank` computed eigenvalues: each is off by about sqrt(p) eps times the largest (the rounding
    errors of a Gram matrix of p rows grow with the root of p: Higham and Mary, SIAM J. Sci. Comput. 41, 2019)."""
    return rank * sqrt(a.shape[0]) * torch.finfo(a.dtype).eps * max(0.0, largest)


def _width(n: int, rank: int) -> int:
    """Width of the iterated block: a quarter more than the rank, at least 48 more (a flat spectrum converges with the gap to the first
    eigenvalue outside the block)."""
    return min(n, rank + max(48, rank // 4))


_SOLVERS: Mapping[str, Callable[[Tensor, int, int], Truncated | None]] = {"exact": _exact, "gram": _gram, "randomized": _randomized}
_FALLBACK: Mapping[str, tuple[str, ...]] = {
    "randomized": ("randomized", "gram", "exact"),
    "gram": ("gram", "exact"),
    "exact": ("exact",),
}
