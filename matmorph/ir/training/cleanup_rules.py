"""The rules of `gradient_cleanup`, by operator: each gives the value that stands for a node's result, or None.

A rule sees operands that are cleaned already. It may write nodes through `Walk.b`, and must not change a number by more than the rounding
of two literals that become one. What it gives must have the type of the result; the caller drops what has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matmorph.ir.build import Builder
from matmorph.ir.core import Arg, Node, Value
from matmorph.ir.op_reading import permutation
from matmorph.ir.op_table import BROADCASTING, having, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.types import Dim, TensorType


@dataclass(frozen=True, slots=True)
class CleanupWalk:
    """`readers`: how often a value of the graph was read before the walk. `made`: producer of each value so far."""

    b: Builder
    readers: Mapping[Value, int]
    made: dict[Value, Node]

    def maker(self, arg: Arg, *names: str) -> Node | None:
        """The node behind a value, if its operator is one of `names`."""
        node = self.made.get(arg) if isinstance(arg, Value) else None
        return node if node is not None and base_name(node.op) in names else None

    def once(self, value: Value) -> bool:
        """Whether nobody else reads it: then its node goes when this reader does."""
        return self.readers.get(value, 0) == 1


CleanupRule = Callable[[CleanupWalk, Node], Value | None]


def _shape(value: Value) -> tuple[Dim, ...]:
    return value.tensor.shape


def _number(arg: Arg) -> bool:
    return isinstance(arg, int | float) and not isinstance(arg, bool)


def _is_tensor(arg: Arg) -> bool:
    return isinstance(arg, Value) and isinstance(arg.type, TensorType)


# copies and layout


def _itself(walk: CleanupWalk, node: Node) -> Value | None:
    """A copy: to the type that it has, to its own shape, of all of it."""
    source = node.args[0]
    return source if isinstance(source, Value) else None


def _same_cast(walk: CleanupWalk, node: Node) -> Value | None:
    return node.args[0] if set(node.attrs) <= {"dtype"} else None


def _turned_twice(walk: CleanupWalk, node: Node) -> Value | None:
    """Orders after one another are one, or none. An inner one that others read stays, and so does what is behind it."""
    inner = walk.maker(node.args[0], *_ORDERS)
    if inner is None:
        return node.args[0] if permutation(node) == tuple(range(len(_shape(node.output)))) else None
    order = tuple(permutation(inner)[axis] for axis in permutation(node))
    if order == tuple(range(len(order))):
        return _itself(walk, inner)
    return walk.b("aten.permute.default", inner.args[0], order) if walk.once(node.args[0]) else None


def _reshaped_twice(walk: CleanupWalk, node: Node) -> Value | None:
    """Only the last shape counts; a shape that is there already needs nothing."""
    inner = walk.maker(node.args[0], *_RESHAPES)
    source = node.args[0] if inner is None else inner.args[0]
    if source.type == node.output.type:
        return _itself(walk, node) if inner is None else _itself(walk, inner)
    return None if inner is None else walk.b("aten.reshape.default", source, node.args[1])


def _unbroken(position: int) -> CleanupRule:
    """A slice, or its gradient, of the type of its operand leaves nothing out, unless it has steps. `position`: of the step."""

    def rule(walk: CleanupWalk, node: Node) -> Value | None:
        step = node.args[position] if len(node.args) > position else 1
        return _itself(walk, node) if step == 1 else None

    return rule


def _picked(walk: CleanupWalk, node: Node) -> Value | None:
    """One of one: the axis goes."""
    source, axis, index = node.args
    single = isinstance(axis, int) and _shape(source)[axis] == 1 and index in (0, -1)
    return walk.b("aten.squeeze.dim", source, axis) if single else None


def _put_back(walk: CleanupWalk, node: Node) -> Value | None:
    """The gradient of one of one: the axis comes back."""
    gradient, _, axis, index = node.args
    single = isinstance(axis, int) and _shape(node.output)[axis] == 1 and index in (0, -1)
    return walk.b("aten.unsqueeze.default", gradient, axis % len(_shape(node.output))) if single else None


def _summed_one(walk: CleanupWalk, node: Node) -> Value | None:
    """A sum or a mean over axes of size 1."""
    axes = node.args[1] if len(node.args) > 1 else None
    if not axes or node.attrs or any(_shape(node.args[0])[axis] != 1 for axis in axes):
        return None
    keep = len(node.args) > 2 and node.args[2]
    return _itself(walk, node) if keep else walk.b("aten.squeeze.dims", node.args[0], axes)


# arithmetic


def _unexpanded(walk: CleanupWalk, node: Node) -> Value | None:
    """A pointwise operator broadcasts by itself: what was expanded for it is read as it was, where the result keeps its shape."""
    sources = [walk.maker(arg, *_EXPANSIONS) for arg in node.args]
    if not any(sources):
        return None
    small = [arg if source is None else source.args[0] for arg, source in zip(node.args, sources, strict=True)]
    shapes = [_shape(arg) for arg in small if _is_tensor(arg)]
    return walk.b(node.op, *small, **node.attrs) if _covers(shapes, _shape(node.output)) else None


def _covers(shapes: Sequence[tuple[Dim, ...]], wanted: tuple[Dim, ...]) -> bool:
    """Whether some operand has each axis of the result in full."""
    rank = len(wanted)
    return all(
        dim == 1 or any(len(shape) >= rank - axis and shape[axis - rank] == dim for shape in shapes) for axis, dim in enumerate(wanted)
    )


def _neutral(number: float) -> CleanupRule:
    """x + 0, x - 0, x * 1, x / 1. An eps is no 0, however small."""

    def rule(walk: CleanupWalk, node: Node) -> Value | None:
        a, b = node.args[:2]
        if _number(b) and b == number and "rounding_mode" not in node.attrs:
            return a if isinstance(a, Value) else None
        return None

    return rule


def _filled(walk: CleanupWalk, node: Node) -> Value | None:
    """A tensor that is one number everywhere is read as that number, where the other operand gives the shape."""
    a, b, *rest = node.args
    swap = base_name(node.op) in ("mul", "add")
    for x, other in ((a, b), (b, a)) if swap and not node.attrs else ((a, b),):
        number = _fill(walk, other)
        if number is not None and _is_tensor(x) and x.type == node.output.type:
            return walk.b(node.op, x, number, *rest, **node.attrs)
    return None


def _fill(walk: CleanupWalk, arg: Arg) -> float | None:
    """The number that a tensor holds everywhere."""
    node = walk.maker(arg, *_FILLS)
    if node is None:
        return None
    fixed = {"zeros": 0.0, "ones": 1.0}.get(base_name(node.op).removesuffix("_like").removeprefix("new_"))
    if fixed is not None:
        return fixed
    value = node.args[-1] if base_name(node.op) != "scalar_tensor" else node.args[0]
    return float(value) if _number(value) else None


def _nested_factor(walk: CleanupWalk, node: Node) -> Value | None:
    """(x * a) * b = x * (a b)."""
    inner = walk.maker(node.args[0], "mul")
    if inner is None or not _number(inner.args[1]) or not _number(node.args[1]) or not walk.once(node.args[0]):
        return None
    return walk.b("aten.mul.Tensor", inner.args[0], inner.args[1] * node.args[1])


def _negated(walk: CleanupWalk, node: Node) -> Value | None:
    """x + (-y) = x - y, (-y) + x = x - y, x - (-y) = x + y."""
    if node.attrs:
        return None
    a, b = node.args[:2]
    other = {"add": "aten.sub.Tensor", "sub": "aten.add.Tensor"}[base_name(node.op)]
    right = walk.maker(b, "neg")
    if right is not None and _is_tensor(a):
        return walk.b(other, a, right.args[0])
    left = walk.maker(a, "neg")
    if left is not None and base_name(node.op) == "add" and _is_tensor(b):
        return walk.b(other, b, left.args[0])
    return None


def _twice_negated(walk: CleanupWalk, node: Node) -> Value | None:
    inner = walk.maker(node.args[0], "neg")
    return None if inner is None else _itself(walk, inner)


_ORDERS = of_kind("permute")
_RESHAPES = ("reshape", "view", "_unsafe_view")
_EXPANSIONS = of_kind("expand")
_FILLS = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "scalar_tensor")
_SEVERAL = BROADCASTING - having(BROADCASTING, operands=(0,))

CLEANUP_RULES: Mapping[str, tuple[CleanupRule, ...]] = {
    **dict.fromkeys(having(of_kind("same"), casts=False) | _EXPANSIONS, (_itself,)),
    **dict.fromkeys(_ORDERS, (_turned_twice,)),
    **dict.fromkeys(_RESHAPES, (_reshaped_twice,)),
    **dict.fromkeys(("sum", "mean"), (_summed_one,)),
    **dict.fromkeys(_SEVERAL, (_unexpanded,)),
    "_to_copy": (_same_cast,),
    "slice": (_unbroken(4),),
    "slice_backward": (_unbroken(5),),
    "select": (_picked,),
    "select_backward": (_put_back,),
    "mul": (_neutral(1), _filled, _nested_factor, _unexpanded),
    "div": (_neutral(1), _filled, _unexpanded),
    "add": (_neutral(0), _filled, _negated, _unexpanded),
    "sub": (_neutral(0), _filled, _negated, _unexpanded),
    "neg": (_twice_negated,),
}
