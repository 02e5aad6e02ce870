"""Where the operands and axes of a node are, read by the table of operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matmorph.ir.core import Node, Value
from matmorph.ir.op_table import OPERATORS
from matmorph.ir.ops import base_name
from matmorph.ir.types import TensorType


def operands_of(node: Node) -> dict[int, Value]:
    """The tensors whose elements the results of a node are made of, by position."""
    places = OPERATORS[base_name(node.op)].operands
    found = {k: node.args[k] for k in places if k < len(node.args)}
    return {k: arg for k, arg in found.items() if isinstance(arg, Value) and isinstance(arg.type, TensorType)}


def axes_over(node: Node) -> tuple[int, ...]:
    """The axes of its operand, counted from the front, that a softmax, a norm or a reduction computes over. ValueError for an operator that
    computes over no whole axes."""
    operator = OPERATORS[base_name(node.op)]
    if operator.axes is None:
        raise ValueError(f"{node.op} names no axes")
    rank = len(node.args[0].tensor.shape)
    given: Any = node.args[operator.axes] if len(node.args) > operator.axes else None
    if operator.kind == "norm":
        return tuple(range(rank - len(given), rank))
    if given is None or given == () or isinstance(given, bool):  # std.default's second argument is `unbiased`
        return tuple(range(rank))
    return tuple(axis % rank for axis in (given if isinstance(given, tuple | list) else (given,)))


def permutation(node: Node) -> tuple[int, ...]:
    """Of a node of kind "permute": which axis of its operand each axis of its result is."""
    rank = len(node.output.tensor.shape)
    return tuple(axis % rank for axis in _ORDERS[base_name(node.op)](rank, node.args[1:]))


def _reversed(rank: int, args: Sequence[Any]) -> Sequence[int]:
    return range(rank)[::-1]


def _swapped(rank: int, args: Sequence[Any]) -> Sequence[int]:
    one, other = args or (-2, -1)
    order = list(range(rank))
    order[one], order[other] = order[other], order[one]
    return order


def _placed(rank: int, args: Sequence[Any]) -> Sequence[int]:
    sources, targets = ([axis % rank for axis in (arg if isinstance(arg, tuple | list) else (arg,))] for arg in args)
    moved = dict(zip(targets, sources, strict=True))
    rest = iter(axis for axis in range(rank) if axis not in sources)
    return [moved[axis] if axis in moved else next(rest) for axis in range(rank)]


_ORDERS: Mapping[str, Callable[[int, Sequence[Any]], Sequence[int]]] = {
    **dict.fromkeys(("t", "numpy_T"), _reversed),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "mT", "mH", "adjoint"), _swapped),
    "permute": lambda rank, args: args[0],
    "movedim": _placed,
}
