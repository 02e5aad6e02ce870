"""Makes ONNX nodes from within a translation: of operators that onnxscript has no schema of, and of types that it would have to guess."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from matmorph.errors import ExportError
from matmorph.exporters.onnx.lowering import record

DOMAIN = "com.microsoft"


def node(
    name: str,
    inputs: Sequence[ir.Value | None],
    dtype: ir.DataType | None,
    domain: str = "",
    version: int | None = None,
    **attributes: Any,
) -> ir.Value:
    """The only result of a new node; `dtype` None where nobody asks for it."""
    made = ir.node(name, inputs, attributes, domain=domain, version=version)
    if dtype is not None:
        made.outputs[0].dtype = dtype
    record(made)
    return made.outputs[0]


def several(
    name: str,
    inputs: Sequence[ir.Value | None],
    dtypes: Sequence[ir.DataType | None],
    domain: str = "",
    version: int | None = None,
    **attributes: Any,
) -> tuple[ir.Value, ...]:
    """All results of a new node."""
    made = ir.node(name, inputs, attributes, domain=domain, version=version, num_outputs=len(dtypes))
    for value, dtype in zip(made.outputs, dtypes, strict=True):
        if dtype is not None:
            value.dtype = dtype
    record(made)
    return tuple(made.outputs)


def contrib(name: str, inputs: Sequence[ir.Value | None], numbers: Mapping[str, int | float], like: ir.Value) -> ir.Value:
    """The result of an operator of com.microsoft, in the element type of `like`: ONNX's own inference knows nothing of it."""
    given = list(inputs)
    while given[-1] is None:
        given.pop()
    return node(name, given, like.dtype, DOMAIN, 1, **numbers)


def cast(value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """In the type of its neighbours, which ONNX does not do by itself."""
    return value if dtype is None or value.dtype == dtype else node("Cast", [value], dtype, to=dtype.value)


def constant(tensor: ir.Tensor[Any]) -> ir.Value:
    return node("Constant", [], tensor.dtype, value=tensor)


def ints(*numbers: int) -> ir.Value:
    """int64 [n]."""
    return constant(ir.Tensor(np.asarray(numbers, np.int64)))


def scalar(number: int) -> ir.Value:
    """int64 []."""
    return constant(ir.Tensor(np.asarray(number, np.int64)))


def number(value: float, like: ir.Value) -> ir.Value:
    """[] in the element type of `like`."""
    if like.dtype is None:
        raise ExportError(f"a number beside {like.name}, of unknown element type, cannot be written")
    return constant(ir.Tensor(np.asarray(value, like.dtype.numpy())))


def held(codes: ir.Value, shape: Sequence[int], until: ir.Value) -> ir.Value:
    """Codes in another `shape`, by a Reshape whose target is `shape` plus the size of `until` modulo 1.

    A session can neither fold what follows nor compute it before `until` is there: without that it would unpack every weight of the graph
    before the first product, and keep them all until the last. Reshape copies nothing, and on CUDA the size lives on the host.
    """
    zero = node("Mod", [node("Size", [until], ir.DataType.INT64), scalar(1)], ir.DataType.INT64)
    return node("Reshape", [codes, node("Add", [ints(*shape), zero], ir.DataType.INT64)], codes.dtype)
