"""Bases in which the gradients of a weight are sparse: the higher-order SVD of a stack of gradients, from two streamed Gram matrices.

SparseGrad (arXiv 2410.07383) stacks n gradients G_i = dL/dW [out, in] to a tensor [n, out, in] and takes the singular vectors of its
unfoldings along `out` and `in`. They are the eigenvectors of sum G_i G_i^T [out, out] and of sum G_i^T G_i [in, in], so that no gradient
has to be kept. In these bases a gradient is U^T G V, and W is U (U^T W V) V^T: both modes are rotated by the columns' side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from matmorph.passes.linalg.svd import one_thread


@dataclass(frozen=True, slots=True, eq=False)
class Bases:
    """`u` [out, out] and `v` [in, in], orthogonal, float64: basis vectors are columns, the one with most gradient energy first."""

    u: Tensor
    v: Tensor

    def rotated(self, gradient: Tensor) -> Tensor:
        """U^T G V of G [.., out, in], in float64."""
        return self.u.T @ gradient.double() @ self.v

    def restored(self, theta: Tensor) -> Tensor:
        """U theta V^T [.., out, in] of theta in these bases, in float64."""
        return self.u @ theta.double() @ self.v.T


@dataclass(frozen=True, slots=True, eq=False)
class GradientStats:
    """What gradients by one weight [out, in] say before it trains, each None where it was not asked for: the bases, the mean over the
    batches of |U^T G V| (of |G| without bases), and, of the first batch, the shares of the gradient's energy that the entries which are to
    learn can hold (without bases, with them)."""

    bases: Bases | None = None
    scores: Tensor | None = None
    shares: tuple[float, float] | None = None


@dataclass(slots=True, eq=False)
class GradientGrams:
    """Running sums over gradients [.., out, in]: `out` = sum G G^T, `into` = sum G^T G, float64; `count` gradients so far."""

    out: Tensor
    into: Tensor
    count: int = field(default=0)

    @classmethod
    def of(cls, out_features: int, in_features: int) -> GradientGrams:
        return cls(torch.zeros(out_features, out_features, dtype=torch.float64), torch.zeros(in_features, in_features, dtype=torch.float64))

    def add(self, gradient: Tensor) -> None:
        """One gradient, or a stack of them (experts share their bases)."""
        g = gradient.detach().double().cpu()
        stack = g.reshape(-1, *g.shape[-2:])
        for one in stack:
            self.out += one @ one.T
            self.into += one.T @ one
        self.count += len(stack)

    def bases(self) -> Bases:
        """The eigenvectors of both sums. Where no gradient has moved anything (sums of zeros) they are the axes themselves."""
        with one_thread():
            return Bases(_eigenvectors(self.out), _eigenvectors(self.into))


def _eigenvectors(gram: Tensor) -> Tensor:
    """Columns, largest eigenvalue first; the entry of largest magnitude of each is positive, so that equal sums give equal bases."""
    if not bool(gram.any()):
        return torch.eye(len(gram), dtype=gram.dtype)
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors.flip(-1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def top_entries(scores: Tensor, count: int) -> Tensor:
    """Flat positions of the `count` largest scores, ascending; of equal ones the first."""
    order = torch.sort(scores.reshape(-1), descending=True, stable=True).indices
    return order[:count].sort().values


def top_share(gradient: Tensor, count: int) -> float:
    """Share of sum g^2 that the `count` entries of largest magnitude hold; 0 for a gradient of zeros."""
    squares = gradient.double().square().reshape(-1)
    total = float(squares.sum())
    return float(squares.topk(count).values.sum()) / total if total else 0.0
