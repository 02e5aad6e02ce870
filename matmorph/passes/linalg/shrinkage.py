"""What a finite sample says of a second moment: how far to draw it towards a multiple of the identity, and how many directions it spans.

H / N over N rows of n features is the truth plus noise, and where N is not several times n the noise decides which directions seem empty.
Oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE Transactions on
Signal Processing 58, 2010, eq. 23) estimates from the sample alone by how much to shrink it:

    S = H / N,  F = tr(S) / n I,  (1 - rho) S + rho F
    rho = min(1, ((1 - 2/n) tr(S^2) + tr(S)^2) / ((N + 1 - 2/n) (tr(S^2) - tr(S)^2 / n)))

Their sample has a known mean of zero, as ours has: the moment is not centred.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENOUGH = 4
"""Rows per feature below which a fit deserves a warning. A least squares fit to N normal rows of n features has on other rows N / (N - n)
times the error that it has on its own: a third more at 4 n."""

_NEARLY_ONE = 1 - 1e-6
"""Where shrinkage stops: beyond it float64 sees the identity alone."""


def oas(moment: Tensor, rows: int) -> float:
    """rho, 0 .. 1, for `moment` [n, n] of `rows` rows (a sum or a mean: the scale cancels). 0 where shrinking changes nothing: one feature,
    or a sample that is a multiple of the identity; 1 without rows."""
    if rows < 1:
        return 1.0
    exact = moment.double()
    n, trace, squares = len(exact), float(exact.diagonal().sum()), float(exact.square().sum())
    spread = squares - trace**2 / n
    if spread <= torch.finfo(torch.float64).eps * squares:
        return 0.0
    return min(((1 - 2 / n) * squares + trace**2) / ((rows + 1 - 2 / n) * spread), 1.0)


def shrinkage_damping(moment: Tensor, rows: int) -> float:
    """The same as a share of the mean of the diagonal that is added to the moment: rho / (1 - rho)."""
    rho = min(oas(moment, rows), _NEARLY_ONE)
    return rho / (1 - rho)


def effective_rank(moment: Tensor) -> float:
    """How many directions a sample spans, by its second moment [n, n]: n'^2 / |C|_F^2 over its n' live features, with C_jk = H_jk /
    sqrt(H_jj H_kk), the participation ratio of their cosines. 1 for one row, about N n / (N + n) for N independent rows, 0 without data.
    Features of any size count alike."""
    size = moment.double().diagonal().clamp_min(0).sqrt()
    live = size > 0
    count = int(live.sum())
    if not count:
        return 0.0
    cosines = moment.double()[live][:, live] / size[live] / size[live].unsqueeze(1)
    return count**2 / float(cosines.square().sum())
