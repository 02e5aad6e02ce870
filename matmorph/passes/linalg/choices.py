"""What settings may choose of the linear algebra: its solvers and quantizers by name, and which settings a quantizer takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Solver = Literal["auto", "exact", "gram", "randomized"]
SOLVERS: tuple[Solver, ...] = ("auto", "exact", "gram", "randomized")

QuantizerName = Literal["nf4", "nf3", "nf2", "uniform", "uniform_clipped"]
QUANTIZERS: tuple[QuantizerName, ...] = ("nf4", "nf3", "nf2", "uniform", "uniform_clipped")
CODEBOOK_BITS = {"nf4": 4, "nf3": 3, "nf2": 2}
UNIFORM_BITS = (2, 3, 4, 8)
CHANNEL = "channel"
"""A block size: all weights that make one output."""
CHANNEL_BITS = (8,)
"""Widths of codes that ONNX Runtime's integer products take with a scale per output channel."""
FLOAT_ZERO_BITS = (2, 3, 4)
"""Widths whose zero points may be floating-point numbers: MatMulNBits has no such form of 8 bits."""


def quantizer_bits(name: str, bits: int | None, block_size: int, zero_point: bool | str, scale: str, double: bool) -> int | None:
    """The bits of a quantizer's codes: a table's own where None is given. Raises ValueError for a combination that does not exist."""
    if name not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {name!r}: one of {', '.join(QUANTIZERS)}")
    own = CODEBOOK_BITS.get(name)
    found = own if bits is None else bits
    allowed: Sequence[int] = (own,) if own is not None else UNIFORM_BITS if name == "uniform" else range(2, 9)
    if found not in allowed:
        raise ValueError(f"{name} has {' or '.join(map(str, allowed))} bits, not {found}")
    if block_size < 8 or block_size % 8:
        raise ValueError(f"block size {block_size}: a positive multiple of 8 is needed")
    if scale not in ("absmax", "search"):
        raise ValueError(f"unknown scale {scale!r}: absmax or search")
    if name != "uniform" and (zero_point or scale == "search"):
        raise ValueError(f"{name} has neither a zero point nor a scale search: they belong to uniform")
    if zero_point == "float" and found not in FLOAT_ZERO_BITS:
        raise ValueError(
            f"the kernel takes zero points that are no whole numbers with {', '.join(map(str, FLOAT_ZERO_BITS))} bits, not {found}"
        )
    if double and own is None:
        raise ValueError(f"double quantisation is for tables (nf4, nf3, nf2), not for {name}")
    return found
