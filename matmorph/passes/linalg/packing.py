"""Codes as the kernels of ONNX Runtime store them, and back.

| layout               | codes, uint8                            | order      | scales           | zero points, uint8            |
|----------------------|-----------------------------------------|------------|------------------|-------------------------------|
| MatMulNBits          | [N, nb, block * bits / 8]               | low first  | [N, nb]          | [N, ceil(nb * bits / 8)]      |
| GatherBlockQuantized | [V, D * bits / 8]                       | low first  | [V, nb]          | [V, ceil(nb * bits / 8)]      |
| MatMulBnb4           | [ceil(N K / 2)], the flattened weight   | high first | [blocks]         | -                             |
| channels             | int8 [N, K], the code of zero at 0      | -          | [N]              | -                             |
| byte table           | [blocks, block * width / 8], flattened  | low first  | [blocks]         | -                             |

nb = blocks of a row, ceil(K / block). "Low first": of the codes in a byte, the first takes the lowest bits. The rest of a short block is
filled with the code of zero. 3-bit codes are 4 bits wide; those of uniform levels without zero points are moved by 4, to the middle of that
width. Zero points of MatMulNBits may also be floating-point numbers, [N, nb]. The layouts are those that the contrib operators document,
checked against their CPU kernels in the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from matmorph.passes.linalg.choices import CODEBOOK_BITS
from matmorph.passes.linalg.quantize import Quantized, Quantizer, stored_width

KERNEL_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes of the three kernels."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The arrays of one layout (see the table above) as the kernel takes them; `zero_points` None where it uses 2^(bits-1) or a table."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.zero_points) if part is not None)


def pack_bits(codes: Tensor, width: int, *, high_first: bool = False) -> Tensor:
    """uint8 [.., ceil(n * width / 8)] from one code per byte, uint8 [.., n]; `width` 2, 4 or 8. The rest of the last byte is 0."""
    per_byte = _per_byte(width)
    if per_byte == 1:
        return codes.contiguous()
    padded = pad(codes, (0, -codes.shape[-1] % per_byte))
    packed = torch.zeros_like(padded[..., ::per_byte])
    for shift, place in _places(width, high_first):
        packed |= padded[..., place::per_byte] << shift
    return packed


def unpack_bits(packed: Tensor, width: int, count: int, *, high_first: bool = False) -> Tensor:
    """The first `count` codes of the last axis: inverse of `pack_bits`."""
    per_byte = _per_byte(width)
    codes = packed.new_empty((*packed.shape[:-1], packed.shape[-1] * per_byte))
    if count > codes.shape[-1]:
        raise ValueError(f"{packed.shape[-1]} bytes hold {codes.shape[-1]} codes of {width} bits, not {count}")
    for shift, place in _places(width, high_first):
        codes[..., place::per_byte] = packed >> shift & 2**width - 1
    return codes[..., :count].contiguous()


def pack_matmul_nbits(q: Quantized) -> Packed:
    """For com.microsoft.MatMulNBits, `q` uniform [N, K]. ValueError for other quantizers, shapes or block sizes."""
    q = _stored(q)
    block, width = _uniform_matrix(q, "MatMulNBits")
    n, k = q.shape
    blocks = -(-k // block)
    padded = q.codes
    if k % block:
        padded = _zero_codes(q).repeat_interleave(block, 1)
        padded[:, :k] = q.codes
    return Packed(pack_bits(padded.view(n, blocks, block), width), q.scales, _packed_zeros(q))


def unpack_matmul_nbits(packed: Packed, quantizer: Quantizer, shape: tuple[int, int]) -> Quantized:
    """Inverse of `pack_matmul_nbits` for a weight of `shape` [N, K]."""
    width = stored_width(quantizer.width)
    codes = unpack_bits(packed.codes, width, quantizer.block_size).view(shape[0], -1)[:, : shape[1]].contiguous()
    return _unpacked(packed, codes, quantizer)


def pack_gather(q: Quantized) -> Packed:
    """For com.microsoft.GatherBlockQuantized with gather_axis 0 and quantize_axis 1, `q` uniform [V, D] with integer zero points or none.

    ValueError for other quantizers, shapes or block sizes, and where a row does not fill its last byte (the kernel takes D from it)."""
    q = _stored(q)
    _, width = _uniform_matrix(q, "GatherBlockQuantized")
    if q.shape[1] * width % 8:
        raise ValueError(f"GatherBlockQuantized needs rows of whole bytes: {q.shape[1]} codes of {width} bits are not")
    return Packed(pack_bits(q.codes, width), q.scales, _packed_zeros(q))


def unpack_gather(packed: Packed, quantizer: Quantizer, shape: tuple[int, int]) -> Quantized:
    """Inverse of `pack_gather` for a table of `shape` [V, D]."""
    return _unpacked(packed, unpack_bits(packed.codes, stored_width(quantizer.width), shape[1]), quantizer)


def pack_channels(q: Quantized) -> Packed:
    """For com.microsoft.MatMulIntegerToFloat, but that it wants [K, N]; `q` uniform [N, K] of 8 bits, a row one block, without zero points.
    ValueError for others."""
    if (q.quantizer.name, q.quantizer.width) != ("uniform", 8) or q.zero_points is not None or q.scales.shape != (len(q.codes), 1):
        raise ValueError(f"integer products take uniform codes of 8 bits with a scale per row and no zero points, not {q.quantizer}")
    return Packed((q.codes ^ 128).view(torch.int8), q.scales[:, 0].contiguous())


def unpack_channels(packed: Packed, quantizer: Quantizer) -> Quantized:
    """Inverse of `pack_channels`."""
    return Quantized(quantizer, packed.codes.view(torch.uint8) ^ 128, packed.scales[:, None])


def pack_matmul_bnb4(q: Quantized) -> Packed:
    """For com.microsoft.MatMulBnb4 (quant_type 1, transB 1), `q` nf4 [N, K]: the bytes of bitsandbytes. Scales in float32."""
    if q.quantizer.name != "nf4":
        raise ValueError(f"MatMulBnb4 takes nf4, not {q.quantizer.name}")
    _kernel_block(q, "MatMulBnb4")
    return Packed(pack_bits(q.codes.reshape(-1), 4, high_first=True), q.scales.float())


def unpack_matmul_bnb4(packed: Packed, quantizer: Quantizer, shape: tuple[int, ...]) -> Quantized:
    """Inverse of `pack_matmul_bnb4`."""
    codes = unpack_bits(packed.codes, 4, math.prod(shape), high_first=True).view(shape)
    return Quantized(quantizer, codes, packed.scales.to(quantizer.scale_dtype))


def pack_byte_table(q: Quantized) -> Packed:
    """For a Gather from `byte_table`, `q` of any table quantizer and shape: whole blocks, so that blocks are rows."""
    _only_tables(q.quantizer)
    block, numel = q.quantizer.block_size, q.codes.numel()
    zero = 2 ** (q.quantizer.width - 1) - 1
    padded = pad(q.codes.reshape(-1), (0, -numel % block), value=zero).view(-1, block)
    return Packed(pack_bits(padded, stored_width(q.quantizer.width)), q.scales)


def unpack_byte_table(packed: Packed, quantizer: Quantizer, shape: tuple[int, ...]) -> Quantized:
    """Inverse of `pack_byte_table`."""
    codes = unpack_bits(packed.codes, stored_width(quantizer.width), quantizer.block_size).reshape(-1)[: math.prod(shape)]
    return Quantized(quantizer, codes.reshape(shape), packed.scales)


def byte_table(quantizer: Quantizer) -> Tensor:
    """The levels that each byte stands for, in order, float32 [256, 8 / width]: gathering rows of it unpacks and looks up at once.

    A nibble that is no 3-bit code reads as 0."""
    _only_tables(quantizer)
    width = stored_width(quantizer.width)
    levels = torch.zeros(2**width)
    table = quantizer.table
    if table is not None:
        levels[: len(table)] = table
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    return levels[unpack_bits(every, width, 8 // width).long()]


def expanded(q: Quantized) -> Quantized:
    """`q` with plain scales, for kernels that know no double quantisation."""
    return replace(q, quantizer=replace(q.quantizer, double=False)) if q.quantizer.double else q


def _per_byte(width: int) -> int:
    if width not in (2, 4, 8):
        raise ValueError(f"codes are packed 2, 4 or 8 bits wide, not {width}")
    return 8 // width


def _places(width: int, high_first: bool) -> list[tuple[int, int]]:
    """(shift, position within a byte's codes)."""
    shifts = range(0, 8, width)
    return list(zip(reversed(shifts) if high_first else shifts, range(8 // width), strict=True))


def _uniform_matrix(q: Quantized, kernel: str) -> tuple[int, int]:
    if q.quantizer.name != "uniform" or len(q.shape) != 2:
        raise ValueError(f"{kernel} takes a matrix quantised as uniform, not {q.quantizer.name} {list(q.shape)}")
    return _kernel_block(q, kernel), q.quantizer.width


def _kernel_block(q: Quantized, kernel: str) -> int:
    block = q.quantizer.block_size
    if block not in KERNEL_BLOCKS:
        raise ValueError(f"{kernel} has blocks of {', '.join(map(str, KERNEL_BLOCKS))}, not {block}")
    return block


def _only_tables(quantizer: Quantizer) -> None:
    if quantizer.name not in CODEBOOK_BITS:
        raise ValueError(f"a byte table is for {', '.join(CODEBOOK_BITS)}, not {quantizer.name}")


def _zero_codes(q: Quantized) -> Tensor:
    """The code of zero per block."""
    if q.zero_points is None:
        return torch.full_like(q.scales, 2 ** (q.quantizer.width - 1), dtype=torch.uint8)
    return q.zero_points.round().clamp(0, 2**q.quantizer.width - 1).to(torch.uint8)


def _packed_zeros(q: Quantized) -> Tensor | None:
    return q.zero_points if q.zero_points is None or q.zero_points.is_floating_point() else pack_bits(q.zero_points, q.quantizer.width)


def _unpacked(packed: Packed, codes: Tensor, quantizer: Quantizer) -> Quantized:
    """`codes` as they are stored."""
    width = stored_width(quantizer.width)
    if packed.zero_points is None:
        return Quantized(quantizer, codes - _moved(quantizer), packed.scales)
    zeros = packed.zero_points
    return Quantized(
        quantizer, codes, packed.scales, zeros if zeros.is_floating_point() else unpack_bits(zeros, width, packed.scales.shape[1])
    )


def _stored(q: Quantized) -> Quantized:
    """Uniform codes at the width that kernels have; without zero points theirs is the middle of that width."""
    wide = stored_width(q.quantizer.width)
    if q.quantizer.name != "uniform" or wide == q.quantizer.width:
        return q
    codes = q.codes if q.zero_points is not None else q.codes + _moved(q.quantizer)
    return replace(q, quantizer=replace(q.quantizer, bits=wide), codes=codes)


def _moved(quantizer: Quantizer) -> int:
    """From the middle of a width to that of the stored one."""
    return int(2 ** (stored_width(quantizer.width) - 1) - 2 ** (quantizer.width - 1))
