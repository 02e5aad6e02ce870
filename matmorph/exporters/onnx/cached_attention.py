"""ONNX forms of attention over a key/value cache.

| operator          | ONNX                                                                                                        |
|-------------------|-------------------------------------------------------------------------------------------------------------|
| cached_attention  | Attention (opset 23) with past and present, and Where over the rows that see nothing, as `attention` has it |
| compact_attention | com.microsoft.GroupQueryAttention                                                                           |

Attention is never told to be causal: its kernels on CPU and CUDA count from different ends where there is a past. GroupQueryAttention
counts the places of tokens itself (of `position_ids` its CPU kernel reads a prompt's first one alone), and takes one row only where several
tokens meet a past.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from matmorph.errors import ExportError
from matmorph.exporters.onnx import emit
from matmorph.exporters.onnx.attention import NATIVE, fixed_size, only_seeing
from matmorph.exporters.onnx.lowering import Lowerings

_INT32 = ir.DataType.INT32
_INT = ir.DataType.INT64

Attended = tuple[ir.Value, ...]


def cache_lowerings(opset: int) -> Lowerings:
    """Translations of attention over a cache for an opset."""

    def cached(
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        past_key: ir.Value,
        past_value: ir.Value,
        mask: ir.Value,
        scale: float,
    ) -> tuple[ir.Value, ...]:
        if opset < NATIVE:
            raise ExportError(f"Attention is an operator of ONNX from opset {NATIVE} on, and export.opset is {opset}")
        given = [query, key, value, mask, past_key, past_value]
        y, *presents = emit.several("Attention", given, [query.dtype] * 3, scale=float(scale))
        return only_seeing(mask, y), *presents

    ours = torch.ops.matmorph
    return {ours.cached_attention.default: cached, ours.compact_attention.default: _compact}


def _compact(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    past_key: ir.Value,
    past_value: ir.Value,
    last: ir.Value,
    mask: ir.Value,
    cos: ir.Value | None,
    sin: ir.Value | None,
    sink: ir.Value | None,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
) -> tuple[ir.Value, ...]:
    size, few = fixed_size(past_key, 3), fixed_size(past_key, 1)
    total = emit.cast(emit.node("Squeeze", [emit.node("Shape", [mask], _INT, start=1, end=2)], _INT), _INT32)
    given = [query, key, value, past_key, past_value, last, total, cos, sin, None, None, sink]
    numbers: dict[str, int | float] = {"num_heads": fixed_size(query, 2) // size, "kv_num_heads": few, "scale": float(scale)}
    numbers |= {"do_rotary": 1, "rotary_interleaved": int(interleaved)} if cos is not None else {}
    numbers |= {"local_window_size": window} if window else {}
    numbers |= {"softcap": float(softcap)} if softcap else {}
    while given[-1] is None:
        given.pop()
    return emit.several("GroupQueryAttention", given, [query.dtype] * 3, emit.DOMAIN, 1, **numbers)
