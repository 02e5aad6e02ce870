"""Scales and floating-point zero points of uniform quantisation, one pair per block: from the extremes, or searched.

A block x becomes codes clamp(round(x / s + z), 0, top) and levels s * (code - z), top = 2^bits - 1, with any number as z. So the levels
need not hold 0, and a grid of any offset is met exactly, as that of GGUF's Q4_1 (a minimum and a step per block).
A block of one number has it as its only level, s = |x| and z = -sign(x); of zeros, s = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = (0.7, 0.78, 0.84, 0.88, 0.92, 0.96)
"""Candidate steps as parts of the one that covers the block."""
SIDES = (0.0, 0.5, 1.0)
"""How much of what a smaller range leaves out lies below it."""
_REFITS = 2


def affine_scales(x: Tensor, bits: int, *, search: bool, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(scale [blocks], zero point [blocks]), float32, for `x` float32 [blocks, size]; `weights` [blocks, size]: what the squared error of
    each number counts. `search`: smaller ranges, each refitted by least squares to its codes, compared by the squared error.

    Raises ValueError for NaN or infinity in `x`."""
    low, high = x.amin(1), x.amax(1)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise ValueError("NaN or infinity in the weight")
    top = 2**bits - 1
    step = (high - low) / top
    step = torch.where(step > 0, step, low.abs())
    if not search:
        return step, _zero(step, low)
    counts = torch.ones_like(x) if weights is None else weights
    best, best_step, best_low = _error(x, counts, step, low, top), step, low
    for part in PARTS:
        for side in SIDES:
            trial_step, trial_low = step * part, low + (high - low) * (1 - part) * side
            for _ in range(_REFITS):
                trial_step, trial_low = _refitted(x, counts, trial_step, trial_low, top)
            error = _error(x, counts, trial_step, trial_low, top)
            better = error < best
            best = torch.where(better, error, best)
            best_step, best_low = torch.where(better, trial_step, best_step), torch.where(better, trial_low, best_low)
    return best_step, _zero(best_step, best_low)


def affine_codes(x: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    """float32 [blocks, size], whole numbers 0 .. top."""
    return (x / torch.where(scales == 0, 1.0, scales)[:, None] + zeros[:, None]).round_().clamp_(0, top)


def _zero(step: Tensor, low: Tensor) -> Tensor:
    return torch.where(step == 0, 0.0, -low / torch.where(step == 0, 1.0, step))


def _codes(x: Tensor, step: Tensor, low: Tensor, top: int) -> Tensor:
    return affine_codes(x, step, _zero(step, low), top)


def _error(x: Tensor, counts: Tensor, step: Tensor, low: Tensor, top: int) -> Tensor:
    """Weighted squared error per block."""
    zero = _zero(step, low)
    levels = (affine_codes(x, step, zero, top) - zero[:, None]) * step[:, None]
    return ((x - levels).square_() * counts).sum(1)


def _refitted(x: Tensor, counts: Tensor, step: Tensor, low: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(step, level of code 0) by weighted least squares for the codes that they give; as they were where these are all one code."""
    codes = _codes(x, step, low, top)
    total = counts.sum(1)
    mean_x, mean_code = (counts * x).sum(1) / total, (counts * codes).sum(1) / total
    off = codes - mean_code[:, None]
    spread = (counts * off * off).sum(1)
    slope = (counts * off * (x - mean_x[:, None])).sum(1) / spread.clamp_min(torch.finfo(torch.float32).tiny)
    fits = (spread > 0) & (slope > 0)
    return torch.where(fits, slope, step), torch.where(fits, mean_x - slope * mean_code, low)
