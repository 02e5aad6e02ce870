"""A part of a graph as a function: what one value is computed from, down to a cut, and its numbers at any sizes.

What a part computes is proved by computing it: names and shapes of operators say nothing. A size that is an expression of the axes is taken
from its type, so that a part that only asks how long something is does not read it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.evaluate import run_node
from matmorph.ir.types import Dim, ScalarType, symbol

Sizes = Mapping[str, int]

_MOST = 200
"""Nodes of a part. What is looked for has some dozens; more are the model itself, reached by a way that the cut leaves open."""


@dataclass(frozen=True, slots=True, eq=False)
class Cone:
    """`nodes` in order; `leaves`: inputs of the graph that it reads, `consts`: constants, neither of them in the cut."""

    result: Value
    nodes: tuple[Node, ...]
    leaves: tuple[Value, ...]
    consts: tuple[Const, ...]

    def __call__(self, given: Mapping[Value, Tensor], sizes: Sizes) -> Tensor:
        """The numbers of the result. `given`: of the cut and the leaves; `sizes`: of every axis by its symbol."""
        known = dict(given)

        def read(value: Value) -> Any:
            if value not in known and isinstance(value, Const):
                known[value] = value.load().detach()
            size = _size(value)
            return known[value] if size is None else _number(size, sizes)

        with torch.no_grad():
            for node in self.nodes:
                known.update(zip(node.outputs, run_node(node, read), strict=True))
        found: Tensor = read(self.result)
        return found


class Parts:
    """Parts of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.makers = graph.producers()
        self.order = {node: place for place, node in enumerate(graph.nodes)}

    def cone(self, result: Value, cut: Collection[Value] = ()) -> Cone | None:
        """What `result` is computed from, down to the values of the cut; None where that is too much to be a part."""
        nodes: set[Node] = set()
        leaves: dict[Value, None] = {}
        waiting, seen = [result], set(cut)
        while waiting:
            value = waiting.pop()
            if value in seen or _size(value) is not None:
                continue
            seen.add(value)
            node = self.makers.get(value)
            if node is None:
                leaves[value] = None
            elif node not in nodes:
                nodes.add(node)
                waiting.extend(node.inputs())
            if len(nodes) > _MOST:
                return None
        consts = tuple(value for value in leaves if isinstance(value, Const))
        inputs = tuple(value for value in leaves if not isinstance(value, Const))
        return Cone(result, tuple(sorted(nodes, key=self.order.__getitem__)), inputs, consts)

    def ancestors(self, value: Value, most: int = _MOST) -> Iterator[Value]:
        """Values that it is computed from, the nearest first."""
        waiting, seen = [value], {value}
        for _ in range(most):
            if not waiting:
                return
            waiting.sort(key=lambda each: self.order[self.makers[each]] if each in self.makers else -1)
            current = waiting.pop()
            if current is not value:
                yield current
            node = self.makers.get(current)
            for each in node.inputs() if node is not None else ():
                if each not in seen and _size(each) is None:
                    seen.add(each)
                    waiting.append(each)


def _size(value: Value) -> Dim | None:
    """What the value says of the axes, where it is a number that they give."""
    return value.type.value if isinstance(value.type, ScalarType) and value.type.kind == "int" else None


def _number(dim: Dim, sizes: Sizes) -> int:
    return dim if isinstance(dim, int) else int(dim.subs({symbol(name): size for name, size in sizes.items()}))
