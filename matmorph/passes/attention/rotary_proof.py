"""Proof that queries or keys are turned by their place: that a value is x with pairs of its numbers rotated (RoFormer, Su et al., 2021) by
angles that a table gives, a row per place.

The table is what the cosine's and the sine's part of the graph give for all places in a row. It is a table only if every other set of
places gives its rows, whatever the set: angles that depend on the largest place (dynamic NTK, LongRoPE) do not pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from matmorph.ir.attention_ops import rotated
from matmorph.ir.core import Value
from matmorph.ir.types import TensorType
from matmorph.passes.attention.cone import Cone, Parts
from matmorph.passes.attention.setting import Setting

_NEAR = 60
_TOLERANCE = 2e-6
"""Of numbers of about 4 times a cosine, twice added: a few roundings in float32 at most, and the same ones mostly."""


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """`source`: x. `cos`, `sin` [places, R]: of the pairs (k, k + R), or of neighbours where `interleaved`."""

    source: Value
    cos: Tensor
    sin: Tensor
    interleaved: bool

    def turns_as(self, other: Rotation) -> bool:
        """By the same angles, in the same pairs."""
        return self.interleaved == other.interleaved and torch.equal(self.cos, other.cos) and torch.equal(self.sin, other.sin)


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Tables of one graph by the value that they stand for, None for one that is no table: layers share them."""

    parts: Parts
    setting: Setting
    places: int
    known: dict[Value, Tensor | None]

    def table(self, value: Value, places: Value) -> Tensor | None:
        """[places, width]: what the value is at each place."""
        if value not in self.known:
            cone = self.parts.cone(value)
            self.known[value] = None if cone is None else _table(cone, places, self.setting, self.places)
        return self.known[value]


def proved_rotation(tables: Tables, value: Value) -> Rotation | str | None:
    """How the value [B, heads, S, D] is turned; None where no place has to do with it, or why it is not proved."""
    turned = _turned(tables, value)
    if turned is None:
        return None
    cone, source, places = turned
    found = list(_bounds(cone, source))
    if len(found) != 2:
        return "what the places do to queries or keys is no rotation"
    rows = [row for bound in found if (row := tables.table(bound, places)) is not None]
    if len(rows) != 2:
        return "the angles of a place depend on other places too"
    for cos, sin in permutations(rows):
        for half, interleaved in _halves(cos.shape[1], int(value.tensor.shape[3])):
            rotation = Rotation(source, half(cos), half(sin), interleaved)
            if _fits(cone, rotation, places, tables):
                return rotation
    return "what the places do to queries or keys is no rotation"


def _turned(tables: Tables, value: Value) -> tuple[Cone, Value, Value] | None:
    """(the part from x to the value, x, the input that holds the places): the nearest x from which nothing but places is read."""
    for source in tables.parts.ancestors(value, _NEAR):
        if not isinstance(source.type, TensorType) or source.type != value.type:
            continue
        cone = tables.parts.cone(value, {source})
        if cone is None or any(const.kind == "parameter" for const in cone.consts) or len(cone.leaves) != 1:
            continue
        places = cone.leaves[0].type
        if isinstance(places, TensorType) and places.shape == tables.setting.rows and not places.torch_dtype.is_floating_point:
            return cone, source, cone.leaves[0]
    return None


def _bounds(cone: Cone, source: Value) -> Iterator[Value]:
    """What does not depend on x and meets what does."""
    dependent, found = {source}, dict[Value, None]()
    for node in cone.nodes:
        if not dependent.isdisjoint(node.inputs()):
            dependent.update(node.outputs)
            found.update(dict.fromkeys(each for each in node.inputs() if each not in dependent and isinstance(each.type, TensorType)))
    return iter(found)


def _table(cone: Cone, places: Value, setting: Setting, count: int) -> Tensor | None:
    def rows(at: Tensor) -> Tensor:
        kind = places.tensor.torch_dtype
        return cone({places: at.to(kind)}, setting.sizes(at.shape[0], at.shape[1], 0)).float().reshape(at.numel(), -1)

    table = rows(torch.arange(count)[None])
    random = torch.Generator().manual_seed(0)
    for at in _sets(count, random):
        found = rows(at)
        if found.shape[1:] != table.shape[1:] or bool((found - table[at.reshape(-1)]).abs().max() > _TOLERANCE):
            return None
    return table


def _sets(count: int, random: torch.Generator) -> Iterator[Tensor]:
    """Sets of places: the last, the first, one twice, in no order, of one row and of several."""
    yield torch.tensor([[count - 1]])
    yield torch.tensor([[0, 0]])
    yield torch.tensor([[count // 2, 1, count - 1], [0, count // 3, 0]])
    for batch, length in ((1, 2), (3, 5)):
        yield torch.randint(0, count, (batch, length), generator=random)


def _halves(width: int, size: int) -> Iterator[tuple[Callable[[Tensor], Tensor], bool]]:
    """Ways in which a row may hold the angles: once each, or twice, as halves or as neighbours."""
    if 2 * width <= size:
        yield (lambda row: row), False
        yield (lambda row: row), True
    if width % 2 == 0 and width <= size:
        yield (lambda row: row[:, : width // 2].contiguous()), False
        yield (lambda row: row[:, ::2].contiguous()), True


def _fits(cone: Cone, rotation: Rotation, places: Value, tables: Tables) -> bool:
    random = torch.Generator().manual_seed(0)
    heads, size = (int(rotation.source.tensor.shape[axis]) for axis in (1, 3))
    for batch, length in ((2, 3), (1, 1), (1, 5)):
        x = torch.randn(batch, heads, length, size, generator=random)
        at = torch.randint(0, tables.places, (batch, length), generator=random)
        given = {rotation.source: x, places: at.to(places.tensor.torch_dtype)}
        found = cone(given, tables.setting.sizes(batch, length, 2))
        wanted = rotated(x, rotation.cos[at], rotation.sin[at], rotation.interleaved)
        if bool((found.float() - wanted).abs().max() > _TOLERANCE * max(1.0, float(x.abs().max()))):
            return False
    return True
