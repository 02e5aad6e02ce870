"""Adjoints of operators that move, pick, join and sum elements. An expansion needs nothing written: `Tape.give` sums what was broadcast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matmorph.ir.core import Node, Value
from matmorph.ir.training.adjoints.tape import AdjointRule, Cotangents, Tape, TapeStep, argument, axis_of

_END = 2**63 - 1


def _moved(back: Any) -> AdjointRule:
    """A rule for one operand and one result: `back(tape, cotangent, node)` is the operand's cotangent."""

    def rule(t: Tape, node: Node) -> TapeStep:
        def pull(found: Cotangents) -> None:
            (dy,) = found
            if dy is not None and t.wants(node.args[0]):
                t.give(node.args[0], back(t, dy, node))

        return TapeStep(t.keep(node), pull)

    return rule


def _reshaped(t: Tape, dy: Value, node: Node) -> Value:
    return t.reshape(dy, node.args[0])


def _permuted(t: Tape, dy: Value, node: Node) -> Value:
    order = [axis_of(axis, dy) for axis in node.args[1]]
    return t.b("aten.permute.default", dy, [order.index(axis) for axis in range(len(order))])


def _transposed(t: Tape, dy: Value, node: Node) -> Value:
    return t.b("aten.transpose.int", dy, *node.args[1:3])


def _turned(t: Tape, dy: Value, node: Node) -> Value:
    return t.b("aten.t.default", dy)


def _squeezed(t: Tape, dy: Value, node: Node) -> Value:
    """Back from `unsqueeze`."""
    return t.b("aten.squeeze.dim", dy, axis_of(node.args[1], dy))


def _expanded(t: Tape, dy: Value, node: Node) -> Value:
    return dy


def _sliced(t: Tape, dy: Value, node: Node) -> Value:
    x = node.args[0]
    dim, start, end, step = (argument(node, k, "", default) for k, default in enumerate((0, None, None, 1), 1))
    start, end = 0 if start is None else start, _END if end is None else end
    if step == 1:
        return t.b("aten.slice_backward.default", dy, t.axes(x), dim, start, end, step)
    return t.b("aten.slice_scatter.default", t.b("aten.zeros_like.default", x), dy, dim, start, end, step)


def _selected(t: Tape, dy: Value, node: Node) -> Value:
    return t.b("aten.select_backward.default", dy, t.axes(node.args[0]), *node.args[1:3])


def _gathered(t: Tape, dy: Value, node: Node) -> Value:
    """One place per row is found by comparison, which every provider runs; several are added where they belong."""
    x, dim, index = node.args[:3]
    axis = axis_of(dim, x)
    size = x.tensor.shape[axis]
    others = [a for a in range(len(x.tensor.shape)) if a != axis]
    rows = all(index.tensor.shape[a] == x.tensor.shape[a] for a in others)
    if not (rows and index.tensor.shape[axis] == 1 and isinstance(size, int)):
        dy = t.wide(dy)
        zeros = t.b("aten.zeros_like.default", x, dtype=dy.tensor.torch_dtype)
        return t.b("aten.scatter_add.default", zeros, axis, index, dy)
    places = t.b("aten.arange.default", size, device=t.device)
    if axis != len(x.tensor.shape) - 1:
        places = t.b("aten.reshape.default", places, [-1, *(1 for _ in others[axis:])])
    return t.cast(t.b("aten.where.ScalarOther", t.b("aten.eq.Tensor", places, index), dy, 0.0), dy.tensor.dtype)


def _spread(t: Tape, dy: Value, axes: Sequence[int], kept: bool) -> Value:
    """A reduced cotangent with its axes of size 1 back in place, smaller than the operand; pointwise rules broadcast it."""
    if kept:
        return dy
    for axis in sorted(axes):
        dy = t.b("aten.unsqueeze.default", dy, axis)
    return dy


def _axes(node: Node) -> list[int]:
    x, given = node.args[0], argument(node, 1, "dim")
    rank = len(x.tensor.shape)
    listed = given if isinstance(given, tuple | list) else [] if given is None else [given]
    return [axis_of(axis, x) for axis in listed] or list(range(rank))


def _summed(t: Tape, dy: Value, node: Node) -> Value:
    return _spread(t, dy, _axes(node), bool(argument(node, 2, "keepdim", False)))


def _averaged(t: Tape, dy: Value, node: Node) -> Value:
    x, axes = node.args[0], _axes(node)
    sizes = [t.axes(x)[axis] if not isinstance(x.tensor.shape[axis], int) else int(x.tensor.shape[axis]) for axis in axes]
    known = math.prod(size for size in sizes if isinstance(size, int))
    scaled = t.b("aten.mul.Tensor", dy, 1.0 / known) if known != 1 else dy
    for size in sizes:
        scaled = t.b("aten.div.Tensor", scaled, size) if isinstance(size, Value) else scaled
    return _spread(t, scaled, axes, bool(argument(node, 2, "keepdim", False)))


def _totalled(t: Tape, dy: Value, node: Node) -> Value:
    return dy


def _squeeze(t: Tape, node: Node) -> TapeStep:
    """`squeeze` in its forms: the shape tells what went."""
    return _moved(_reshaped)(t, node)


def _joined(t: Tape, node: Node) -> TapeStep:
    """`cat`: each operand gets its part."""
    parts, dim = node.args[0], argument(node, 1, "dim", 0)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is None:
            return
        axis, start = axis_of(dim, dy), 0
        sizes = [part.tensor.shape[axis] if len(part.tensor.shape) == len(dy.tensor.shape) else 0 for part in parts]
        if all(isinstance(size, int) for size in sizes):
            for part, size in zip(parts, sizes, strict=True):
                if t.wants(part):
                    t.give(part, t.b("aten.slice.Tensor", dy, axis, start, start + int(size)))
                start += int(size)
            return
        measured = [t.size(size) for size in sizes]
        pieces = t.b.many("aten.split_with_sizes.default", dy, measured, axis)
        for part, piece in zip(parts, pieces, strict=True):
            t.give(part, piece)

    return TapeStep(t.keep(node), pull)


def _stacked(t: Tape, node: Node) -> TapeStep:
    parts, dim = node.args[0], argument(node, 1, "dim", 0)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        for index, part in enumerate(parts):
            if dy is not None and t.wants(part):
                t.give(part, t.b("aten.select.int", dy, dim, index))

    return TapeStep(t.keep(node), pull)


def _split(t: Tape, node: Node) -> TapeStep:
    """`split`, `chunk` and `unbind`: the parts join again, with zeros for those that nothing read."""
    x, unbound = node.args[0], node.op.startswith("aten.unbind")
    dim = argument(node, 1 if unbound else 2, "dim", 0)
    outputs = t.keep(node)

    def pull(found: Cotangents) -> None:
        if t.wants(x):
            whole = [t.b("aten.zeros_like.default", y) if dy is None else dy for dy, y in zip(found, outputs, strict=True)]
            t.give(x, t.b("aten.stack.default" if unbound else "aten.cat.default", whole, dim))

    return TapeStep(outputs, pull)


def _blank(t: Tape, node: Node) -> TapeStep:
    """A constant of the operand's type: no gradient."""
    return TapeStep(t.keep(node), lambda found: None)


def _looked_up(t: Tape, node: Node) -> TapeStep:
    """`embedding`: rows of the table get the sum over their uses."""
    weight, indices = node.args[:2]
    padding = argument(node, 2, "padding_idx", -1)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is not None and t.wants(weight):
            count = weight.tensor.shape[0]
            t.give(weight, t.b("aten.embedding_dense_backward.default", t.wide(dy), indices, count, padding, False))

    return TapeStep(t.keep(node), pull)


LAYOUT: Mapping[str, AdjointRule] = {
    **dict.fromkeys(("aten.reshape.default", "aten.flatten.using_ints", "aten.unflatten.int"), _moved(_reshaped)),
    **dict.fromkeys(("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default"), _squeeze),
    "aten.permute.default": _moved(_permuted),
    "aten.transpose.int": _moved(_transposed),
    "aten.t.default": _moved(_turned),
    "aten.unsqueeze.default": _moved(_squeezed),
    "aten.expand.default": _moved(_expanded),
    "aten.slice.Tensor": _moved(_sliced),
    "aten.select.int": _moved(_selected),
    "aten.gather.default": _moved(_gathered),
    "aten.sum.dim_IntList": _moved(_summed),
    "aten.sum.default": _moved(_totalled),
    "aten.mean.dim": _moved(_averaged),
    "aten.mean.default": _moved(_averaged),
    "aten.cat.default": _joined,
    "aten.stack.default": _stacked,
    **dict.fromkeys(("aten.split.Tensor", "aten.split_with_sizes.default", "aten.unbind.int"), _split),
    "aten.embedding.default": _looked_up,
    "aten.new_zeros.default": _blank,
}
