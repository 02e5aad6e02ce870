"""Bags of embeddings in ONNX without a loop: the loop over bags of torchlib's translation ends ONNX Runtime's optimiser in a crash.

    member[b, n] = starts[b] <= n < starts[b + 1]

| mode     | y[b]                                                      |
|----------|-----------------------------------------------------------|
| 0 (sum)  | sum over n of member[b, n] w[ids[n]] (times its weight)   |
| 1 (mean) | that over the number of members, 0 for an empty bag       |
| 2 (max)  | the largest of the members, feature by feature, else 0    |

Ids that are the padding belong to no bag. `member` has bags times ids entries, a bit of what the rows themselves take.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from matmorph.exporters.onnx import emit
from matmorph.exporters.onnx.lowering import Lowerings

_BOOL, _INT = ir.DataType.BOOL, ir.DataType.INT64
_MEAN, _MAX = 1, 2


def embedding_bag_lowerings() -> Lowerings:
    """Translations of both overloads; of their results only the first is one that a model reads."""

    def bag(
        weight: ir.Value,
        indices: ir.Value,
        offsets: ir.Value,
        scale_grad_by_freq: bool = False,
        mode: int = 0,
        sparse: bool = False,
        per_sample_weights: ir.Value | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> tuple[ir.Value, ...]:
        nothing = emit.ints()
        return (_bags(weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx), nothing, nothing, nothing)

    aten = torch.ops.aten
    return {aten.embedding_bag.default: bag, aten.embedding_bag.padding_idx: bag, aten._embedding_bag_forward_only.default: bag}


def _bags(
    weight: ir.Value, indices: ir.Value, offsets: ir.Value, mode: int, weights: ir.Value | None, has_end: bool, padding: int | None
) -> ir.Value:
    kind = weight.dtype
    ids = emit.node("Reshape", [emit.cast(indices, _INT), emit.ints(-1)], _INT)
    rows = emit.node("Gather", [weight, ids], kind, axis=0)
    if weights is not None:
        each = emit.node("Reshape", [emit.cast(weights, kind), emit.ints(-1, 1)], kind)
        rows = emit.node("Mul", [rows, each], kind)
    member = _members(ids, emit.cast(offsets, _INT), has_end, padding)
    if mode == _MAX:
        return _largest(rows, member)
    counted = emit.cast(member, kind)
    total = emit.node("MatMul", [counted, rows], kind)
    if mode != _MEAN:
        return total
    count = emit.node("ReduceSum", [counted, emit.ints(1)], kind, keepdims=1)
    return emit.node("Div", [total, emit.node("Max", [count, emit.number(1, rows)], kind)], kind)


def _members(ids: ir.Value, offsets: ir.Value, has_end: bool, padding: int | None) -> ir.Value:
    """bool [bags, ids]."""
    count = emit.node("Shape", [ids], _INT)
    later = emit.node("Slice", [offsets, emit.ints(1), emit.ints(2**63 - 1)], _INT)
    starts = emit.node("Slice", [offsets, emit.ints(0), emit.ints(-1)], _INT) if has_end else offsets
    ends = later if has_end else emit.node("Concat", [later, count], _INT, axis=0)
    places = emit.node("Range", [emit.scalar(0), emit.node("Squeeze", [count, emit.ints(0)], _INT), emit.scalar(1)], _INT)
    begun = emit.node("LessOrEqual", [emit.node("Unsqueeze", [starts, emit.ints(1)], _INT), places], _BOOL)
    going = emit.node("Less", [places, emit.node("Unsqueeze", [ends, emit.ints(1)], _INT)], _BOOL)
    member = emit.node("And", [begun, going], _BOOL)
    if padding is None or padding < 0:
        return member
    shown = emit.node("Not", [emit.node("Equal", [ids, emit.scalar(padding)], _BOOL)], _BOOL)
    return emit.node("And", [member, shown], _BOOL)


def _largest(rows: ir.Value, member: ir.Value) -> ir.Value:
    kind = rows.dtype
    shown = emit.node("Unsqueeze", [member, emit.ints(2)], _BOOL)
    apart = emit.node("Where", [shown, emit.node("Unsqueeze", [rows, emit.ints(0)], kind), emit.number(-np.inf, rows)], kind)
    found = emit.node("ReduceMax", [apart, emit.ints(1)], kind, keepdims=0)
    count = emit.node("ReduceSum", [emit.cast(member, _INT), emit.ints(1)], _INT, keepdims=1)
    return emit.node("Where", [emit.node("Greater", [count, emit.scalar(0)], _BOOL), found, emit.number(0, rows)], kind)
