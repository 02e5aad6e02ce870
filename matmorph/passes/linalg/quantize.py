"""Quantizers: a matrix in, integer codes and scales out.

| name              | level of a code             | a block                           | source                                            |
|-------------------|-----------------------------|-----------------------------------|---------------------------------------------------|
| "nf4" "nf3" "nf2" | scale * table[code]         | of the row-major flattened weight | QLoRA (arXiv 2305.14314), LoftQ (arXiv 2310.08659) |
| "uniform"         | scale * (code - zero point) | along the last axis (in_features) | ONNX Runtime's MatMulNBits                        |
| "uniform_clipped" | scale * code + offset       | the whole tensor                  | LoftQ, its published code for uniform quantisers  |

Weights are [.., out, in]; leading axes are rows. A code is the nearest level: a tie goes to the lower code in a table, to the even multiple
of the scale in "uniform". The last block of a row (or of the flattened weight) may be short. A block whose numbers are all zero, or too
small for the type of the scales, gets scale 0 and the code of zero.

"uniform" without a zero point uses 2^(bits-1), and its scale may be negative: the number of largest magnitude gets code 0 whichever sign
it has, because that side has one level more. With `zero_point` the levels cover [min(block, 0), max(block, 0)]; with "float" zero points
(`affine`) [min(block), max(block)].

`scale="search"` clips: among a grid of smaller scales, each refitted to the least-squares scale of its codes (the best one twice more), it
keeps the scale and zero point with the smallest squared error of the block, never worse than "absmax". At 2 bits that halves the error.

Quantising a dequantised matrix gives the same matrix to the bit, but for "uniform_clipped" (clips anew each time) and `double`.

Scratch memory is a few MB whatever the size of the weight. NaN and infinity raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from matmorph.passes.linalg.affine import affine_codes, affine_scales
from matmorph.passes.linalg.choices import CODEBOOK_BITS, QuantizerName, quantizer_bits
from matmorph.passes.linalg.codebook import nearest, normal_float
from matmorph.passes.linalg.scales import SCALE_TYPES, level_indices, uniform_scales
from matmorph.passes.linalg.svd import power_of_two

_CHUNK = 1 << 17
"""Numbers quantised at a time: a chunk and its scratch stay in a core's cache."""
_DOUBLE_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How to quantise; a value, compared by its fields. Raises ValueError for a combination that does not exist.

    `bits`: of "uniform" 2, 3, 4 or 8, of "uniform_clipped" 2..8; a table's own when None. `zero_point`, `scale`: "uniform" only.
    `scale_dtype`: type the scales are rounded to, before codes are chosen. `double` (tables only): the scales are stored as 8-bit codes,
    in blocks of 256, of their difference from the mean (double quantisation as in QLoRA, with uniform steps instead of an 8-bit float);
    codes are chosen before that, as in the paper. It is a storage format: kernels get the expanded scales.
    """

    name: QuantizerName
    bits: int | None = None
    block_size: int = 64
    zero_point: bool | Literal["float"] = False
    scale: Literal["absmax", "search"] = "absmax"
    scale_dtype: torch.dtype = torch.float32
    double: bool = False

    def __post_init__(self) -> None:
        bits = quantizer_bits(self.name, self.bits, self.block_size, self.zero_point, self.scale, self.double)
        object.__setattr__(self, "bits", bits)
        if self.scale_dtype not in SCALE_TYPES:
            raise ValueError(f"scales are float32 or float16, not {self.scale_dtype}")

    @property
    def width(self) -> int:
        """Bits of one code; a number of levels, 2^width, for every quantizer."""
        return self.bits or 0

    @property
    def table(self) -> Tensor | None:
        """float32 [2^bits], or None for uniform levels."""
        return normal_float(self.width) if self.name in CODEBOOK_BITS else None

    @property
    def bits_per_weight(self) -> float:
        """Nominal storage per weight: codes, scales and zero points of whole blocks. 4.25 for NF4 with float16 scales per 64."""
        if self.name == "uniform_clipped":
            return float(self.width)
        scale = 8 + 32 / _DOUBLE_BLOCK if self.double else 8 * self.scale_dtype.itemsize
        zero = 32 if self.zero_point == "float" else self.width * bool(self.zero_point)
        return self.width + (scale + zero) / self.block_size

    def blocks(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales of a weight of `shape`: [.., blocks per row], flat for tables, [] for one of the whole tensor."""
        if self.name == "uniform_clipped":
            return ()
        if self.name == "uniform":
            return (*shape[:-1], -(-shape[-1] // self.block_size))
        return (-(-math.prod(shape) // self.block_size),)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of the packed arrays (`matmorph.passes.linalg.packing`) of a weight of `shape`: from the shape alone.

        Blocks are stored whole, 3-bit codes 4 bits wide, zero points packed per row; "uniform_clipped" as one stream of codes."""
        blocks = math.prod(self.blocks(shape))
        if self.name == "uniform_clipped":
            return -(-math.prod(shape) * self.width // 8) + 2 * torch.float32.itemsize
        codes = blocks * self.block_size * stored_width(self.width) // 8
        if self.name == "nf4":  # its kernel takes the flattened codes without the rest of the last block
            codes = -(-math.prod(shape) // 2)
        if self.double:
            return codes + Quantizer("uniform", 8, _DOUBLE_BLOCK).nbytes((1, blocks)) + torch.float32.itemsize
        rows = math.prod(shape[:-1])
        packed = rows * -(-blocks // max(rows, 1) * stored_width(self.width) // 8) if self.zero_point else 0
        zeros = blocks * torch.float32.itemsize if self.zero_point == "float" else packed
        return codes + blocks * self.scale_dtype.itemsize + zeros


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """`codes` uint8 in the shape of the weight, one per byte; `scales` `quantizer.scale_dtype` (float32 where `double`) [blocks(shape)];
    `zero_points` like the scales, uint8 or float32, or None; `offset` float32 [] of "uniform_clipped"."""

    quantizer: Quantizer
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    offset: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the packed arrays."""
        return self.quantizer.nbytes(self.shape)

    def dequantize(self) -> Tensor:
        """float32, in the shape of the weight."""
        out = torch.empty(self.shape, dtype=torch.float32)
        if self.offset is not None:
            return torch.mul(self.codes, self.scales, out=out).add_(self.offset)
        block = self.quantizer.block_size
        chunks = (_rows(part, self.quantizer) for part in (self.codes, out))
        scales = self.scales.float().reshape(-1)
        zeros = None if self.zero_points is None else self.zero_points.float().reshape(-1)
        table, at = self.quantizer.table, 0
        for codes, target in zip(*chunks, strict=True):
            per_row = -(-codes.shape[1] // block)
            here = slice(at, at + len(codes) * per_row)
            at = here.stop
            if table is not None:
                level = table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
            else:
                level = codes.float()
                level.sub_(2 ** (self.quantizer.width - 1) if zeros is None else _spread(zeros[here], level, block))
            torch.mul(level, _spread(scales[here], level, block), out=target)
        return out


def quantize(w: Tensor, quantizer: Quantizer, importance: Tensor | None = None) -> Quantized:
    """Codes and scales of `w` [.., out, in], any floating type (quantised in float32). `importance` [in]: what the squared error of each
    input feature counts in a search of scales, only ever beside the others of its block.

    Raises ValueError for NaN, infinity, an empty weight, fewer than two axes, or scales outside `scale_dtype`."""
    if w.dim() < 2 or w.numel() == 0 or not w.dtype.is_floating_point:
        raise ValueError(f"a floating-point weight with two axes or more is needed, not {w.dtype} {list(w.shape)}")
    squares = quantizer.name == "uniform_clipped" or quantizer.scale == "search"
    factor = power_of_two(w) if squares and quantizer.scale_dtype == torch.float32 else 1.0
    if factor != 1:
        found = quantize(w / factor, quantizer, importance)
        return replace(found, scales=found.scales * factor, offset=None if found.offset is None else found.offset * factor)
    if quantizer.name == "uniform_clipped":
        return _clipped(w, quantizer)
    weights = None if importance is None or quantizer.scale != "search" else _weights(importance, quantizer.block_size)
    parts: list[tuple[Tensor, Tensor, Tensor, torch.Size]] = []
    begun = 0  # blocks
    for rows in _rows(w, quantizer):
        x = _padded(rows, quantizer.block_size)
        if quantizer.name == "uniform":
            at = None if weights is None else weights[torch.arange(begun, begun + len(x)) % len(weights)]
            parts.append((*_uniform_chunk(x, quantizer, at), rows.shape))
        else:
            parts.append((*_table_chunk(x, quantizer), rows.shape))
        begun += len(x)
    codes = torch.cat([codes.view(shape[0], -1)[:, : shape[1]].reshape(-1) for codes, _, _, shape in parts]).view(w.shape)
    blocks = quantizer.blocks(w.shape)
    scales = torch.cat([scales for _, scales, _, _ in parts]).view(blocks)
    zeros = torch.cat([zeros for _, _, zeros, _ in parts]).view(blocks) if quantizer.zero_point else None
    if quantizer.double:
        scales = _twice(scales)
    return Quantized(quantizer, codes, scales, zeros)


def stored_width(bits: int) -> int:
    """Bits that a code takes in a packed byte: 3-bit codes are stored 4 bits wide."""
    return 4 if bits == 3 else bits


def _rows(w: Tensor, quantizer: Quantizer) -> Iterator[Tensor]:
    """`w` as views [rows, n] of about `_CHUNK` numbers, in order; blocks start at the beginning of each row."""
    block, n = quantizer.block_size, w.shape[-1]
    if quantizer.name == "uniform" and n % block:
        pieces = [w.reshape(-1, n)]
    else:
        flat = w.reshape(-1)
        whole = flat.numel() // block * block
        pieces = [flat[:whole].view(-1, block), flat[whole:].view(1, -1)]
    for piece in pieces:
        if piece.numel():
            yield from torch.split(piece, max(1, _CHUNK // piece.shape[1]))


def _padded(rows: Tensor, block: int) -> Tensor:
    """float32 [blocks, block]; zeros in the rest of a short block change neither its scale nor its error."""
    short = -rows.shape[1] % block
    return (pad(rows.float(), (0, short)) if short else rows.float()).reshape(-1, block)


def _weights(importance: Tensor, block: int) -> Tensor:
    """float32 [blocks of a row, block], the largest of each block 1; all alike where a block counts nothing."""
    whole = pad(importance.double(), (0, -len(importance) % block)).view(-1, block)
    most = whole.amax(1, keepdim=True)
    return torch.where(most > 0, whole / most, 1.0).float()


def _spread(per_block: Tensor, like: Tensor, block: int) -> Tensor:
    """One number per block [rows * blocks] as one per weight, to go with `like` [rows, n]."""
    per_row = per_block.view(len(like), -1)
    return per_row if per_row.shape[1] == 1 else per_row.repeat_interleave(block, 1)[:, : like.shape[1]]


_Chunk = tuple[Tensor, Tensor, Tensor]
"""(codes uint8 [blocks, block], scales [blocks], zero points uint8 [blocks] or empty)."""


def _table_chunk(x: Tensor, quantizer: Quantizer) -> _Chunk:
    """Scale = largest magnitude; code = number of midpoints between neighbouring levels that lie below x / scale."""
    exact = torch.maximum(x.amax(1), -x.amin(1))  # ten times faster than a norm over short rows
    scales = exact.to(quantizer.scale_dtype)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(
            "NaN or infinity in the weight"
            if not bool(torch.isfinite(exact).all())
            else f"the largest scale is outside the range of {quantizer.scale_dtype}: use float32 scales"
        )
    divisor = scales.float()
    unit = x / torch.where(divisor == 0, math.inf, divisor)[:, None]
    return nearest(quantizer.width).codes(unit.view(-1)).view(x.shape), scales, scales.new_empty(0)


def _uniform_chunk(x: Tensor, quantizer: Quantizer, weights: Tensor | None) -> _Chunk:
    search, dtype = quantizer.scale == "search", quantizer.scale_dtype
    if quantizer.zero_point == "float":
        return _affine_chunk(x, quantizer, weights)
    scales, zeros = uniform_scales(x, quantizer.width, zero_point=quantizer.zero_point is True, search=search, dtype=dtype, weights=weights)
    codes = level_indices(x, scales, zeros, 2**quantizer.width - 1).add_(zeros[:, None])
    return codes.to(torch.uint8), scales.to(dtype), zeros.to(torch.uint8)


def _affine_chunk(x: Tensor, quantizer: Quantizer, weights: Tensor | None) -> _Chunk:
    scales, zeros = affine_scales(x, quantizer.width, search=quantizer.scale == "search", weights=weights)
    narrow = scales.to(quantizer.scale_dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise ValueError(f"the largest scale is outside the range of {quantizer.scale_dtype}: use float32 scales")
    zeros = torch.where(narrow == 0, 0.0, zeros * scales / torch.where(narrow == 0, 1.0, narrow.float()))  # the same lowest level
    return affine_codes(x, narrow.float(), zeros, 2**quantizer.width - 1).to(torch.uint8), narrow, zeros


def _clipped(w: Tensor, quantizer: Quantizer) -> Quantized:
    """Clip to mean +- 2 standard deviations, then 2^bits equal steps from the smallest to the largest number of the tensor."""
    x = w.float()
    mean, deviation = x.mean(), x.std() if x.numel() > 1 else x.new_zeros(())
    if not bool(torch.isfinite(mean) & torch.isfinite(deviation)):
        raise ValueError("NaN or infinity in the weight")
    clipped = x.clamp(mean - 2 * deviation, mean + 2 * deviation)
    low, high = torch.aminmax(clipped)
    span, top = high - low + 1e-8, 2**quantizer.width - 1
    codes = clipped.sub_(low).div_(span).mul_(top).round_().to(torch.uint8)
    return Quantized(quantizer, codes, (span / top).to(quantizer.scale_dtype), offset=low)


def _twice(scales: Tensor) -> Tensor:
    """The scales as double quantisation gives them back, float32."""
    mean = scales.float().mean()
    stored = quantize((scales.float() - mean).view(1, -1), Quantizer("uniform", 8, _DOUBLE_BLOCK))
    return (stored.dequantize().view(-1) + mean).clamp_min_(0)
