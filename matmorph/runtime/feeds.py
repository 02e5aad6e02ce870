"""Checks a dict of numpy arrays against the manifest before ONNX Runtime sees it.

Rules, in order: every input is there and no other; each value is a numpy array; the dtype is the model's, or casts to it without loss
(bool to integer, an integer or float to a wider one of its kind); the rank and fixed sizes agree; one name is one size across all
inputs; a named size lies in its range; an axis that is an expression over names has the size that follows.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from matmorph.runtime.errors import InputMismatch, nearest
from matmorph.runtime.format.artifact import NamedDim, Range, TensorInfo
from matmorph.runtime.format.cases import Array as Array


class Ports(Protocol):
    """What a manifest says of the arrays that go in."""

    @property
    def inputs(self) -> tuple[TensorInfo, ...]: ...

    @property
    def ranges(self) -> Mapping[str, Range]: ...


def check_feeds(manifest: Ports, feeds: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays in the model's dtypes, in the manifest's order. Raises InputMismatch."""
    _check_names(manifest, feeds)
    arrays = {info.name: _as_dtype(info, feeds[info.name]) for info in manifest.inputs}
    sizes: dict[str, tuple[int, str]] = {}  # axis name -> (size, where it was seen first)
    for info in manifest.inputs:
        _bind_axes(info, arrays[info.name].shape, manifest.ranges, sizes)
    for info in manifest.inputs:
        _check_expressions(info, arrays[info.name].shape, {name: size for name, (size, _) in sizes.items()})
    return arrays


def _check_names(manifest: Ports, feeds: Mapping[str, Any]) -> None:
    names = [info.name for info in manifest.inputs]
    for name in feeds:
        if name not in names:
            raise InputMismatch(f"unknown input {name!r}; the model takes {', '.join(names)}{nearest(name, names)}")
    missing = [str(info) for info in manifest.inputs if info.name not in feeds]
    if missing:
        raise InputMismatch(f"missing input {'; '.join(missing)}")


def _as_dtype(info: TensorInfo, value: Any) -> Array:
    if not isinstance(value, np.ndarray | np.generic):
        raise InputMismatch(f"input {info.name}: expected a numpy array, got {type(value).__module__}.{type(value).__qualname__}")
    array = np.asarray(value)
    wanted = np.dtype(info.dtype)
    if array.dtype == wanted:
        return array
    if not _casts_without_loss(array.dtype, wanted):
        raise InputMismatch(f"input {info.name}: expected {wanted}, got {array.dtype}; convert it with .astype({str(wanted)!r})")
    return array.astype(wanted)


def _casts_without_loss(given: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    family = {"b": "integer", "i": "integer", "u": "integer", "f": "float", "c": "complex"}
    same = given.kind in family and family.get(given.kind) == family.get(wanted.kind)
    return same and np.can_cast(given, wanted, "safe")


def _bind_axes(info: TensorInfo, shape: tuple[int, ...], ranges: Mapping[str, Range], sizes: dict[str, tuple[int, str]]) -> None:
    if len(shape) != len(info.shape):
        raise InputMismatch(f"input {info.name}: expected {len(info.shape)} axes {_axes(info.shape)}, got shape {shape}")
    for axis, (dim, size) in enumerate(zip(info.shape, shape, strict=True)):
        where = f"input {info.name}, axis {axis}"
        if isinstance(dim, int):
            if size != dim:
                raise InputMismatch(f"{where}: expected size {dim}, got {size} (shape {shape})")
        elif dim.isidentifier():
            _bind(dim, size, where, ranges.get(dim, Range()), sizes)


def _bind(name: str, size: int, where: str, allowed: Range, sizes: dict[str, tuple[int, str]]) -> None:
    known, first = sizes.setdefault(name, (size, where))
    if size != known:
        raise InputMismatch(f"{where}: {name} is {size} here and {known} at {first}; both must agree")
    if size not in allowed:
        raise InputMismatch(f"{where}: {name} is {size}, the model takes {allowed}")


def _check_expressions(info: TensorInfo, shape: tuple[int, ...], sizes: Mapping[str, int]) -> None:
    for axis, (dim, size) in enumerate(zip(info.shape, shape, strict=True)):
        if isinstance(dim, int) or dim.isidentifier():
            continue
        wanted = size_of(dim, sizes)
        if wanted is not None and wanted != size:
            named = ", ".join(f"{name}={value}" for name, value in sizes.items())
            raise InputMismatch(f"input {info.name}, axis {axis}: expected {dim} = {wanted} ({named}), got {size}")


def _axes(shape: tuple[NamedDim, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


_ARITHMETIC: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


_LONGEST, _LARGEST_POWER, _LARGEST_BASE = 2000, 16, 1 << 64
"""Of an expression that a manifest gives: what it takes to evaluate it is bounded."""


def size_of(expression: str, sizes: Mapping[str, int]) -> int | None:
    """The value of `2*seq + 1`; None, and then nothing is checked, where a name has no size or this is more than integer arithmetic."""
    if len(expression) > _LONGEST:
        return None
    try:
        return _evaluate(ast.parse(expression, mode="eval").body, sizes)
    except (KeyError, SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, sizes), _evaluate(node.right, sizes)
        if isinstance(node.op, ast.Pow) and not (0 <= right <= _LARGEST_POWER and abs(left) < _LARGEST_BASE):
            raise KeyError("a power that no size has")
        return _ARITHMETIC[type(node.op)](left, right)
    raise KeyError(type(node).__name__)
