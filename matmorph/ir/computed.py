"""Weights and biases that a graph computes from others, as numbers: what merging an adapter needs that changes the weight itself, and what
an export needs of an operator that ONNX has not (the matrix exponential of an orthogonal parametrisation).

An adapter's matmul is one linear node whose weight and bias are nodes over constants. Merged, they are constants: computed in float64 from
the stored numbers and rounded once, so that what is made of the old weight is made of it to the end, whatever order the sums are in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from matmorph.errors import RewriteError, VerifyError
from matmorph.ir.build import names_of, unique_name
from matmorph.ir.core import Const, Graph, Node, Value, map_values
from matmorph.ir.evaluate import run_node
from matmorph.ir.ops import base_name
from matmorph.ir.randomness import may_draw
from matmorph.ir.rewiring import rewired, swept
from matmorph.ir.types import TensorType, dtype_name

LINEAR = "aten.linear.default"


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """A graph with a site's weight as a constant again. `wanted`: in float64, `stored`: as rounded, `before`: without the factors; each
    [out, in]. `names`: dotted names of the constants."""

    graph: Graph
    wanted: Tensor
    stored: Tensor
    before: Tensor
    names: tuple[str, ...]


def constant(graph: Graph, value: Value, zero: Collection[Const] = (), wide: bool = True) -> Tensor:
    """The number that a value over constants is, computed in float64, or, not `wide`, in the types of the graph. `zero`: constants taken as
    zeros. VerifyError where it needs an input."""
    makers = graph.producers()
    known: dict[Value, Tensor] = {}

    def read(wanted: Value) -> Tensor:
        if wanted in known:
            return known[wanted]
        if isinstance(wanted, Const):
            tensor = wanted.load().detach()
            tensor = tensor.double() if wide and tensor.is_floating_point() else tensor
            known[wanted] = torch.zeros_like(tensor) if wanted in zero else tensor
        elif wanted in makers:
            node = makers[wanted]
            known.update(zip(node.outputs, run_node(node, read), strict=True))
        else:
            raise VerifyError(f"%{wanted.name} is no constant, it depends on an input")
        return known[wanted]

    return read(value)


def settled(graph: Graph, chosen: Callable[[str], bool]) -> Graph:
    """The graph with what `chosen` operators compute from constants alone as constants of their own: their numbers are computed when they
    are loaded, in the types of the graph. An operator that draws random numbers gives no constant."""
    fixed: set[Value] = set()
    made: dict[Value, Value] = {}
    taken = names_of(graph) | {name for const in graph.state for name in const.names}
    for node in graph.nodes:
        if not all(isinstance(value, Const) or value in fixed for value in node.inputs()) or may_draw(node.op):
            continue
        fixed.update(node.outputs)
        if any(node.inputs()) and chosen(node.op):  # what no weight goes into is no weight
            made.update({value: _result(graph, node, value, taken) for value in node.outputs if isinstance(value.type, TensorType)})
    if not made:
        return graph
    nodes = tuple(rewired(node, made) for node in graph.nodes if made.keys().isdisjoint(node.outputs))
    outputs = map_values(graph.outputs, lambda value: made.get(value, value))
    state = (*graph.state, *(const for const in made.values() if isinstance(const, Const)))
    return swept(replace(graph, nodes=nodes, outputs=outputs, state=state), graph)


def _result(graph: Graph, node: Node, value: Value, taken: set[str]) -> Const:
    name = unique_name(f"{node.origin.path or 'constant'}.{base_name(node.op)}", taken)
    return Const(name, value.tensor, lambda: constant(graph, value, wide=False), (name,), kind="constant", storage=name)


def folded(graph: Graph, site: str, factors: Sequence[Const]) -> Folded:
    """The graph in which the linear nodes whose weight or bias is computed from these factors read constants. VerifyError where there is no
    such node, RewriteError where a weight leaves the range of its type."""
    ends = _ends(graph, factors)
    if not ends:
        raise VerifyError(f"{site}: no matmul is computed from {', '.join(const.path for const in factors)}")
    weight = ends[0].args[1]
    wanted, before = constant(graph, weight), constant(graph, weight, set(factors))
    made: dict[Value, tuple[str, Tensor]] = {}
    new_weight = _placeholder(made, f"{site}.weight", wanted, weight)
    nodes: dict[Node, Node] = {}
    biases: dict[bytes, Value] = {}
    for node in ends:
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, Value) and not isinstance(bias, Const):
            numbers = constant(graph, bias)
            key = numbers.numpy(force=True).tobytes()  # applications of one weight share what is equal
            if key not in biases:
                biases[key] = _placeholder(made, f"{site}.bias", numbers, bias)
            bias = biases[key]
        nodes[node] = replace(node, args=(node.args[0], new_weight, bias), origin=replace(node.origin, rule=None, location=None))
    result, names = with_constants(graph, nodes, made, factors[0])
    stored = made[new_weight][1].to(weight.tensor.torch_dtype)
    return Folded(result, wanted, stored, before, names)


def with_constants(
    graph: Graph, nodes: Mapping[Node, Node], made: Mapping[Value, tuple[str, Tensor]], anchor: Const
) -> tuple[Graph, tuple[str, ...]]:
    """The graph with nodes exchanged, and the placeholders `made` (a wished dotted name and the numbers of each) that they read as weights
    of their types; what nobody reads any more goes, and the names of weights that go are free for the new ones. These stand where
    `anchor` stood in the state. Also their dotted names."""
    bare = swept(replace(graph, nodes=tuple(nodes.get(node, node) for node in graph.nodes)), graph)
    taken = names_of(bare) | {name for const in bare.state for name in const.names}
    weights = {value: _weight(unique_name(wish, taken), numbers, value) for value, (wish, numbers) in made.items()}
    kept = set(bare.state)
    state: list[Const] = []
    for const in graph.state:
        state += [const] if const in kept else []
        state += weights.values() if const is anchor else ()
    ours = set(nodes.values())
    return replace(bare, nodes=tuple(rewired(node, weights) if node in ours else node for node in bare.nodes), state=tuple(state)), tuple(
        const.path for const in weights.values()
    )


def _ends(graph: Graph, factors: Collection[Const]) -> list[Node]:
    """Linear nodes of activations whose weight or bias is computed from the factors."""
    tainted: set[Value] = set(factors)
    found: list[Node] = []
    for node in graph.nodes:
        if tainted.isdisjoint(node.inputs()):
            continue
        if node.op == LINEAR and node.args[0] not in tainted:
            found.append(node)
        else:
            tainted.update(node.outputs)
    return found


def _placeholder(made: dict[Value, tuple[str, Tensor]], wish: str, numbers: Tensor, like: Value) -> Value:
    value = Value(wish, like.type)
    made[value] = (wish, numbers)
    return value


def _weight(name: str, numbers: Tensor, like: Value) -> Const:
    tensor = numbers.to(like.tensor.torch_dtype).contiguous()
    if not bool(torch.isfinite(tensor).all()):
        raise RewriteError(f"{name}: the merged numbers leave the range of {like.tensor.dtype}")
    type = TensorType(dtype_name(tensor.dtype), tuple(tensor.shape))
    return Const(name, type, lambda: tensor, (name,), trainable=True, storage=f"{name} (merged)")
