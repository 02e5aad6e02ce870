"""One step of a tensor-train sweep: the leading left singular vectors of an unfolding, and the unfolding seen through them.

An unfolding is much longer than wide (256 x 65536 for the first of 16^6), and only the vectors of one side are wanted. So, unlike
`svd.truncated_svd`, no factor of the long side is formed, and what there is to do is the Gram matrix of the short side, summed over blocks.
For float32 unfoldings it is first multiplied in float32, and in float64 where rounding could hide 1 % of the error (`svd.GUARD`). Products
of float32 entries are exact in float64: it resolves singular values down to 1e-8 of the largest, which is all that float32 weights hold.

| solver       | what it does                                            | taken by "auto"                                   |
|--------------|---------------------------------------------------------|---------------------------------------------------|
| "gram"       | Gram matrix of the short side, LAPACK syevd in float64  | short side <= 512, or no faster one applies       |
| "randomized" | `svd.truncated_svd`, with its certificate               | beyond, for a fixed rank, where low_rank takes it |
| "exact"      | LAPACK QR of the long side, then gesdd, in float64      | where the guard of the others fails               |

The guard is that of `svd`: the error is within `svd.GUARD` of the smallest any matrix of that rank can have (Eckart-Young), or is rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from matmorph.passes.linalg.choices import SOLVERS, Solver
from matmorph.passes.linalg.svd import GUARD, choose_solver, one_thread, truncated_svd

ROUNDING = 16.0
"""Errors below this many machine epsilons times |C|_F are rounding (as in `svd`)."""

_GRAM_SIDE = 512
_BLOCK = 1 << 22
"""Entries of an unfolding that are widened to float64 at a time."""
_COLUMNS = 1 << 14
"""The longest sum in one product: its rounding grows with the root of the length."""
_BAND = 32
"""Narrower products do not pay."""
_RUN = 1 << 15
_WELL_APART = {torch.float32: 1e-2, torch.float64: 1e-6}
_NOISE = 1e-12
"""Sums below this share of the energy decide no rank."""

ChooseRank = Callable[[Tensor], int]
"""Squared tails, float64 [k + 1] (entry r = what rank r leaves over) -> rank in 1..k."""


@dataclass(frozen=True, slots=True, eq=False)
class UnfoldingStep:
    """C [m, n] ~ u @ rest with orthonormal columns `u` [m, r] and `rest` = u^T C [r, n].

    `error` = |C - u rest|_F up to rounding; `optimum`: proven lower bound on the error of every rank-r matrix."""

    u: Tensor
    rest: Tensor
    error: float
    optimum: float
    solver: Solver


def left_step(c: Tensor, rank: int | ChooseRank, *, solver: Solver = "auto", seed: int = 0) -> UnfoldingStep:
    """The leading left singular vectors of `c` [m, n], float32 or float64, for a fixed rank or one that the squared tails decide.

    A zero matrix gives some orthonormal `u`. Raises ValueError for an unknown solver or a rank outside 1..min(m, n)."""
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: one of {', '.join(SOLVERS)}")
    if not callable(rank) and not 1 <= rank <= min(c.shape):
        raise ValueError(f"rank {rank} is outside 1..{min(c.shape)}")
    if not callable(rank) and _randomized_pays(c, rank, solver):
        return _randomized(c, rank, seed)
    if solver != "exact":
        for dtype in (torch.float64,) if callable(rank) else dict.fromkeys((c.dtype, torch.float64)):
            found = _gram(c, rank, dtype)
            if found is not None:
                return found
    return _exact(c, rank)


def _randomized_pays(c: Tensor, rank: int, solver: Solver) -> bool:
    if solver == "auto":
        return min(c.shape) > _GRAM_SIDE and choose_solver(c.shape[0], c.shape[1], rank) == "randomized"
    return solver == "randomized"


def _randomized(c: Tensor, rank: int, seed: int) -> UnfoldingStep:
    found = truncated_svd(c, rank, solver="randomized", seed=seed)
    rest = found.u.T @ c
    return UnfoldingStep(found.u, rest, _error(c, found.u, rest, 0.0), found.optimum, found.solver)


def _gram(c: Tensor, wanted: int | ChooseRank, dtype: torch.dtype) -> UnfoldingStep | None:
    """None where rounding of the Gram matrix, multiplied in `dtype`, could hide more than the guard allows.

    Its rounding E has |E|_F <= sqrt(columns of a block) * eps * |C|_F^2 (Higham and Mary, SIAM J. Sci. Comput. 41, 2019), and r eigenvalues
    of a symmetric E sum up to at most sqrt(r) |E|_F."""
    wide = c.shape[0] <= c.shape[1]
    gram = gram_matrix(c if wide else c.T, dtype)
    with one_thread():
        values, vectors = torch.linalg.eigh(gram)
    tails = _tails(values.flip(0).clamp_min(0))
    total = float(tails[0])
    rank = wanted(tails) if callable(wanted) else wanted
    if callable(wanted) and float(tails[rank - 1]) <= _NOISE * total and rank > 1:
        return None  # the choice would be made by rounding
    top = vectors[:, -rank:].flip(1).to(c)
    u = top if wide else _orthonormal(c @ top)
    rest = u.T @ c
    tail = float(tails[rank])
    slack = sqrt(rank * min(max(c.shape), _COLUMNS)) * torch.finfo(dtype).eps * total
    optimum = sqrt(max(0.0, tail - slack))
    error = _error(c, u, rest, tail / total if total > 0 else 0.0)
    if error <= ROUNDING * torch.finfo(c.dtype).eps * sqrt(total):
        return UnfoldingStep(u, rest, error, 0.0, "gram")
    return UnfoldingStep(u, rest, error, min(optimum, error), "gram") if error <= GUARD * optimum else None


def _exact(c: Tensor, wanted: int | ChooseRank) -> UnfoldingStep:
    """In float64. The triangular factor of the long side has the singular values of `c` and its vectors on the short side."""
    wide = c.shape[0] <= c.shape[1]
    a = c.double()
    with one_thread():
        if wide:
            small = torch.linalg.qr(a.T, mode="r").R.T
            vectors, values, _ = torch.linalg.svd(small, full_matrices=False)
        else:
            q, small = torch.linalg.qr(a)
            inner, values, _ = torch.linalg.svd(small, full_matrices=False)
            vectors = q @ inner
    tails = _tails(values.square())
    rank = wanted(tails) if callable(wanted) else wanted
    u = vectors[:, :rank].to(c).contiguous()
    error = float(tails[rank].sqrt())
    floor = ROUNDING * torch.finfo(torch.float64).eps * float(tails[0].sqrt())
    return UnfoldingStep(u, u.T @ c, error, max(0.0, error - floor), "exact")


def frobenius(a: Tensor) -> float:
    """|a|_F: sums of short runs in the type of `a`, added up in float64: ten times faster than a norm in float64."""
    with one_thread():
        return sqrt(sum(float(torch.dot(run, run)) for run in torch.split(a.reshape(-1), _RUN)))


def gram_matrix(c: Tensor, dtype: torch.dtype) -> Tensor:
    """c c^T [m, m] in float64, summed over blocks of columns of `c` [m, n] that are multiplied in `dtype`, up to the diagonal only.

    On one thread: the products are short, and two threads were slower than one on a busy machine."""
    side = len(c)
    band = max(_BAND, -(-side // 4))
    lower = torch.zeros(side, side, dtype=torch.float64, device=c.device)
    with one_thread():
        for block in torch.split(c, max(1, min(_COLUMNS, _BLOCK // side)), dim=1):
            part = block.to(dtype)
            for start in range(0, side, band):
                end = start + band
                lower[start:end, :end] += part[start:end] @ part[:end].T
    return lower.tril() + lower.tril(-1).T


def _error(c: Tensor, u: Tensor, rest: Tensor, share: float) -> float:
    """|c - u rest|_F: by Pythagoras where enough is left over (about `share` of the energy) for the difference to keep its digits."""
    if share > _WELL_APART[c.dtype]:
        return sqrt(max(0.0, frobenius(c) ** 2 - frobenius(rest) ** 2))
    return frobenius(torch.addmm(c, u, rest, alpha=-1))


def _tails(squares: Tensor) -> Tensor:
    """[k + 1] sums of what follows, from descending squares [k]; the last is exactly zero."""
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


def _orthonormal(a: Tensor) -> Tensor:
    with one_thread():
        basis: Tensor = torch.linalg.qr(a).Q
    return basis
