"""The key/value cache of a graph, found by dataflow: names play no part.

A slot is an input that one `cat`, or one operator of attention over a cache, puts in front of something new, the result of which is an
output. A layer of a decoder has two of them, its keys and its values; kept in codes, each has its scales beside it as one more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from matmorph.ir.attention_ops import CACHED, COMPACT, FUSED_SLOTS
from matmorph.ir.cache_ops import CODED, CODED_SLOTS
from matmorph.ir.core import Graph, Node, Value
from matmorph.ir.ops import base_name
from matmorph.ir.types import Dim, TensorType


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One tensor of the cache. `past`: what came before; `new`: what this call adds; `present`: both along `axis`, made by `join`.
    `input` and `output`: what past and present are called."""

    past: Value
    new: Value
    present: Value
    join: Node
    axis: int
    input: str
    output: str

    @property
    def before(self) -> Dim:
        """Tokens in `past`."""
        return self.past.tensor.shape[self.axis]

    @property
    def total(self) -> Dim:
        """Tokens in `present`: the past and the new ones."""
        return self.present.tensor.shape[self.axis]

    @property
    def rest(self) -> tuple[Dim, ...]:
        """Sizes beside rows, which are the first axis, and tokens: heads and their width."""
        return tuple(size for axis, size in enumerate(self.past.tensor.shape) if axis not in (0, self.axis))

    @property
    def elements_per_token(self) -> int | None:
        """Of one row; None where one of `rest` is dynamic."""
        return prod(map(int, self.rest)) if all(isinstance(size, int) for size in self.rest) else None


def find_slots(graph: Graph) -> tuple[Slot, ...]:
    """The slots, in the order of their inputs; () for a graph that keeps no cache."""
    users, results = graph.users(), {value: name for name, value in graph.results}
    found = []
    for entry in graph.signature.inputs:
        past = entry.value
        readers = [node for node in users.get(past, ()) if not reads_size(node)] if past is not None else []
        joined = _joined(readers[0], past) if past is not None and len(readers) == 1 else None
        if past is not None and joined is not None and joined[1] in results:
            new, present, axis = joined
            found.append(Slot(past, new, present, readers[0], axis, entry.name, results[present]))
    return tuple(found)


def where_sized(values: Iterable[Value], dim: Dim) -> tuple[Value, int] | None:
    """The first of the tensors that has the size, and where."""
    return next(((value, axis) for value in values for axis, size in enumerate(value.tensor.shape) if size == dim), None)


def reads_size(node: Node) -> bool:
    """Whether the node reads how long an axis is, and nothing of what lies along it."""
    return base_name(node.op) == "sym_size"


def _joined(node: Node, past: Value) -> tuple[Value, Value, int] | None:
    """What the node puts behind `past`, what it makes of both, and along which axis; None where it does something else."""
    if node.op in (CACHED, COMPACT):
        places = [place for place in FUSED_SLOTS if node.args[place[1]] is past]
        return (node.args[places[0][0]], node.outputs[places[0][2]], 2) if len(places) == 1 else None
    if node.op == CODED:
        present = next(result for given, result in CODED_SLOTS if node.args[given] is past)
        return (node.args[2], node.outputs[present], node.args[3])
    axis = _appended(node, past)
    return None if axis is None else (node.args[0][1], node.output, axis)


def _appended(node: Node, past: Value) -> int | None:
    """The axis along which the node puts one other tensor behind `past`; None where it does something else."""
    if base_name(node.op) != "cat" or len(node.args[0]) != 2 or node.args[0][0] is not past or node.args[0][1] is past:
        return None
    kind = past.type
    if not isinstance(kind, TensorType) or not kind.torch_dtype.is_floating_point:
        return None
    axis = int(node.args[1] if len(node.args) > 1 else node.attrs.get("dim", 0)) % len(kind.shape)
    return None if isinstance(kind.shape[axis], int) else axis
