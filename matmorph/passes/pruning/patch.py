"""Patches: a block made narrower. Weights are cut, literals that carry the width are written anew, values from outside are gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from matmorph.ir.build import Builder
from matmorph.ir.core import Const, Node, Value
from matmorph.ir.site import Choice, Site
from matmorph.ir.types import TensorType, dtype_name
from matmorph.passes.pruning.axes import QK, Counts, KeptUnits, positions, resized, units_of
from matmorph.passes.pruning.axis_walk import Literal, Place, replaced
from matmorph.passes.pruning.find_blocks import Block


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """What a block becomes. `consts`: narrower weights and biases for those they replace, under their names. `nodes`: what stands in place
    of nodes of the region. `inputs`: narrower pasts of a cache for those they replace. `added`: index constants. `features`: the consumer's
    input features that stay, `weight` [out, in] its new matrix. `kept`: of each constant of the producers the axis that was cut, and what
    stays of it. `choice` is what was taken in the end."""

    block: Block
    consts: Mapping[Const, Const]
    nodes: Mapping[Node, tuple[Node, ...]]
    inputs: Mapping[Value, Value]
    added: tuple[Const, ...]
    features: Tensor
    weight: Tensor
    choice: Choice
    notes: tuple[str, ...] = ()
    kept: Mapping[Const, tuple[int, Tensor]] = field(default_factory=dict)

    def in_full_width(self) -> dict[Const, Callable[[], Tensor]]:
        """The weights that make the block as wide as it was compute what it computes now: zeros in the place of what is gone. The softmax
        keeps its scale in both."""
        consumer = self.block.consumer
        axis = 1 if consumer.layout == "oi" else 0
        narrow = self.weight if consumer.layout == "oi" else self.weight.T
        found = {const: partial(_zeroed, const, axis, rows) for const, (axis, rows) in self.kept.items()}
        return {**found, consumer.const: partial(_spread, consumer.const, axis, self.features, narrow)}


def _zeroed(const: Const, axis: int, rows: Tensor) -> Tensor:
    stored = const.load().detach()
    own = rows.to(stored.device)
    return torch.zeros_like(stored).index_copy_(axis, own, stored.index_select(axis, own))


def _spread(const: Const, axis: int, features: Tensor, narrow: Tensor) -> Tensor:
    stored = const.load().detach()
    return torch.zeros_like(stored).index_copy_(axis, features.to(stored.device), narrow.to(stored))


def counts_of(kept: KeptUnits) -> Counts:
    """How many of each unit stay."""
    return {unit: int(index.shape[-1]) for unit, index in kept.items()}


def make_patch(block: Block, kept: KeptUnits, weight: Tensor, label: str, b: Builder, choice: Choice, notes: tuple[str, ...] = ()) -> Patch:
    """The patch that keeps these units. `weight` [out, new in]: the consumer's matrix in its stored type. `label` names the method in the
    storage keys of what it cut and in the names of index constants; `b` writes over the graph that the block was found in."""
    marker = len(b.consts)
    shop = _Shop(block, kept, label, b)
    for producer in block.producers:
        shop.cut_producer(producer.site, positions(producer.axis, kept))
    shop.consts[block.consumer.const] = _stored(block.consumer, weight, label)
    shop.edit_region()
    features = positions(block.axis, kept)
    added = tuple(b.consts[marker:])
    pasts = _pasts(block, counts_of(kept))
    return Patch(block, shop.consts, shop.written(), pasts, added, features, weight, choice, notes, shop.kept_rows)


def _pasts(block: Block, counts: Counts) -> Mapping[Value, Value]:
    """The pasts of a cache as wide as what is put behind them."""
    found = {}
    for past in block.pasts:
        kind = past.value.tensor
        shape = tuple(resized(axis, counts) if units_of(axis) else size for axis, size in zip(past.axes, kind.shape, strict=True))
        if shape != kind.shape:
            found[past.value] = replace(past.value, type=replace(kind, shape=shape))
    return found


class _Shop:
    """The patch while it is made."""

    def __init__(self, block: Block, kept: KeptUnits, label: str, b: Builder) -> None:
        self.consts: dict[Const, Const] = {}
        self.kept_rows: dict[Const, tuple[int, Tensor]] = {}
        self._block = block
        self._kept = kept
        self._label = label
        self._b = b
        self._rule, self._location = b.origin.rule, b.origin.location
        self._edits: dict[Node, dict[Place, Any]] = {}
        self._gathers: dict[Node, tuple[Node, ...]] = {}
        self._gathered: dict[tuple[Value, int, str], Value] = {}
        self._indices: dict[str, Const] = {}

    def cut_producer(self, site: Site, rows: Tensor) -> None:
        self._cut(site.const, 0 if site.layout == "oi" else 1, rows)
        for application in site.applications:
            bias = application.bias
            if isinstance(bias, Const):
                if bias not in self.consts:
                    self._cut(bias, len(bias.tensor.shape) - 1, rows)
            elif bias is not None:
                place = next((k,) for k, arg in enumerate(application.node.args) if arg is bias)
                self._gather(application.node, place, bias, len(bias.tensor.shape) - 1, rows)

    def _cut(self, const: Const, axis: int, rows: Tensor) -> None:
        self.consts[const] = cut(const, axis, rows, self._label)
        self.kept_rows[const] = axis, rows

    def edit_region(self) -> None:
        counts = counts_of(self._kept)
        for literal in self._block.literals:
            self._edits.setdefault(literal.node, {})[literal.place] = -1 if literal.fill else _number(literal, counts)
        for side in self._block.sides:
            self._gather(side.node, side.place, side.value, side.dim, positions(side.axis, self._kept))
        for scale in self._block.scales if QK in counts else ():
            self._edits.setdefault(scale.node, {})[("scale",)] = scale.value

    def _gather(self, node: Node, place: Place, value: Value, dim: int, rows: Tensor) -> None:
        """`value` where `node` reads it, only `rows` of its axis; nodes stand in front of the first that reads it."""
        if len(rows) == value.tensor.shape[dim]:
            return
        key = (value, dim, str(rows.tolist()))
        if key not in self._gathered:
            self._b.origin = replace(node.origin, rule=self._rule, location=self._location)
            mark = len(self._b.nodes)
            self._gathered[key] = self._b("aten.index_select.default", value, dim, self._index(rows), name=f"{value.name}_kept")
            self._gathers[node] = (*self._gathers.get(node, ()), *self._b.nodes[mark:])
        self._edits.setdefault(node, {})[place] = self._gathered[key]

    def _index(self, rows: Tensor) -> Const:
        key = str(rows.tolist())
        if key not in self._indices:
            name = f"{self._block.consumer.path}.{self._label}.kept_{len(self._indices)}"
            self._indices[key] = self._b.const(name, rows, kind="buffer", rule=self._rule)
        return self._indices[key]

    def written(self) -> Mapping[Node, tuple[Node, ...]]:
        found = {}
        for node in self._edits.keys() | self._gathers.keys():
            args, attrs = node.args, dict(node.attrs)
            for place, new in self._edits.get(node, {}).items():
                if isinstance(place[0], str):
                    attrs[place[0]] = new
                else:
                    args = replaced(args, place, new)
            found[node] = (*self._gathers.get(node, ()), replace(node, args=args, attrs=attrs))
        return found


def _number(literal: Literal, counts: Counts) -> int:
    return sum(int(resized(term, counts)) for term in literal.terms)


def cut(const: Const, dim: int, rows: Tensor, label: str) -> Const:
    """The constant with only these positions along `dim`, under its own names; read when it is loaded."""
    shape = [*const.tensor.shape]
    shape[dim] = len(rows)

    def load() -> Tensor:
        stored = const.load()
        return stored.detach().index_select(dim, rows.to(stored.device)).contiguous()

    return replace(const, type=TensorType(const.tensor.dtype, tuple(shape)), load=load, storage=f"{const.storage or const.path}#{label}")


def _stored(site: Site, weight: Tensor, label: str) -> Const:
    """The consumer's weight in the layout of its constant."""
    tensor = (weight if site.layout == "oi" else weight.T).contiguous()
    type = TensorType(dtype_name(tensor.dtype), tuple(tensor.shape))
    return replace(site.const, type=type, load=lambda: tensor, storage=f"{site.const.storage or site.const.path}#{label}")
