"""Heads side by side in a row, [B, S, N*D], where a graph has them apart, [B, N, S, D], next to it: the same numbers before they were laid
out, or after they are put back. That a value is these numbers in that order is proved by computing it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from matmorph.ir.core import Node, Value
from matmorph.ir.op_table import LAYOUT_OPS
from matmorph.ir.ops import base_name
from matmorph.ir.types import Dim, TensorType
from matmorph.passes.attention.cone import Cone, Parts
from matmorph.passes.attention.setting import Setting

_NEAR = 6


def joined(apart: Value) -> tuple[Dim, Dim, int]:
    """The shape with the heads side by side."""
    batch, heads, length, size = apart.tensor.shape
    return batch, length, int(heads) * int(size)


def joined_before(parts: Parts, apart: Value, setting: Setting) -> Value | None:
    """What the value was laid out from, with its heads side by side; None where that is not there."""
    for source in parts.ancestors(apart, _NEAR):
        if _is_joined(source, apart):
            cone = parts.cone(apart, {source})
            return source if cone is not None and _only_lays_out(cone) and _puts_apart(cone, source, setting) else None
    return None


def joined_after(parts: Parts, users: Mapping[Value, tuple[Node, ...]], apart: Value, setting: Setting) -> Value | None:
    """What the value is laid out to, with its heads side by side; None where anything else is done with it on the way."""
    current = apart
    for _ in range(_NEAR):
        readers = users.get(current, ())
        if len(readers) != 1 or base_name(readers[0].op) not in LAYOUT_OPS or len(readers[0].outputs) != 1:
            return None
        current = readers[0].output
        if _is_joined(current, apart):
            cone = parts.cone(current, {apart})
            return current if cone is not None and _only_lays_out(cone) and _puts_together(cone, apart, setting) else None
    return None


def _is_joined(value: Value, apart: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type == TensorType(apart.tensor.dtype, joined(apart))


def _only_lays_out(cone: Cone) -> bool:
    return not cone.leaves and not cone.consts and all(base_name(node.op) in LAYOUT_OPS for node in cone.nodes)


def _puts_apart(cone: Cone, source: Value, setting: Setting) -> bool:
    heads, size = (int(cone.result.tensor.shape[axis]) for axis in (1, 3))
    numbers = torch.arange(2 * 3 * heads * size, dtype=torch.float32).view(2, 3, heads * size)
    return torch.equal(cone({source: numbers}, setting.sizes(2, 3, 4)), numbers.view(2, 3, heads, size).transpose(1, 2))


def _puts_together(cone: Cone, apart: Value, setting: Setting) -> bool:
    heads, size = (int(apart.tensor.shape[axis]) for axis in (1, 3))
    numbers = torch.arange(2 * 3 * heads * size, dtype=torch.float32).view(2, heads, 3, size)
    return torch.equal(cone({apart: numbers}, setting.sizes(2, 3, 4)), numbers.transpose(1, 2).flatten(2))
