"""Gradients at values in the middle of a graph, in bounded memory.

To be differentiated a graph keeps what its nodes make until the gradients are due. Where that is more than `PASS_BYTES` the nodes are cut
into segments at places where little goes on; only that is kept, and a segment runs again, with gradients, once those of all behind it are
there (arXiv 1604.06174). What is still too much is divided by samples: gradients of samples that know nothing of one another add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.evaluate import run_node
from matmorph.ir.rewiring import needed
from matmorph.ir.types import TensorType, dim_symbols, element_size

PASS_BYTES = 1 << 26
"""What the nodes of one pass may make and keep, counted from shapes."""
_THIN = 16
"""A segment may end where no more than one in so many of its bytes goes on."""

Take: TypeAlias = Callable[[Value, Tensor, Tensor | None], None]
"""What is done with a value, its tensor, and the gradient by it: None where nothing depends on it."""
Seeds: TypeAlias = Callable[[Mapping[Value, Any]], Mapping[Value, Tensor]]
"""From the values at the end of a graph to the gradients by some of them that everything begins with."""


@dataclass(frozen=True, slots=True, eq=False)
class Backward:
    """How the gradients by `values` are found. `nodes`: of a graph and, where there is one, of a loss behind it. `ends`: what the seeds
    read, beside inputs and weights. `limit`: see `PASS_BYTES`."""

    nodes: tuple[Node, ...]
    values: frozenset[Value]
    ends: tuple[Value, ...]
    limit: int = PASS_BYTES

    @classmethod
    def of(cls, nodes: Sequence[Node], values: Iterable[Value], ends: Sequence[Value], limit: int = PASS_BYTES) -> Backward:
        """Only what the ends need runs; of a value that they do not depend on nothing is taken."""
        return cls(tuple(needed(nodes, list(ends))), frozenset(values), tuple(ends), limit)

    def run_parts(self, graph: Graph, known: Mapping[Value, Any], seeds: Seeds, take: Take) -> None:
        """In as many parts and segments as the limit asks for; `known`: all inputs of the graph, then labels."""
        pairs = list(known.items())
        divided = division(graph, self.nodes, self.ends, [known[value] for value in graph.inputs], self.limit)
        for part in divided.parts:
            self.run(slice_samples(graph, pairs, part), divided.cuts, seeds, take)

    def run(self, known: dict[Value, Any], cuts: Sequence[int], seeds: Seeds, take: Take) -> None:
        """`known`: inputs and labels; `cuts`: where segments begin, from 0. Each of `values` is taken once, those of the last segment
        first. Weights stay without gradients."""
        segments = [self.nodes[start:stop] for start, stop in pairwise([*cuts, len(self.nodes)])]
        later = _read_later(segments, self.ends)
        at_borders = [dict(known)]
        for nodes, alive in zip(segments[:-1], later[:-1], strict=True):
            at_borders.append(_forward(nodes, at_borders[-1], alive))
        gradients: dict[Value, Tensor] = {}
        moving = self._moving()
        for number in reversed(range(len(segments))):
            last = number == len(segments) - 1
            gradients = _segment(
                segments[number], at_borders.pop(), self.values, moving, gradients, later[number], seeds if last else None, take
            )

    def _moving(self) -> frozenset[Value]:
        """Whatever depends on one of the values."""
        found = set(self.values)
        for node in self.nodes:
            if not found.isdisjoint(node.inputs()):
                found.update(node.outputs)
        return frozenset(found)


def _read_later(segments: Sequence[Sequence[Node]], ends: Sequence[Value]) -> list[frozenset[Value]]:
    """What is read behind each segment, weights aside."""
    found: list[frozenset[Value]] = []
    later = frozenset(ends)
    for nodes in reversed(segments):
        found.append(later)
        later |= {value for node in nodes for value in node.inputs() if not isinstance(value, Const)}
    return found[::-1]


def _reader(known: dict[Value, Any]) -> Callable[[Value], Any]:
    def read(value: Value) -> Any:
        return value.load().detach() if value not in known and isinstance(value, Const) else known[value]

    return read


def _forward(nodes: Sequence[Node], given: Mapping[Value, Any], alive: frozenset[Value]) -> dict[Value, Any]:
    """What goes on behind the nodes, without gradients; everything else is dropped after its last use."""
    known = dict(given)
    last: dict[Value, Node] = {}
    for node in nodes:
        last.update(dict.fromkeys((*node.inputs(), *node.outputs), node))
    dying: dict[Node, list[Value]] = {}
    for value, node in last.items():
        if value not in alive:
            dying.setdefault(node, []).append(value)
    with torch.no_grad():
        for node in nodes:
            known.update(zip(node.outputs, run_node(node, _reader(known)), strict=True))
            for value in dying.get(node, ()):
                known.pop(value, None)
    return {value: held for value, held in known.items() if value in alive}


def _segment(
    nodes: Sequence[Node],
    given: Mapping[Value, Any],
    values: frozenset[Value],
    moving: frozenset[Value],
    behind: Mapping[Value, Tensor],
    later: frozenset[Value],
    seeds: Seeds | None,
    take: Take,
) -> dict[Value, Tensor]:
    """The gradients by what a segment is given, from those `behind` it or its seeds."""
    leaves = {value: _leaf(held) for value, held in given.items() if value in moving and _is_float(held)}
    known: dict[Value, Any] = {**given, **leaves}
    wanted = dict(leaves)
    with torch.enable_grad():
        for node in nodes:
            for value, result in zip(node.outputs, run_node(node, _reader(known)), strict=True):
                known[value] = result
                if value in values:  # an object of its own: what a node gives may be what it was given
                    known[value] = wanted[value] = result.view_as(result) if result.requires_grad else _leaf(result)
    if seeds is not None:
        with torch.no_grad():
            behind = seeds(known)
    into = {value: gradient for value, gradient in behind.items() if known[value].requires_grad}
    outputs = [known[value] for value in into]
    known.clear()
    found = torch.autograd.grad(outputs, list(wanted.values()), list(into.values()), allow_unused=True) if into and wanted else ()
    by = dict(zip(wanted, found, strict=True)) if found else dict.fromkeys(wanted)
    for value, tensor in wanted.items():
        if value not in leaves:
            take(value, tensor.detach(), by[value])
    return {value: gradient for value in leaves if (gradient := by[value]) is not None}


def _is_float(held: Any) -> bool:
    return isinstance(held, Tensor) and held.is_floating_point()


def _leaf(held: Tensor) -> Tensor:
    return held.detach().requires_grad_()


# where it is cut


@dataclass(frozen=True, slots=True)
class Division:
    """`cuts`: where segments begin, from 0; `parts`: (start, stop) of the samples that are differentiated at a time."""

    cuts: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]


def division(graph: Graph, nodes: Sequence[Node], ends: Sequence[Value], inputs: Sequence[Tensor], limit: int) -> Division:
    """So that a pass keeps no more than `limit`, as far as shapes tell and samples can be divided."""
    count = len(inputs[0]) if inputs and inputs[0].dim() else 1
    sizes = _Sizes(graph, inputs)
    cuts, kept = _cuts(nodes, ends, sizes, limit)
    axis = graph.inputs[0].tensor.shape[:1] if graph.inputs else ()
    if kept <= limit or not axis or isinstance(axis[0], int) or not independent(graph.nodes, str(axis[0])):
        return Division(cuts, ((0, count),))
    name = str(axis[0])
    least = graph.ranges[name].low if name in graph.ranges else 1
    pieces = max(min(-(-kept // limit), count // max(least, 1)), 1)
    borders = [count * k // pieces for k in range(pieces + 1)]
    return Division(cuts, tuple(pairwise(borders)))


def independent(nodes: Sequence[Node], axis: str) -> bool:
    """Whether no sample of the axis knows of another one: it never disappears from a shape, nor stands in one twice."""
    for node in nodes:
        before = any(axis in _symbols(value) for value in node.inputs())
        for value in node.outputs:
            here = [axis in dim_symbols([dim]) for dim in value.type.shape] if isinstance(value.type, TensorType) else [before]
            if sum(here) != before:
                return False
    return True


def _symbols(value: Value) -> frozenset[str]:
    """Of axes, and of what a number is computed from."""
    if isinstance(value.type, TensorType):
        return dim_symbols(value.type.shape)
    return frozenset() if value.type.value is None else dim_symbols([value.type.value])


def slice_samples(graph: Graph, pairs: Sequence[tuple[Value, Tensor]], part: tuple[int, int]) -> dict[Value, Tensor]:
    """Of inputs and labels that lie along the first axis of the first input those of `part`; the others whole."""
    axis = graph.inputs[0].tensor.shape[:1]
    along = [bool(value.tensor.shape) and value.tensor.shape[:1] == axis for value, _ in pairs]
    return {value: tensor[slice(*part)] if cut else tensor for (value, tensor), cut in zip(pairs, along, strict=True)}


class _Sizes:
    """Bytes of values on given inputs; of an axis whose size only the data says 1 is counted."""

    def __init__(self, graph: Graph, inputs: Sequence[Tensor]) -> None:
        pairs = zip(graph.inputs, inputs, strict=True)
        found = [(dim, size) for value, tensor in pairs for dim, size in zip(value.tensor.shape, tensor.shape, strict=True)]
        self._axes = {dim: size for dim, size in found if not isinstance(dim, int) and dim.is_Symbol}
        self._known: dict[tuple[Any, ...], int] = {}

    def of(self, value: Value) -> int:
        if isinstance(value, Const) or not isinstance(value.type, TensorType):
            return 0
        shape = value.type.shape
        if shape not in self._known:
            self._known[shape] = prod(self._size(dim) for dim in shape)
        return self._known[shape] * element_size(value.type.dtype)

    def _size(self, dim: Any) -> int:
        found = dim if isinstance(dim, int) else dim.subs(self._axes)
        return int(found) if isinstance(found, int) or found.is_Integer else 1


def _cuts(nodes: Sequence[Node], ends: Sequence[Value], sizes: _Sizes, limit: int) -> tuple[tuple[int, ...], int]:
    """(where segments begin, bytes that are kept at once): what goes on between segments and what the largest one makes."""
    if sum(sizes.of(value) for node in nodes for value in node.outputs) <= limit:
        return (0,), 0
    last = {value: index for index, node in enumerate(nodes) for value in node.inputs()} | dict.fromkeys(ends, len(nodes))
    cuts, kept, alive = [0], dict[Value, int](), dict[Value, int]()
    made, largest = 0, 0
    for index, node in enumerate(nodes):
        made += sum(sizes.of(value) for value in node.outputs)
        alive.update((value, sizes.of(value)) for value in node.outputs if last.get(value, -1) > index)
        for value in node.inputs():
            if last[value] == index:
                alive.pop(value, None)
        largest = max(largest, made)
        if made > 0 and _THIN * sum(alive.values()) <= made and index + 1 < len(nodes):
            kept.update(alive)
            alive.clear()
            cuts.append(index + 1)
            made = 0
    return tuple(cuts), sum(kept.values()) + largest
