"""Activation-whitened low rank: the rank-r matrix with the smallest error on the outputs, not on the weight.

With H = sum of x x^T over the calibration rows and H = L L^T, the output error is tr((W - W') H (W - W')^T) = |(W - W') L|_F^2, so the best
rank-r W' is the truncated SVD of W L, multiplied by L^-1 (SVD-LLM, arXiv 2403.07378). U_r S_r V_r^T L^-1 = U_r U_r^T W: the inverse is
never formed, and directions that hardly occur in the data cost no accuracy.

Weighted on the side of the outputs too: with G = C C^T the second moment of the gradients that reach the output, an error E of the weight
changes what is differentiated by tr(G E H E^T) = |C^T E L|_F^2 in the mean square, gradients and inputs taken as independent (the Kronecker
factored Fisher of K-FAC, arXiv 1503.05671). The best rank-r W' is then C^-T U_r U_r^T C^T W, U_r the left singular vectors of C^T W L.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from matmorph.passes.linalg.shrinkage import shrinkage_damping
from matmorph.passes.linalg.svd import one_thread

_ROWS = 1 << 12
"""Rows of a weight that are in float64 at a time: that of an output head is a fifth of a small model."""
_RAISE = 10.0
_FIRST_DAMPING = 1e-10
_LARGEST_DAMPING = 1e3


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """`factor` L [n, n] (or [E, n, n]), lower triangular, float64, with L L^T = H / rows + `shift` I. `notes`: what had to be changed."""

    factor: Tensor
    shift: Tensor
    notes: tuple[str, ...] = ()


def whitening_factor(second_moment: Tensor, rows: Tensor | int, damping: float | None = None) -> Whitening:
    """Cholesky factor of the damped second moment H / rows + damping * mean(diag(H / rows)) I, in float64.

    `damping` None: what the sample itself asks for (`shrinkage`), which tends to 0 as rows outnumber features and leaves plain SVD of very
    few. `second_moment` [n, n] with `rows` a number, or [E, n, n] with `rows` [E], of which the sum divides all (so that errors add up over
    the stack as they do on the data); each is shrunk by its own rows. Where float64 cannot factor the matrix (features that never vary,
    rounding), damping is raised tenfold until it can; of one that was asked for a note says so. Without any data (all zero) L is the
    identity: plain SVD, with a note. Raises ValueError where a moment holds NaN or infinity.
    """
    if not bool(torch.isfinite(second_moment).all()):
        raise ValueError("the second moment of the input holds NaN or infinity")
    mean = second_moment.double() / max(float(torch.as_tensor(rows).sum()), 1.0)
    if mean.dim() == 2:
        return _factor(mean, int(rows), damping)
    parts = [_factor(matrix, int(count), damping) for matrix, count in zip(mean, torch.as_tensor(rows), strict=True)]
    notes = tuple(f"expert {index}: {note}" for index, part in enumerate(parts) for note in part.notes)
    return Whitening(torch.stack([part.factor for part in parts]), torch.stack([part.shift for part in parts]), notes)


def _factor(moment: Tensor, rows: int, damping: float | None) -> Whitening:
    scale = float(moment.diagonal().mean())
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    if scale <= 0:
        return Whitening(identity, moment.new_ones(()), ("no calibration data reached this input: plain SVD",))
    used = first = shrinkage_damping(moment, rows) if damping is None else damping
    while used <= max(first, _LARGEST_DAMPING):
        with one_thread():
            lower, failed = torch.linalg.cholesky_ex(moment + used * scale * identity)
        if not int(failed):
            asked = damping is None or used == damping
            raised = () if asked else (f"damping raised from {damping:g} to {used:g}: the second moment is not positive definite",)
            return Whitening(lower, moment.new_tensor(used * scale), raised)
        used = max(used * _RAISE, _FIRST_DAMPING)
    raise ValueError(f"the second moment of the input is not positive semidefinite: damping {used / _RAISE:g} does not help")


def project(w: Tensor, u: Tensor, weighting: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(down [.., n, r], up [.., r, m]) with x @ down @ up = x @ (u u^T w)^T, for `w` [.., m, n] and orthonormal columns `u` [.., m, r].

    For u = left singular vectors of w these are V sqrt(S) and sqrt(S) U^T; for those of w L they are the whitened factors; for those of
    C^T w L, with `weighting` C [m, m] lower triangular, the weighted ones. Both factors get the same norm per rank-one term, so that
    neither leaves the range of a half-precision type."""
    inner, outer = u.transpose(-2, -1) @ weighted(w, weighting).to(u.dtype), unweighted(u, weighting).transpose(-2, -1)
    norms = torch.linalg.vector_norm(inner, dim=-1, keepdim=True, dtype=torch.float64)  # squares of float32 may leave its range
    sizes = 1.0 if weighting is None else torch.linalg.vector_norm(outer, dim=-1, keepdim=True, dtype=torch.float64)
    balance = (norms / sizes).sqrt().to(inner.dtype)
    down = torch.where(norms > 0, inner / balance.clamp_min(torch.finfo(inner.dtype).tiny), 0.0)
    return down.transpose(-2, -1).contiguous(), (outer * balance).contiguous()


def weighted(w: Tensor, weighting: Tensor | None) -> Tensor:
    """C^T w; w itself without a weighting."""
    return w if weighting is None else weighting.T @ w.to(weighting.dtype)


def unweighted(u: Tensor, weighting: Tensor | None) -> Tensor:
    """C^-T u in the type of u; u itself without a weighting."""
    return u if weighting is None else torch.linalg.solve_triangular(weighting.T, u.to(weighting.dtype), upper=True).to(u.dtype)


def relative_weight_error(w: Tensor, approximation: Tensor) -> float:
    """|W - W'|_F / |W|_F over all axes, summed in float64; 0 where both are zero."""
    if w.numel() > _LARGE:
        pairs = zip(_pieces(w), _pieces(approximation), strict=True)
        squares = [(_energy(one - other), _energy(one)) for one, other in pairs]
        error, size = (sqrt(sum(column)) for column in zip(*squares, strict=True))
    else:
        error, size = (float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) for matrix in (w - approximation, w))
    return share(error, size)


_LARGE = 1 << 24
"""Numbers of a matrix beyond which its errors are summed up piece by piece: a copy in float64 is twice the matrix."""


def _pieces(matrix: Tensor) -> tuple[Tensor, ...]:
    rows = matrix.reshape(-1, matrix.shape[-1])
    return torch.split(rows, max(1, _LARGE // 16 // rows.shape[1]))


def _energy(piece: Tensor) -> float:
    return float(torch.linalg.vector_norm(piece, dtype=torch.float64)) ** 2


def share(error: float, size: float) -> float:
    """error / size; 0 where both are 0."""
    return error / size if size > 0 else 0.0 if error == 0 else float("inf")


def relative_output_error(w: Tensor, approximation: Tensor, second_moment: Tensor) -> float:
    """|(W - W') L|_F / |W L|_F with L L^T = `second_moment` [.., n, n], as sqrt(tr(E H E^T) / tr(W H W^T)) in float64: no factorisation, no
    damping. A weight whose outputs are all zero on the data counts as exact where the approximation's are too."""
    moment = second_moment.double()
    rows = zip(torch.split(w, _ROWS, -2), torch.split(approximation, _ROWS, -2), strict=True)
    error = sqrt(max(sum(_square(one.double() - other.double(), moment) for one, other in rows), 0.0))
    return share(error, size_on_outputs(w, moment))


def size_on_outputs(matrix: Tensor, second_moment: Tensor) -> float:
    """|M L|_F of `matrix` M [.., m, n] with L L^T = `second_moment` [.., n, n], summed in float64; a few rows at a time."""
    moment = second_moment.double()
    return sqrt(max(sum(_square(rows.double(), moment) for rows in torch.split(matrix, _ROWS, -2)), 0.0))


def _square(rows: Tensor, moment: Tensor) -> float:
    return float(((rows @ moment) * rows).sum())
