"""Scales per input channel of a matmul: x / s times W s is x times W, and codes of W s serve loud channels better (AWQ, arXiv 2306.00978).

With s = (root mean square of the channel)^alpha the weights of loud channels grow before they are rounded, and so does what a step of
their block is worth to them. alpha = 0 changes nothing, alpha = 1 makes all channels equally loud. AWQ takes the mean magnitude; the root
mean square is what a second moment holds. All s are divided by the root of the smallest times the largest, so that neither side grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALPHAS = tuple(k / 10 for k in range(11))
"""Exponents that are tried, 0 first: it wins a tie."""

_QUIET = 1e-4
"""Share of the loudest channel below which all channels are alike: a scale of 0 could not be divided by."""


def channel_scales(power: Tensor, alpha: float, exact: bool = False) -> Tensor:
    """s [n], float64, of `power` [n]: mean squares of the channels. `exact`: powers of two, which no floating-point type rounds."""
    loud = power.double().clamp_min(0).sqrt()
    most = float(loud.max()) if loud.numel() else 0.0
    if alpha == 0 or most == 0:
        return torch.ones_like(loud)
    s = (loud / most).clamp_min(_QUIET) ** alpha
    s = s / (s.max() * s.min()).sqrt()
    return torch.exp2(torch.log2(s).round()) if exact else s


def scaled_moment(moment: Tensor, s: Tensor) -> Tensor:
    """The second moment of x / s."""
    return moment / torch.outer(s, s).to(moment)
