"""LoftQ: a quantised matrix and a low-rank correction, found by alternation (arXiv 2310.08659, algorithm 1).

Minimises |(W - Q - A B) L|_F over Q that a quantizer can represent and A B of rank r, from A B = 0:

    Q_t = quantize(W - A_{t-1} B_{t-1})          A_t B_t = best rank-r matrix for W - Q_t

L = I is the paper. L = Cholesky factor of the second moment of the inputs (`whiten.whitening_factor`) measures the error on outputs: A B is
then the truncated SVD of (W - Q) L, times L^-1, which is U U^T (W - Q) for its left singular vectors U. The quantizer works on weights in
both cases. The error need not fall from one iterate to the next (the quantizer knows nothing of the low-rank part), so the best iterate is
kept. A `weighting` C measures |C^T (W - Q - A B) L|_F, as `whiten` says. One iteration is never worse than quantising alone (Eckart-Young).

`svd_first` swaps the two steps: Q_0 = 0, A_t B_t from W - Q_{t-1}, then Q_t = quantize(W - A_t B_t), which counts. A smaller error where W
itself is close to low rank; worse after fine-tuning in the paper (table 6).

The low-rank step. A quantisation residual has an almost flat spectrum, where subspace iteration converges slowly; a block Krylov space
(all blocks of the iteration are kept, arXiv 1504.05477) needs a third of the products with the matrix. It starts from the previous
iterate's subspace, and ends where the error is within `GUARD` of the smallest possible by extrapolation: the energy gained per step falls
like a geometric series from the second step on. Where that does not happen within the width of the space, `svd.truncated_svd` answers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite, sqrt

import torch
from torch import Tensor

from matmorph.passes.linalg.quantize import Quantized, Quantizer, quantize
from matmorph.passes.linalg.svd import one_thread, power_of_two, truncated_svd
from matmorph.passes.linalg.whiten import Whitening, project, weighted

GUARD = 1.0005
"""Error of each low-rank step over the smallest possible: proven where LAPACK did the step, extrapolated where a Krylov space did."""

_EXACT_SIDE = 192
_THREADED = 4 << 20
"""Smaller matrices are handled on one thread: the products are short."""
_MARGIN = 8
_MAX_STEPS = 16
_FEWEST_STEPS = 3
_DIGITS = 1e4
"""What is left over has to be known to four digits for `GUARD` to mean anything."""
_WELL_APART = 0.01
_RUN = 1 << 15
_TINY = 1e-20
"""Sums of squares below it may have lost some that are no longer numbers of float32."""
_SAFETY = 1.5
"""The extrapolated gain is multiplied by this before it is compared with `GUARD`."""


@dataclass(frozen=True, slots=True, eq=False)
class LoftQResult:
    """W ~ dequantize(quantized) + A @ B with `A` [out, r] and `B` [r, in], each rank-one term split evenly between them.

    All errors are |(W - Q - A B) L|_F / |W L|_F: `errors[t - 1]` of iterate t, `quantized_only` without factors. `kept` = index of the
    kept iterate in `errors`: the smallest, the first of equals. `guard`: see `GUARD`, the worst over all iterates.
    """

    quantized: Quantized
    A: Tensor
    B: Tensor
    errors: tuple[float, ...]
    kept: int
    quantized_only: float
    guard: float

    @property
    def error(self) -> float:
        return self.errors[self.kept]

    @property
    def down(self) -> Tensor:
        """[in, r]: y = x @ Q^T + (x @ down) @ up."""
        return self.B.T.contiguous()

    @property
    def up(self) -> Tensor:
        """[r, out]."""
        return self.A.T.contiguous()

    def factors(self, scale: float) -> tuple[Tensor, Tensor]:
        """(A, B) for an adapter that multiplies its product by `scale` (alpha / r): scale * A @ B is unchanged. ValueError for 0."""
        if scale == 0:
            raise ValueError("an adapter scale of 0 removes the low-rank part")
        root = sqrt(abs(scale))
        return self.A / root, self.B / (root if scale > 0 else -root)


def loftq(
    w: Tensor,
    quantizer: Quantizer | Callable[[Tensor], Quantized],
    rank: int,
    iterations: int = 1,
    *,
    svd_first: bool = False,
    whitening: Whitening | None = None,
    weighting: Tensor | None = None,
    seed: int = 0,
) -> LoftQResult:
    """`w` [out, in] quantised, with rank-`rank` factors; see the docstring of this module. `quantizer` may also be what makes codes of a
    matrix like `w`.

    `whitening.factor` is [in, in], `weighting` [out, out]. Works in float64 for float64 weights, otherwise in float32 (codes are always
    chosen in float32). Deterministic for one seed and thread count. Raises ValueError for a weight that is not a matrix or holds NaN or
    infinity, a rank outside 1..min(out, in), fewer than one iteration, or a whitening factor of another size.
    """
    if w.dim() != 2:
        raise ValueError(f"LoftQ needs a matrix, not {w.dim()} axes")
    if not 1 <= rank <= min(w.shape):
        raise ValueError(f"rank {rank} is outside 1..{min(w.shape)}")
    if iterations < 1:
        raise ValueError(f"{iterations} iterations: at least 1 is needed")
    if whitening is not None and whitening.factor.shape != (w.shape[1], w.shape[1]):
        raise ValueError(f"the whitening factor is {list(whitening.factor.shape)}, the weight has {w.shape[1]} input features")
    work = w.detach() if w.dtype == torch.float64 else w.detach().float()
    factor = None if whitening is None else whitening.factor.to(work.dtype)
    codes = partial(quantize, quantizer=quantizer) if isinstance(quantizer, Quantizer) else quantizer
    problem = _Problem(work, codes, rank, factor, None if weighting is None else weighting.to(work.dtype), seed)
    with one_thread() if w.numel() < _THREADED else nullcontext():
        return problem.solve(iterations, problem.svd_first if svd_first else problem.quantize_first)


@dataclass(frozen=True, slots=True, eq=False)
class _Iterate:
    """`error` is absolute, `alone` that of quantising alone; `basis`: where the next low-rank step starts."""

    quantized: Quantized
    A: Tensor
    B: Tensor
    error: float
    alone: float
    guard: float
    basis: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    w: Tensor
    codes: Callable[[Tensor], Quantized]
    rank: int
    factor: Tensor | None
    weighting: Tensor | None
    seed: int

    def solve(self, iterations: int, step: Callable[[_Iterate | None], _Iterate]) -> LoftQResult:
        size = self.size(self.w)
        if not isfinite(size):
            raise ValueError("NaN or infinity in the weight")
        best = last = step(None)
        alone = last.alone
        errors, kept, guard = [last.error], 0, last.guard
        for index in range(1, iterations):
            last = step(last)
            errors.append(last.error)
            guard = max(guard, last.guard)
            if last.error < best.error:
                best, kept = last, index
        relative = tuple(error / size if size > 0 else 0.0 for error in errors)
        return LoftQResult(best.quantized, best.A, best.B, relative, kept, alone / size if size > 0 else 0.0, guard)

    def quantize_first(self, before: _Iterate | None) -> _Iterate:
        quantized = self.codes(self.w if before is None else torch.addmm(self.w, before.A, before.B, alpha=-1))
        a, b, found = self.low_rank(_difference(self.w, quantized), before)
        return _Iterate(quantized, a, b, found.error, before.alone if before else found.size, found.guard, found.basis)

    def svd_first(self, before: _Iterate | None) -> _Iterate:
        a, b, found = self.low_rank(self.w if before is None else _difference(self.w, before.quantized), before)
        rest = torch.addmm(self.w, a, b, alpha=-1)
        quantized = self.codes(rest)
        error = self.size(_difference(rest, quantized))
        alone = before.alone if before else self.size(_difference(self.w, self.codes(self.w)))
        return _Iterate(quantized, a, b, error, alone, found.guard, found.basis)

    def low_rank(self, residual: Tensor, before: _Iterate | None) -> tuple[Tensor, Tensor, Subspace]:
        found = top_subspace(self.seen(residual), self.rank, start=None if before is None else before.basis, seed=self.seed)
        down, up = project(residual, found.u, self.weighting)
        return up.T, down.T, found

    def seen(self, difference: Tensor) -> Tensor:
        """A difference of weights as the objective sees it."""
        seen = weighted(difference, self.weighting)
        return seen if self.factor is None else seen @ self.factor

    def size(self, difference: Tensor) -> float:
        return _norm(self.seen(difference))


@dataclass(frozen=True, slots=True, eq=False)
class Subspace:
    """The leading left singular vectors `u` [m, r] of a matrix `a`, with `size` = |a|_F, `error` = |a - u u^T a|_F and its `guard`.

    `basis` [min(m, n), r] spans the leading singular vectors on the shorter side; None where the next step has no use for it."""

    u: Tensor
    size: float
    error: float
    guard: float
    basis: Tensor | None


def top_subspace(a: Tensor, rank: int, *, start: Tensor | None = None, seed: int = 0) -> Subspace:
    """The best rank-`rank` column space of `a` [m, n], up to `GUARD`; `start` = `basis` of a similar matrix."""
    scale = power_of_two(a)
    found = _top_subspace(a if scale == 1 else a / scale, rank, start, seed)
    return found if scale == 1 else replace(found, size=found.size * scale, error=found.error * scale)


def _top_subspace(a: Tensor, rank: int, start: Tensor | None, seed: int) -> Subspace:
    short = min(a.shape)
    width = rank + max(_MARGIN, rank // 4)
    steps = min(_MAX_STEPS, 3 * short // (4 * width))
    found = _krylov(a, rank, width, steps, start, seed) if short > _EXACT_SIDE and steps >= _FEWEST_STEPS else None
    if found is not None:
        return found
    size = _norm(a)
    exact = truncated_svd(a, rank, solver="exact" if short <= _EXACT_SIDE else "gram", seed=seed)
    if exact.guard > GUARD:
        exact = truncated_svd(a, rank, solver="exact", seed=seed)
    return Subspace(exact.u, size, _left_over(a, exact.u, size**2), exact.guard, None)


def _krylov(a: Tensor, rank: int, width: int, steps: int, start: Tensor | None, seed: int) -> Subspace | None:
    """Rayleigh-Ritz on the block Krylov space of a^T a (or a a^T, whichever is smaller).

    None where `steps` blocks do not reach `GUARD`, or so little is left over that sums of squares no longer resolve it."""
    tall = a.shape[0] >= a.shape[1]
    forward, back = (a, a.T) if tall else (a.T, a)
    energy = _norm(a) ** 2
    noise = torch.randn(forward.shape[1], width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(a)
    block = _orthonormal(noise if start is None else torch.cat([start, noise[:, start.shape[1] :]], 1))
    basis, image, gram = (a.new_empty(rows, steps * width) for rows in (forward.shape[1], forward.shape[0], steps * width))
    unresolved = _DIGITS * torch.finfo(a.dtype).eps * energy
    gains: list[float] = []
    captured = 0.0
    for end in range(width, steps * width + 1, width):
        new = slice(end - width, end)
        basis[:, new] = block
        image[:, new] = forward @ block
        gram[:end, new] = image[:, :end].T @ image[:, new]
        gram[new, :end] = gram[:end, new].T
        values, vectors = torch.linalg.eigh(gram[:end, :end])
        gains.append(float(values[-rank:].double().sum()) - captured)
        captured += gains[-1]
        if energy - captured <= unresolved:
            return None
        guard = _extrapolated(gains, energy - captured)
        if guard <= GUARD:
            break
        block = back @ image[:, new]
        for _ in range(2):  # once leaves what rounding put back into the old blocks
            block = _orthonormal(block - basis[:, :end] @ (basis[:, :end].T @ block))
    else:
        return None
    top = vectors[:, -rank:].flip(1)
    ritz = basis[:, :end] @ top
    u = _orthonormal(image[:, :end] @ top) if tall else ritz
    return Subspace(u, sqrt(energy), _left_over(a, u, energy), guard, ritz)


def _extrapolated(gains: list[float], rest: float) -> float:
    """Error over the smallest possible if gains go on shrinking as they did last, though by half at most and by a tenth at least per
    step. Infinite before there are enough of them."""
    if len(gains) < _FEWEST_STEPS:
        return inf
    last, before = max(0.0, gains[-1]), gains[-2]
    ratio = max(0.5, last / before) if last < 0.9 * before else 0.9
    coming = _SAFETY * last * ratio / (1 - ratio)
    return sqrt(rest / (rest - coming)) if coming < rest else inf


def _difference(w: Tensor, quantized: Quantized) -> Tensor:
    """w - dequantize(quantized), with one temporary of the size of w."""
    dense = quantized.dequantize().to(w.dtype)
    return torch.sub(w, dense, out=dense)


def _left_over(a: Tensor, u: Tensor, energy: float) -> float:
    """|a - u u^T a|_F: by Pythagoras where the difference of squares keeps its digits."""
    image = u.T @ a
    rest = energy - _norm(image) ** 2
    return sqrt(rest) if rest > _WELL_APART * energy else _norm(torch.addmm(a, u, image, alpha=-1))


def _orthonormal(a: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(a).Q
    return basis


def _norm(a: Tensor) -> float:
    """Frobenius norm: float32 sums of short runs, added up in float64; all in float64 where squares leave the range of float32."""
    flat = a.reshape(-1)
    squares = sum(float(torch.dot(run, run)) for run in torch.split(flat, _RUN))
    return sqrt(squares) if _TINY < squares < inf else float(torch.linalg.vector_norm(flat, dtype=torch.float64))
