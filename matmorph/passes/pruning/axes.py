"""Axes that carry the width of a block: of which units they are made, what size they get, which positions stay.

An axis is a row-major product of atoms, some of which count units that pruning may remove (hidden features of an MLP, key/value heads,
dimensions of a head); or the concatenation of several such products, as behind a fused projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from torch import Tensor

from matmorph.ir.types import Dim, as_dim

WIDTH, HEADS, QK, V = "width", "heads", "qk", "v"
"""Units: features between the two halves of an MLP; key/value heads with all query heads that read them; dimensions of a head of queries
and keys (under rotary embeddings: pairs of them); dimensions of a head of values."""
PART = "part"
"""Not a unit: the axis over the parts of a fused projection (q, k, v), which nothing removes."""


@dataclass(frozen=True, slots=True)
class Atom:
    """`size` positions; `unit`: of what, None for what pruning leaves alone."""

    size: Dim
    unit: str | None = None


AxisProduct: TypeAlias = tuple[Atom, ...]
"""Row-major, major first; () is an axis of size 1."""


@dataclass(frozen=True, slots=True)
class Concat:
    """Products one after the other on one axis."""

    parts: tuple[AxisProduct, ...]


Axis: TypeAlias = "AxisProduct | Concat"
Axes: TypeAlias = tuple[Axis, ...]
"""Of a value, one per dimension."""
Counts: TypeAlias = Mapping[str, int]
"""How many of each unit stay; units that are not named stay whole."""
KeptUnits: TypeAlias = Mapping[str, Tensor]
"""Which of each unit stay, ascending: indices [n], or [heads, n] where each key/value head has its own."""


def plain(shape: Iterable[Dim]) -> Axes:
    """The axes of a value in which no unit is known."""
    return tuple(() if size == 1 else (Atom(size),) for size in shape)


def product(*atoms: Atom) -> AxisProduct:
    """The normal form: nothing of size 1, plain numbers that lie side by side as one."""
    found: list[Atom] = []
    for atom in atoms:
        if atom.size == 1:
            continue
        if found and found[-1].unit is None and atom.unit is None and isinstance(atom.size, int) and isinstance(found[-1].size, int):
            found[-1] = Atom(found[-1].size * atom.size)
        else:
            found.append(atom)
    return tuple(found)


def units_of(axis: Axis) -> frozenset[str]:
    """The units that an axis counts."""
    if isinstance(axis, Concat):
        return frozenset(unit for part in axis.parts for unit in units_of(part))
    return frozenset(atom.unit for atom in axis if atom.unit not in (None, PART))


def resized(axis: Axis, counts: Counts) -> Dim:
    """The size of an axis once only `counts` units of each kind are left; with {} the size it has."""
    if isinstance(axis, Concat):
        return as_dim(sum(resized(part, counts) for part in axis.parts))
    total: Dim = 1
    for atom in axis:
        total = as_dim(total * (counts.get(atom.unit, atom.size) if atom.unit else atom.size))
    return total


def size_of(axis: Axis) -> Dim:
    """The size it has."""
    return resized(axis, {})


def positions(axis: Axis, kept: KeptUnits) -> Tensor:
    """Positions of an axis that stay, in order: int64 [new size]. The axis must have a fixed size."""
    if isinstance(axis, Concat):
        found, start = [], 0
        for part in axis.parts:
            found.append(start + positions(part, kept))
            start += int(size_of(part))
        return torch.cat(found)
    if not axis:
        return torch.zeros(1, dtype=torch.int64)
    sizes = [int(atom.size) for atom in axis]
    names = [atom.unit for atom in axis]
    table = torch.arange(int(size_of(axis))).reshape(sizes)
    for dim in sorted(range(len(axis)), key=lambda dim: names[dim] == HEADS):  # heads last: dimensions are chosen per head
        index = kept.get(names[dim] or "")
        if index is None:
            continue
        if index.dim() == 1:
            table = table.index_select(dim, index)
            continue
        shape = [1] * len(axis)
        shape[names.index(HEADS)], shape[dim] = index.shape
        wanted = [*table.shape]
        wanted[dim] = index.shape[1]
        table = table.gather(dim, index.reshape(shape).expand(wanted))
    return table.reshape(-1)


def regrouped(axes: Axes, shape: Sequence[Dim]) -> Axes | None:
    """The axes of the same elements in row-major order under another shape; None where a unit or a concatenation would be cut."""
    left: list[Atom | Concat] = [item for axis in axes for item in ((axis,) if isinstance(axis, Concat) else axis)]
    found: list[Axis] = []
    for size in shape:
        axis = _take(left, size)
        if axis is None:
            return None
        found.append(axis)
    return None if left else tuple(found)


def _take(left: list[Atom | Concat], size: Dim) -> Axis | None:
    """The next axis, of this size; what it is made of leaves `left`."""
    taken: list[Atom] = []
    need: Dim = size
    while need != 1:
        if not left:
            return None
        head = left.pop(0)
        if isinstance(head, Concat):
            return head if not taken and size_of(head) == size else None
        if (rest := divided(need, head.size)) is not None:
            taken.append(head)
            need = rest
        elif head.unit is None and (rest := divided(head.size, need)) is not None:
            taken.append(Atom(need))
            left.insert(0, Atom(rest))
            need = 1
        else:
            return None
    return product(*taken)


def divided(size: Dim, by: Dim) -> Dim | None:
    """size / by where that is a whole number or polynomial, else None."""
    if size == by:
        return 1
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    quotient = sympy.cancel(sympy.sympify(size) / sympy.sympify(by))
    if quotient.is_number:
        return as_dim(quotient) if quotient.is_Integer else None
    whole = quotient.is_polynomial() and all(number.is_Integer for number in sympy.Poly(quotient).coeffs())
    return as_dim(quotient) if whole else None


def totals(axis: AxisProduct, values: Tensor, *units: str) -> Tensor:
    """Sums of one number per position of the axis over all but the given units, which must be among its own, in that order."""
    table = values.reshape([int(atom.size) for atom in axis])
    names = [atom.unit for atom in axis]
    rest = [dim for dim, name in enumerate(names) if name not in units]
    summed = table.sum(rest) if rest else table
    left = [name for name in names if name in units]
    return summed.permute([left.index(unit) for unit in units])
