"""How a matmul reads its activation as rows [.., in] and gives rows [.., out] back: the same steps for the graph and for calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from matmorph.ir.build import Builder
from matmorph.ir.core import Value
from matmorph.ir.op_table import BARE_PRODUCTS, having, of_kind
from matmorph.ir.ops import base_name, resolve
from matmorph.ir.site import Application, Reject, Site
from matmorph.ir.sites.matmul_forms import pixel_steps, weight_first

RowStep: TypeAlias = "tuple[str, tuple[Any, ...]] | tuple[str, tuple[Any, ...], torch.memory_format]"
"""An operator of one tensor, its further arguments (hashable), and the memory format it is asked for, if any."""

# A permuted result is laid out in memory as the node's own is: later views of it rely on that.
_CONTIGUOUS: RowStep = ("aten.clone.default", (), torch.contiguous_format)
_END = 2**63 - 1
"""The end of an axis, as a slice has it."""
_SWAP: RowStep = ("aten.transpose.int", (-1, -2))


@dataclass(frozen=True, slots=True)
class RowView:
    """`enter`: from the operand to rows [.., in] (for an expert stack [.., E, rows, in]); `leave`: from rows [.., out] to the node's own
    result. `bias_on_rows`: whether its bias is added before `leave` (a channel axis) or after (as the node broadcasts it)."""

    enter: tuple[RowStep, ...] = ()
    leave: tuple[RowStep, ...] = ()
    bias_on_rows: bool = False


def row_view(site: Site, application: Application) -> RowView:
    """The view of one application. Raises ValueError with the reason where there is none (`unreadable` says so beforehand)."""
    name = base_name(application.node.op)
    if name not in _FORMS:
        raise ValueError(f"{name} is no form of a matmul that rows can be read from")
    return _FORMS[name](site, application)


def unreadable(site: Site) -> Reject | None:
    """Why the applications of a site cannot be read as rows; None where they can."""
    for application in site.applications:
        try:
            row_view(site, application)
        except ValueError as error:
            return Reject(str(error))
    return None


def emit(b: Builder, steps: Sequence[RowStep], x: Value) -> Value:
    """The steps as nodes."""
    for op, args, *layout in steps:
        attrs: dict[str, Any] = {"memory_format": layout[0]} if layout else {}
        x = b(op, x, *(list(arg) if isinstance(arg, tuple) else arg for arg in args), **attrs)
    return x


def apply(steps: Sequence[RowStep], x: torch.Tensor) -> torch.Tensor:
    """The steps on a tensor."""
    for op, args, *_ in steps:
        x = resolve(op)(x, *args)
    return x


def undo(steps: Sequence[RowStep], y: torch.Tensor) -> torch.Tensor:
    """What the steps of `RowView.leave` made, back to rows [.., out]: they only rearrange."""
    for op, args, *_ in reversed(steps):
        y = _UNDO[op](y, *args)
    return y


_UNDO: Mapping[str, Callable[..., torch.Tensor]] = {
    "aten.clone.default": lambda y: y,
    "aten.transpose.int": lambda y, one, other: y.transpose(one, other),
    "aten.permute.default": lambda y, order: y.permute(sorted(range(len(order)), key=order.__getitem__)),
    "aten.squeeze.dim": lambda y, axis: y.unsqueeze(axis),
    "aten.unflatten.int": lambda y, _, sizes: y.flatten(-len(sizes)),
}


def _as_it_is(site: Site, application: Application) -> RowView:
    return RowView()


def _product(site: Site, application: Application) -> RowView:
    """mm, bmm, matmul: W on the left multiplies columns."""
    x, y = application.x.tensor.shape, application.output.tensor.shape
    if len(x) == 1 and weight_first(application):
        return _vector(site, application)
    if site.batch is None and (len(x) != len(y) or any(a == 1 and b != 1 for a, b in zip(x[:-2], y[:-2], strict=True))):
        raise ValueError("the weight is broadcast to more axes than the activation has")
    return RowView(enter=(_SWAP,), leave=(_SWAP, _CONTIGUOUS)) if weight_first(application) else RowView()


def _convolution(site: Site, application: Application) -> RowView:
    """A kernel of one pixel: every position is a row, its channels are the features."""
    stride, padding = pixel_steps(application.node) or ((), ())
    axes = len(application.x.tensor.shape)
    last = (0, *range(2, axes), 1)
    back = (0, axes - 1, *range(1, axes - 1))
    taken = [("aten.slice.Tensor", (axis, 0, _END, step)) for axis, step in enumerate(stride, 2) if step > 1]
    padded = [("aten.constant_pad_nd.default", (tuple(n for pair in padding[::-1] for n in (pair, pair)), 0.0))] if any(padding) else []
    enter: tuple[RowStep, ...] = (*padded, *taken, ("aten.permute.default", (last,)))
    return RowView(enter, (("aten.permute.default", (back,)), _CONTIGUOUS), bias_on_rows=True)


def _vector(site: Site, application: Application) -> RowView:
    """One vector: a single row."""
    return RowView((("aten.unsqueeze.default", (0,)),), (("aten.squeeze.dim", (0,)),))


def _tensordot(site: Site, application: Application) -> RowView:
    """The axes that meet are one row's features; the weight's other axes come last."""
    met = len(application.node.args[2])
    outer = application.output.tensor.shape[len(application.x.tensor.shape) - met :]
    enter: tuple[RowStep, ...] = (("aten.flatten.using_ints", (-met, -1)),) if met > 1 else ()
    if not outer:
        return RowView(enter, (("aten.squeeze.dim", (-1,)),))
    return RowView(enter, () if len(outer) == 1 else (("aten.unflatten.int", (-1, outer)),))


def _einsum(site: Site, application: Application) -> RowView:
    """x is [stack, rows.., in] and the result [stack, rows.., out axes..], as `find_sites` accepts them."""
    x, y = application.x.tensor.shape, application.output.tensor.shape
    rows = len(x) - 1 - (site.batch is not None)
    outer = y[len(x) - 1 :]
    if site.batch is not None and rows > 1:
        raise ValueError("einsum with several row axes beside an expert stack")
    alone = site.batch is not None and rows == 0
    enter: tuple[RowStep, ...] = (("aten.unsqueeze.default", (-2,)),) if alone else ()
    leave: tuple[RowStep, ...] = (("aten.squeeze.dim", (-2,)),) if alone else ()
    if not outer:
        return RowView(enter, (*leave, ("aten.squeeze.dim", (-1,))))
    return RowView(enter, leave if len(outer) == 1 else (*leave, ("aten.unflatten.int", (-1, outer))))


_FORMS: Mapping[str, Callable[[Site, Application], RowView]] = {
    **dict.fromkeys(("linear", "addmm", "inner"), _as_it_is),
    **dict.fromkeys((*BARE_PRODUCTS, "baddbmm"), _product),
    **dict.fromkeys(("mv", "addmv"), _vector),
    "tensordot": _tensordot,
    **dict.fromkeys(having(of_kind("convolution"), transposed=False), _convolution),
    "einsum": _einsum,
}
