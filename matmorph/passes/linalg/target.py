"""What a weight should be where the model in front of it was rewritten: its outputs on the new inputs nearest to the original's on its own.

With x the inputs of the original and y those of the rewritten model in the same rows, A = sum of x x^T, C = sum of x y^T and H = sum of
y y^T, the matrix T that minimises |W x - T y|^2 + d |T - W|^2 over the rows is

    T = W + W (C - H) (H + d I)^-1,

which is W C H^-1 for d = 0 and W itself for d without end. Few rows do not determine C: without d, T has on other rows a larger error than
W. So d is chosen on rows that were held out, among `STRENGTHS` times the mean of the diagonal of H and W itself. With H = Q L Q^T and
T - W = W (C - H) Q (L + d)^-1 Q^T, the error of all of them costs one product each of the size of the moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from matmorph.passes.linalg.shrinkage import shrinkage_damping
from matmorph.passes.linalg.svd import one_thread

STRENGTHS = (*(10.0 ** (k / 2) for k in range(-16, 5)), inf)
"""d over the mean of the diagonal of H, ascending."""

KEPT = 0.9
"""Share of the best gain on rows held out that the strongest pull towards W must keep to be chosen. Along directions that hardly occur T is
free to grow, and what rounds or cuts it then pays for its size: at 2 bits a T that was best by a hair had three times the error of W."""


@dataclass(frozen=True, slots=True, eq=False)
class CrossMoments:
    """Of rows x and y [n], float64: `original` A = sum of x x^T, `cross` C = sum of x y^T, `rewritten` H = sum of y y^T, of `rows` rows."""

    original: Tensor
    cross: Tensor
    rewritten: Tensor
    rows: int

    def squared_error(self, w: Tensor, approximation: Tensor) -> float:
        """Sum over the rows of |w x - approximation y|^2."""
        before, after = w.double(), approximation.double()
        total = ((before @ self.original) * before).sum() - 2 * ((before @ self.cross) * after).sum()
        return max(float(total + ((after @ self.rewritten) * after).sum()), 0.0)

    def relative_error(self, w: Tensor, approximation: Tensor) -> float:
        """The root of it over that of the sum of |w x|^2; a weight without outputs counts as exact where the approximation has none."""
        exact = w.double()
        error, size = sqrt(self.squared_error(w, approximation)), sqrt(max(float(((exact @ self.original) * exact).sum()), 0.0))
        return error / size if size > 0 else 0.0 if error == 0 else inf


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """H = Q diag(`values`) Q^T of the rows fitted to, `vectors` Q; `held` = Q^T H Q of those held out, None without any. For all weights
    that read these rows."""

    fitted: CrossMoments
    held_out: CrossMoments | None
    values: Tensor
    vectors: Tensor
    held: Tensor | None

    @classmethod
    def of(cls, fitted: CrossMoments, held_out: CrossMoments | None) -> Directions:
        with one_thread():
            values, vectors = torch.linalg.eigh(fitted.rewritten)
        held = None if held_out is None else vectors.T @ held_out.rewritten @ vectors
        return cls(fitted, held_out, values.clamp_min(0), vectors, held)


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """`weight` T [out, in] float64; `strength`: d over the mean of the diagonal, infinite for W itself."""

    weight: Tensor
    strength: float


def target(w: Tensor, found: Directions) -> Target:
    """T for `w` [out, in]. Where nothing was held out, d is what the sample itself asks for (`shrinkage`)."""
    exact, fitted = w.double(), found.fitted
    scale = float(fitted.rewritten.diagonal().mean())
    if scale <= 0:
        return Target(exact, inf)
    along = (exact @ (fitted.cross - fitted.rewritten)) @ found.vectors
    if found.held_out is None or found.held is None:
        strength = shrinkage_damping(fitted.rewritten, fitted.rows)
    else:
        strength = _best(exact, along, found.values, found.vectors, found.held_out, found.held, scale)
    if strength == inf:
        return Target(exact, inf)
    return Target(exact + (along * _shares(found.values, strength * scale)) @ found.vectors.T, strength)


def _shares(values: Tensor, damping: float) -> Tensor:
    """1 / (L + d), 0 for a direction without rows."""
    total = values + damping
    floor = torch.finfo(values.dtype).eps * float(values.max())
    return torch.where(total > floor, 1 / total.clamp_min(torch.finfo(values.dtype).tiny), 0.0)


def _best(w: Tensor, along: Tensor, values: Tensor, vectors: Tensor, held_out: CrossMoments, held: Tensor, scale: float) -> float:
    """The strength with the smallest error on the rows held out: with D = 1 / (L + d) and T - W = B D Q^T, that is, up to what all have in
    common, sum over j, k of D_j D_k (B^T B)_jk (Q^T H Q)_jk - 2 sum over j of D_j (B^T W (C - H) Q)_jj."""
    slope = (along * ((w @ (held_out.cross - held_out.rewritten)) @ vectors)).sum(0)
    bend = (along.T @ along) * held
    errors: list[float] = [
        0.0 if strength == inf else float((shares := _shares(values, strength * scale)) @ bend @ shares - 2 * shares @ slope)
        for strength in STRENGTHS
    ]
    enough = KEPT * min(errors)  # of W itself it is 0
    return max((strength for strength, error in zip(STRENGTHS, errors, strict=True) if error <= enough), default=inf)
