"""Least squares after columns were removed: the kept columns take over what the removed ones did on the calibration data.

With H = sum of x x^T and kept columns S (removed R), |W X - W' X_S|^2 + d |W' - W_S|^2 is smallest at
W' = W_S + W_R H_RS (H_SS + d I)^-1. Its first term is never above that of W_S itself, whatever d >= 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matmorph.passes.linalg.shrinkage import shrinkage_damping
from matmorph.passes.linalg.svd import one_thread

_RAISE = 10.0
_FIRST = 1e-10
_LAST = 1e3


def refit(w: Tensor, second_moment: Tensor, kept: Tensor, damping: float | None, rows: int) -> tuple[Tensor, tuple[str, ...]]:
    """(W' [out, kept] float64, notes) for `w` [out, in], `second_moment` [in, in] of `rows` rows and ascending column indices `kept`.

    d = damping * mean(diag(H_SS)), by default what the sample asks for (`shrinkage`); where float64 cannot factor the damped matrix d is
    raised tenfold until it can; of one that was asked for a note says so. Without any data on the kept columns they stay as they are, with
    a note. Raises ValueError where the moment is not positive semidefinite.
    """
    exact, moment = w.double(), second_moment.double()
    removed = torch.ones(exact.shape[1], dtype=torch.bool)
    removed[kept] = False
    inner = moment[kept][:, kept]
    scale = float(inner.diagonal().mean())
    if scale <= 0:
        return exact[:, kept], ("no calibration data reached the kept features: nothing was refitted",)
    target = (exact[:, removed] @ moment[removed][:, kept]).T
    identity = torch.eye(len(inner), dtype=torch.float64)
    used = first = shrinkage_damping(inner, rows) if damping is None else damping
    while used <= max(first, _LAST):
        with one_thread():
            lower, failed = torch.linalg.cholesky_ex(inner + used * scale * identity)
        if not int(failed):
            note = f"damping raised from {first:g} to {used:g}: the second moment is not positive definite"
            return exact[:, kept] + torch.cholesky_solve(target, lower).T, () if damping is None or used == first else (note,)
        used = max(used * _RAISE, _FIRST)
    raise ValueError("the second moment of the input is not positive semidefinite")
