"""Occurrences of a pattern in a graph: sub-graph monomorphism (networkx, VF2) over the def-use graph of its operators.

Layout operators are looked through: every operand is traced back to the value that was computed. Two kinds of edges: "flow" (a result of
one operator is an operand of the other) and "share" (both read one value). The pattern becomes such a graph too; VF2 finds candidates
in the neighbourhood of each layer's matmuls, and `_bindable` then checks operand positions and repeated names exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, TypeAlias

import networkx as nx
from networkx.algorithms.isomorphism import DiGraphMatcher

from matmorph.ir.core import Graph, Node, Value, values_in
from matmorph.ir.op_table import BARE_PRODUCTS, LAYOUT_OPS
from matmorph.ir.ops import base_name
from matmorph.ir.site import Application, Site
from matmorph.ir.types import TensorType
from matmorph.specs.pattern import MATMUL, PRODUCT, Call, Pattern, Ref, connected_parts

COMMUTATIVE = frozenset({"add", "mul"})

Digraph: TypeAlias = Any
"""An `nx.DiGraph` whose nodes are ints (networkx is typed only in part)."""


@dataclass(frozen=True, slots=True, eq=False)
class Occurrence:
    """One place where a pattern holds. `captures`: a Site for each captured weight matmul, else the Value."""

    captures: Mapping[str, Site | Value]


@dataclass(frozen=True, slots=True)
class _Operation:
    """A node as patterns see it under one name; a weight matmul appears under `matmul` and under its own ATen name.

    `operands`: tensor operands in order, traced back through layout operators. `scope`: the layer of a weight matmul.
    """

    op: str
    operands: tuple[Value, ...]
    outputs: tuple[Value, ...]
    site: Site | None = None
    scope: str = ""


def find(pattern: Pattern, graph: Graph, sites: Sequence[Site]) -> tuple[Occurrence, ...]:
    """All occurrences, each set of captured values once, in graph order. Captured weight matmuls lie in one layer; distinct calls of the
    pattern are distinct nodes; intermediate values may have other users."""
    wanted = {call.op for call in pattern.calls}
    operations = [operation for operation in _operations(graph, sites) if operation.op in wanted]
    target = _target(operations, pattern)
    small = _pattern_graph(pattern)
    captured = frozenset(pattern.captures[name].call for name in pattern.matmuls)
    found: dict[tuple[int, ...], Occurrence] = {}
    for scope in dict.fromkeys(operation.scope for operation in operations if operation.site):
        for assignment in _assignments(pattern, small, target, operations, captured, scope):
            key = tuple(assignment[ref.call] for ref in pattern.captures.values())
            if key not in found and _bindable(pattern.calls, [operations[assignment[k]] for k in range(len(pattern.calls))], 0, {}):
                found[key] = Occurrence({name: _captured(operations[assignment[r.call]], r) for name, r in pattern.captures.items()})
    return tuple(found[key] for key in sorted(found))


def operator_counts(pattern: Pattern, graph: Graph, sites: Sequence[Site]) -> dict[str, int]:
    """How often each operator of the pattern stands in the graph, in the order of the pattern: why a pattern may be found nowhere."""
    counts = dict.fromkeys((call.op for call in pattern.calls), 0)
    for operation in _operations(graph, sites):
        if operation.op in counts:
            counts[operation.op] += 1
    return counts


def _captured(operation: _Operation, ref: Ref) -> Site | Value:
    return operation.site if operation.site and operation.op == MATMUL else operation.outputs[ref.output]


# ------------------------------------------------------------------------------------------------------------------ the target graph


def _operations(graph: Graph, sites: Sequence[Site]) -> Iterator[_Operation]:
    """The tensor operators of the graph in order; layout operators and arithmetic on sizes are left out."""
    applied = {
        application.node: (site, application)
        for site in sites
        if site.form != "embedding" and not site.listed
        for application in site.applications
    }
    computed = _computed_values(graph)
    for node in graph.nodes:
        name = base_name(node.op).strip("_")
        if node in applied:
            yield _weight_matmul(*applied[node], computed)
        if _is_layout(node) or not any(isinstance(value.type, TensorType) for value in node.outputs):
            continue
        operands = tuple(computed.get(value, value) for value in values_in(node.args) if isinstance(value.type, TensorType))
        if name != MATMUL:
            yield _Operation(name, operands, node.outputs)
        if name in BARE_PRODUCTS and node not in applied:
            yield _Operation(PRODUCT, operands, node.outputs)


def _weight_matmul(site: Site, application: Application, computed: Mapping[Value, Value]) -> _Operation:
    operand = computed.get(application.x, application.x)
    return _Operation(MATMUL, (operand,), (computed.get(application.output, application.output),), site, _layer_scope(site))


def _is_layout(node: Node) -> bool:
    """Whether a node only moves elements; a slice that takes everything (the `:` of `x[:, None, :]`) does too."""
    source = node.args[0] if node.args else None
    if not node.op.startswith("aten.") or not isinstance(source, Value) or len(node.outputs) != 1:
        return False
    name = base_name(node.op)
    return name in LAYOUT_OPS or (name == "slice" and node.output.type == source.type)


def _computed_values(graph: Graph) -> dict[Value, Value]:
    """For each result of a layout operator, the value that it is a view, a copy or a cast of."""
    computed: dict[Value, Value] = {}
    for node in graph.nodes:
        if _is_layout(node):
            source: Value = node.args[0]
            computed[node.outputs[0]] = computed.get(source, source)
    return computed


def _layer_scope(site: Site) -> str:
    """The module path of the layer that the weight belongs to: up to the first number with something below it ("encoder.layer.3").

    A number at the end of the path is the matmul's own place in a sequence ("mlp.2"), not a layer around it.
    """
    parts = site.path.split(".")
    numbered = next((k for k, part in enumerate(parts[:-1]) if part.isdecimal()), -1)
    return ".".join(parts[: numbered + 1])


def _target(operations: Sequence[_Operation], pattern: Pattern) -> Digraph:
    """Nodes are indices into `operations`; each edge has the set `kinds`."""
    target: Digraph = nx.DiGraph()
    target.add_nodes_from(range(len(operations)))
    makers: dict[Value, list[int]] = {}
    for index, operation in enumerate(operations):
        for value in operation.outputs:
            makers.setdefault(value, []).append(index)
    for index, operation in enumerate(operations):
        for value in operation.operands:
            for maker in makers.get(value, ()):
                _add_edge(target, maker, index, "flow")
    for first, second in _shared_pairs(pattern):
        kinds = (pattern.calls[first].op, pattern.calls[second].op)
        _add_shares(target, operations, kinds)
    return target


def _add_shares(target: Digraph, operations: Sequence[_Operation], ops: tuple[str, str]) -> None:
    readers: dict[Value, tuple[list[int], list[int]]] = {}
    for index, operation in enumerate(operations):
        for side, op in enumerate(ops):
            if operation.op == op:
                for value in set(operation.operands):
                    readers.setdefault(value, ([], []))[side].append(index)
    for firsts, seconds in readers.values():
        for first in firsts:
            for second in seconds:
                if first != second:
                    _add_edge(target, first, second, "share")


def _add_edge(graph: Digraph, source: int, sink: int, kind: str) -> None:
    if graph.has_edge(source, sink):
        graph.edges[source, sink]["kinds"].add(kind)
    else:
        graph.add_edge(source, sink, kinds={kind})


# ------------------------------------------------------------------------------------------------------------------ the pattern graph


def _shared_pairs(pattern: Pattern) -> Iterator[tuple[int, int]]:
    """Pairs of different calls that read one free name, each as (earlier, later)."""
    for name in pattern.free:
        yield from combinations([index for index, call in enumerate(pattern.calls) if name in call.args], 2)


def _pattern_graph(pattern: Pattern) -> Digraph:
    small: Digraph = nx.DiGraph()
    small.add_nodes_from(range(len(pattern.calls)))
    for index, call in enumerate(pattern.calls):
        for arg in call.args:
            if isinstance(arg, Ref):
                _add_edge(small, arg.call, index, "flow")
    for first, second in _shared_pairs(pattern):
        _add_edge(small, first, second, "share")
    return small


# ------------------------------------------------------------------------------------------------------------------ matching


def _assignments(
    pattern: Pattern, small: Digraph, target: Digraph, operations: Sequence[_Operation], captured: frozenset[int], scope: str
) -> Iterator[dict[int, int]]:
    """Operation of each call, with the captured matmuls in `scope`; structure and names agree, positions are not checked yet."""
    seeds = [index for index, operation in enumerate(operations) if operation.site and operation.scope == scope]
    radius = max(len(part) for part in connected_parts(pattern.calls)) - 1
    near = target.subgraph(_within(target, seeds, radius)).copy()
    in_scope = set(seeds)
    for index in near:
        near.nodes[index]["fits"] = frozenset(
            k
            for k, call in enumerate(pattern.calls)
            if operations[index].op == call.op
            and len(operations[index].operands) >= len(call.args)
            and (k not in captured or index in in_scope)
        )
    for k in small:
        small.nodes[k]["call"] = k
    matcher: Any = DiGraphMatcher(
        near,
        small,
        node_match=lambda found, sought: sought["call"] in found["fits"],
        edge_match=lambda found, sought: sought["kinds"] <= found["kinds"],
    )
    for mapping in matcher.subgraph_monomorphisms_iter():
        yield {call: index for index, call in mapping.items()}


def _within(target: Digraph, seeds: Iterable[int], radius: int) -> set[int]:
    """Nodes at most `radius` edges away from a seed, in either direction."""
    reached = set(seeds)
    border = reached
    for _ in range(radius):
        border = {other for index in border for other in (*target.predecessors(index), *target.successors(index))} - reached
        reached |= border
    return reached


def _bindable(calls: Sequence[Call], chosen: Sequence[_Operation], index: int, bound: Mapping[str, Value]) -> bool:
    """Whether the arguments of `calls[index:]` fit the operands of the chosen operations, with `bound` for the free names so far."""
    if index == len(calls):
        return True
    args, operands = calls[index].args, chosen[index].operands
    commutes = calls[index].op in COMMUTATIVE
    for placed in permutations(operands, len(args)) if commutes else (operands[: len(args)],):
        now = _bind(args, placed, chosen, bound)
        if now is not None and _bindable(calls, chosen, index + 1, now):
            return True
    return False


def _bind(
    args: Sequence[Ref | str], operands: Sequence[Value], chosen: Sequence[_Operation], bound: Mapping[str, Value]
) -> dict[str, Value] | None:
    """`bound` with the free names of one call added, or None where an operand is another value than its argument says."""
    now = dict(bound)
    for arg, operand in zip(args, operands, strict=True):
        if isinstance(arg, Ref):
            outputs = chosen[arg.call].outputs
            fits = arg.output < len(outputs) and outputs[arg.output] is operand
        else:
            fits = now.setdefault(arg, operand) is operand
        if not fits:
            return None
    return now
