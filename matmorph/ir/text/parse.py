"""Reads the text form of a graph; `matmorph.ir.text.printing` says what it looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import torch
from torch.utils._pytree import TreeSpec

from matmorph.errors import InputError
from matmorph.ir.core import Arg, Const, Graph, Input, Node, Origin, Range, Signature, Value
from matmorph.ir.text.scan import Scanner
from matmorph.ir.text.tree import default_specs, parse_tree
from matmorph.ir.types import ScalarType, TensorType, Type, dtype_name, parse_dim

MADE_BY = ("rule", "site", "method", "part")
"""What a weight says of its making, in this order: fields of `Const`."""
BARE_NAME = r"[A-Za-z0-9_.\-]+"
ESCAPES = str.maketrans({"%": "%25", "/": "%2F", ":": "%3A", "=": "%3D"})
_WORDS: Mapping[str, Any] = {"None": None, "True": True, "False": False, "inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


def parse_graph(text: str, weights: Mapping[str, torch.Tensor] | None = None) -> Graph:
    """The graph that `text` states. `weights`: tensors by any name of a constant.

    Raises InputError with line and column where the text is wrong; a constant without a weight raises InputError when it is loaded.
    """
    scanner = Scanner(text)
    scanner.lines()
    scanner.expect(r"graph\b", "`graph`")
    graph = _graph(scanner, weights or {}, nested=False)
    scanner.lines()
    if scanner.at < len(text):
        scanner.fail("expected the end of the text")
    return graph


@dataclass(slots=True)
class _Parts:
    """What the statements of one graph have said so far."""

    weights: Mapping[str, torch.Tensor]
    values: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ranges: dict[str, Range] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    state: list[Const] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[tuple[Arg, str]] = field(default_factory=list)
    call: TreeSpec | None = None
    result: TreeSpec | None = None

    def bind(self, s: Scanner, value: Value, at: int) -> None:
        if value.name in self.values:
            s.fail(f"%{value.name} is bound twice", at)
        self.values[value.name] = value


def _graph(s: Scanner, weights: Mapping[str, torch.Tensor], nested: bool) -> Graph:
    s.expect("device=", "`device=`")
    device = s.expect(r"[a-z]+(:\d+)?", "a device")
    if nested:
        s.expect(r"\{", "`{`")
    parts = _Parts(weights)
    while not _ends(s, nested):
        word = s.take("|".join(rf"{keyword}\b" for keyword in _STATEMENTS))
        (_STATEMENTS[word] if word else _node)(s, parts)
    call, result = default_specs(len(parts.inputs), len(parts.outputs))
    names = tuple(name for _, name in parts.outputs)
    signature = Signature(tuple(parts.inputs), parts.call or call, names, parts.result or result)
    outputs = tuple(value for value, _ in parts.outputs)
    return Graph(signature, tuple(parts.nodes), outputs, tuple(parts.state), parts.ranges, device, tuple(parts.notes))


def _ends(s: Scanner, nested: bool) -> bool:
    before = s.at
    s.lines()
    if nested and s.take(r"\}"):
        return True
    if s.at == len(s.text):
        return s.fail("expected `}`") if nested else True
    if s.at > 0 and "\n" not in s.text[before : s.at]:
        s.fail("expected the end of the line")
    return False


# statements


def _note(s: Scanner, parts: _Parts) -> None:
    parts.notes.append(s.string())


def _range(s: Scanner, parts: _Parts) -> None:
    name = s.expect(r"[A-Za-z_]\w*", "the name of a symbol")
    low, _, high = s.expect(r"\d+\.\.\d*", "a range such as 2..512").partition("..")
    parts.ranges[name] = Range(int(low), int(high) if high else None)


def _call(s: Scanner, parts: _Parts) -> None:
    parts.call = parse_tree(s)


def _result(s: Scanner, parts: _Parts) -> None:
    parts.result = parse_tree(s)


def _literal(s: Scanner, parts: _Parts) -> None:
    name = s.string()
    s.expect("=", "`=`")
    parts.inputs.append(Input(name, None, _arg(s, parts)))


def _input(s: Scanner, parts: _Parts) -> None:
    value = Value(*_binding(s, parts))
    parts.values[value.name] = value
    parts.inputs.append(Input(s.string(), value))


def _const(s: Scanner, parts: _Parts, kind: Any) -> None:
    name, type = _binding(s, parts)
    if not isinstance(type, TensorType):
        s.fail(f"a {kind} is a tensor")
    names = [s.string()]
    while s.text[s.at : s.at + 2] == ' "':
        names.append(s.string())
    trainable, transient = s.take(r"trainable\b") is not None, s.take(r"transient\b") is not None
    storage = s.string() if s.take("storage=") else names[0]
    made = {key: s.string() for key in MADE_BY if s.take(f"{key}=")}
    const = Const(name, type, _loader(name, type, names, parts.weights), tuple(names), kind, trainable, not transient, storage, **made)
    parts.values[name] = const
    parts.state.append(const)


def _loader(name: str, type: TensorType, names: list[str], weights: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        found = next((weights[key] for key in names if key in weights), None)
        if found is None:
            raise InputError(f"constant %{name} has no weight: its graph was read from text, without one for {names[0]!r}")
        if (dtype_name(found.dtype), tuple(found.shape)) != (type.dtype, type.shape):
            raise InputError(f"constant %{name} is {type}, its weight is {dtype_name(found.dtype)}{list(found.shape)}")
        return found

    return load


def _output(s: Scanner, parts: _Parts) -> None:
    value = _arg(s, parts)
    s.blanks()
    at, name = s.at, s.string()
    if any(name == other for _, other in parts.outputs):
        s.fail(f"a second output is called {name!r}", at)
    parts.outputs.append((value, name))


def _node(s: Scanner, parts: _Parts) -> None:
    bound: list[tuple[Value, int]] = []
    while not bound or s.take(","):
        if not bound and s.take(r"_(?=\s*=)"):
            break
        s.blanks()
        at = s.at
        bound.append((Value(*_binding(s, parts)), at))
    s.expect("=", "`=`")
    op = s.expect(r"[A-Za-z_]\w*(\.\w+)+", "an operator such as aten.linear.default")
    s.expect(r"\(", "`(`")
    attrs: dict[str, Arg] = {}
    args: list[Arg] = []

    def operand() -> bool:
        at = s.at
        key = s.take(r"[A-Za-z_]\w*=")
        if key:
            attrs[key[:-1]] = _arg(s, parts)
        elif attrs:
            s.fail("a positional argument after one with a name", at)
        else:
            args.append(_arg(s, parts))
        return True

    s.series(r"\)", operand)
    for value, at in bound:  # after the operands: a node does not see its own results
        parts.bind(s, value, at)
    parts.nodes.append(Node(op, tuple(args), tuple(value for value, _ in bound), attrs, _origin(s)))


_STATEMENTS: Mapping[str, Callable[[Scanner, _Parts], None]] = {
    "note": _note,
    "range": _range,
    "call": _call,
    "result": _result,
    "literal": _literal,
    "input": _input,
    "output": _output,
    "parameter": lambda s, parts: _const(s, parts, "parameter"),
    "buffer": lambda s, parts: _const(s, parts, "buffer"),
    "constant": lambda s, parts: _const(s, parts, "constant"),
}


# parts of statements


def _binding(s: Scanner, parts: _Parts) -> tuple[str, Type]:
    s.blanks()
    at = s.at
    name = _name(s)
    if name in parts.values:
        s.fail(f"%{name} is bound twice", at)
    s.expect(":", "`:` and a type")
    return name, _type(s)


def _name(s: Scanner) -> str:
    s.expect("%", "a value such as %x")
    return s.string() if s.text[s.at : s.at + 1] == '"' else s.expect(BARE_NAME, "a name")


def _type(s: Scanner) -> Type:
    s.blanks()
    at = s.at
    word = s.expect(r"\w+", "a type")
    if s.text[s.at : s.at + 1] == "[":
        inner = s.expect(r"\[[^\]\n]*\]", "dims in brackets")[1:-1]
        if not isinstance(getattr(torch, word, None), torch.dtype):
            s.fail(f"unknown element type {word!r}", at)
        return TensorType(word, tuple(_dim(s, part) for part in _commas(inner)))
    if word not in ("int", "float", "bool"):
        s.fail(f"unknown type {word!r}", at)
    if s.text[s.at : s.at + 1] != "(":
        return ScalarType(word)  # type: ignore[arg-type]
    start = s.at
    depth = 0
    while s.at < len(s.text):
        depth += {"(": 1, ")": -1}.get(s.text[s.at], 0)
        s.at += 1
        if not depth:
            return ScalarType(word, _dim(s, s.text[start + 1 : s.at - 1]))  # type: ignore[arg-type]
    return s.fail("expected `)`")


def _dim(s: Scanner, text: str) -> Any:
    try:
        return parse_dim(text)
    except ValueError as error:
        s.fail(str(error))


def _commas(text: str) -> list[str]:
    """Splits at the commas outside of parentheses."""
    found, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found if text.strip() else []


def _origin(s: Scanner) -> Origin:
    scopes = _scopes(s) if s.take("@") else ()
    layer = int(s.expect(r"\d+", "a number")) if s.take("layer=") else None
    rule, location, source = (s.string() if s.take(f"{key}=") else None for key in ("rule", "location", "source"))
    return Origin(scopes, layer, rule, location, source)


def _scopes(s: Scanner) -> tuple[tuple[str, str], ...]:
    at = s.at
    found: list[tuple[str, str]] = []
    outer = ""
    for part in s.string().split("/"):
        shown, colon, kind = part.partition(":")
        if not colon:
            s.fail(f"expected PATH:CLASS, found {part!r}", at)
        absolute, path = shown.startswith("="), unquote(shown.removeprefix("="))
        outer = path if absolute or not outer else f"{outer}.{path}" if path else outer
        found.append((outer, unquote(kind)))
    return tuple(found)


def _arg(s: Scanner, parts: _Parts) -> Arg:
    s.blanks()
    at = s.at
    if s.text[at : at + 1] == "%":
        name = _name(s)
        return parts.values[name] if name in parts.values else s.fail(f"%{name} is not bound", at)
    if s.text[at : at + 1] == '"':
        return s.string()
    if s.take(r"\["):
        return tuple(s.series(r"\]", lambda: _arg(s, parts)))
    if s.take(r"graph\b"):
        return _graph(s, parts.weights, nested=True)
    if s.take(r"device\("):
        device = _device(s)
        s.expect(r"\)", "`)`")
        return device
    return _word(s)


def _device(s: Scanner) -> torch.device:
    at = s.at
    try:
        return torch.device(s.string())
    except RuntimeError:
        s.fail("no such device", at)


def _word(s: Scanner) -> Any:
    at = s.at
    word = s.expect(r"-?\d[\d.]*([eE][+-]?\d+)?|-?[A-Za-z_][\w.]*", "a value or a literal")
    if word in _WORDS:
        return _WORDS[word]
    found = getattr(torch, word.removeprefix("torch."), None) if word.startswith("torch.") else None
    if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
        return found
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    s.fail(f"expected a value or a literal, found {word!r}", at)
