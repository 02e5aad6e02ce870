"""Quantised weights as the operators of `quant_ops` take them, and back to dense numbers, a part at a time.

Layouts are those of ONNX Runtime's contrib operators, so that an export copies the bytes (W [N, K], nb = ceil(K / block_size)):

* nbits: codes uint8 [N, nb, block_size * bits / 8], of the codes in a byte the first takes the lowest bits; scales [N, nb]; zero points
  packed in the same way, uint8 [N, ceil(nb * bits / 8)], or of a matmul floating-point numbers [N, nb]. W = (code - zero point) * scale;
  without zero points they are 2^(bits-1). (com.microsoft.MatMulNBits.) A table may also have rows of bytes:
  [V, nb * block_size * bits / 8], or without the rest of the last block [V, ceil(D * bits / 8)]. (com.microsoft.GatherBlockQuantized.)
* channels, a form of nbits with 8 bits and a scale per row of W: codes int8 [N, K], scales [N], no zero points; block_size is K. Told from
  blocks by its scales, which have one axis. W = code * scale. (com.microsoft.MatMulIntegerToFloat, but that it has K first.)
* codebook "nf4": the flattened W in codes uint8 [ceil(N K / 2)], the first of two codes in the high bits; absmax per block of the flattened
  W. (com.microsoft.MatMulBnb4.) "nf3" (stored 4 bits wide) and "nf2": codes uint8 [blocks, block_size * width / 8], lowest bits first.
  W = table[code] * absmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# fmt: off
TABLES: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ),
    "nf3": (-1.0, -0.4786292, -0.21714179, 0.0, 0.1609302, 0.33791524, 0.562617, 1.0),
    "nf2": (-1.0, 0.0, 0.33791524, 1.0),
}
# fmt: on
"""Levels of the codebooks by code, exact in float32: QLoRA (arXiv 2305.14314, appendix E) and its 3- and 2-bit forms in LoftQ."""

BITS = (2, 4, 8)
"""Widths of uniform codes."""

_CHUNK = 1 << 22
"""Weights dequantised at a time: 16 MB of float32, and still a matrix product large enough to run at full speed."""

Rows = Iterator[tuple[slice, Tensor]]
"""Parts of a dequantised weight: (rows, W[rows])."""


def stored_bits(table: str) -> int:
    """Bits that a code of a codebook takes in a byte."""
    return 2 if table == "nf2" else 4


def byte_levels(levels: Tensor, width: int, *, high_first: bool = False) -> Tensor:
    """What each byte stands for, [256, 8 / width]: taking rows of it unpacks codes and looks up their levels [<= 2^width] at once.

    A code without a level reads as 0."""
    full = levels.new_zeros(2**width)
    full[: len(levels)] = levels
    shifts = torch.arange(0, 8, width, device=levels.device)
    every = torch.arange(256, device=levels.device)[:, None]
    return full[every >> (shifts.flip(0) if high_first else shifts) & 2**width - 1]


def nbits_rows(x: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor | None, k: int, bits: int) -> Rows:
    """W [N, k] in the type of `x`, which it will be multiplied with."""
    block = codes.shape[-1] * 8 // bits
    for rows in _slices(len(codes), k, 1):
        zeros = None if zero_points is None else zero_points[rows]
        yield rows, nbits_dense(codes[rows], scales[rows], zeros, k, bits, block, working_type(x)).to(x.dtype)


def nbits_dense(codes: Tensor, scales: Tensor, zero_points: Tensor | None, k: int, bits: int, block: int, dtype: torch.dtype) -> Tensor:
    """[n, k] of the bytes of n rows, [n, ..]; those of a table may end inside the last block."""
    if per_channel(scales):
        return codes.to(dtype).mul_(scales.to(dtype)[:, None])
    n, nb = scales.shape
    levels = byte_levels(torch.arange(2**bits, dtype=dtype, device=codes.device), bits)
    whole = _filled(codes.reshape(n, codes.shape[1:].numel()), nb * block * bits // 8)
    values = _looked_up(levels if zero_points is not None else levels - 2 ** (bits - 1), whole).view(n, nb, block)
    if zero_points is not None:
        zeros = zero_points.to(dtype) if zero_points.is_floating_point() else _looked_up(levels, zero_points)[:, :nb]
        values.sub_(zeros[..., None])
    return values.mul_(scales.to(dtype)[..., None]).view(n, nb * block)[:, :k].contiguous()


def per_channel(scales: Tensor) -> bool:
    """Whether each row of the weight has one scale, and is no row of blocks."""
    return scales.dim() == 1


def codebook_rows(x: Tensor, codes: Tensor, absmax: Tensor, table: str, n: int, k: int, block: int) -> Rows:
    """W [n, k] in the type of `x`, which it will be multiplied with."""
    width, flat, dtype = stored_bits(table), codes.reshape(-1), working_type(x)
    levels = byte_levels(torch.tensor(TABLES[table], dtype=torch.float32, device=codes.device).to(dtype), width, high_first=table == "nf4")
    for rows in _slices(n, k, block // gcd(k, block)):  # every part begins with a block
        start, stop = rows.start * k, rows.stop * k
        scales = absmax[start // block : -(-stop // block)].to(dtype)
        some = _filled(flat[start * width // 8 : -(-stop * width // 8)], len(scales) * block * width // 8)
        values = _looked_up(levels, some).view(-1, block).mul_(scales[:, None]).view(-1)
        yield rows, values[: stop - start].view(-1, k).to(x.dtype)


def _slices(n: int, k: int, step: int) -> Iterator[slice]:
    """Parts of n rows of k weights, about `_CHUNK` in each; every part but the last has a multiple of `step` rows."""
    rows = max(1, _CHUNK // (k * step)) * step
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def _filled(codes: Tensor, count: int) -> Tensor:
    """With zeros after the last byte of a row, up to `count`: the rest of a block that is not stored."""
    short = count - codes.shape[-1]
    return pad(codes, (0, short)) if short else codes


def _looked_up(levels: Tensor, codes: Tensor) -> Tensor:
    """The level of every code: the last axis of `codes` times the codes in a byte."""
    return levels.index_select(0, codes.reshape(-1).int()).view(*codes.shape[:-1], codes.shape[-1] * levels.shape[1])


def working_type(x: Tensor) -> torch.dtype:
    """Of codes times scales: never half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def check_nbits(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, n: Any, k: int, bits: int, block: int, *, table: bool = False
) -> None:
    """Raises ValueError where they are not a weight [n, k]. `table`: rows of bytes will do."""
    if bits not in BITS:
        raise ValueError(f"codes have {', '.join(map(str, BITS))} bits, not {bits}")
    if per_channel(scales) and not table:
        _check_channels(codes, scales, zero_points, (n, k), bits)
        return
    _check_block(block)
    nb = -(-k // block)
    bytes_of_row = (nb * block * bits // 8, -(-k * bits // 8))
    expect("codes", codes, torch.uint8, (n, nb, block * bits // 8), *((n, count) for count in bytes_of_row if table))
    expect("scales", scales, None, (n, nb))
    if zero_points is not None and zero_points.is_floating_point() and not table:
        expect("zero_points", zero_points, None, (n, nb))
    elif zero_points is not None:
        expect("zero_points", zero_points, torch.uint8, (n, -(-nb * bits // 8)))


def _check_channels(codes: Tensor, scales: Tensor, zero_points: Tensor | None, shape: tuple[Any, int], bits: int) -> None:
    if bits != 8:
        raise ValueError(f"codes with a scale per row have 8 bits, not {bits}")
    if zero_points is not None:
        raise ValueError("codes with a scale per row have no zero points")
    expect("codes", codes, torch.int8, shape)
    expect("scales", scales, None, shape[:1])


def check_codebook(codes: Tensor, absmax: Tensor, table: str, numel: int, block: int) -> None:
    """Raises ValueError where they are not a weight of `numel` numbers."""
    if table not in TABLES:
        raise ValueError(f"unknown codebook {table!r}: one of {', '.join(TABLES)}")
    _check_block(block)
    blocks = -(-numel // block)
    expect("codes", codes, torch.uint8, (-(-numel // 2),) if table == "nf4" else (blocks, block * stored_bits(table) // 8))
    expect("absmax", absmax, None, (blocks,))


def _check_block(block: int) -> None:
    if block < 8 or block % 8:
        raise ValueError(f"block size {block}: a positive multiple of 8 is needed")


def expect(name: str, found: Tensor, dtype: torch.dtype | None, *shapes: tuple[Any, ...]) -> None:
    """Raises ValueError for another type or shape; `dtype` None: any floating-point type."""
    fits = found.dtype.is_floating_point if dtype is None else found.dtype is dtype
    if not fits or tuple(found.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(
            f"{name} must be {'float' if dtype is None else short(dtype)}{wanted}, not {short(found.dtype)}{list(found.shape)}"
        )


def short(dtype: torch.dtype) -> str:
    """The name, "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")
