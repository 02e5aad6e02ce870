"""What a graph computes from stored numbers alone: values that no input has a part in, and the weights among them.

A weight that is behind something (weight norm, a mask, an orthogonal parametrisation, `w * 0.1`, two parts joined) is such a value. It is
read as one more stored matrix: a `Const` that is no part of the graph's state, whose numbers are computed when they are asked for, one
matrix at a time, by the graph's own operators and therefore to the bit as the model computes them. The graph itself stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from matmorph.ir.computed import constant
from matmorph.ir.core import Const, Graph, Node, Value, map_values, values_in
from matmorph.ir.op_table import of_kind
from matmorph.ir.ops import base_name, is_overload
from matmorph.ir.randomness import may_draw
from matmorph.ir.types import TensorType

_READS_WEIGHT: Mapping[str, int] = {**dict.fromkeys(of_kind("convolution"), 1), "linear": 1}
"""Operators that say which operand is the weight, and where it stands."""
_MARKS = ("_orig", "_g", "_v")
"""What torch's older utilities append to the name of a parameter that they compute from."""


@dataclass(frozen=True, slots=True, eq=False)
class ComputedWeight:
    """`const`: the numbers, under the name that the weight should go by. `parts`: what of the state they are computed from, in its order,
    but for buffers that something else reads too. `shared`: a parameter of them that something else reads too, and what."""

    const: Const
    parts: tuple[Const, ...]
    shared: str | None = None


@dataclass(slots=True, eq=False)
class Constants:
    """`origins`: of every value that no input has a part in, the constants it comes from. `serving`: nodes among them that compute the
    weight of a linear or a convolution. Equal expressions have one key in `keys`."""

    graph: Graph
    origins: Mapping[Value, frozenset[Const]]
    makers: Mapping[Value, Node]
    serving: frozenset[Node]
    keys: Mapping[Value, int]
    _readers: Mapping[Value, tuple[Node, ...]]
    _known: dict[int, ComputedWeight | None] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph) -> Constants:
        origins: dict[Value, frozenset[Const]] = {const: frozenset((const,)) for const in graph.state}
        makers: dict[Value, Node] = {}
        table: dict[Any, int] = {}
        keys: dict[Value, int] = {const: table.setdefault(("const", const.storage or const.path), len(table)) for const in graph.state}
        for node in graph.nodes:
            inputs = node.inputs()
            if any(value not in origins for value in inputs) or not _is_fixed(node):
                continue
            behind = frozenset[Const]().union(*(origins[value] for value in inputs))
            for k, value in enumerate(node.outputs):
                origins[value], makers[value] = behind, node
                keys[value] = table.setdefault((_key(node, keys), k), len(table))
        return cls(graph, origins, makers, _serving(graph, makers), keys, graph.users())

    def weight(self, value: Value) -> ComputedWeight | None:
        """The weight that a computed value is; None where no parameter of the model has a part in it, or where a rule put something in."""
        key = self.keys[value]
        if key not in self._known:
            self._known[key] = self._weight(value)
        return self._known[key]

    def _weight(self, value: Value) -> ComputedWeight | None:
        behind = self.origins[value]
        parameters = [const for const in self.graph.state if const in behind and is_weight(const, axes=1)]
        if not parameters or any(const.rule is not None for const in behind) or not is_weight(value, axes=1):
            return None
        key = self.keys[value]
        twins = {node for other, its in self.keys.items() if its == key for node in self._nodes(other)}
        others = {const: self._other_reader(const, twins) for const in self.graph.state if const in behind}
        shared = next((f"{const.path}, which {others[const]} reads too" for const in parameters if others[const]), None)
        main = max(parameters, key=lambda const: (len(const.tensor.shape) > 1, const.numel))
        path = _path(main.path)  # a wish: two weights may have it
        const = Const(path, value.tensor, lambda: constant(self.graph, value, wide=False), (path,), storage=f"{path} (computed {key})")
        return ComputedWeight(const, tuple(c for c in others if c in parameters or not others[c]), shared)

    def _other_reader(self, const: Const, nodes: set[Node]) -> str | None:
        found = next((base_name(node.op) for node in self._readers.get(const, ()) if node not in nodes), None)
        return "the result of the model" if found is None and const in set(values_in(self.graph.outputs)) else found

    def _nodes(self, value: Value) -> set[Node]:
        """All that compute a value."""
        found, todo = set[Node](), [value]
        while todo:
            node = self.makers.get(todo.pop())
            if node is not None and node not in found:
                found.add(node)
                todo += node.inputs()
        return found


def is_weight(value: Value, axes: int) -> bool:
    """Whether it is a floating parameter, or a computed value, of at least so many axes."""
    if isinstance(value, Const) and value.kind != "parameter":
        return False
    return value.tensor.torch_dtype.is_floating_point and len(value.tensor.shape) >= axes


def _is_fixed(node: Node) -> bool:
    """Whether it gives the same tensors each time: no random numbers, no sub-graph, no size that varies."""
    if not is_overload(node.op) or not all(isinstance(value.type, TensorType) for value in node.outputs):
        return False
    if may_draw(node.op):
        return False
    return all(isinstance(dim, int) for value in node.outputs for dim in value.tensor.shape)


def _key(node: Node, keys: Mapping[Value, int]) -> tuple[Any, ...]:
    """What makes two nodes compute the same."""
    args, attrs = (map_values(given, lambda value: f"%{keys[value]}") for given in (node.args, tuple(sorted(node.attrs.items()))))
    return node.op, repr(args), repr(attrs)


def _serving(graph: Graph, makers: Mapping[Value, Node]) -> frozenset[Node]:
    places = ((node, _READS_WEIGHT.get(base_name(node.op))) for node in graph.nodes)
    todo: list[Any] = [node.args[place] for node, place in places if place is not None and len(node.args) > place]
    found: set[Node] = set()
    while todo:
        maker = makers.get(todo.pop())
        if maker is not None and maker not in found:
            found.add(maker)
            todo += maker.inputs()
    return frozenset(found)


def _path(name: str) -> str:
    """What the weight is called whose part has this name: "fc" of "fc.parametrizations.weight.original1" and of "fc.weight_orig"."""
    before, found, after = name.rpartition("parametrizations.")
    if found:
        return f"{before}{after.rpartition('.')[0]}"
    return next((name.removesuffix(mark) for mark in _MARKS if name.endswith(f"weight{mark}")), name)
