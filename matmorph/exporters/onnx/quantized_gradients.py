"""ONNX forms of the transposed (gradient) products with quantised weights: dX = dY @ W, W [N, K] unpacked for one product at a time.

| operator                   | ONNX                                                                        |
|----------------------------|-----------------------------------------------------------------------------|
| matmul_nbits_transposed    | com.microsoft.GatherBlockQuantized of all rows, then MatMul                 |
| the same, a scale per row  | Cast of all codes, times the scales, then MatMul                            |
| matmul_codebook_transposed | Gather from a table of what each byte stands for, times absmax, then MatMul |

No quantised product of ONNX Runtime runs over N: MatMulNBits sums over K alone, and MatMulBnb4 ignores its `transB` on the CPU. The codes
come through `emit.held`, so that they stay packed in any session, and every unpacked weight lives from its product's dY to that product.
All operators have CUDA kernels.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir
import torch

from matmorph.exporters.onnx import emit
from matmorph.exporters.onnx.channels import dense_channels
from matmorph.exporters.onnx.lowering import Lowerings
from matmorph.exporters.onnx.quantized import codes_shape, looked_up, rebuilt
from matmorph.ir.core import Graph

_SUFFIX = "_transposed.default"


def gradient_lowerings() -> Lowerings:
    """Translations of the transposed products of `ir.quant_ops`."""
    ours = torch.ops.matmorph
    return {ours.matmul_nbits_transposed.default: _nbits, ours.matmul_codebook_transposed.default: _codebook}


def has_gradients(graph: Graph) -> bool:
    """Whether the graph multiplies by the transpose of a quantised weight, as only gradients do."""
    return any(node.op.startswith("matmorph.") and node.op.endswith(_SUFFIX) for node in graph.nodes)


def _nbits(
    y: ir.Value,
    codes: ir.Value,
    scales: ir.Value,
    zero_points: ir.Value | None,
    in_features: int,
    out_features: int,
    bits: int,
    block_size: int,
) -> ir.Value:
    """y [.., N] -> [.., K]. The kernel unpacks rows; its blocks, bits and packed zero points are those of MatMulNBits."""
    if len(codes_shape(scales)) == 1:
        return _product(y, dense_channels(codes, scales, y))
    stored = prod(codes_shape(codes)[1:])
    every = emit.node("Range", [emit.scalar(0), emit.scalar(out_features), emit.scalar(1)], ir.DataType.INT64)
    held = emit.held(codes, (out_features, stored), y)
    steps, packed = emit.cast(scales, y.dtype), zero_points is None or zero_points.dtype == ir.DataType.UINT8
    dense = looked_up(every, held, steps, zero_points if packed else None, (stored, in_features), bits, block_size)
    if zero_points is None or packed:
        return _product(y, dense)
    zeros = emit.cast(emit.held(zero_points, codes_shape(zero_points), y), y.dtype)
    shift = _shift(steps, zeros, (out_features, in_features), bits, block_size)
    return _product(y, emit.node("Add", [dense, shift], y.dtype))


def _shift(scales: ir.Value, zeros: ir.Value, shape: tuple[int, int], bits: int, block: int) -> ir.Value:
    """[N, K]: the kernel takes zero points off that are whole numbers, the middle of the codes where it is given none."""
    n, k = shape
    kind = scales.dtype
    middle = emit.cast(emit.constant(ir.Tensor(np.array(2 ** (bits - 1), dtype=np.float32))), kind)
    of_block = emit.node("Mul", [scales, emit.node("Sub", [middle, zeros], kind)], kind)
    wide = emit.node("Expand", [emit.node("Unsqueeze", [of_block, emit.ints(2)], kind), emit.ints(1, 1, block)], kind)
    whole = emit.node("Reshape", [wide, emit.ints(n, -1)], kind)
    return whole if k % block == 0 else emit.node("Slice", [whole, emit.ints(0), emit.ints(k), emit.ints(1)], kind)


def _codebook(y: ir.Value, codes: ir.Value, absmax: ir.Value, table: str, in_features: int, out_features: int, block_size: int) -> ir.Value:
    """y [.., N] -> [.., K]."""
    held = emit.held(codes, codes_shape(codes), y)
    return _product(y, rebuilt(held, absmax, table, (out_features, in_features), block_size))


def _product(y: ir.Value, dense: ir.Value) -> ir.Value:
    return emit.node("MatMul", [y, emit.cast(dense, y.dtype)], y.dtype)
