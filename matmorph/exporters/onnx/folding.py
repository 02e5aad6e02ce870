"""Values of small constant sub-graphs: the sizes, axes and scalars that a translation spells out in ten nodes.

Numpy stands in for each operator exactly; an operator or attribute not listed here is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from matmorph.runtime.format.cases import Array

MAX_ELEMENTS = 1024
"""Larger results stay computed: a folded mask or position table would be a weight that the source model does not have."""


def fold(node: ir.Node, inputs: Sequence[Array | None]) -> Array | None:
    """The value of a node on constant inputs, or None where it is not foldable. Only single-output nodes of the ONNX domain fold."""
    function = _FOLDS.get(node.op_type)
    if function is None or node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    result = function(inputs, attributes)
    return None if result is None or result.size > MAX_ELEMENTS else np.asarray(result)


def constant_value(node: ir.Node) -> Array | None:
    """The value of a `Constant` node of at most `MAX_ELEMENTS` numbers."""
    for name, attribute in node.attributes.items():
        if name == "value":
            tensor = attribute.as_tensor()
            numeric = tensor.dtype not in (ir.DataType.STRING, ir.DataType.UNDEFINED)
            return tensor.numpy() if numeric and tensor.size <= MAX_ELEMENTS and tensor.dtype.bitwidth >= 8 else None
        if name in ("value_int", "value_ints"):
            return np.asarray(attribute.value, np.int64)
        if name in ("value_float", "value_floats"):
            return np.asarray(attribute.value, np.float32)
    return None


def _cast(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array | None:
    dtype = ir.DataType(attributes["to"])
    if dtype is ir.DataType.STRING or dtype.bitwidth < 8:
        return None
    source: Array = inputs[0]
    if dtype.is_integer() and not np.issubdtype(source.dtype, np.integer) and source.dtype != np.bool_ and not _fits(source, dtype):
        return None
    with np.errstate(over="ignore"):
        return source.astype(dtype.numpy())


def _fits(source: Array, dtype: ir.DataType) -> bool:
    """Whether a float converts to the integer type with one meaning everywhere (ONNX leaves the rest undefined)."""
    info = np.iinfo(dtype.numpy())
    return bool(np.all(np.isfinite(source)) and np.all(source >= info.min) and np.all(source < float(info.max)))


def _reshape(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array | None:
    shape = [int(d) for d in inputs[1]]
    if not attributes.get("allowzero"):
        shape = [inputs[0].shape[i] if d == 0 else d for i, d in enumerate(shape)]
    return np.asarray(inputs[0].reshape(shape))


def _squeeze(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array | None:
    axes = None if len(inputs) < 2 or inputs[1] is None else tuple(int(a) for a in inputs[1])
    return np.asarray(np.squeeze(inputs[0], axes))


def _unsqueeze(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array | None:
    return np.asarray(np.expand_dims(inputs[0], tuple(int(a) for a in inputs[1])))


def _slice(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array | None:
    data, starts, ends = inputs[:3]
    axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else range(len(starts))
    steps = inputs[4] if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    if any(int(step) < 1 for step in steps):
        return None
    cut = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cut[int(axis)] = slice(int(start), int(end), int(step))
    return np.asarray(data[tuple(cut)])


def _divide(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array | None:
    a, b = inputs
    if np.issubdtype(a.dtype, np.integer):
        return np.asarray(np.trunc(a / b).astype(a.dtype)) if np.all(b != 0) and np.all(np.abs(a) < 2**52) else None
    with np.errstate(all="ignore"):
        return np.asarray(a / b)


def _quietly(function: Callable[..., Any]) -> Callable[[Sequence[Any], Mapping[str, Any]], Array | None]:
    def run(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Array | None:
        with np.errstate(all="ignore"):
            return np.asarray(function(*inputs)).astype(inputs[0].dtype)

    return run


_FOLDS: Mapping[str, Callable[[Sequence[Any], Mapping[str, Any]], Array | None]] = {
    "Identity": lambda inputs, attributes: inputs[0],
    "Cast": _cast,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda inputs, attributes: np.concatenate(list(inputs), axis=attributes["axis"]),
    "Gather": lambda inputs, attributes: np.take(inputs[0], inputs[1], axis=attributes.get("axis", 0)),
    "Slice": _slice,
    "Expand": lambda inputs, attributes: inputs[0] * np.ones([int(d) for d in inputs[1]], inputs[0].dtype),
    "Neg": _quietly(np.negative),
    "Add": _quietly(np.add),
    "Sub": _quietly(np.subtract),
    "Mul": _quietly(np.multiply),
    "Div": _divide,
    "Sqrt": _quietly(np.sqrt),
}
