"""Codes of 8 bits whose integer products overflow on no CPU.

x86 CPUs without VNNI multiply unsigned bytes with signed ones two at a time and add the two in 16 bits, which saturate (vpmaddubsw, which
ONNX Runtime's kernels use there for signed weights; its own way out is `reduce_range`, 7 bits for all). Features 2j and 2j + 1 are such a
pair, an activation is at most 255, and 255 * 128 fits: so the codes of a pair that have one sign may add up to 128. Few pairs of a row are
near that, and a somewhat larger scale of their row alone brings them below it; every CPU then gives the same numbers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from matmorph.passes.linalg.quantize import Quantized
from matmorph.passes.linalg.scales import level_indices

MOST = 128
"""What the codes of a pair may add up to in either direction."""

_MIDDLE, _ROUNDS = 128, 16


def pair_sums(levels: Tensor) -> Tensor:
    """[n, ceil(k / 2)]: the larger magnitude of the sums of positive and of negative numbers of each pair of `levels` [n, k]."""
    pairs = torch.nn.functional.pad(levels, (0, levels.shape[1] % 2)).view(len(levels), -1, 2)
    return torch.maximum(pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1))


def widened_for_pairs(w: Tensor, found: Quantized) -> Quantized:
    """`found`, `w` [out, in] in uniform codes of 8 bits with a scale per row and no zero points, with larger scales of the rows that have a
    pair above `MOST`, and their codes rounded to nearest on these."""
    codes, scales = found.codes.clone(), found.scales.clone()
    for _ in range(_ROUNDS):
        worst = pair_sums(codes.short() - _MIDDLE).amax(1)
        rows = (worst > MOST).nonzero()[:, 0]
        if not len(rows):
            break
        wider = (scales[rows].float() * (worst[rows, None] / MOST)).to(scales.dtype)
        zeros = torch.full((len(rows),), float(_MIDDLE))
        codes[rows] = (level_indices(w[rows].float(), wider[:, 0].float(), zeros, 255) + _MIDDLE).to(torch.uint8)
        scales[rows] = wider
    return held_to_pairs(replace(found, codes=codes, scales=scales))


def held_to_pairs(found: Quantized) -> Quantized:
    """The same with the smaller code of each pair that is above `MOST` brought nearer to zero: of codes not rounded to nearest."""
    n, k = found.codes.shape
    levels = torch.nn.functional.pad(found.codes.short() - _MIDDLE, (0, k % 2)).view(n, -1, 2)
    over = pair_sums(levels.view(n, -1))[..., None] > MOST
    if not bool(over.any()):
        return found
    size = levels.abs()
    smaller = size == size.amin(-1, keepdim=True)
    smaller[..., 1] &= ~smaller[..., 0]
    room = MOST - size.amax(-1, keepdim=True)
    held = torch.where(over & smaller, levels.sign() * torch.minimum(size, room), levels)
    return replace(found, codes=(held.view(n, -1)[:, :k] + _MIDDLE).to(torch.uint8))
