"""The normal form of a trace: what changes no element is dropped, every change of shape is a `reshape`.

1. `view` and `_unsafe_view` become `reshape`: a view may rely on the strides that one backend's kernels happen to give.
2. `clone`, `contiguous`, `lift_fresh_copy`, `dropout` in eval mode, and conversions to the type a value has already, are the value itself.
3. Second names (`divide`, `multiply`, `greater`) become the first: what follows knows an operator by one name.
4. Other conversions become `_to_copy`; `flatten` and `unflatten` become `reshape` where one -1 says enough, `chunk` becomes `split`.

In this form many programs need no `run_decompositions`, which traces them a second time (`is_functional`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.fx
from torch._export import utils as export_utils
from torch.export import ExportedProgram

from matmorph.ir.ops import op_name


@dataclass(frozen=True, slots=True)
class Same:
    """The node's result is that of another node."""

    value: torch.fx.Node


@dataclass(frozen=True, slots=True)
class Op:
    """The node as another operator."""

    op: str
    args: tuple[Any, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)


Normal = Same | Op
NormalRule = Callable[[torch.fx.Node], "Normal | None"]
"""None: this node cannot be brought into normal form here."""


def normal(node: torch.fx.Node) -> Normal | None:
    """The normal form of one call, None where it stays as it is. A copy that is a result of the program stays a copy."""
    rule = _RULES.get(op_name(node.target))
    found = rule(node) if rule is not None else None
    if isinstance(found, Same) and any(user.op == "output" for user in node.users):
        return Op("aten.clone.default", (found.value,))
    return found


def is_functional(program: ExportedProgram) -> bool:
    """Whether no operator of the program writes to its operands, holds a sub-graph, or is a composite that may alias them, apart from those
    that the normal form replaces: then `run_decompositions({})` would change nothing that matters here."""
    return all(_is_pure(node) for node in program.graph.nodes if node.op == "call_function")


def _is_pure(node: torch.fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return not isinstance(target, torch._ops.HigherOrderOperator)
    if op_name(target) in _RULES:
        return normal(node) is not None
    composite = export_utils._is_cia_op(target) and not export_utils._is_preservable_cia_op(target)
    return not (target._schema.is_mutable or composite)


def _source(node: torch.fx.Node) -> torch.fx.Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], torch.fx.Node) else None


def _same(node: torch.fx.Node) -> Normal | None:
    source = _source(node)
    return Same(source) if source is not None else None


def _reshape(node: torch.fx.Node) -> Normal | None:
    return Op("aten.reshape.default", node.args) if len(node.args) == 2 else None


def _dropout(node: torch.fx.Node) -> Normal | None:
    return _same(node) if len(node.args) == 3 and node.args[2] is False else None


def _convert(node: torch.fx.Node) -> Normal | None:
    source = _source(node)
    if source is None:
        return None
    old, new = source.meta["val"], node.meta["val"]
    changed = {name: getattr(new, name) for name in ("dtype", "device") if getattr(new, name) != getattr(old, name)}
    return Op("aten._to_copy.default", (source,), changed) if changed else Same(source)


def _to_shape(node: torch.fx.Node) -> Normal | None:
    """A reshape to the result's shape where at most one of its dims is symbolic; else the operator itself, which only may alias."""
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    return Op("aten.reshape.default", (node.args[0], sizes)) if sizes.count(-1) <= 1 else Op(op_name(node.target), node.args, node.kwargs)


def _chunk(node: torch.fx.Node) -> Normal | None:
    source, parts = _source(node), node.meta["val"]
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    size = parts[0].shape[axis] if parts else None
    return Op("aten.split.Tensor", (source, size, axis)) if source is not None and isinstance(size, int) else None


_SECOND_NAMES = {
    **dict.fromkeys(("divide", "true_divide"), "div"),
    "multiply": "mul",
    "subtract": "sub",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
}


def _renamed() -> Iterator[tuple[str, NormalRule]]:
    """A rule per overload that both names have."""
    for second, first in _SECOND_NAMES.items():
        for overload in getattr(torch.ops.aten, first).overloads():
            if overload in getattr(torch.ops.aten, second).overloads() and "out" not in overload:
                yield f"aten.{second}.{overload}", partial(_under, f"aten.{first}.{overload}")


def _under(op: str, node: torch.fx.Node) -> Normal | None:
    return Op(op, node.args, node.kwargs)


_RULES: Mapping[str, NormalRule] = {
    **dict(_renamed()),
    **dict.fromkeys(("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default"), _reshape),
    **dict.fromkeys(("aten.clone.default", "aten.contiguous.default", "aten.lift_fresh_copy.default"), _same),
    **dict.fromkeys(
        ("aten.to.device", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.other", "aten.type_as.default", "aten._to_copy.default"),
        _convert,
    ),
    **dict.fromkeys(("aten.flatten.using_ints", "aten.unflatten.int"), _to_shape),
    "aten.dropout.default": _dropout,
    "aten.chunk.default": _chunk,
}
