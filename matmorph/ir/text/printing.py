"""The text form of a graph: the language of tests and of error messages. `parse_graph(print_graph(g))` is the same graph.

    graph device=cpu
    range batch 1..
    range seq 2..512
    input %x: float32[batch, seq, 8] "x"
    parameter %fc.weight: float32[4, 8] "fc.weight" "alias.weight" trainable
    %linear: float32[batch, seq, 4] = aten.linear.default(%x, %fc.weight, None) @":Net/fc:Linear" layer=0
    %split: float32[batch, seq, 2], %split_1: float32[batch, seq, 2] = aten.split.Tensor(%linear, 2, -1)
    output %split "output_0"
    output None "output_1"

One statement a line; a sub-graph of a higher-order operator is `graph device=cpu {`, its statements indented, `}`. After `@` comes the
module stack, outermost first, each path relative to the one before (`=` in front where it is not inside of it). Further statements:
`note "..."`, `literal "use_cache" = None` (an input that is no tensor), and `call` / `result`, the pytrees of the call and of the result,
where these are not positional arguments and a tuple (or a single value). `#` starts a comment.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from matmorph.errors import VerifyError
from matmorph.ir.core import Arg, Const, Graph, Input, Node, Origin, Range, Value
from matmorph.ir.text.parse import BARE_NAME, ESCAPES, MADE_BY, parse_graph
from matmorph.ir.text.tree import default_specs, format_tree

__all__ = ["format_arg", "format_node", "format_value", "parse_graph", "print_graph", "statements"]

_INDENT = "    "


def print_graph(graph: Graph) -> str:
    """The whole graph as text, ending in a newline."""
    return "\n".join(line for _, line in statements(graph)) + "\n"


def statements(graph: Graph) -> Iterator[tuple[Any, str]]:
    """(what it states, its text) in order: a Node, Const, Input or output's value; None for the rest. A text may have several lines."""
    yield None, f"graph device={graph.device}"
    yield from _body(graph)


def _body(graph: Graph) -> Iterator[tuple[Any, str]]:
    signature = graph.signature
    for note in graph.notes:
        yield None, f"note {_quote(note)}"
    for name, bounds in graph.ranges.items():
        yield None, f"range {name} {_range(bounds)}"
    call, result = default_specs(len(signature.inputs), len(signature.outputs))
    if signature.in_spec != call:
        yield None, f"call {format_tree(signature.in_spec)}"
    for entry in signature.inputs:
        yield entry, _input(entry)
    for const in graph.state:
        yield const, _const(const)
    for node in graph.nodes:
        yield node, format_node(node)
    for value, name in zip(graph.outputs, signature.outputs, strict=False):
        yield value, f"output {format_arg(value)} {_quote(name)}"
    if signature.out_spec != result:
        yield None, f"result {format_tree(signature.out_spec)}"


def _range(bounds: Range) -> str:
    return f"{bounds.low}..{'' if bounds.high is None else bounds.high}"


def _input(entry: Input) -> str:
    if entry.value is None:
        return f"literal {_quote(entry.name)} = {format_arg(entry.literal)}"
    return f"input {_binding(entry.value)} {_quote(entry.name)}"


def _const(const: Const) -> str:
    parts = [const.kind, _binding(const), *map(_quote, const.names)]
    parts += ["trainable"] * const.trainable + ["transient"] * (not const.persistent)
    if const.storage != const.path:
        parts.append(f"storage={_quote(const.storage)}")
    made = ((key, getattr(const, key)) for key in MADE_BY)
    parts += [f"{key}={_quote(value)}" for key, value in made if value is not None]
    return " ".join(parts)


def format_node(node: Node) -> str:
    """One node as its statement."""
    outputs = ", ".join(map(_binding, node.outputs)) or "_"
    args = [*map(format_arg, node.args), *(f"{name}={format_arg(arg)}" for name, arg in node.attrs.items())]
    return " ".join([f"{outputs} = {node.op}({', '.join(args)})", *_origin(node.origin)])


def _origin(origin: Origin) -> Iterator[str]:
    if origin.scopes:
        yield f"@{_quote(_scopes(origin.scopes))}"
    if origin.layer is not None:
        yield f"layer={origin.layer}"
    for key in ("rule", "location", "source"):
        if getattr(origin, key) is not None:
            yield f"{key}={_quote(getattr(origin, key))}"


def _scopes(scopes: tuple[tuple[str, str], ...]) -> str:
    parts, outer = [], ""
    for path, kind in scopes:
        inside = not outer or path == outer or path.startswith(f"{outer}.")
        shown = path[len(outer) :].removeprefix(".") if inside and outer else path
        parts.append(f"{'' if inside else '='}{shown.translate(ESCAPES)}:{kind.translate(ESCAPES)}")
        outer = path
    return "/".join(parts)


def format_value(value: Value) -> str:
    """`%name`, quoted where the name has other characters than letters, digits, `_`, `.` and `-`."""
    return f"%{value.name}" if re.fullmatch(BARE_NAME, value.name) else f"%{_quote(value.name)}"


def _binding(value: Value) -> str:
    return f"{format_value(value)}: {value.type}"


def format_arg(arg: Arg) -> str:
    """An operand: a Value, a nest, a sub-graph or a literal. Raises VerifyError for a literal that the text form does not know."""
    if isinstance(arg, Value):
        return format_value(arg)
    if isinstance(arg, tuple | list):
        return f"[{', '.join(map(format_arg, arg))}]"
    if isinstance(arg, Graph):
        inner = "\n".join(line for _, line in _body(arg)).replace("\n", f"\n{_INDENT}")
        return f"graph device={arg.device} {{\n{_INDENT}{inner}\n}}"
    form = next((form for kind, form in _LITERALS.items() if isinstance(arg, kind)), None)
    if form is None:
        raise VerifyError(f"a literal of type {type(arg).__name__} has no place in the IR: {arg!r}")
    return str(form(arg))


def _float(number: float) -> str:
    return repr(number) if math.isfinite(number) else str(number)  # "inf", "-inf", "nan"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_LITERALS: Mapping[type, Any] = {
    type(None): repr,
    bool: repr,
    int: int.__repr__,
    float: _float,
    str: _quote,
    torch.dtype: str,
    torch.layout: str,
    torch.memory_format: str,
    torch.device: lambda device: f"device({_quote(str(device))})",
}
