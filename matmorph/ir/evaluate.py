"""Runs a Graph with torch, node by node: the oracle that other executors are held against, and what calibration watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from matmorph.errors import InputError, did_you_mean
from matmorph.ir.core import Const, Graph, Node, Value, map_values, mapped_arguments, values_in
from matmorph.ir.ops import resolve
from matmorph.ir.types import format_dim, symbol

Observer = Callable[[torch.Tensor], None]
Runner = Callable[[Node, Callable[[Value], Any]], tuple[Any, ...]]
"""From a node and what reads a value to the node's results."""


def evaluate(graph: Graph, inputs: Sequence[Any], observe: Mapping[Value, Observer] | None = None, run: Runner | None = None) -> list[Any]:
    """Flat outputs for flat tensor inputs, in `graph.inputs` order. `observe` is called with a value as soon as it exists. `run`: what
    computes a node in place of `run_node`.

    A value is dropped after its last use, so the peak is that of the model's own forward.
    """
    observe, run = observe or {}, run or run_node
    known: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True))
    for value, tensor in known.items():
        if value in observe:
            observe[value](tensor)
    dying = last_uses(graph)
    for node in graph.nodes:
        results = run(node, lambda value: known[value] if value in known else _load(known, value))
        for value, result in zip(node.outputs, results, strict=True):
            known[value] = result
            if value in observe:
                observe[value](result)
        for value in dying.get(node, ()):
            known.pop(value, None)
    return [map_values(output, lambda value: known[value] if value in known else _load(known, value)) for output in graph.outputs]


def _load(known: dict[Value, Any], value: Value) -> torch.Tensor:
    if not isinstance(value, Const):
        raise KeyError(f"%{value.name} is read before it is computed")
    tensor = value.load()
    known[value] = tensor
    return tensor


def run_node(node: Node, read: Callable[[Value], Any]) -> tuple[Any, ...]:
    """The results of one node, one per output. Sub-graphs of higher-order operators run as Python functions."""
    args, attrs = mapped_arguments(node, read)
    result = resolve(node.op)(*_bodies(args), **{name: _bodies(value) for name, value in attrs.items()})
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _bodies(arg: Any) -> Any:
    if isinstance(arg, Graph):
        return lambda *inputs: tuple(evaluate(arg, inputs))
    if isinstance(arg, tuple | list):
        return type(arg)(_bodies(item) for item in arg)
    return arg


def last_uses(graph: Graph) -> dict[Node, list[Value]]:
    kept = set(values_in(graph.outputs))
    last: dict[Value, Node] = {}
    for node in graph.nodes:
        last.update(dict.fromkeys((*node.inputs(), *node.outputs), node))
    dying: dict[Node, list[Value]] = {}
    for value, node in last.items():
        if value not in kept:
            dying.setdefault(node, []).append(value)
    return dying


def bind(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Flat tensor inputs, in `graph.inputs` order, of a call that mirrors the traced example.

    Keyword arguments that were literals in the example (None, False ...) may be left out. Raises InputError for missing or unknown
    arguments (nearest name), for a literal other than the traced one, and for tensors of the wrong dtype, rank, fixed size or range.
    """
    leaves = _flatten_call(graph, args, kwargs)
    found: list[Any] = []
    named: list[tuple[str, Value, Any]] = []
    for entry, leaf in zip(graph.signature.inputs, leaves, strict=True):
        if entry.value is None:
            if leaf is not entry.literal and leaf != entry.literal:
                raise InputError(f"input {entry.name} was traced as {entry.literal!r} and is fixed to it, got {leaf!r}")
            continue
        named.append((entry.name, entry.value, leaf))
        found.append(leaf)
    check_tensors(graph, named)
    return found


def check_tensors(graph: Graph, named: Iterable[tuple[str, Value, Any]]) -> None:
    """(name, what the graph has there, what was given) of inputs: InputError for a wrong dtype, rank, fixed size or range, and where two
    tensors give an axis different sizes."""
    sizes: dict[str, tuple[int, str]] = {}
    seen = list(named)
    for name, value, leaf in seen:
        _check_tensor(graph, name, value, leaf, sizes)
    known = {symbol(label): size for label, (size, _) in sizes.items()}
    for name, value, leaf in seen:
        for dim, size in zip(value.tensor.shape, leaf.shape, strict=True):
            if not isinstance(dim, int) and dim.free_symbols <= known.keys() and dim.subs(known) != size:
                raise InputError(f"{format_dim(dim)} is {dim.subs(known)}, but {name} has {size} there")


def _flatten_call(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    args_spec, kwargs_spec = graph.signature.in_spec.children()
    names = list(kwargs_spec.context or ())
    if len(args) != len(args_spec.children()):
        kinds = [f"{len(args_spec.children())} positional arguments"] if args_spec.children() or not names else []
        how = " and ".join([*kinds, *([f"keyword arguments {', '.join(names)}"] if names else [])])
        raise InputError(f"{len(args)} positional arguments given, but the model was traced with {how}")
    unknown = [name for name in kwargs if name not in names]
    if unknown:
        raise InputError(
            f"no input is named {unknown[0]}; the inputs are {', '.join(names) or 'positional'}{did_you_mean(unknown[0], names)}"
        )
    literals = {entry.name: entry.literal for entry in graph.signature.inputs if entry.value is None}
    missing = [name for name in names if name not in kwargs and name not in literals]
    if missing:
        raise InputError(f"input {missing[0]} is missing; the inputs are {', '.join(names)}")
    full = {name: kwargs[name] if name in kwargs else literals[name] for name in names}
    leaves, spec = tree_flatten((tuple(args), full))
    if spec != graph.signature.in_spec and len(leaves) != len(graph.signature.inputs):
        raise InputError("the inputs are nested differently from the traced example")
    return leaves


def _check_tensor(graph: Graph, name: str, value: Value, leaf: Any, sizes: dict[str, tuple[int, str]]) -> None:
    kind = value.tensor
    if not isinstance(leaf, torch.Tensor):
        raise InputError(f"input {name} must be a tensor {kind}, got {type(leaf).__name__}")
    if leaf.dtype != kind.torch_dtype or leaf.dim() != len(kind.shape):
        raise InputError(f"input {name} must be {kind}, got {str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}")
    for axis, (dim, size) in enumerate(zip(kind.shape, leaf.shape, strict=True)):
        label = format_dim(dim)
        if isinstance(dim, int):
            if size != dim:
                raise InputError(f"axis {axis} of input {name} must be {dim}, got {size}")
            continue
        known, first = sizes.setdefault(label, (int(size), name))
        if known != size:
            raise InputError(f"{label} is {known} in {first} but {size} in {name}")
        limits = graph.ranges.get(label)
        if limits is not None and (size < limits.low or (limits.high is not None and size > limits.high)):
            raise InputError(f"{label} must be in {limits.low}..{limits.high or ''}, got {size} in {name}")
