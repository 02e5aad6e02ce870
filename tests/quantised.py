"""Quantised weights made by hand: random codes packed with plain Python integers, and what they mean in float64 numpy.

Nothing here comes from the package, so that it can be judged by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

# fmt: off
LEVELS = {
    # QLoRA, appendix E, to the digits that are printed there; NF3 and NF2 from the same quantiles.
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "nf3": (-1.0, -0.4786292016506195, -0.217141792178154, 0.0, 0.16093020141124725, 0.33791524171829224, 0.5626170039176941, 1.0),
    "nf2": (-1.0, 0.0, 0.33791524171829224, 1.0),
}
# fmt: on

ROUNDING = 1e-6
"""Of a float32 product of at most 200 terms, relative to the largest result: a few roundings of 6e-8 each."""


@dataclass(frozen=True)
class Weight:
    """`dense` float64 [n, k]; `parts`: codes, scales and, of uniform levels, zero points or None; `numbers`: the trailing arguments."""

    dense: np.ndarray
    parts: tuple[Tensor | None, ...]
    numbers: tuple[object, ...]

    @property
    def op(self) -> Callable[..., Tensor]:
        return torch.ops.matmorph.matmul_codebook if isinstance(self.numbers[0], str) else torch.ops.matmorph.matmul_nbits

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.op(x, *self.parts, bias, *self.numbers)


def packed(codes: Sequence[int], bits: int, high_first: bool = False) -> list[int]:
    """Bytes of a run of codes; the rest of the last byte is 0."""
    per_byte = 8 // bits
    padded = [*codes, *[0] * (-len(codes) % per_byte)]
    groups = [padded[i : i + per_byte] for i in range(0, len(padded), per_byte)]
    return [sum(int(code) << (bits * place) for place, code in enumerate(reversed(group) if high_first else group)) for group in groups]


def uniform(rng: np.random.Generator, n: int, k: int, bits: int, block: int, zero_points: bool | str = False) -> Weight:
    """Scales of either sign; codes in the rest of the last block are random too. `zero_points` "float": no whole numbers."""
    nb = -(-k // block)
    codes = rng.integers(0, 2**bits, (n, nb, block))
    scales = (rng.uniform(0.01, 0.1, (n, nb)) * rng.choice([-1, 1], (n, nb))).astype(np.float32)
    zeros = rng.integers(0, 2**bits, (n, nb)) if zero_points else np.full((n, nb), 2 ** (bits - 1))
    if zero_points == "float":
        zeros = (zeros + rng.uniform(-2, 2, (n, nb))).astype(np.float32)
    dense = (codes - zeros[..., None]).astype(np.float64) * scales.astype(np.float64)[..., None]
    packed_codes = torch.tensor([[packed(block_codes, bits) for block_codes in row] for row in codes], dtype=torch.uint8)
    packed_zeros = torch.tensor([packed(row, bits) for row in zeros], dtype=torch.uint8) if zero_points is True else None
    if zero_points == "float":
        packed_zeros = torch.from_numpy(zeros)
    return Weight(dense.reshape(n, -1)[:, :k], (packed_codes, torch.from_numpy(scales), packed_zeros), (k, n, bits, block))


def channels(rng: np.random.Generator, n: int, k: int) -> Weight:
    """Signed codes of 8 bits with one scale per row, of either sign."""
    codes, scales = rng.integers(-128, 128, (n, k)), (rng.uniform(0.01, 0.1, n) * rng.choice([-1, 1], n)).astype(np.float32)
    dense = codes.astype(np.float64) * scales.astype(np.float64)[:, None]
    return Weight(dense, (torch.tensor(codes, dtype=torch.int8), torch.from_numpy(scales), None), (k, n, 8, k))


def codebook(rng: np.random.Generator, n: int, k: int, table: str, block: int) -> Weight:
    """Blocks of the flattened weight."""
    levels, blocks = np.asarray(LEVELS[table], np.float32).astype(np.float64), -(-n * k // block)
    codes = rng.integers(0, len(levels), (blocks, block))
    absmax = rng.uniform(0.5, 2.0, blocks).astype(np.float32)
    dense = (levels[codes] * absmax.astype(np.float64)[:, None]).reshape(-1)[: n * k].reshape(n, k)
    if table == "nf4":
        data = packed(codes.reshape(-1)[: n * k], 4, high_first=True)
    else:
        data = [packed(row, 2 if table == "nf2" else 4) for row in codes]
    return Weight(dense, (torch.tensor(data, dtype=torch.uint8), torch.from_numpy(absmax)), (table, k, n, block))


class Quantised(nn.Module):
    """x -> x W.T + bias, with the packed parts as buffers `codes`, `scales`, `zero_points`."""

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        for name, part in zip(("codes", "scales", "zero_points"), weight.parts, strict=False):
            self.register_buffer(name, part)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.op, self.count, self.numbers = weight.op, len(weight.parts), weight.numbers

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.codes, self.scales) if self.count == 2 else (self.codes, self.scales, self.zero_points)
        return self.op(x, *parts, self.bias, *self.numbers)


def expected(weight: Weight, x: Tensor, bias: Tensor | None = None) -> np.ndarray:
    """x W.T + bias in float64."""
    return x.double().numpy() @ weight.dense.T + (0.0 if bias is None else bias.detach().double().numpy())


def error(actual: np.ndarray | Tensor, reference: np.ndarray) -> float:
    """Largest difference relative to the largest reference."""
    found = np.asarray(actual.detach() if isinstance(actual, Tensor) else actual, np.float64)
    assert found.shape == reference.shape
    return float(np.abs(found - reference).max() / np.abs(reference).max())
