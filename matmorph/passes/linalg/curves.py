"""Errors at every rank from one decomposition: what an allocation compares.

Let U be the left singular vectors of W L (L = I: plain; L L^T = damped second moment: whitened). The factors of rank r stand for
W_r = U_r U_r^T W (`whiten.project`), and their squared error in any metric H is, with B = W H W^T,

    tr((W - W_r) H (W - W_r)^T) = tr(B) - sum_{i <= r} u_i^T B u_i

so all ranks cost one eigenvalue problem and one product, also where H is not what was whitened with (damping, or none at all).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matmorph.passes.linalg.svd import one_thread

_RESOLVED = 1e-7
"""Singular values below this share of the largest are lost in a float64 Gram matrix (the root of its rounding, with a margin)."""


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """All left singular vectors `u` [.., m, k] of W L for `w` [.., m, n], k = min(m, n), in descending order; float64."""

    w: Tensor
    u: Tensor

    def relative_errors(self, second_moment: Tensor | None) -> Tensor:
        """[k + 1]: the relative error at each rank 0 .. k, over a whole stack; of outputs, or of weights where there is no moment. Zeros
        for a weight that is zero in that metric."""
        inner = self.u.transpose(-2, -1) @ self.w
        found, total = _energy(inner, second_moment).reshape(-1, inner.shape[-2]).sum(0), float(_energy(self.w, second_moment).sum())
        if total <= 0:
            return found.new_zeros(len(found) + 1)
        left = (total - torch.cat([found.new_zeros(1), found.cumsum(0)])).clamp_min(0)
        left[-1] = 0.0  # all directions together are W
        return (left / total).sqrt()


def directions(w: Tensor, factor: Tensor | None = None) -> Directions:
    """Of `w` [m, n] or a stack [E, m, n], with the whitening `factor` [.., n, n] where given. One eigenvalue problem of the shorter side
    per matrix."""
    whole = w.double()
    if whole.dim() == 2:
        return Directions(whole, _left(whole if factor is None else whole @ factor.double()))
    parts = [_left(one if factor is None else one @ factor[index].double()) for index, one in enumerate(whole)]
    return Directions(whole, torch.stack(parts))


def _left(a: Tensor) -> Tensor:
    with one_thread():
        if a.shape[0] <= a.shape[1]:
            u: Tensor = torch.linalg.eigh(a @ a.T).eigenvectors.flip(1)
            return u
        vectors = torch.linalg.eigh(a.T @ a).eigenvectors.flip(1)
    image = a @ vectors
    norms = torch.linalg.vector_norm(image, dim=0)
    return torch.where(norms > _RESOLVED * norms.max(), image / norms.clamp_min(torch.finfo(a.dtype).tiny), 0.0)


def _energy(rows: Tensor, second_moment: Tensor | None) -> Tensor:
    """r H r^T of each row r [.., n], |r|^2 without H."""
    image = rows if second_moment is None else rows @ second_moment.double()
    return (image * rows).sum(-1).clamp_min(0)
