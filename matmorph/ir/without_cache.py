"""A graph that keeps a cache as the one that starts with an empty one and gives none back: what training computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import VerifyError
from matmorph.ir.build import Builder, names_of
from matmorph.ir.cache import Slot, find_slots, reads_size, where_sized
from matmorph.ir.core import Const, Graph, Input, Node, Signature, Value
from matmorph.ir.rewiring import swept
from matmorph.ir.types import Dim, ScalarType, TensorType, Type, as_dim, dim_symbols, symbol

POSITIONS, MASK = "position_ids", "attention_mask"
"""Inputs of a decoder, as transformers calls them: the place of each token in its text, and which tokens there are."""


def positions_of(mask: Tensor) -> Tensor:
    """The place of each token among those of its row that the mask shows, from 0; what is hidden has a place too, and nobody asks."""
    return (mask.to(torch.int64).cumsum(-1) - 1).clamp(min=0)


def without_cache(graph: Graph) -> Graph:
    """The graph without its slots: the past is empty everywhere, and what is present is what is new. Where positions and mask are inputs,
    the positions are counted from the mask instead. The graph itself where it has no slot; weights and their names stay."""
    slots = find_slots(graph)
    if not slots:
        return graph
    written = _Rewritten(slots)
    gone = {slot.past for slot in slots}
    inputs = [replace(entry, value=written(entry.value)) for entry in graph.signature.inputs if entry.value not in (None, *gone)]
    front = Builder({name: limits for name, limits in graph.ranges.items() if name not in written.empty}, names_of(graph))
    inputs = _counted(front, inputs, written)
    joins = {slot.join for slot in slots}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node in joins:
            continue
        if reads_size(node) and node.args[0] in gone:
            written.known[node.output] = _size(front, inputs, written.dim(node.args[0].tensor.shape[node.args[1]]))
        else:
            nodes.append(written.node(node))
    named = zip(graph.signature.outputs, graph.outputs, strict=True)
    outputs = [(name, written.arg(out)) for name, out in named if not _is_present(out, slots)]
    signature = Signature.of_keywords(inputs, [name for name, _ in outputs])
    ranges = {name: limits for name, limits in graph.ranges.items() if name not in written.empty}
    whole = replace(graph, signature=signature, nodes=(*front.nodes, *nodes), outputs=tuple(out for _, out in outputs), ranges=ranges)
    return swept(whole, whole)


def _is_present(out: Any, slots: Sequence[Slot]) -> bool:
    return any(out is slot.present for slot in slots)


class _Rewritten:
    """Values and nodes without a past: `known` has what stands for a value, by the value in the graph before. `empty`: names of the
    axes that are no more."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.empty = dim_symbols([slot.before for slot in slots])
        self._sizes = {symbol(name): 0 for name in self.empty}
        self.known: dict[Value, Any] = {}
        for slot in slots:
            self.known[slot.present] = self(slot.new)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Const) or value is None:
            return value
        if value not in self.known:
            kind = self._type(value.type)
            self.known[value] = value if kind == value.type else replace(value, type=kind)
        return self.known[value]

    def node(self, node: Node) -> Node:
        outputs = tuple(map(self, node.outputs))
        return replace(node, args=self.arg(node.args), attrs={name: self.arg(arg) for name, arg in node.attrs.items()}, outputs=outputs)

    def arg(self, arg: Any) -> Any:
        if isinstance(arg, Value):
            return self(arg)
        if isinstance(arg, tuple | list):
            return type(arg)(map(self.arg, arg))
        return self._body(arg) if isinstance(arg, Graph) else arg

    def _body(self, graph: Graph) -> Graph:
        inputs = tuple(replace(entry, value=self(entry.value)) for entry in graph.signature.inputs)
        ranges = {name: limits for name, limits in graph.ranges.items() if name not in self.empty}
        return replace(
            graph,
            signature=replace(graph.signature, inputs=inputs),
            nodes=tuple(map(self.node, graph.nodes)),
            outputs=self.arg(graph.outputs),
            ranges=ranges,
        )

    def dim(self, dim: Dim) -> Dim:
        return dim if isinstance(dim, int) or self.empty.isdisjoint(dim_symbols([dim])) else as_dim(dim.subs(self._sizes))

    def _type(self, kind: Type) -> Type:
        if isinstance(kind, TensorType):
            return replace(kind, shape=tuple(map(self.dim, kind.shape)))
        return kind if kind.value is None else ScalarType(kind.kind, self.dim(kind.value))


def _counted(front: Builder, inputs: Sequence[Input], written: _Rewritten) -> list[Input]:
    """The inputs without the positions, where a mask of the same shape says where each token stands."""
    by_name = {entry.name: entry.value for entry in inputs}
    positions, mask = by_name.get(POSITIONS), by_name.get(MASK)
    if positions is None or mask is None or positions.type != mask.type:
        return list(inputs)
    counted = front("aten.clamp.default", front("aten.sub.Tensor", front("aten.cumsum.default", mask, 1), 1), 0, name=POSITIONS)
    for value, now in list(written.known.items()):
        if now is positions:
            written.known[value] = counted
    return [entry for entry in inputs if entry.value is not positions]


def _size(front: Builder, inputs: Sequence[Input], dim: Dim) -> Any:
    """The size, read off an input that is left."""
    if isinstance(dim, int):
        return dim
    found = where_sized([entry.value for entry in inputs if entry.value is not None], dim)
    if found is None:
        raise VerifyError(f"no input that is left has the size {dim}, which the graph reads")
    return front("aten.sym_size.int", *found)
