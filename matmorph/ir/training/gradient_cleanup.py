"""Clean-up of gradient graphs: what a derivative writes twice, expands before it broadcasts, or moves there and back again.

One forward walk. Each node first gets the replacements of its operands, then the rules of its operator (`cleanup_rules`), then gives way to
an equal node before it, so that masks and shared terms are computed once. What nothing reads goes. Numbers stay what they are, up to the
rounding of products of two literals; no weight is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from matmorph.ir.build import Builder
from matmorph.ir.core import Arg, Graph, Node, Value, values_in
from matmorph.ir.infer import Inference
from matmorph.ir.ops import base_name, resolve
from matmorph.ir.randomness import may_draw
from matmorph.ir.rewiring import needed, rewired, rewired_outputs
from matmorph.ir.training.cleanup_rules import CLEANUP_RULES, CleanupWalk


def simplify_gradient(graph: Graph) -> Graph:
    """The same graph with fewer nodes: equal results for every input, names of what stays, signature and state untouched."""
    while True:
        smaller = _walked(graph)
        if len(smaller.nodes) == len(graph.nodes) and all(map(_alike, smaller.nodes, graph.nodes)):
            return graph
        graph = smaller


def _alike(a: Node, b: Node) -> bool:
    return a.op == b.op and a.args == b.args and a.attrs == b.attrs


def _walked(graph: Graph) -> Graph:
    named = (*graph.inputs, *graph.state, *(value for node in graph.nodes for value in node.outputs))
    b = Builder(graph.ranges, [value.name for value in named], inference=Inference(graph.ranges, graph.device))
    walk = CleanupWalk(b, _readers(graph.nodes, graph.outputs), {})
    env: dict[Value, Value] = {}
    seen: dict[Any, Node] = {}
    for original in graph.nodes:
        node = rewired(original, env)
        b.origin = node.origin
        start = len(b.nodes)
        found = _simplified(walk, node)
        if found is not None:
            env[node.output] = found
            walk.made.update((value, made) for made in b.nodes[start:] for value in made.outputs)
            continue
        first = seen.setdefault(_identity(node), node) if _pure(node) else node
        if first is not node:
            env.update(zip(original.outputs, first.outputs, strict=True))
            continue
        b.nodes.append(node)
        walk.made.update((value, node) for value in node.outputs)
    outputs = rewired_outputs(graph, env)
    return replace(graph, nodes=needed(b.nodes, outputs), outputs=outputs)


def _simplified(walk: CleanupWalk, node: Node) -> Value | None:
    """What stands for the result of a node, of the same type; None where no rule knows better."""
    if len(node.outputs) != 1:
        return None
    for rule in CLEANUP_RULES.get(base_name(node.op), ()):
        found = rule(walk, node)
        if found is not None and found.type == node.output.type:
            return found
    return None


def _readers(nodes: Iterable[Node], outputs: Iterable[Arg]) -> dict[Value, int]:
    """How often each value is read; outputs count."""
    counts: dict[Value, int] = {}
    for value in (*(value for node in nodes for value in node.inputs()), *values_in(tuple(outputs))):
        counts[value] = counts.get(value, 0) + 1
    return counts


def _pure(node: Node) -> bool:
    """Whether two equal nodes have equal results, and no effect."""
    target = resolve(node.op)
    if not isinstance(target, torch._ops.OpOverload):
        return not node.op.startswith("higher_order.")
    return not may_draw(node.op) and not target._schema.is_mutable


def _identity(node: Node) -> Any:
    return node.op, _key(node.args), tuple((name, _key(arg)) for name, arg in sorted(node.attrs.items()))


def _key(arg: Arg) -> Any:
    """Numbers of different types differ: 1, 1.0 and True do not mean the same in a literal."""
    if isinstance(arg, tuple | list):
        return tuple(map(_key, arg))
    return (type(arg).__name__, repr(arg)) if isinstance(arg, bool | int | float) else arg
