"""What each operator does to the axes of a block: one function per kind of operator, in a table by base name.

A rule gives the axes of every result and notes, on the walk, the literals that carry the width and the values from outside that meet it. It
raises `Stuck` where the operator mixes units or where it is not known to leave them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matmorph.ir.core import Node, Value
from matmorph.ir.op_reading import axes_over, operands_of, permutation
from matmorph.ir.op_table import BARE_PRODUCTS, BROADCASTING, having, of_kind
from matmorph.ir.ops import base_name
from matmorph.passes.pruning.axes import HEADS, PART, QK, Atom, Axes, Axis, AxisProduct, Concat, plain, product, size_of, units_of
from matmorph.passes.pruning.axis_walk import AxisRule, AxisWalk, Place, Read, stuck

_END = 1 << 62
"""Ends of slices above this mean "to the end"."""


# ------------------------------------------------------------------------------------------------------------- position by position


def _pointwise(walk: AxisWalk, node: Node) -> list[Axes]:
    """Operators that treat every element alone, broadcasting their tensors."""
    operands: list[tuple[Place, Value]] = [((k,), arg) for k, arg in operands_of(node).items()]
    return [_aligned(walk, node, operands, len(node.output.tensor.shape))]


def _aligned(walk: AxisWalk, node: Node, operands: Sequence[tuple[Place, Value]], rank: int) -> Axes:
    """The axes of a broadcast: where one operand carries units, the others must carry the same, have size 1, or come from outside."""
    rows = [(place, value, walk.axes(value)) for place, value in operands]
    found: list[Axis] = []
    for back in range(rank, 0, -1):
        met = [Read(place, value, len(axes) - back, axes[-back]) for place, value, axes in rows if len(axes) >= back and axes[-back] != ()]
        carrying = next((one.axis for one in met if _labelled(one.axis)), None)
        if carrying is None:
            found.append(met[0].axis if met else ())
            continue
        found.append(carrying)
        for one in met:
            if one.axis != carrying:
                _meet(walk, node, one, carrying)
    return tuple(found)


def _meet(walk: AxisWalk, node: Node, one: Read, carrying: Axis) -> None:
    if walk.carries(one.value):
        raise stuck(node, "brings together axes of the block that run differently", one.axis, carrying)
    if units_of(carrying):
        walk.side(node, one.place, one.value, one.dim, carrying)


def _labelled(axis: Axis) -> bool:
    return bool(units_of(axis)) or (isinstance(axis, tuple) and any(atom.unit == PART for atom in axis))


# ------------------------------------------------------------------------------------------------------------- layout


def _same(walk: AxisWalk, node: Node) -> list[Axes]:
    """The first operand, copied, converted, or with some of its elements dropped; in training with the mask of these."""
    return [walk.axes(node.args[0])] * len(node.outputs)


def _permute(walk: AxisWalk, node: Node) -> list[Axes]:
    axes = walk.axes(node.args[0])
    return [tuple(axes[dim] for dim in permutation(node))]


def _expand(walk: AxisWalk, node: Node) -> list[Axes]:
    """Axes of size 1 are repeated; the sizes of the others may be written out."""
    axes, shape, sizes = walk.axes(node.args[0]), node.output.tensor.shape, node.args[1]
    added = len(shape) - len(axes)
    found: list[Axis] = [*plain(shape[:added])]
    for k, axis in enumerate(axes, added):
        found.append(axis if axis != () or shape[k] == 1 else (Atom(shape[k]),))
        if isinstance(sizes[k], Value) and units_of(axis):
            walk.literal(node, (1, k), axis, fill=True)
        elif sizes[k] != -1:
            walk.literal(node, (1, k), axis)
    return [tuple(found)]


def _repeat_interleave(walk: AxisWalk, node: Node) -> list[Axes]:
    axes = list(walk.axes(node.args[0]))
    dim = node.args[2] if len(node.args) > 2 else None
    if dim is None or not isinstance(node.args[1], int) or node.attrs.get("output_size") is not None:
        raise stuck(node, "repeats in a manner that is not understood", *axes)
    axis = axes[dim % len(axes)]
    if isinstance(axis, Concat):
        raise stuck(node, "repeats parts of a fused projection", axis)
    axes[dim % len(axes)] = product(*axis, Atom(node.args[1]))
    return [tuple(axes)]


# ------------------------------------------------------------------------------------------------------------- parts of an axis


def _slice(walk: AxisWalk, node: Node) -> list[Axes]:
    axes, shape = list(walk.axes(node.args[0])), node.args[0].tensor.shape
    given: tuple[Any, ...] = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    dim, start, end, step = given
    dim %= len(axes)
    axis = axes[dim]
    if not units_of(axis):
        axes[dim] = axis if node.output.tensor.shape[dim] == shape[dim] else plain([node.output.tensor.shape[dim]])[0]
        return [tuple(axes)]
    size = int(shape[dim])
    low, high = _bound(start, 0, size, node, axis), _bound(end, size, size, node, axis)
    if step != 1:
        axes[dim] = _strided(walk, node, axis, low, high, step)
    else:
        before, taken = _cut(node, axis, low, high)
        if low:
            walk.literal(node, (2,), *before)
        if isinstance(end, int) and end < _END and taken is not axis:
            walk.literal(node, (3,), *before, taken)
        axes[dim] = taken
    return [tuple(axes)]


def _bound(value: Any, default: int, size: int, node: Node, axis: Axis) -> int:
    if value is None:
        return default
    if not isinstance(value, int):
        raise stuck(node, "cuts the block at a computed place", axis)
    return min(max(value + size if value < 0 else value, 0), size)


def _cut(node: Node, axis: Axis, low: int, high: int) -> tuple[tuple[Axis, ...], Axis]:
    """(what lies before, what is taken) of an axis between two positions."""
    size = int(size_of(axis))
    if (low, high) == (0, size):
        return (), axis
    if low >= high:
        return ((axis,) if low == size else ()), (Atom(0),)
    parts = axis.parts if isinstance(axis, Concat) else _pieces(axis)
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + int(size_of(part)))
    if low not in ends or high not in ends:
        raise stuck(node, "cuts an axis of the block", axis)
    first, last = ends.index(low), ends.index(high)
    return parts[:first], _joined(parts[first:last])


def _pieces(axis: AxisProduct) -> tuple[AxisProduct, ...]:
    """An axis whose major atom counts nothing: that many pieces, one after the other."""
    if len(axis) < 2 or axis[0].unit is not None or not isinstance(axis[0].size, int):
        return (axis,)
    return (axis[1:],) * axis[0].size


def _joined(parts: Sequence[AxisProduct]) -> Axis:
    if len(parts) == 1:
        return parts[0]
    return product(Atom(len(parts)), *parts[0]) if len(set(parts)) == 1 else Concat(tuple(parts))


def _strided(walk: AxisWalk, node: Node, axis: Axis, low: int, high: int, step: int) -> Axis:
    """Every `step`-th position where `step` neighbours belong together (interleaved rotary pairs)."""
    inner = axis[-1] if isinstance(axis, tuple) and len(axis) > 1 else None
    if inner is None or inner.unit is not None or inner.size != step or low >= step or high != size_of(axis):
        raise stuck(node, "takes every n-th position of the block", axis)
    if isinstance(node.args[3], int) and node.args[3] < _END:
        walk.literal(node, (3,), axis)
    return product(*axis[:-1])  # type: ignore[index]


def _split(walk: AxisWalk, node: Node) -> list[Axes]:
    """split, split_with_sizes and chunk."""
    value, sizes = node.args[:2]
    dim = (node.args[2] if len(node.args) > 2 else 0) % len(value.tensor.shape)
    axes = walk.axes(value)
    axis = axes[dim]
    found, start = [], 0
    for k, output in enumerate(node.outputs):
        if not units_of(axis):
            found.append((*axes[:dim], plain([output.tensor.shape[dim]])[0], *axes[dim + 1 :]))
            continue
        width = int(output.tensor.shape[dim])
        taken = _cut(node, axis, start, start + width)[1]
        start += width
        found.append((*axes[:dim], taken, *axes[dim + 1 :]))
        if isinstance(sizes, tuple):
            walk.literal(node, (1, k), taken)
        elif base_name(node.op) == "split":
            walk.literal(node, (1,), taken)
        elif any(size_of(taken) != size_of(other[dim]) for other in found):
            raise stuck(node, "cuts the block into unequal parts", axis)
    return found


def _glu(walk: AxisWalk, node: Node) -> list[Axes]:
    axes = list(walk.axes(node.args[0]))
    dim = (node.args[1] if len(node.args) > 1 else -1) % len(axes)
    axis = axes[dim]
    if units_of(axis):
        half = int(size_of(axis)) // 2
        left, right = _cut(node, axis, 0, half)[1], _cut(node, axis, half, 2 * half)[1]
        if left != right:
            raise stuck(node, "multiplies halves of the block that run differently", axis)
        axes[dim] = left
    else:
        axes[dim] = plain([node.output.tensor.shape[dim]])[0]
    return [tuple(axes)]


def _cat(walk: AxisWalk, node: Node) -> list[Axes]:
    values, dim = node.args[0], (node.args[1] if len(node.args) > 1 else 0)
    rank = len(node.output.tensor.shape)
    dim %= rank
    joined = [walk.axes(value)[dim] for value in values if value.tensor.shape[dim] != 0]
    if len(joined) == 1:
        along: Axis = joined[0]
    elif not any(units_of(axis) for axis in joined):
        along = plain([node.output.tensor.shape[dim]])[0]
    elif all(isinstance(axis, tuple) and axis == joined[0] for axis in joined):
        along = product(Atom(len(joined)), *joined[0])  # type: ignore[misc]
    else:
        raise stuck(node, "joins an axis of the block to others", *joined)
    operands = [((0, k), value) for k, value in enumerate(values) if value.tensor.shape[dim] != 0]
    rest = _aligned(_Without(walk, dim), node, operands, rank - 1)  # type: ignore[arg-type]
    return [(*rest[:dim], along, *rest[dim:])]


class _Without:
    """The walk as seen by values of which one axis is left out."""

    def __init__(self, walk: AxisWalk, dim: int) -> None:
        self._walk = walk
        self._dim = dim
        self.carries = walk.carries

    def axes(self, value: Value) -> Axes:
        axes = self._walk.axes(value)
        return (*axes[: self._dim], *axes[self._dim + 1 :])

    def side(self, node: Node, place: Place, value: Value, dim: int, axis: Axis) -> None:
        self._walk.side(node, place, value, dim + (dim >= self._dim), axis)


def _stack(walk: AxisWalk, node: Node) -> list[Axes]:
    values, dim = node.args[0], (node.args[1] if len(node.args) > 1 else 0)
    rank = len(node.output.tensor.shape)
    dim %= rank
    rest = _aligned(walk, node, [((0, k), value) for k, value in enumerate(values)], rank - 1)
    return [(*rest[:dim], (Atom(len(values)),), *rest[dim:])]


# ------------------------------------------------------------------------------------------------------------- across an axis


def _along(walk: AxisWalk, node: Node) -> list[Axes]:
    """softmax and norms: over axes that carry nothing. What a norm gives beside its result has size 1 there."""
    axes, dims = walk.axes(node.args[0]), axes_over(node)
    _refuse_mixing(node, [axes[dim] for dim in dims])
    return [axes] + [tuple(() if dim in dims else axis for dim, axis in enumerate(axes))] * (len(node.outputs) - 1)


def _reduced(walk: AxisWalk, node: Node) -> list[Axes]:
    """sum, mean, amax ... over axes that carry nothing."""
    axes, dims = walk.axes(node.args[0]), axes_over(node)
    keep = len(node.output.tensor.shape) == len(axes)
    _refuse_mixing(node, [axes[dim] for dim in dims])
    return [tuple(() if dim in dims else axis for dim, axis in enumerate(axes) if keep or dim not in dims)]


def _refuse_mixing(node: Node, axes: Sequence[Axis]) -> None:
    if any(units_of(axis) for axis in axes):
        raise stuck(node, "computes across an axis of the block", *axes)


# ------------------------------------------------------------------------------------------------------------- products


def _matmul(walk: AxisWalk, node: Node) -> list[Axes]:
    return [_multiplied(walk, node, (0,), (1,))]


def _baddbmm(walk: AxisWalk, node: Node) -> list[Axes]:
    found = _multiplied(walk, node, (1,), (2,))
    added = walk.axes(node.args[0])
    for back, axis in enumerate(reversed(found), 1):
        if len(added) >= back and added[-back] not in ((), axis) and units_of(axis):
            _meet(walk, node, Read((0,), node.args[0], len(added) - back, added[-back]), axis)
    return [found]


def _multiplied(walk: AxisWalk, node: Node, left_at: Place, right_at: Place) -> Axes:
    left, right = node.args[int(left_at[0])], node.args[int(right_at[0])]
    one, other = walk.axes(left), walk.axes(right)
    if min(len(one), len(other)) < 2:
        raise stuck(node, "multiplies by a vector", *one, *other)
    _contracted(walk, node, Read(left_at, left, len(one) - 1, one[-1]), Read(right_at, right, len(other) - 2, other[-2]))
    batch = _aligned(_Leading(walk, 2), node, [(left_at, left), (right_at, right)], max(len(one), len(other)) - 2)  # type: ignore[arg-type]
    return (*batch, one[-2], other[-1])


class _Leading:
    """The walk as seen by the leading axes of a product's operands."""

    def __init__(self, walk: AxisWalk, last: int) -> None:
        self._walk = walk
        self._last = last
        self.carries, self.side = walk.carries, walk.side

    def axes(self, value: Value) -> Axes:
        return self._walk.axes(value)[: -self._last]


def _contracted(walk: AxisWalk, node: Node, one: Read, other: Read) -> None:
    """The axes that a product sums over: only the dimensions of a head may vanish in it."""
    axes = (one.axis, other.axis)
    wrong = [axis for axis in axes if units_of(axis) - {QK}]
    if wrong:
        raise stuck(node, "sums over an axis of the block", *wrong)
    if not any(units_of(axis) for axis in axes) or axes[0] == axes[1]:
        return
    for read, carrying in ((one, other.axis), (other, one.axis)):
        if units_of(carrying):
            _meet(walk, node, read, carrying)


def _attention(walk: AxisWalk, node: Node) -> list[Axes]:
    """scaled_dot_product_attention(q [.., L, E], k [.., S, E], v [.., S, Ev], mask): the default scale is 1 / sqrt(E)."""
    q, k, v = (walk.axes(value) for value in node.args[:3])
    _contracted(walk, node, Read((0,), node.args[0], len(q) - 1, q[-1]), Read((1,), node.args[1], len(k) - 1, k[-1]))
    _refuse_mixing(node, [k[-2], v[-2]])
    heads = q[:-2]
    grouped = bool(node.attrs.get("enable_gqa", node.args[7] if len(node.args) > 7 else False))
    for others in (k[:-2], v[:-2]):
        wanted = heads if not grouped else (*heads[:-1], product(*_of_heads(heads[-1])))
        for axis, known in zip(others, wanted, strict=True):
            if axis != known and (units_of(axis) or units_of(known)):
                raise stuck(node, "pairs heads that run differently", axis, known)
    found: Axes = (*heads, q[-2], v[-1])
    mask = node.args[3] if len(node.args) > 3 else node.attrs.get("attn_mask")
    if mask is not None:
        place: Place = (3,) if len(node.args) > 3 else ("attn_mask",)
        axes = walk.axes(mask)
        for back in range(3, len(axes) + 1):
            if axes[-back] not in ((), found[-back]) and units_of(found[-back]):
                _meet(walk, node, Read(place, mask, len(axes) - back, axes[-back]), found[-back])
    if node.attrs.get("scale") is None and QK in units_of(q[-1]):
        walk.scale(node, float(int(size_of(q[-1]))) ** -0.5)
    return [found, *(plain(value.tensor.shape) for value in node.outputs[1:])]


def _of_heads(axis: Axis) -> AxisProduct:
    """Of the query heads, the key/value heads that they read."""
    return tuple(atom for atom in axis if atom.unit == HEADS) if isinstance(axis, tuple) else ()


# Not `like`: a shape that another tensor gives is no literal that could be edited. A group norm names no axes.
_EXPANSIONS = having(of_kind("expand"), like=False)
_NORMALISED = having(of_kind("softmax", "log_softmax", "norm"), axes=1)
AXIS_RULES: Mapping[str, AxisRule] = {
    **dict.fromkeys(BROADCASTING, _pointwise),
    **dict.fromkeys(of_kind("same", "dropout"), _same),
    **dict.fromkeys(of_kind("permute"), _permute),
    **dict.fromkeys(_EXPANSIONS, _expand),
    "repeat_interleave": _repeat_interleave,
    "slice": _slice,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "glu": _glu,
    "cat": _cat,
    "stack": _stack,
    **dict.fromkeys(_NORMALISED, _along),
    **dict.fromkeys(of_kind("reduction"), _reduced),
    **dict.fromkeys(BARE_PRODUCTS, _matmul),
    "baddbmm": _baddbmm,
    "scaled_dot_product_attention": _attention,
}
"""By base name of the operator; changes of shape and picks are the walk's own."""
