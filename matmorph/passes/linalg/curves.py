"""Errors at every rank from one decomposition: what an allocation compares.

Let U be the left singular vectors of W L (L = I: plain; L L^T = damped second moment: whitened). The factors of rank r stand for
W_r = U_r U_r^T W (`whiten.project`), and their squared error in any metric H is, with B = W H W^T,

    tr((W - W_r) H (W - W_r)^T) = tr(B) - sum_{i <= r} u_i^T B u_i

so all ranks cost one eigenvalue problem and one product, also where H is not what was whitened with (damping, or none at all).

Weighted on the output side (`whiten`), W_r = sum_{i <= r} a_i b_i^T with a_i = C^-T u_i and b_i = W^T C u_i, and the a_i are orthonormal
only as C^T a_i. In any other metric

    |W - W_r|_H^2 = tr(B) - 2 sum_{i <= r} a_i^T W H b_i + sum_{i, j <= r} (a_i^T a_j) (b_i^T H b_j)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from matmorph.passes.linalg.svd import one_thread
from matmorph.passes.linalg.whiten import unweighted, weighted

_RESOLVED = 1e-7
"""Singular values below this share of the largest are lost in a float64 Gram matrix (the root of its rounding, with a margin)."""


@dataclass(frozen=True, eq=False)
class Directions:
    """The left singular vectors `u` [.., m, k] of W L for `w` [.., m, n], k = min(m, n) or fewer, in descending order; float64. With a
    `weighting` C those of C^T W L. `seen`: C^T W, W itself without a weighting."""

    w: Tensor
    u: Tensor
    seen: Tensor
    weighting: Tensor | None = None

    def relative_errors(self, second_moment: Tensor | None, weighting: Tensor | None = None, size: float | None = None) -> Tensor:
        """[k + 1]: the relative error at each rank 0 .. k, over a whole stack; of outputs, or of weights where there is no moment; as it is
        felt behind the outputs where there is a `weighting`. `size`: that of W in the metric, where it is known. Zeros for a weight that is
        zero in it."""
        own = weighting is self.weighting
        seen = self.seen if own else weighted(self.w, weighting)
        gains = _energy(self.inner, second_moment) if own else self._gains(seen, second_moment, weighting)
        found = gains.reshape(-1, self.inner.shape[-2]).sum(0)
        total = float(_energy(seen, second_moment).sum()) if size is None else size**2
        if total <= 0:
            return found.new_zeros(len(found) + 1)
        left = (total - torch.cat([found.new_zeros(1), found.cumsum(0)])).clamp_min(0)
        if self.u.shape[-1] == min(self.w.shape[-2:]):
            left[-1] = 0.0  # all directions together are W
        return (left / total).sqrt()

    @cached_property
    def inner(self) -> Tensor:
        """b_i of the formulas above as rows [.., k, n]."""
        return self.u.transpose(-2, -1) @ self.seen

    @cached_property
    def outer(self) -> Tensor:
        """a_i as columns [.., m, k]."""
        return unweighted(self.u, self.weighting)

    @cached_property
    def _across(self) -> tuple[Tensor, Tensor]:
        """a_i^T a_j, and a_i^T W: what all metrics without a weighting share."""
        turned = self.outer.transpose(-2, -1)
        return turned @ self.outer, turned @ self.w

    def _gains(self, seen: Tensor, second_moment: Tensor | None, weighting: Tensor | None) -> Tensor:
        """By how much the squared error falls with each rank-one term."""
        if weighting is None:
            between, met = self._across
        else:
            turned = weighted(self.outer, weighting).transpose(-2, -1)
            between, met = turned @ turned.transpose(-2, -1), turned @ seen
        image = self.inner if second_moment is None else self.inner @ second_moment.double()
        across = between * (image @ self.inner.transpose(-2, -1))
        return 2 * ((image * met).sum(-1) - across.tril(-1).sum(-1)) - across.diagonal(dim1=-2, dim2=-1)


def directions(
    w: Tensor, factor: Tensor | None = None, weighting: Tensor | None = None, *, most: int | None = None, seen: Tensor | None = None
) -> Directions:
    """Of `w` [m, n] or a stack [E, m, n], with the whitening `factor` [.., n, n] and the `weighting` [m, m] where given. `most`: how many
    directions are wanted; `seen`: C^T w, where it is known. One eigenvalue problem of the shorter side per matrix."""
    whole = w.double()
    known = weighted(whole, weighting) if seen is None else seen.double()
    if whole.dim() == 2:
        return Directions(whole, _left(known if factor is None else known @ factor.double(), most), known, weighting)
    parts = [_left(one if factor is None else one @ factor[index].double(), most) for index, one in enumerate(known)]
    return Directions(whole, torch.stack(parts), known, weighting)


def _left(a: Tensor, most: int | None) -> Tensor:
    with one_thread():
        if a.shape[0] <= a.shape[1]:
            u: Tensor = torch.linalg.eigh(a @ a.T).eigenvectors.flip(1)[:, :most]
            return u
        vectors = torch.linalg.eigh(a.T @ a).eigenvectors.flip(1)[:, :most]
    image = a @ vectors
    norms = torch.linalg.vector_norm(image, dim=0)
    return torch.where(norms > _RESOLVED * norms.max(), image / norms.clamp_min(torch.finfo(a.dtype).tiny), 0.0)


def _energy(rows: Tensor, second_moment: Tensor | None) -> Tensor:
    """r H r^T of each row r [.., n], |r|^2 without H."""
    image = rows if second_moment is None else rows @ second_moment.double()
    return (image * rows).sum(-1).clamp_min(0)
