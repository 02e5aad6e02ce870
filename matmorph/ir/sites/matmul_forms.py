"""Which nodes multiply an activation by a stored weight, and how to read each as rows times a matrix: one function per operator.

The rules for `Application.x`, by form, are those a rewrite needs to make rows of it:

* linear, addmm, einsum: x is [..., in] and the result [..., out] (an einsum's out axes may be several, always last).
* mm, expert: x is [..., in] and the result [..., out] where the weight is the second operand; where it is the first
  (`weight_first(application)`), x is [..., in, n] and the result [..., out, n].
* mm by mv and its kin: x is [in] and the result [out]. By tensordot: x is [..., in] with one or several axes last, and the result
  [..., out], its axes as the weight has them.
* conv1x1: x is [n, in, *pixels] and the result [n, out, *pixels]; a stride takes every n-th pixel, padding adds pixels of zeros.
* expert: x has the axis of the picked matrices (with `select`), or of all of them, in front of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from matmorph.ir.core import Node, Value
from matmorph.ir.op_table import BARE_PRODUCTS, having, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.site import Application, Form
from matmorph.ir.sites.weight_view import WeightReading, WeightView, matrix

Views: TypeAlias = Mapping[Value, WeightView]


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One matmul with a stored weight. `operand` is the value that the node reads it by. `reading` is None where `problem` says why the
    weight cannot be read as a matrix there; a problem with a reading is one of the node itself."""

    view: WeightView
    operand: Value
    form: Form
    application: Application
    reading: WeightReading | None
    problem: str | None = None


def find_use(node: Node, views: Views) -> Use | None:
    """The matmul with a weight that this node is, if it is one."""
    rule = _FORMS.get(base_name(node.op))
    return rule(node, views) if rule is not None else None


def gathered(node: Node, views: Views) -> WeightView | None:
    """The table that an embedding node gathers rows from, where it is a stored weight as it stands."""
    if base_name(node.op) != "embedding" or not node.args or node.args[0] not in views:
        return None
    view = views[node.args[0]]
    reading = matrix(view, (), (0,), (1,)) if len(view.axes) == 2 and view.cast is None else "no table"
    plain = isinstance(reading, WeightReading) and reading.layout == "oi" and reading.rows == (0, reading.total)
    return view if plain else None


def weight_first(application: Application) -> bool:
    """Whether the weight is the left operand, so that columns of x, not its rows, are multiplied."""
    node = application.node
    return base_name(node.op) in BARE_PRODUCTS and node.args[0] is not application.x


def _use(
    view: WeightView,
    operand: Value,
    form: Form,
    application: Application,
    axes: tuple[Sequence[int], Sequence[int], Sequence[int]],
    problem: str | None = None,
) -> Use:
    """`axes`: batch, out and contracted axes of the operand."""
    reading = matrix(view, *axes)
    if view.cast is not None:
        problem = f"it is converted to {view.cast} before it is used"
    if isinstance(reading, str):
        return Use(view, operand, form, application, None, reading)
    return Use(view, operand, "expert" if reading.batch is not None else form, application, reading, problem)


def _get(args: Sequence[Any], position: int) -> Any:
    return args[position] if len(args) > position else None


def _linear(node: Node, views: Views) -> Use | None:
    x, weight = node.args[:2]
    view = views.get(weight)
    if view is None or len(view.axes) != 2:
        return None
    return _use(view, weight, "linear", Application(node, x, node.output, _get(node.args, 2)), ((), (0,), (1,)))


def _addmm(node: Node, views: Views) -> Use | None:
    bias, x, weight = node.args[:3]
    view = views.get(weight)
    if view is None or x in views:
        return None
    return _use(view, weight, "addmm", Application(node, x, node.output, bias), ((), (1,), (0,)), _scaled(node))


def _product(node: Node, views: Views) -> Use | None:
    """mm, bmm, matmul: one operand is the weight, on either side; a product of two weights is none."""
    left, right = node.args[:2]
    view = views.get(right)
    if (left in views) == (right in views):
        return None
    operand, x = (left, right) if view is None else (right, left)
    view = views[operand]
    rank = len(view.axes)
    if rank < 2:
        return None
    batch = tuple(range(rank - 2))
    select = view.select
    application = Application(node, x, node.output, None, select)
    if operand is right:
        return _use(view, operand, "mm", application, (batch, (rank - 1,), (rank - 2,)))
    problem = "a stack of matrices multiplies a single vector" if len(x.tensor.shape) < 2 < rank else None
    return _use(view, operand, "mm", application, (batch, (rank - 2,), (rank - 1,)), problem)


def _inner(node: Node, views: Views) -> Use | None:
    """The last axes of both meet."""
    x, weight = node.args[:2]
    view = views.get(weight)
    if view is None or x in views or len(view.axes) != 2 or not x.tensor.shape:
        return None
    return _use(view, weight, "mm", Application(node, x, node.output), ((), (0,), (1,)))


def _vector(node: Node, views: Views) -> Use | None:
    """mv and addmv: a matrix times one vector."""
    *bias, weight, x = node.args
    view = views.get(weight)
    if view is None or x in views or len(view.axes) != 2:
        return None
    application = Application(node, x, node.output, bias[0] if bias else None)
    return _use(view, weight, "mm", application, ((), (0,), (1,)), _scaled(node))


def _batched(node: Node, views: Views) -> Use | None:
    """baddbmm: a stack of products, and something added."""
    bias, x, weight = node.args[:3]
    view = views.get(weight)
    if view is None or x in views:
        return None
    return _use(view, weight, "mm", Application(node, x, node.output, bias, view.select), ((0,), (2,), (1,)), _scaled(node))


def _tensordot(node: Node, views: Views) -> Use | None:
    """The last axes of an activation, in order, meet any of a weight."""
    x, weight, of_x, of_weight = node.args[:4]
    view, rank = views.get(weight), len(x.tensor.shape)
    if view is None or x in views or [axis % rank for axis in of_x] != list(range(rank - len(of_x), rank)):
        return None
    inner = [axis % len(view.axes) for axis in of_weight]
    out = [axis for axis in range(len(view.axes)) if axis not in inner]
    return _use(view, weight, "mm", Application(node, x, node.output), ((), out, inner)) if inner else None


def _scaled(node: Node) -> str | None:
    scaled = any(node.attrs.get(name, 1) != 1 for name in ("alpha", "beta"))
    return "its product or bias is scaled by the same node (alpha, beta)" if scaled else None


def _convolution(node: Node, views: Views) -> Use | None:
    """A convolution with a kernel of one pixel and one group."""
    x, weight, bias = (*node.args, None)[:3]
    view = views.get(weight)
    found = pixel_steps(node)
    if view is None or found is None:
        return None
    pixels = tuple(range(2, len(view.axes)))
    problem = None
    if len(x.tensor.shape) != len(view.axes):
        problem = "its input has no batch axis"
    elif any(step > 1 and not isinstance(size, int) for size, step in zip(x.tensor.shape[2:], found[0], strict=True)):
        problem = "it strides over an axis of varying size"
    return _use(view, weight, "conv1x1", Application(node, x, node.output, bias), ((), (0, *pixels), (1,)), problem)


def pixel_steps(node: Node) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(stride, padding) of a convolution with a kernel of one pixel and one group, by axis; None for any other."""
    weight, rest = node.args[1], node.args[3:]
    if base_name(node.op) == "convolution":  # x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        stride, padding, _, transposed, _, groups = rest[:6]
    else:  # x, weight, bias, stride, padding (a word for some), dilation, groups
        given = [*rest, *(1, 0, 1, 1)[len(rest) :]]
        stride, padding, groups = given[0], given[1], given[3]
        transposed = False
    if set(weight.tensor.shape[2:]) != {1} or transposed or groups != 1:
        return None
    count = len(weight.tensor.shape) - 2
    return _each(stride, count), _each(0 if padding in ("same", "valid") else padding, count)


def _each(entry: Any, count: int) -> tuple[int, ...]:
    """One number for each axis."""
    given = tuple(entry) if isinstance(entry, tuple | list) else (entry,)
    return given * count if len(given) == 1 else given


def _einsum(node: Node, views: Views) -> Use | None:
    """Two operands, one of them a weight, axes of which meet axes of x and vanish."""
    operands = node.args[1]
    held = [k for k, operand in enumerate(operands) if operand in views]
    if len(operands) != 2 or len(held) != 1 or len(views[operands[held[0]]].const.tensor.shape) < 2:
        return None
    operand, x = operands[held[0]], operands[1 - held[0]]
    terms, result = _equation(node.args[0], [len(o.tensor.shape) for o in operands])
    of_weight, of_x = terms[held[0]], terms[1 - held[0]]
    inner = [axis for axis in of_weight if axis in of_x and axis not in result]
    if not inner:
        return None
    batch = [axis for axis in of_weight if axis in of_x and axis in result]
    out = [axis for axis in of_weight if axis not in of_x]
    rest = [axis for axis in of_x if axis not in inner and axis not in batch]
    problem = None
    if len(inner) > 1:
        problem = f"einsum {node.args[0]!r} contracts {len(inner)} axes"
    elif of_x != [*batch, *rest, *inner] or result != [*batch, *rest, *out]:
        problem = f"einsum {node.args[0]!r} sums over or permutes other axes"
    at = of_weight.index
    axes = ([at(a) for a in batch], [at(a) for a in out], [at(a) for a in inner])
    view = views[operand]
    return _use(view, operand, "einsum", Application(node, x, node.output, None, view.select), axes, problem)


def _equation(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Axis names of each operand and of the result; an ellipsis becomes axes named "0", "1" ... from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [_term(text, rank) for text, rank in zip(left.split(","), ranks, strict=True)]
    names = [name for term in terms for name in term]
    dots = sorted({name for name in names if name.isdigit()}, key=int, reverse=True)
    if arrow:
        before, found, after = right.partition("...")
        return terms, [*before, *(dots if found else ()), *after]
    return terms, [*dots, *sorted(name for name in set(names) if names.count(name) == 1 and not name.isdigit())]


def _term(text: str, rank: int) -> list[str]:
    before, found, after = text.partition("...")
    width = rank - len(before) - len(after) if found else 0
    return [*before, *(str(k) for k in reversed(range(width))), *after]


_FORMS: Mapping[str, Callable[[Node, Views], Use | None]] = {
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(BARE_PRODUCTS, _product),
    "inner": _inner,
    "mv": _vector,
    "addmv": _vector,
    "baddbmm": _batched,
    "tensordot": _tensordot,
    **dict.fromkeys(having(of_kind("convolution"), transposed=False), _convolution),
    "einsum": _einsum,
}
