"""NormalFloat codebooks: NF4, NF3, NF2.

The levels of a b-bit NormalFloat are quantiles of the standard normal distribution, taken separately on both sides of an exact zero, from
the tail probability `TAIL` inwards: 2^(b-1) of them above zero and 2^(b-1) - 1 below, divided by the largest (QLoRA, arXiv 2305.14314,
appendix E; LoftQ, arXiv 2310.08659, takes the same construction to 3 and 2 bits). Their published code is the definition: equation (2) of
the LoftQ paper puts the outermost levels at infinity. The two sides differ; NF2 has no small negative level at all.

The quantiles are computed in float32, as there: NF4 equals the table inside bitsandbytes and ONNX Runtime's MatMulBnb4 to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from scipy.special import ndtri
from torch import Tensor

from matmorph.passes.linalg.choices import CODEBOOK_BITS

TAIL = 0.9677083
"""Probability of the outermost quantile, (1 - 1/30 + 1 - 1/32) / 2 rounded to seven digits as published."""

_BINS = 32
"""Half the number of equal bins on [-1, 1] that find a code (a power of two: multiplying by it is exact)."""


def normal_float(bits: int) -> Tensor:
    """The 2^bits levels in ascending order, float32 [2^bits]; the first is -1, the last 1, and code 2^(bits-1) - 1 is exactly 0.

    Raises ValueError for `bits` other than 2, 3, 4."""
    if bits not in CODEBOOK_BITS.values():
        raise ValueError(f"NormalFloat has 2, 3 or 4 bits, not {bits}")
    above = _quantiles(2 ** (bits - 1))
    below = -_quantiles(2 ** (bits - 1) - 1)
    levels = torch.cat([below, torch.zeros(1), above]).sort().values
    return levels / levels.max()


def _quantiles(count: int) -> Tensor:
    """The positive levels before scaling: quantiles of equally spaced probabilities from `TAIL` towards the median, float32 [count]."""
    probabilities = torch.linspace(TAIL, 0.5, count + 1)[:-1]
    return torch.as_tensor(ndtri(probabilities.numpy()), dtype=torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """Finds the nearest level of a table for many numbers in [-1, 1], without a search per number.

    [-1, 1] is cut in equal bins so narrow that each holds at most one midpoint between neighbouring levels. `below` uint8 [bins] counts the
    midpoints in lower bins, `midpoint` float32 [bins] is the one inside (infinity where there is none). Binning is monotone in floating
    point too, so `below[bin] + (x > midpoint[bin])` equals the number of midpoints below x: exactly a binary search over the midpoints,
    ties to the lower code, at a tenth of its time.
    """

    table: Tensor
    zero: int
    midpoint: Tensor
    below: Tensor

    def codes(self, x: Tensor) -> Tensor:
        """uint8 codes of `x` float32 [n]. Overwrites `x` with scratch values."""
        bins = x.mul(_BINS).add_(_BINS).clamp_(0, 2 * _BINS).to(torch.int32)
        above = torch.gt(x, self.midpoint.index_select(0, bins))
        return self.below.index_select(0, bins).add_(above.view(torch.uint8))


@cache
def nearest(bits: int) -> Nearest:
    """The finder for NormalFloat of 2, 3 or 4 bits."""
    table = normal_float(bits)
    midpoints = (table[1:] + table[:-1]) / 2
    home = midpoints.mul(_BINS).add_(_BINS).to(torch.int32)
    midpoint = torch.full((2 * _BINS + 1,), float("inf"))
    midpoint[home.long()] = midpoints
    below = torch.bucketize(torch.arange(2 * _BINS + 1, dtype=torch.int32), home).to(torch.uint8)
    return Nearest(table, 2 ** (bits - 1) - 1, midpoint, below)
