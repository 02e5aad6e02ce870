"""Calibration block by block: all batches go through one part of a graph before any goes through the next.

Between two parts of each batch only those values are held that are still read (`kept`), so that at any time there are the activations of
one part for one batch. What depends on weights alone is computed once per part and held for no batch. A part ends where little is held:
between layers where roles found some, elsewhere where a single value goes on (`cuts`).

A graph that is being rewritten goes the same way: nodes ahead of the batches are exchanged, and weights that nodes ahead of them read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from matmorph.errors import InputError
from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.evaluate import run_node
from matmorph.ir.randomness import may_draw
from matmorph.ir.rewiring import needed
from matmorph.ir.site import Site
from matmorph.passes.statistics.kept import LIMIT, KeptBatches

Read: TypeAlias = Callable[[Value], Any]
Watch: TypeAlias = Mapping[Node, Callable[[int, Read], None]]
"""Of a watched node, what is called before it would run, with the number of the batch and what reads its values."""


@contextmanager
def of_batch(number: int) -> Iterator[None]:
    """What torch raises while the model runs on batch `number`, from 0, as an InputError: a token outside of the vocabulary, a class that
    there is not."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"calibration batch {number + 1}: the model fails on it: {reason}") from error


class Stream:
    """All batches at one place of a graph.

    `watched`: nodes, and the values that are looked at when they are reached; only what these need is ever computed. `limit`: see
    `KeptBatches`.
    """

    def __init__(self, graph: Graph, watched: Mapping[Node, Collection[Value]], limit: int = LIMIT) -> None:
        self.at = 0
        runs = set(needed(graph.nodes, tuple(value for values in watched.values() for value in values)))
        self._fixed = fixed_nodes(node for node in graph.nodes if node in runs)
        runs -= set(self._fixed.values())
        self._steps: list[tuple[Node, ...]] = [(node,) if node in runs else () for node in graph.nodes]
        self._last = _last_reads(graph.nodes, runs, self._fixed)
        for index, node in enumerate(graph.nodes):
            self._last.update({value: max(index, self._last.get(value, 0)) for value in watched.get(node, ())})
        self._nodes = graph.nodes
        self._inputs = graph.inputs
        self._weights: dict[Const, Callable[[], Tensor]] = {}
        self._limit = limit
        self._kept = KeptBatches(limit)

    def __len__(self) -> int:
        return len(self._kept)

    def enter(self, inputs: Sequence[Tensor]) -> None:
        """One more batch, which waits at the beginning of the graph."""
        self._kept.append(dict(zip(self._inputs, inputs, strict=True)))

    def advance(self, stop: int, watch: Watch | None = None) -> None:
        """All batches to `stop`."""
        for _ in self.advancing(stop, watch or {}):
            pass

    def advancing(self, stop: int, watch: Watch) -> Iterator[int]:
        """The same, batch by batch: the number of each that is there. The stream is at `stop` once the last of them is."""
        before, self._kept, shared = self._kept, KeptBatches(self._limit), dict[Value, Any]()
        for number in range(len(before)):
            with of_batch(number):
                self._append(before.take(number), number, stop, watch, shared)
            yield number
        self.at = stop

    def fork(self) -> Stream:
        """Another stream at the same place, whose nodes and weights may differ from here on."""
        other = object.__new__(Stream)
        other.__dict__.update(self.__dict__)
        other._kept, other._steps, other._fixed, other._weights = self._kept.copy(), [*self._steps], dict(self._fixed), dict(self._weights)
        return other

    def exchange(self, nodes: Mapping[Node, Sequence[Node]], weights: Mapping[Const, Callable[[], Tensor]] | None = None) -> None:
        """From here on `nodes` run in the place of others ahead, and weights are read as these. What the nodes read of the graph, those in
        whose place they stand read too."""
        self._weights.update(weights or {})
        for index in range(self.at, len(self._nodes)):
            found = nodes.get(self._nodes[index])
            if found is not None and self._steps[index]:
                self._fixed.update(constant := fixed_nodes(found, self._fixed))
                self._steps[index] = tuple(node for node in found if not constant.keys() & set(node.outputs))

    def looking(self, stop: int, wanted: Collection[Value]) -> Callable[[int], Read]:
        """From the number of a batch to what reads these values in it, which exist at `stop` or before; the batch stays where it is."""
        ahead = [node for step in self._steps[self.at : stop] for node in step]
        nodes = needed(ahead, tuple(wanted))
        last = _last_reads(nodes, set(nodes), self._fixed)
        shared: dict[Value, Any] = {}

        def look(number: int) -> Read:
            known = self._kept.read(number)
            with torch.no_grad():
                for index, node in enumerate(nodes):
                    self._run(node, known, shared)
                    for value in {*node.inputs(), *node.outputs}:
                        if last.get(value, -1) <= index and value not in wanted:
                            known.pop(value, None)
            return lambda value: self._read(value, known, shared)

        return look

    def _append(self, known: dict[Value, Any], number: int, stop: int, watch: Watch, shared: dict[Value, Any]) -> None:
        with torch.no_grad():
            for index in range(self.at, stop):
                node = self._nodes[index]
                if node in watch:
                    watch[node](number, lambda value: self._read(value, known, shared))
                step = self._steps[index]
                for each in step:
                    self._run(each, known, shared)
                for value in {value for each in (node, *step) for value in (*each.inputs(), *each.outputs)}:
                    if self._last.get(value, -1) <= index:
                        known.pop(value, None)
        self._kept.append({value: held for value, held in known.items() if self._last.get(value, -1) >= stop})

    def _run(self, node: Node, known: dict[Value, Any], shared: dict[Value, Any]) -> None:
        known.update(zip(node.outputs, run_node(node, lambda value: self._read(value, known, shared)), strict=True))

    def _read(self, value: Value, known: Mapping[Value, Any], shared: dict[Value, Any]) -> Any:
        if value in known:
            return known[value]
        if value not in shared:
            if isinstance(value, Const):
                shared[value] = self._weights.get(value, value.load)()
            elif value in self._fixed:
                node = self._fixed[value]
                shared.update(zip(node.outputs, run_node(node, lambda each: self._read(each, {}, shared)), strict=True))
            else:
                raise KeyError(f"%{value.name} is read before it is computed")
        return shared[value]


def fixed_nodes(nodes: Iterable[Node], known: Mapping[Value, Node] | None = None) -> dict[Value, Node]:
    """What is computed from weights alone, by value. `known`: such values from before."""
    found: dict[Value, Node] = {}
    for node in nodes:
        alone = all(isinstance(value, Const) or value in found or value in (known or {}) for value in node.inputs())
        if alone and not may_draw(node.op):
            found.update(dict.fromkeys(node.outputs, node))
    return found


def _last_reads(nodes: Sequence[Node], reading: Collection[Node], fixed: Collection[Value]) -> dict[Value, int]:
    """Of each value that one of the `reading` nodes reads, the index of the last that does."""
    found: dict[Value, int] = {}
    for index, node in enumerate(nodes):
        if node in reading:
            found.update({value: index for value in node.inputs() if not isinstance(value, Const) and value not in fixed})
    return found


def cuts(graph: Graph, sites: Iterable[Site]) -> tuple[int, ...]:
    """Indices of nodes that a part begins with, the number of nodes last: between the layers of the sites where the fewest values go on
    that depend on a matmul; between other sites where a single one does. One part for a graph that has no such place."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    reads = sorted(
        (order[application.node], (site.container, site.layer))
        for site in sites
        for application in site.applications
        if application.node in order
    )
    crossing = _crossing(graph, {index for index, _ in reads})
    found = []
    for (before, layer), (after, next_layer) in pairwise(reads):
        gaps = range(before + 1, after + 1)
        if not gaps or (layer == next_layer and layer[1] is not None):
            continue
        best = min(gaps, key=lambda gap: (crossing[gap], -gap))
        if layer[1] is not None or next_layer[1] is not None or crossing[best] <= 1:
            found.append(best)
    return (*found, len(graph.nodes))


def _crossing(graph: Graph, matmuls: Collection[int]) -> list[int]:
    """In front of each node, how many values are read there or later that depend on one of the matmuls."""
    last = _last_reads(graph.nodes, set(graph.nodes), ())
    moving: set[Value] = set()
    changes = [0] * (len(graph.nodes) + 1)
    for index, node in enumerate(graph.nodes):
        if index in matmuls or not moving.isdisjoint(node.inputs()):
            moving.update(node.outputs)
            for value in node.outputs:
                if last.get(value, -1) > index:
                    changes[index + 1] += 1
                    changes[last[value] + 1] -= 1
    total, found = 0, []
    for change in changes:
        total += change
        found.append(total)
    return found
