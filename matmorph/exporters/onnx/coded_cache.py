"""ONNX form of a key/value cache in codes: operators that every provider has, in the float type of the keys.

Numbers of the past are a Cast and a Mul. DequantizeLinear by blocks says the same in one node and takes twice the time on a CPU (1.31).
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from matmorph.errors import ExportError
from matmorph.exporters.onnx import emit
from matmorph.exporters.onnx.lowering import Lowerings
from matmorph.runtime.format.cache import LEVELS

_INT8 = ir.DataType.INT8
_FLOAT = ir.DataType.FLOAT


def coded_cache_lowerings() -> Lowerings:
    """Translations of `ir.cache_ops`, for opset 18 and later."""

    def append(codes: ir.Value, scales: ir.Value, new: ir.Value, axis: int) -> tuple[ir.Value, ...]:
        if new.dtype is None:
            raise ExportError(f"a cache of {new.name}, of unknown element type, cannot be written")
        kind = new.dtype
        largest = emit.node("ReduceMax", [emit.node("Abs", [new], kind), emit.ints(-1)], kind, keepdims=1)
        step = emit.node("Div", [largest, emit.number(LEVELS, new)], kind)
        step = emit.node("Max", [step, emit.number(torch.finfo(_torch(kind)).tiny, new)], kind)
        # Codes in float32 whatever the type: a quotient of half precision is off by a sixteenth of a step, one of bfloat16 by half a step.
        wide = emit.node("Reciprocal", [emit.cast(step, _FLOAT)], _FLOAT)
        whole = emit.node("Round", [emit.node("Mul", [emit.cast(new, _FLOAT), wide], _FLOAT)], _FLOAT)
        more = emit.cast(emit.node("Clip", [whole, emit.number(-LEVELS, wide), emit.number(LEVELS, wide)], _FLOAT), _INT8)
        before = emit.node("Mul", [emit.cast(codes, kind), scales], kind)
        joined = emit.node("Concat", [codes, more], _INT8, axis=axis)
        return before, joined, emit.node("Concat", [scales, step], kind, axis=axis)

    return {torch.ops.matmorph.append_codes.default: append}


def _torch(kind: ir.DataType) -> torch.dtype:
    return {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}.get(kind, torch.float32)
