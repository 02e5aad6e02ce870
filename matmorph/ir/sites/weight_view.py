"""A stored weight seen through layout operators: which strided part of the constant a value of the graph is.

Nothing is computed and no byte is read. Every axis of a view is a tuple of (size, stride) atoms, major first, in elements of the constant;
together with an offset they say where each element lies, as torch's own strides do. Stride 0 is a broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import torch

from matmorph.ir.core import Const, Node, Value
from matmorph.ir.op_reading import permutation
from matmorph.ir.op_table import of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.site import Layout
from matmorph.ir.types import Dim, TensorType

ViewAtom: TypeAlias = tuple[Dim, int]
ViewAxis: TypeAlias = tuple[ViewAtom, ...]


@dataclass(frozen=True, slots=True)
class WeightView:
    """`axes` of the value; `offset` of its first element. `select`: the value that picks matrices of an expert stack, whose first axis
    (count, stride) is then `experts` and axis 0 of the view is what was picked. `cast`: the dtype it was converted to on the way."""

    const: Const
    axes: tuple[ViewAxis, ...]
    offset: int = 0
    select: Value | None = None
    experts: ViewAtom | None = None
    cast: str | None = None


@dataclass(frozen=True, slots=True)
class WeightReading:
    """How a matrix [rows, in] lies in the constant: `layout` "oi" = [total, in] or "io" = [in, total], `rows` = part of total; with
    `batch` that many such matrices, one after the other."""

    layout: Layout
    in_features: int
    total: int
    rows: tuple[int, int]
    batch: int | None = None

    def read(self, stored: torch.Tensor) -> torch.Tensor:
        """[out, in], or [batch, out, in], from the stored tensor."""
        lead = () if self.batch is None else (self.batch,)
        start, stop = self.rows
        if self.layout == "oi":
            return stored.reshape(*lead, self.total, self.in_features)[..., start:stop, :]
        return stored.reshape(*lead, self.in_features, self.total)[..., start:stop].transpose(-1, -2)


def whole(const: Const) -> WeightView:
    """The constant itself, row-major."""
    axes: list[ViewAxis] = []
    stride = 1
    for size in reversed([int(d) for d in const.tensor.shape]):
        axes.append(((size, stride),))
        stride *= size
    return WeightView(const, tuple(reversed(axes)))


def follow(view: WeightView, node: Node) -> tuple[WeightView | None, ...] | None:
    """The view that each output of a layout operator is; None where the node is no layout operator, an output None where it cannot be
    expressed."""
    rule = _LAYOUT.get(base_name(node.op))
    if rule is None or not all(isinstance(value.type, TensorType) for value in node.outputs):
        return None
    return rule(view, node)


def matrix(view: WeightView, batch: Sequence[int], out: Sequence[int], inner: Sequence[int]) -> WeightReading | str:
    """The view as matrices: `batch`, `out` and `inner` (contracted) name its axes. A string says why it is none."""
    stacks = _merged([view.axes[k] for k in batch if not (view.select is not None and k == 0)])
    stacks = [atom for atom in stacks if atom[1] != 0]
    if view.experts is not None:
        stacks.insert(0, view.experts)
    rows, columns = _merged([view.axes[k] for k in out]), _merged([view.axes[k] for k in inner])
    if len(stacks) > 1 or len(rows) > 1 or len(columns) > 1:
        return "its axes are not stored side by side"
    if any(stride == 0 or not isinstance(size, int) for size, stride in (*rows, *columns)):
        return "it is broadcast along an axis of the matrix"
    n_out, s_out = _only(rows)
    n_in, s_in = _only(columns)
    count = int(stacks[0][0]) if stacks else None
    block = view.const.numel // (count or 1)
    if stacks and stacks[0][1] != block:
        return "the matrices of the stack are not stored one after the other"
    return _reading(n_out, s_out, n_in, s_in, block, view.offset, count)


def _only(atoms: Sequence[ViewAtom]) -> tuple[int, int | None]:
    """(size, stride) of an axis; the stride None where the size is 1, because any will do."""
    return (int(atoms[0][0]), atoms[0][1]) if atoms else (1, None)


def _reading(n_out: int, s_out: int | None, n_in: int, s_in: int | None, block: int, offset: int, batch: int | None) -> WeightReading | str:
    total = block // n_in
    if total * n_in == block:
        if s_in in (1, None) and s_out in (n_in, None) and offset % n_in == 0:
            start = offset // n_in
            return WeightReading("oi", n_in, total, (start, start + n_out), batch)
        if s_out in (1, None) and s_in in (total, None) and offset + n_out <= total:
            return WeightReading("io", n_in, total, (offset, offset + n_out), batch)
    return "only a part of its in axis, or every n-th row, is read"


def _merged(axes: Sequence[ViewAxis]) -> list[ViewAtom]:
    """Atoms of several axes in order, neighbours that lie side by side joined, those of size 1 left out."""
    found: list[ViewAtom] = []
    for size, stride in (atom for axis in axes for atom in axis if atom[0] != 1):
        if found and found[-1][1] == size * stride and stride != 0:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return found


# ------------------------------------------------------------------------------------------------------------- layout operators

ViewRule: TypeAlias = Callable[[WeightView, Node], "tuple[WeightView | None, ...]"]


def _shape(value: Value) -> tuple[Dim, ...]:
    return value.tensor.shape


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.attrs.get(name, default)


def _same(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    dtype = node.output.tensor.dtype
    return (view if dtype == view.const.tensor.dtype else replace(view, cast=dtype),)


def _regroup(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    """view and its kin: the same elements in row-major order, in axes of other sizes."""
    shape = _shape(node.output)
    sizes = [int(d) for d in shape if isinstance(d, int)]
    if len(sizes) != len(shape) or view.select is not None or any(not isinstance(n, int) for axis in view.axes for n, _ in axis):
        return (None,)
    left = [(int(n), s) for axis in view.axes for n, s in axis if n != 1][::-1]
    axes: list[ViewAxis] = []
    for size in sizes:
        axis: list[ViewAtom] = []
        while size > 1:
            if not left:
                return (None,)
            count, stride = left.pop()
            if size % count == 0:
                axis.append((count, stride))
                size //= count
            elif count % size == 0:
                axis.append((size, stride * (count // size)))
                left.append((count // size, stride))
                size = 1
            else:
                return (None,)
        axes.append(tuple(axis))
    return (replace(view, axes=tuple(axes)),)


def _reorder(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    """What an expert stack was indexed with stays in front."""
    order = permutation(node)
    if view.select is not None and order[0] != 0:
        return (None,)
    return (replace(view, axes=tuple(view.axes[k] for k in order)),)


def _unsqueeze(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    axis = node.args[1] % (len(view.axes) + 1)
    if view.select is not None and axis == 0:
        return (None,)
    return (replace(view, axes=(*view.axes[:axis], (), *view.axes[axis:])),)


def _expand(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    """New leading axes and axes of size 1 repeat their elements."""
    shape = _shape(node.output)
    added = len(shape) - len(view.axes)
    if view.select is not None and added:
        return (None,)
    old = ((),) * added + view.axes
    sizes = [prod(n for n, _ in axis) for axis in old]
    axes = tuple(axis if size == dim else ((dim, 0),) for axis, size, dim in zip(old, sizes, shape, strict=True))
    return (replace(view, axes=axes),)


def _part(view: WeightView, axis: int, start: Any, size: Dim, step: int = 1) -> WeightView | None:
    """`size` elements of an axis from `start` on, every `step`-th."""
    axis %= len(view.axes)
    if not isinstance(start, int) or not isinstance(size, int) or (view.select is not None and axis == 0):
        return None
    atoms = _merged([view.axes[axis]])
    if prod(n for n, _ in atoms) == size:
        return view
    if len(atoms) != 1:
        return None
    stride = atoms[0][1]
    axes = (*view.axes[:axis], ((size, stride * step),) if size != 1 else (), *view.axes[axis + 1 :])
    return replace(view, axes=axes, offset=view.offset + start * stride)


def _start(node: Node, axis: int, start: Any) -> Any:
    """A start counted from the front."""
    length = _shape(node.args[0])[axis]
    return start + length if isinstance(start, int) and start < 0 and isinstance(length, int) else start


def _slice(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    axis, start, step = _argument(node, 1, "dim", 0), _argument(node, 2, "start") or 0, _argument(node, 4, "step", 1)
    return (_part(view, axis, _start(node, axis, start), _shape(node.output)[axis], step),)


def _narrow(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    axis = node.args[1]
    return (_part(view, axis, _start(node, axis, node.args[2]), _shape(node.output)[axis]),)


def _drop(view: WeightView | None, axis: int) -> WeightView | None:
    """Without an axis of size 1."""
    if view is None:
        return None
    axis %= len(view.axes)
    return replace(view, axes=(*view.axes[:axis], *view.axes[axis + 1 :]))


def _select(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    axis = node.args[1]
    return (_drop(_part(view, axis, _start(node, axis, node.args[2]), 1), axis),)


def _pieces(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    """split, chunk: consecutive parts of an axis, their sizes as the outputs have them."""
    axis = _argument(node, 2, "dim", 0)
    found: list[WeightView | None] = []
    start: Any = 0
    for value in node.outputs:
        size = _shape(value)[axis]
        found.append(_part(view, axis, start, size))
        start = start + size
    return tuple(found)


def _unbind(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    axis = _argument(node, 1, "dim", 0)
    return tuple(_drop(_part(view, axis, k, 1), axis) for k in range(len(node.outputs)))


def _pick(view: WeightView, index: Value) -> WeightView | None:
    """Matrices of a stack picked by a list of expert numbers."""
    lead = _merged([view.axes[0]])
    listed = index.tensor.dtype in ("int64", "int32") and len(_shape(index)) == 1
    if view.select is not None or len(view.axes) != 3 or len(lead) != 1 or not listed:
        return None
    return replace(view, axes=((), *view.axes[1:]), select=index, experts=lead[0])


def _index(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    indices = node.args[1]
    plain = len(indices) == 1 and isinstance(indices[0], Value)
    return (_pick(view, indices[0]) if plain else None,)


def _index_select(view: WeightView, node: Node) -> tuple[WeightView | None, ...]:
    return (_pick(view, node.args[2]) if node.args[1] == 0 else None,)


_LAYOUT: Mapping[str, ViewRule] = {
    **dict.fromkeys(of_kind("same"), _same),
    **dict.fromkeys(of_kind("reshape"), _regroup),
    "unsqueeze": _unsqueeze,  # which leaves the other axes as they are, so that it may be one of symbolic size
    **dict.fromkeys(of_kind("permute"), _reorder),
    **dict.fromkeys(of_kind("expand"), _expand),
    **dict.fromkeys(of_kind("part"), _pieces),  # several, one after the other; a part alone has its own place
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "unbind": _unbind,
    "index": _index,
    "index_select": _index_select,
}
