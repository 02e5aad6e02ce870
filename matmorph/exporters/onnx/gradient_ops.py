"""ONNX forms of ATen's backward operators, each the shortest, on symbolic shapes; every operator used has a CUDA kernel.

| operator                                    | ONNX                                                          |
|---------------------------------------------|---------------------------------------------------------------|
| _softmax_backward_data                      | y (dy - ReduceSum(dy y)): Mul, ReduceSum, Sub, Mul            |
| _log_softmax_backward_data                  | dy - exp(y) ReduceSum(dy): Exp, ReduceSum, Mul, Sub           |
| slice_backward (step 1), select_backward    | Pad, after an Unsqueeze in the second                         |
| embedding_dense_backward                    | ScatterND with reduction `add` into zeros                     |
| tanh_backward, sigmoid_backward, threshold_backward | Mul and Sub; Greater and Where                        |

What is not here and has no translation of torchlib's is decomposed by torch's own table (`prepare.decompose_unknown`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch

from matmorph.errors import ExportError
from matmorph.exporters.onnx import emit
from matmorph.exporters.onnx.lowering import Lowerings

RowSize: TypeAlias = "int | ir.Value"
"""A number, or an int64 [] of the graph."""

_INT = ir.DataType.INT64
_END = 2**63 - 1


def backward_lowerings() -> Lowerings:
    """Translations of ATen's backward operators."""
    aten = torch.ops.aten
    return {
        aten._softmax_backward_data.default: _softmax,
        aten._log_softmax_backward_data.default: _log_softmax,
        aten.slice_backward.default: _slice,
        aten.select_backward.default: _select,
        aten.embedding_dense_backward.default: _embedding,
        aten.tanh_backward.default: _tanh,
        aten.sigmoid_backward.default: _sigmoid,
        aten.threshold_backward.default: _threshold,
    }


def _mul(a: ir.Value, b: ir.Value) -> ir.Value:
    return emit.node("Mul", [a, b], a.dtype)


def _sub(a: ir.Value, b: ir.Value) -> ir.Value:
    return emit.node("Sub", [a, b], a.dtype)


def _total(value: ir.Value, axis: int) -> ir.Value:
    return emit.node("ReduceSum", [value, emit.ints(axis)], value.dtype, keepdims=1)


def _softmax(dy: ir.Value, y: ir.Value, dim: int, input_dtype: int) -> ir.Value:
    return _mul(y, _sub(dy, _total(_mul(dy, y), dim)))


def _log_softmax(dy: ir.Value, y: ir.Value, dim: int, input_dtype: int) -> ir.Value:
    return _sub(dy, _mul(emit.node("Exp", [y], y.dtype), _total(dy, dim)))


def _tanh(dy: ir.Value, y: ir.Value) -> ir.Value:
    return _mul(dy, _sub(emit.number(1, y), _mul(y, y)))


def _sigmoid(dy: ir.Value, y: ir.Value) -> ir.Value:
    return _mul(dy, _mul(y, _sub(emit.number(1, y), y)))


def _threshold(dy: ir.Value, x: ir.Value, threshold: float) -> ir.Value:
    above = emit.node("Greater", [x, emit.number(threshold, x)], ir.DataType.BOOL)
    return emit.node("Where", [above, dy, emit.number(0, dy)], dy.dtype)


def _slice(dy: ir.Value, input_sizes: Sequence[RowSize], dim: int, start: RowSize, end: RowSize, step: int) -> ir.Value:
    """Zeros before and behind the slice. `end` is not looked at: dy tells where the slice ends."""
    if step != 1:
        raise ExportError(f"the gradient of a slice in steps of {step} has no ONNX form here")
    axis = dim % len(input_sizes)
    whole = input_sizes[axis]
    return _padded(dy, axis, _from_start(start, whole), whole, _size(dy, axis))


def _select(dy: ir.Value, input_sizes: Sequence[RowSize], dim: int, index: RowSize) -> ir.Value:
    rank = len(input_sizes)
    axis = dim % rank
    whole = input_sizes[axis]
    line = emit.node("Unsqueeze", [dy, emit.ints(axis)], dy.dtype)
    return _padded(line, axis, _from_start(index, whole), whole, 1)


def _padded(value: ir.Value, axis: int, before: RowSize, whole: RowSize, length: RowSize) -> ir.Value:
    """`value`, of `length` along the axis, at `before` in zeros of size `whole`."""
    behind = _minus(_minus(whole, before), length)
    pads = _vector([before, behind])
    return emit.node("Pad", [value, pads, emit.number(0, value), emit.ints(axis)], value.dtype)


def _from_start(place: RowSize, whole: RowSize) -> RowSize:
    """A place counted from the start, also where it was counted from the end."""
    if not isinstance(place, int) or (place >= 0 and not isinstance(whole, int)):
        return place
    if isinstance(whole, int):
        return min(max(place + whole if place < 0 else place, 0), whole)
    return emit.node("Add", [whole, emit.scalar(place)], _INT)


def _minus(a: RowSize, b: RowSize) -> RowSize:
    if isinstance(b, int) and b == 0:
        return a
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    left, right = (emit.scalar(value) if isinstance(value, int) else value for value in (a, b))
    return emit.node("Sub", [left, right], _INT)


def _vector(sizes: Sequence[RowSize]) -> ir.Value:
    """int64 [n]."""
    numbers = [size for size in sizes if isinstance(size, int)]
    if len(numbers) == len(sizes):
        return emit.ints(*numbers)
    lines = [emit.ints(size) if isinstance(size, int) else _line(size) for size in sizes]
    return emit.node("Concat", lines, _INT, axis=0)


def _line(size: ir.Value) -> ir.Value:
    return emit.node("Reshape", [size, emit.ints(-1)], _INT)


def _size(value: ir.Value, axis: int) -> RowSize:
    """A size of a value of the traced graph: a number where it is known."""
    known = value.shape[axis] if value.shape is not None else None
    if isinstance(known, int):
        return known
    shape = emit.node("Shape", [value], _INT, start=axis, end=axis + 1)
    return emit.node("Squeeze", [shape, emit.ints(0)], _INT)


def _embedding(dy: ir.Value, indices: ir.Value, num_weights: int, padding_idx: int, scale_grad_by_freq: bool) -> ir.Value:
    """dW [num_weights, width]: rows of dy added up by index, but for those at `padding_idx`."""
    if scale_grad_by_freq:
        raise ExportError("the gradient of an embedding that is scaled by frequency has no ONNX form here")
    sizes = _vector([num_weights, _size(dy, len(dy.shape or ()) - 1)])
    if padding_idx >= 0:
        padding = emit.node("Equal", [indices, emit.cast(emit.scalar(padding_idx), indices.dtype)], ir.DataType.BOOL)
        column = emit.node("Unsqueeze", [padding, emit.ints(-1)], ir.DataType.BOOL)
        dy = emit.node("Where", [column, emit.number(0, dy), dy], dy.dtype)
    places = emit.node("Unsqueeze", [emit.cast(indices, _INT), emit.ints(-1)], _INT)
    if dy.dtype is None:
        raise ExportError("a gradient of unknown element type cannot be written")
    zeros = emit.node("ConstantOfShape", [sizes], dy.dtype, value=ir.Tensor(np.zeros(1, dy.dtype.numpy())))
    return emit.node("ScatterND", [zeros, places, dy], dy.dtype, reduction="add")
