"""Scaled dot product attention in ONNX, exact for rows whose mask allows no key: their result is 0, as torch's kernels give it.

    y = softmax(s q k' + bias) v

| mask      | bias                          | a row is dead where                 |
|-----------|-------------------------------|-------------------------------------|
| none      | none                          | never                               |
| is_causal | the lowest float above the diagonal | never: the first key is always seen |
| bool      | the lowest float where False  | nothing is True                     |
| float     | the mask                      | all of it is -inf                   |

A dead row has no softmax. Whatever the kernel makes of it (a mean with finite numbers, NaN with -inf) is replaced behind the product with
v, where it is narrowest: one reduction over the mask, which has no heads, and one Where over the result. From opset 23 on ONNX has the
operator itself. It is used without a mask and with boolean ones: given numbers, ONNX Runtime's kernel takes the lowest finite one for -inf,
and so calls rows dead that torch gives a mean.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from matmorph.errors import ExportError
from matmorph.exporters.onnx import emit
from matmorph.exporters.onnx.lowering import Lowerings
from matmorph.specs.schema import ATTENTION_OPSET

_BOOL = ir.DataType.BOOL
_INT = ir.DataType.INT64
NATIVE = ATTENTION_OPSET


def attention_lowerings(opset: int) -> Lowerings:
    """Translations of attention for an opset: of the composite, and of the kernels that a program may name itself."""
    aten = torch.ops.aten

    def composite(
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        attn_mask: ir.Value | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> ir.Value:
        return _attention(opset, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def on_cpu(
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        attn_mask: ir.Value | None = None,
        scale: float | None = None,
    ) -> tuple[ir.Value, ...]:
        return (_attention(opset, query, key, value, attn_mask, dropout_p, is_causal, scale), _nothing(query))

    def efficient(
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        attn_bias: ir.Value | None,
        compute_log_sumexp: bool,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> tuple[ir.Value, ...]:
        y = _attention(opset, query, key, value, attn_bias, dropout_p, is_causal, scale)
        return (y, _nothing(query), emit.scalar(0), emit.scalar(0))

    return {
        aten.scaled_dot_product_attention.default: composite,
        aten._scaled_dot_product_flash_attention_for_cpu.default: on_cpu,
        aten._scaled_dot_product_efficient_attention.default: efficient,
    }


def _attention(
    opset: int,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool = False,
) -> ir.Value:
    if dropout:
        raise ExportError(f"attention with dropout {dropout} has no fixed result", ["set dropout_p to 0 where the model does not train"])
    if mask is not None and mask.dtype != _BOOL:
        mask = emit.cast(mask, q.dtype)
    native = opset >= NATIVE and all(_rank(x) == 4 for x in (q, k, v)) and (mask is None or _is_whole(mask))
    if mask is not None and causal:
        mask, causal, native = _below(q, k, mask), False, False
    y = _operator(q, k, v, mask, causal, scale) if native else _written_out(q, k, v, mask, causal, scale, grouped)
    return y if mask is None else only_seeing(mask, y)


def only_seeing(mask: ir.Value, y: ir.Value) -> ir.Value:
    """y with 0 in the rows that the mask allows no key."""
    return emit.node("Where", [_alive(mask), y, emit.number(0.0, y)], y.dtype)


def _operator(q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, causal: bool, scale: float | None) -> ir.Value:
    """ONNX's own operator, which repeats the heads of keys and values by itself."""
    given = [q, k, v] if mask is None else [q, k, v, mask]
    numbers: dict[str, Any] = {"is_causal": 1} if causal else {}
    if scale is not None:
        numbers["scale"] = float(scale)
    return emit.node("Attention", given, q.dtype, **numbers)


def _written_out(
    q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, causal: bool, scale: float | None, grouped: bool
) -> ir.Value:
    if grouped:
        k, v = _repeated(k, fixed_size(q, -3)), _repeated(v, fixed_size(q, -3))
    scores = emit.node("MatMul", [_scaled(q, scale), _turned(k)], q.dtype)
    bias = _triangle(q, k, _lowest(q)) if causal else None if mask is None else _bias(mask, q)
    if bias is not None:
        scores = emit.node("Add", [scores, bias], q.dtype)
    return emit.node("MatMul", [emit.node("Softmax", [scores], q.dtype, axis=-1), v], v.dtype)


def _scaled(q: ir.Value, scale: float | None) -> ir.Value:
    """On q, which is the smallest of what could be scaled."""
    if scale is None:
        scale = 1.0 / math.sqrt(fixed_size(q, -1))
    return q if scale == 1 else emit.node("Mul", [q, emit.number(scale, q)], q.dtype)


def _turned(k: ir.Value) -> ir.Value:
    rank = _rank(k)
    return emit.node("Transpose", [k], k.dtype, perm=(*range(rank - 2), rank - 1, rank - 2))


def _repeated(value: ir.Value, heads: int) -> ir.Value:
    """Each head of keys or values as often as queries share it: [.., few, s, e] to [.., heads, s, e]."""
    few, rank = fixed_size(value, -3), _rank(value)
    if few == heads:
        return value
    apart = emit.node("Unsqueeze", [value, emit.ints(rank - 2)], value.dtype)
    wide = emit.node("Expand", [apart, emit.ints(*[1] * (rank - 2), heads // few, 1, 1)], value.dtype)
    repeated = emit.node("Reshape", [wide, emit.ints(*[0] * (rank - 3), heads, -1, fixed_size(value, -1))], value.dtype)
    repeated.shape = ir.Shape([heads if axis == rank - 3 else size for axis, size in enumerate(value.shape or ())])
    return repeated


def _below(q: ir.Value, k: ir.Value, mask: ir.Value) -> ir.Value:
    """A mask that allows nothing above the diagonal either."""
    if mask.dtype != _BOOL:
        return emit.node("Add", [mask, _triangle(q, k, -math.inf)], mask.dtype)
    return emit.node("And", [mask, emit.node("Equal", [_triangle(q, k, -math.inf), emit.number(0.0, q)], _BOOL)], _BOOL)


def _triangle(q: ir.Value, k: ir.Value, above: float) -> ir.Value:
    """[l, s]: 0 up to the diagonal, another number above it. Row i sees keys 0 to i."""
    sizes = [emit.node("Shape", [value], _INT, start=_rank(value) - 2, end=_rank(value) - 1) for value in (q, k)]
    filling = ir.Tensor(np.asarray([above], _dtype(q).numpy()))
    full = emit.node("ConstantOfShape", [emit.node("Concat", sizes, _INT, axis=0)], q.dtype, value=filling)
    return emit.node("Trilu", [full, emit.scalar(1)], q.dtype, upper=1)


def _bias(mask: ir.Value, q: ir.Value) -> ir.Value:
    """What is added to the scores: the lowest number makes a softmax as exactly 0 as -inf does, and of a dead row no NaN."""
    return mask if mask.dtype != _BOOL else emit.node("Where", [mask, emit.number(0.0, q), emit.number(_lowest(q), q)], q.dtype)


def _alive(mask: ir.Value) -> ir.Value:
    """bool [.., l, 1]: rows that may look at something."""
    if mask.dtype == _BOOL:
        # In int32, because ReduceMax of booleans came with opset 20.
        most = emit.node("ReduceMax", [emit.cast(mask, ir.DataType.INT32), emit.ints(-1)], ir.DataType.INT32, keepdims=1)
        return emit.cast(most, _BOOL)
    most = emit.node("ReduceMax", [mask, emit.ints(-1)], mask.dtype, keepdims=1)
    return emit.node("Greater", [most, emit.number(-math.inf, mask)], _BOOL)


def _is_whole(mask: ir.Value) -> bool:
    """Whether it says yes or no of every row and key, as the kernels of the operator want it."""
    return mask.dtype == _BOOL and _rank(mask) in (2, 4) and all(size != 1 for size in (mask.shape or ())[-2:])


def _lowest(like: ir.Value) -> float:
    return float(_dtype(like).min)


def _nothing(like: ir.Value) -> ir.Value:
    """In the place of a result that only torch's own gradient reads."""
    return emit.constant(ir.Tensor(np.zeros(0, _dtype(like).numpy())))


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise ExportError("attention of unknown element type cannot be written")
    return value.dtype


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise ExportError("attention over a tensor of unknown rank cannot be written")
    return len(value.shape)


def fixed_size(value: ir.Value, axis: int) -> int:
    """ExportError for an axis that is dynamic."""
    size = value.shape[axis] if value.shape is not None else None
    if not isinstance(size, int):
        raise ExportError("attention is written for a fixed number of heads of a fixed width", [f"axis {axis} of {value.name} is dynamic"])
    return size
