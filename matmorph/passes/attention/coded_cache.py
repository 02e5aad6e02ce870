"""`code_cache`: the key/value cache of a graph in int8, one scale for each token of each head (`ir.cache_ops`).

Every slot becomes two, its codes and their scales, as inputs and as outputs. Who read the past reads it as numbers again, so that the form
in which attention is written makes no difference, and training graphs, which keep no cache, never get here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from matmorph.errors import ExportError
from matmorph.ir.attention_ops import CACHED, FUSED_SLOTS
from matmorph.ir.build import Builder, names_of, unique_name
from matmorph.ir.cache import Slot, find_slots, reads_size
from matmorph.ir.cache_ops import CODED, coded
from matmorph.ir.core import Graph, Input, Node, Signature, Value
from matmorph.ir.infer import Inference
from matmorph.ir.rewiring import rewired
from matmorph.ir.types import TensorType

SCALES = "scales"
"""Behind the name of a slot's input or output: the port of its scales."""


@dataclass(frozen=True, slots=True, eq=False)
class _Coded:
    """What a slot's past becomes."""

    slot: Slot
    codes: Value
    scales: Value


def code_cache(graph: Graph) -> Graph:
    """The graph with its cache in codes; itself where it keeps none. Raises ExportError for a slot that has no axis beside its tokens'."""
    slots = find_slots(graph)
    if not slots:
        return graph
    for slot in slots:
        if slot.axis == len(slot.past.tensor.shape) - 1:
            raise ExportError(
                f"export.cache int8 has a scale for each token of a head, and {slot.input} has its tokens along its last axis",
                ["leave export.cache out"],
            )
    taken = names_of(graph)
    made = {slot.past: _ports(slot, taken) for slot in slots}
    results, nodes = _nodes(graph, made, Builder(graph, taken, inference=Inference(graph.ranges, graph.device)))
    outputs = _outputs(graph, results)
    return replace(graph, signature=_signature(graph.signature, made, tuple(outputs)), nodes=nodes, outputs=tuple(outputs.values()))


def coded_examples(graph: Graph, examples: Sequence[Tensor]) -> list[Tensor]:
    """Inputs of `code_cache(graph)` from those of the graph, both in the order of their inputs."""
    pasts = {slot.past for slot in find_slots(graph)}
    pairs = zip(graph.inputs, examples, strict=True)
    return [part for value, tensor in pairs for part in (coded(tensor) if value in pasts else (tensor,))]


def _ports(slot: Slot, taken: set[str]) -> _Coded:
    kind = slot.past.tensor
    codes, scales = TensorType("int8", kind.shape), TensorType(kind.dtype, (*kind.shape[:-1], 1))
    names = (unique_name(f"{slot.past.name}_{what}", taken) for what in ("codes", SCALES))
    return _Coded(slot, Value(next(names), codes), Value(next(names), scales))


def _nodes(graph: Graph, made: Mapping[Value, _Coded], build: Builder) -> tuple[Mapping[Value, tuple[Value, Value]], tuple[Node, ...]]:
    """(present codes and scales by the present that they stand for, all nodes): the codes are made where the past was joined."""
    joins: dict[Node, list[_Coded]] = {}
    for port in made.values():
        joins.setdefault(port.slot.join, []).append(port)
    sizes = {past: port.codes for past, port in made.items()}
    results: dict[Value, tuple[Value, Value]] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        change = dict(sizes) if reads_size(node) else {}
        build.origin = node.origin
        for port in joins.get(node, ()):
            slot = port.slot
            before, codes, scales = build.many(CODED, port.codes, port.scales, slot.new, slot.axis, name=f"{slot.past.name}_read")
            change[slot.past], results[slot.present] = before, (codes, scales)
        changed = _over_numbers(rewired(node, change), build) if node.op == CACHED and node in joins else rewired(node, change)
        nodes += [*build.nodes, changed]
        build.nodes.clear()
    return results, tuple(nodes)


def _over_numbers(node: Node, build: Builder) -> Node:
    """`cached_attention` that gives no cache. ONNX's Attention gives one where it takes one, so it gets old and new tokens as one."""
    query, *pairs, mask, scale = node.args
    keys, values = (build("aten.cat.default", (pairs[past - 1], pairs[new - 1]), 2) for new, past, _ in FUSED_SLOTS)
    given = (query, keys, values, mask, 0.0, False)
    attrs = {"scale": scale, "enable_gqa": True}
    return Node("aten.scaled_dot_product_attention.default", given, node.outputs[:1], attrs, node.origin)


def _outputs(graph: Graph, results: Mapping[Value, tuple[Value, Value]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, output in zip(graph.signature.outputs, graph.outputs, strict=True):
        if isinstance(output, Value) and output in results:
            found[name], found[f"{name}.{SCALES}"] = results[output]
        else:
            found[name] = output
    return found


def _signature(signature: Signature, made: Mapping[Value, _Coded], outputs: tuple[str, ...]) -> Signature:
    """All inputs and outputs by name."""
    inputs: list[Input] = []
    for entry in signature.inputs:
        port = made.get(entry.value) if entry.value is not None else None
        more = [] if port is None else [Input(entry.name, port.codes), Input(f"{entry.name}.{SCALES}", port.scales)]
        inputs += more or [entry]
    return Signature.of_keywords(inputs, outputs)
