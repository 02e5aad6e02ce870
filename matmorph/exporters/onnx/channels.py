"""ONNX forms of a product with codes of 8 bits that have one scale per row of the weight: y = x @ W.T + bias, W = code * scale.

| form     | ONNX                                                                                                          |
|----------|---------------------------------------------------------------------------------------------------------------|
| integers | DynamicQuantizeLinear of x, one scale and zero point for all of it; com.microsoft.MatMulIntegerToFloat        |
| floats   | Cast of the codes, times the scales, then MatMul; a session makes the weight dense once, when it loads         |

The kernel of the first wants the codes as [in, out]; they are stored as every other weight is, [out, in], and a session turns them once,
when it loads.
"""

from __future__ import annotations

import onnx_ir as ir

from matmorph.exporters.onnx import emit

INTEGER_PRODUCT = "MatMulIntegerToFloat"

_FLOAT, _BYTES, _SIGNED = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT8


def integer_product(x: ir.Value, codes: ir.Value, scales: ir.Value, bias: ir.Value | None) -> ir.Value:
    """In float32 between casts where the activations have another type: the kernel has no other."""
    levels, step, zero = emit.several("DynamicQuantizeLinear", [emit.cast(x, _FLOAT)], [_BYTES, _FLOAT, _BYTES])
    columns = emit.node("Transpose", [codes], _SIGNED, perm=(1, 0))
    added = bias if bias is None else emit.cast(bias, _FLOAT)
    y = emit.contrib(INTEGER_PRODUCT, [levels, columns, step, emit.cast(scales, _FLOAT), zero, None, added], {}, step)
    return emit.cast(y, x.dtype)


def channels_product(x: ir.Value, codes: ir.Value, scales: ir.Value, bias: ir.Value | None, packed: bool) -> ir.Value:
    """With float activations. `packed`: no session makes the weight dense for longer than one product."""
    dense = emit.cast(dense_channels(codes, scales, x if packed else None), x.dtype)
    y = emit.node("MatMul", [x, emit.node("Transpose", [dense], x.dtype, perm=(1, 0))], x.dtype)
    return y if bias is None else emit.node("Add", [y, emit.cast(bias, x.dtype)], x.dtype)


def dense_channels(codes: ir.Value, scales: ir.Value, until: ir.Value | None) -> ir.Value:
    """W [out, in], float32; no earlier than `until` is there, where that is given. Not by DequantizeLinear: a session takes that and the
    product for one in 8 bits (MatMulNBits, level 4), activations too, which nobody asked for."""
    shape = tuple(ir.Shape(codes.shape or ()).numpy())
    held = codes if until is None else emit.held(codes, shape, until)
    steps = emit.node("Unsqueeze", [emit.cast(scales, _FLOAT), emit.ints(1)], _FLOAT)
    return emit.node("Mul", [emit.cast(held, _FLOAT), steps], _FLOAT)
