"""Scales and zero points of uniform quantisation, one per block: from the extremes, or searched for the smallest squared error.

A block x becomes codes clamp(round(x / s) + z, 0, top) and levels s * (code - z); `top` = 2^bits - 1. Two rules hold for every scale that
leaves this module, and make quantising idempotent:
* reach: with a free zero point some number of the block lands on code 0 and some on `top` (0 counts as a number of each block); with the
  fixed z = 2^(bits-1) the number of largest magnitude lands on code 0. So the extremes of the levels give back the same scale.
* short: with a free zero point a float32 scale has 16 significant bits, so s * k and differences of two such levels are exact in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_TYPES = (torch.float32, torch.float16)

_SHRINK: Mapping[int, tuple[float, ...]] = {
    2: (0.4, 0.46, 0.52, 0.58, 0.64, 0.7, 0.78, 0.86, 0.94),
    3: (0.5, 0.58, 0.65, 0.72, 0.78, 0.84, 0.9, 0.96),
    4: (0.6, 0.7, 0.77, 0.82, 0.86, 0.9, 0.94, 0.98),
    8: (0.94, 0.96, 0.98, 0.99),
}
"""Candidate scales as parts of the unclipped one. For normal, uniform and Student-t blocks of 16 to 256 numbers the optimum lies inside."""

_REFITS = 2
_LEAST = torch.finfo(torch.float32).tiny
"""A divisor where a sum of squares is 0, and the dividend with it."""


@dataclass(frozen=True, slots=True)
class _Levels:
    """What a block may become: `free` = the zero point may be chosen; `dtype` = type that stores the scales."""

    bits: int
    free: bool
    dtype: torch.dtype

    @property
    def top(self) -> int:
        return int(2**self.bits - 1)

    @property
    def half(self) -> int:
        return int(2 ** (self.bits - 1))

    def stored(self, s: Tensor, down: bool = False) -> Tensor:
        """`s` rounded to what the store holds; `down`: one step of it nearer to zero."""
        if self.dtype == torch.float16:
            bits, step = s.half().view(torch.int16), 1
            return torch.where(bits & 0x7FFF > 0, bits - step * down, bits).view(torch.float16).float()
        step = 0x100 if self.free else 1
        word = s.view(torch.int32)
        if self.free:
            word = (word + step // 2) & -step
        return torch.where(word & 0x7FFFFFFF >= step, word - step * down, 0).view(torch.float32)

    def reached(self, lo: Tensor, hi: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """The rule of reach, bool [blocks]; never true for a scale of 0."""
        low, high = _ratio(lo, s).round(), _ratio(hi, s).round()
        ends = (low <= -z) & (high >= self.top - z) if self.free else torch.minimum(low, high) <= -z
        return ends & (s != 0)


def uniform_scales(
    x: Tensor, bits: int, *, zero_point: bool, search: bool, dtype: torch.dtype, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scale [blocks], zero point [blocks]), both float32 with values that `dtype` and uint8 hold exactly, for `x` float32 [blocks, size].
    `weights` [blocks, size], the largest of a block 1: what the squared error of each number counts in a search.

    Raises ValueError for NaN or infinity in `x` and for scales too large for `dtype`."""
    levels = _Levels(bits, zero_point, dtype)
    lo, hi = x.amin(1), x.amax(1)  # eight times faster than aminmax over short rows
    if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
        raise ValueError("NaN or infinity in the weight")
    lo, hi = lo.clamp_max_(0), hi.clamp_min_(0)
    s, z = _covering(lo, hi, levels)
    return _searched(x, lo, hi, s, z, levels, weights) if search else (s, z)


def level_indices(x: Tensor, s: Tensor, z: Tensor, top: int, out: Tensor | None = None) -> Tensor:
    """round(x / s) clamped to [-z, top - z]: the codes minus the zero point, float32 like `x` [blocks, size]."""
    divisor = torch.where(s == 0, 1.0, s)[:, None]
    return torch.div(x, divisor, out=out).round_().clamp_(-z[:, None], top - z[:, None])


def _ratio(a: Tensor, s: Tensor) -> Tensor:
    return a / torch.where(s == 0, 1.0, s)


def _covering(lo: Tensor, hi: Tensor, levels: _Levels) -> tuple[Tensor, Tensor]:
    """The smallest scale whose levels cover the block. Where rounding it for storage broke the rule of reach, one step less restores it;
    where even that is 0 (numbers too small for the type), the block counts as zero. ValueError for scales too large for the type."""
    wanted = (hi - lo) / levels.top if levels.free else -torch.where(-lo >= hi, lo, hi) / levels.half
    first = levels.stored(wanted)
    if not bool(torch.isfinite(first).all()):
        raise ValueError(f"the largest scale is outside the range of {levels.dtype}: use float32 scales")
    second = levels.stored(first, down=True)

    def zero(s: Tensor) -> Tensor:
        return _ratio(-lo, s).round().clamp_(0, levels.top) if levels.free else torch.full_like(s, levels.half)

    s = torch.where(levels.reached(lo, hi, first, zero(first)), first, second)
    return s, zero(s)


def _candidates(lo: Tensor, hi: Tensor, covering: Tensor, levels: _Levels) -> Iterator[tuple[Tensor, Tensor]]:
    """(scale, zero point) pairs: smaller scales; with a free zero point the one or two that clip both sides alike; else both signs."""
    half = torch.full_like(covering, levels.half)
    for part in _SHRINK[levels.bits]:
        s = levels.stored(covering * part)
        if not levels.free:
            yield s, half
            if levels.bits < 8:
                yield -s, half
            continue
        middle = (levels.top - _ratio(lo + hi, s)) / 2
        for z in (middle.floor(), middle.ceil()) if levels.bits == 2 else (middle.round(),):
            yield s, z.clamp_(0, levels.top)


def _searched(
    x: Tensor, lo: Tensor, hi: Tensor, covering: Tensor, z0: Tensor, levels: _Levels, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See the docstring of `quantize`. With k = code - z the least-squares scale of given codes is sum(x k) / sum(k^2) and leaves
    sum(x^2) - sum(x k)^2 / sum(k^2): candidates are compared by that, results by the error itself. All sums are weighted."""
    scratch, k = torch.empty_like(x), torch.empty_like(x)
    felt = x if weights is None else x * weights

    def total(squares: Tensor) -> Tensor:
        return (squares if weights is None else squares.mul_(weights)).sum(1)

    def sums(s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        level_indices(x, s, z, levels.top, out=k)
        return torch.mul(felt, k, out=scratch).sum(1), total(torch.mul(k, k, out=scratch))

    def refit(xk: Tensor, kk: Tensor) -> Tensor:
        return levels.stored(torch.where(kk > 0, xk / kk.clamp_min(_LEAST), 0.0))

    best, z = torch.full_like(covering, -1.0), z0
    s = covering
    for trial_s, trial_z in _candidates(lo, hi, covering, levels):
        xk, kk = sums(trial_s, trial_z)
        gain = torch.where(levels.reached(lo, hi, trial_s, trial_z), xk * (xk / kk.clamp_min(_LEAST)), -1.0)
        better = gain > best
        best = torch.where(better, gain, best)
        s, z = torch.where(better, refit(xk, kk), s), torch.where(better, trial_z, z)

    kept_s, kept_z = covering, z0
    level_indices(x, covering, z0, levels.top, out=k)
    least = total(torch.addcmul(x, k, covering[:, None], value=-1, out=scratch).square_())
    for last in (*(False,) * _REFITS, True):
        xk, kk = sums(s, z)
        error = total(torch.addcmul(x, k, s[:, None], value=-1, out=scratch).square_())
        better = (error < least) & levels.reached(lo, hi, s, z)
        least = torch.where(better, error, least)
        kept_s, kept_z = torch.where(better, s, kept_s), torch.where(better, z, kept_z)
        if not last:
            s = refit(xk, kk)
    return kept_s, kept_z
