"""The laws of the IR, checked after every pass, and `retype`, which carries a change of types through a graph.

1. A value is bound before it is used: an input, a constant of `state`, or a result of an earlier node.
2. It is bound once.
3. Names are unique within a graph; a sub-graph is a space of its own.
4. The stored type of every result is the one that re-inference gives.
5. The signature has a name per output, and its pytrees have a leaf per input and output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from matmorph.errors import VerifyError
from matmorph.ir.core import Arg, Graph, Node, Value, map_values, mapped_arguments, values_in
from matmorph.ir.infer import Inference, called_bodies, infer_node
from matmorph.ir.rewiring import rewired, rewired_outputs
from matmorph.ir.text.printing import statements

_AROUND = 5


def verify(graph: Graph, inference: Inference | None = None) -> None:
    """Raises VerifyError, with the printed lines around the fault, if a law is broken. `inference`: one to share with other passes."""
    _check_names(graph)
    _check_signature(graph)
    inference = inference or Inference(graph.ranges, graph.device)
    _check_types(graph, inference, {value: inference.fake(value.type) for value in graph.inputs})


def _check_names(graph: Graph) -> None:
    """Laws 1 to 3, in sub-graphs too."""
    bound: set[Value] = set()
    names: set[str] = set()

    def bind(value: Value, place: Any) -> None:
        if value in bound:
            raise _fault(graph, place, f"%{value.name} is bound twice")
        if value.name in names:
            raise _fault(graph, place, f"two values are named %{value.name}")
        bound.add(value)
        names.add(value.name)

    for entry in graph.signature.inputs:
        if entry.value is not None:
            bind(entry.value, entry)
    for const in graph.state:
        bind(const, const)
    for node in graph.nodes:
        for value in node.inputs():
            if value not in bound:
                raise _fault(graph, node, f"%{value.name} is read by {node.op} before it is bound")
        for body in _sub_graphs(node.args):
            _check_names(body)
        for value in node.outputs:
            bind(value, node)
    for value in values_in(graph.outputs):
        if value not in bound:
            raise _fault(graph, value, f"output %{value.name} is not bound")


def _sub_graphs(arg: Arg) -> Iterator[Graph]:
    if isinstance(arg, Graph):
        yield arg
    elif isinstance(arg, tuple | list):
        for item in arg:
            yield from _sub_graphs(item)


def _check_signature(graph: Graph) -> None:
    signature = graph.signature
    counts = {
        "output names": (len(signature.outputs), len(graph.outputs)),
        "leaves of the input pytree": (signature.in_spec.num_leaves, len(signature.inputs)),
        "leaves of the output pytree": (signature.out_spec.num_leaves, len(graph.outputs)),
    }
    for what, (found, expected) in counts.items():
        if found != expected:
            raise VerifyError(f"the signature has {found} {what} where the graph has {expected}")


def _check_types(graph: Graph, inference: Inference, fakes: dict[Value, Any]) -> None:
    """Law 4. `fakes` holds those of the inputs and gains the rest."""
    for node in graph.nodes:
        results = _infer(node, graph, inference, fakes)
        for value, result in zip(node.outputs, results, strict=True):
            inferred = inference.type_of(result)
            if not inference.equal(value.type, inferred):
                raise _fault(graph, node, f"%{value.name} is stored as {value.type}, but {node.op} gives {inferred}")
        for body, operands in called_bodies(inference, node, fakes):
            for value, operand in zip(body.inputs, operands, strict=True):
                if not inference.equal(value.type, inference.type_of(operand)):
                    raise _fault(graph, node, f"%{value.name} is a {value.type}, but {node.op} passes a {inference.type_of(operand)}")
            _check_types(body, inference, dict(zip(body.inputs, operands, strict=True)))


def _infer(node: Node, graph: Graph, inference: Inference, fakes: dict[Value, Any]) -> tuple[Any, ...]:
    """Results of one node; adds them to `fakes`."""
    try:
        results = infer_node(inference, node, fakes)
    except VerifyError as error:
        raise _fault(graph, node, error.message, error.details) from error
    if len(results) != len(node.outputs):
        raise _fault(graph, node, f"{node.op} has {len(results)} results, but the node binds {len(node.outputs)}")
    fakes.update(zip(node.outputs, results, strict=True))
    return results


def _fault(graph: Graph, place: Any, message: str, details: tuple[str, ...] = ()) -> VerifyError:
    """The error with the lines of `graph`, the innermost, around `place` (a Node, Const, Input or output), which is marked by `>`."""
    lines: list[str] = []
    at: int | None = None
    for thing, text in statements(graph):
        if at is None and thing is place:
            at = len(lines)
        lines += text.split("\n")
    if at is None:
        return VerifyError(message, details)
    first = max(0, at - _AROUND)
    window = [f"{'>' if k == at else ' '} {line}" for k, line in enumerate(lines[first : at + _AROUND + 1], first)]
    return VerifyError(message, [*details, *window])


def retype(graph: Graph) -> Graph:
    """The graph with every result's type inferred anew from inputs and constants, as after a change of width.

    Values whose type stays are kept; the others are replaced everywhere, under their names. Raises VerifyError, with the lines around it,
    where an operator refuses its new operands.
    """
    inference = Inference(graph.ranges, graph.device)
    return _retype(graph, inference, {value: inference.fake(value.type) for value in graph.inputs})


@dataclass(slots=True)
class _Renewed:
    """Values and nodes of a graph on its way through `retype`."""

    values: dict[Value, Value]
    nodes: list[Node]

    def __call__(self, value: Value) -> Value:
        return self.values.get(value, value)


def _retype(graph: Graph, inference: Inference, fakes: dict[Value, Any]) -> Graph:
    renewed = _Renewed({}, [])
    for node in graph.nodes:
        results = _infer(node, graph, inference, fakes)
        swaps = _retyped_bodies(node, inference, fakes)
        outputs = tuple(_retyped(value, result, inference) for value, result in zip(node.outputs, results, strict=True))
        renewed.values.update((old, new) for old, new in zip(node.outputs, outputs, strict=True) if old is not new)
        stale = outputs != node.outputs or any(value in renewed.values for value in node.inputs()) or swaps
        args, attrs = mapped_arguments(node, renewed)
        renewed.nodes.append(replace(node, args=_swap(args, swaps), attrs=attrs, outputs=outputs) if stale else node)
    if not renewed.values and tuple(renewed.nodes) == graph.nodes:
        return graph
    return replace(graph, nodes=tuple(renewed.nodes), outputs=tuple(map_values(value, renewed) for value in graph.outputs))


def _retyped(value: Value, result: Any, inference: Inference) -> Value:
    inferred = inference.type_of(result)
    return value if inference.equal(value.type, inferred) else Value(value.name, inferred)


def _retyped_bodies(node: Node, inference: Inference, fakes: dict[Value, Any]) -> dict[Graph, Graph]:
    """The sub-graphs of a node that change."""
    found: dict[Graph, Graph] = {}
    for body, operands in called_bodies(inference, node, fakes):
        inputs = {old: _retyped(old, operand, inference) for old, operand in zip(body.inputs, operands, strict=True)}
        new = _retype(_with_inputs(body, inputs), inference, dict(zip(inputs.values(), operands, strict=True)))
        if new is not body:
            found[body] = new
    return found


def _with_inputs(graph: Graph, inputs: Mapping[Value, Value]) -> Graph:
    if all(old is new for old, new in inputs.items()):
        return graph
    entries = tuple(
        replace(entry, value=inputs.get(entry.value, entry.value)) if entry.value else entry for entry in graph.signature.inputs
    )
    nodes = tuple(rewired(node, inputs) for node in graph.nodes)
    return replace(graph, signature=replace(graph.signature, inputs=entries), nodes=nodes, outputs=rewired_outputs(graph, inputs))


def _swap(arg: Arg, swaps: Mapping[Graph, Graph]) -> Arg:
    if isinstance(arg, Graph):
        return swaps.get(arg, arg)
    if isinstance(arg, tuple | list):
        return type(arg)(_swap(item, swaps) for item in arg)
    return arg
