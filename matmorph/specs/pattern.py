"""The pattern language: lines like `h = mul(silu(g), u)` that describe a piece of the def-use graph.

    line     = names "=" call              # names: one, or several with commas for an operator with several outputs
    call     = function "(" argument {"," argument} ")"
    argument = call | name                 # a name of a left side, or a free one, which matches any value

A `#` begins a comment; inside parentheses a line may go on. A repeated name is the same value. `matmul(x)` is a weight matmul in any form
(the weight is not written), `matmul(a, b)` the product of two activations; every other function is an ATen base name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from matmorph.errors import SpecError, did_you_mean
from matmorph.ir.op_table import LAYOUT_OPS
from matmorph.specs.tree import Scalar

MATMUL = "matmul"
"""The weight matmul, in whatever form."""
PRODUCT = "matmul of activations"
"""`matmul` with two arguments."""


class Ref(NamedTuple):
    """Output `output` of call `call` of the pattern."""

    call: int
    output: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One operator of a pattern; `args` are outputs of other calls or free names. `op` has no outer underscores."""

    op: str
    args: tuple[Ref | str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """`captures`: what each name on a left side stands for, in order; `matmuls`: those of them that are weight matmuls."""

    text: str
    calls: tuple[Call, ...]
    captures: dict[str, Ref]
    matmuls: tuple[str, ...]

    @property
    def free(self) -> tuple[str, ...]:
        """Names that match any value, in order of first use."""
        return tuple(dict.fromkeys(arg for call in self.calls for arg in call.args if isinstance(arg, str)))


ATEN = "aten.txt"
"""The base names of ATen in the library's folder, below a line with the version of torch that they are of: a spec is read without torch."""


@cache
def aten_names() -> frozenset[str]:
    """Base names of all ATen operators that the installed torch has, without outer underscores."""
    text = (resources.files("matmorph.specs") / "library" / ATEN).read_text(encoding="utf-8")
    described, *names = text.split("\n")
    return frozenset(names) if described == f"# torch {_torch_version()}" else frozenset(names) | frozenset(torch_names())


def _torch_version() -> str:
    """Without what a build adds to it; "" where there is none, and then nothing to ask either."""
    try:
        return version("torch").partition("+")[0]
    except PackageNotFoundError:
        return ""


def torch_names() -> list[str]:
    """The names as torch itself has them, sorted; [] without torch."""
    try:
        import torch  # a version that the file does not describe is asked
    except ImportError:
        return []
    schemas = torch._C._jit_get_all_schemas()
    return sorted({schema.name.removeprefix("aten::").strip("_") for schema in schemas if schema.name.startswith("aten::")})


class _Token(NamedTuple):
    kind: str  # "name", "number", "end", "line", or the character itself
    text: str
    offset: int


_TOKENS = re.compile(r"(?P<space>[ \t\r]+|#[^\n]*)|(?P<line>\n)|(?P<name>[A-Za-z_]\w*)|(?P<number>[-+]?\.?\d[\w.]*)|(?P<mark>[(),=])")


def parse_pattern(tree: Scalar) -> Pattern:
    """Reads a pattern. SpecError at the line and column inside the text: syntax, an unknown function (nearest one named), a name defined
    twice or by itself, a layout operator (those are looked through), a part without a captured matmul, no captured matmul at all."""
    return _Parser(tree).pattern()


class _Parser:
    """Recursive descent over the tokens; calls are numbered as they close, so arguments inside a call come before it."""

    def __init__(self, tree: Scalar) -> None:
        self.tree = tree
        self.tokens = list(self.tokenize())
        self.position = 0
        self.calls: list[tuple[str, tuple[Ref | _Token, ...], _Token]] = []
        self.captures: dict[str, Ref] = {}

    def error(self, message: str, offset: int) -> SpecError:
        return SpecError(message, at=self.tree.place(offset), keypath=self.tree.keypath)

    def tokenize(self) -> Iterator[_Token]:
        text, offset, depth = self.tree.text, 0, 0
        while offset < len(text):
            found = _TOKENS.match(text, offset)
            if found is None:
                raise self.error(f"{text[offset]!r} does not belong in a pattern; its lines look like `g = matmul(x)`", offset)
            kind = found.lastgroup or ""
            depth += {"(": 1, ")": -1}.get(found[0], 0)
            if kind == "mark":
                yield _Token(found[0], found[0], offset)
            elif kind != "space" and (kind != "line" or depth <= 0):
                yield _Token(kind, found[0], offset)
            offset = found.end()
        yield _Token("end", "", len(text.rstrip()))

    def pattern(self) -> Pattern:
        while (token := self.tokens[self.position]).kind != "end":
            if token.kind == "line":
                self.position += 1
            else:
                self.line()
        calls = tuple(Call(op, tuple(self.resolve(arg) for arg in args)) for op, args, _ in self.calls)
        matmuls = tuple(name for name, ref in self.captures.items() if calls[ref.call].op == MATMUL)
        self.check(calls, matmuls)
        return Pattern(self.tree.text, calls, self.captures, matmuls)

    def line(self) -> None:
        names = [self.take("name", "a name to capture, as in `g = matmul(x)`")]
        while self.tokens[self.position].kind == ",":
            self.position += 1
            names.append(self.take("name", "a name to capture"))
        self.take("=", "`=` and an operator")
        call = self.call()
        after = self.tokens[self.position]
        if after.kind not in ("line", "end"):
            raise self.error(f"expected the end of the line, got {after.text!r}", after.offset)
        if len(names) > 1 and self.calls[call][0] in (MATMUL, PRODUCT):
            raise self.error("matmul has one output", names[1].offset)
        for output, name in enumerate(names):
            if name.text in self.captures:
                raise self.error(f"{name.text} is already defined on an earlier line", name.offset)
            self.captures[name.text] = Ref(call, output)

    def take(self, kind: str, expected: str) -> _Token:
        token = self.tokens[self.position]
        if token.kind != kind:
            shown = {"line": "the end of the line", "end": "the end of the pattern"}.get(token.kind, repr(token.text))
            raise self.error(f"expected {expected}, got {shown}", token.offset)
        self.position += 1
        return token

    def call(self) -> int:
        function = self.take("name", "an operator, as in `matmul(x)`")
        if self.tokens[self.position].kind != "(":
            raise self.error(f"expected an operator with arguments, as in `matmul(x)`, got the name {function.text!r}", function.offset)
        self.position += 1
        args = [self.argument()]
        while self.tokens[self.position].kind == ",":
            self.position += 1
            args.append(self.argument())
        self.take(")", "`,` or `)`")
        self.calls.append((self.function(function, len(args)), tuple(args), function))
        return len(self.calls) - 1

    def argument(self) -> Ref | _Token:
        token = self.tokens[self.position]
        if token.kind == "number":
            raise self.error("numbers are not compared in a pattern; leave them out", token.offset)
        if token.kind == "name" and self.tokens[self.position + 1].kind == "(":
            return Ref(self.call())
        return self.take("name", "a name or an operator")

    def function(self, token: _Token, arity: int) -> str:
        name = token.text.strip("_")
        if name == MATMUL:
            if arity > 2:
                message = "matmul takes one argument, or two where no weight is involved; the weight and the bias are not written"
                raise self.error(message, token.offset)
            return MATMUL if arity == 1 else PRODUCT
        if name in {layout.strip("_") for layout in LAYOUT_OPS}:
            raise self.error(f"{token.text} only changes the layout and is looked through; leave it out", token.offset)
        if name not in aten_names():
            near = did_you_mean(token.text, sorted({MATMUL, *aten_names()}))
            raise self.error(f"unknown operator {token.text}{near or '; operators are matmul and the base names of ATen'}", token.offset)
        return name

    def resolve(self, arg: Ref | _Token) -> Ref | str:
        return arg if isinstance(arg, Ref) else self.captures.get(arg.text, arg.text)

    def check(self, calls: tuple[Call, ...], matmuls: tuple[str, ...]) -> None:
        if not matmuls:
            raise self.error("the pattern captures no matmul; a line like `g = matmul(x)` does", 0)
        self.check_cycles(calls)
        captured = {self.captures[name].call for name in matmuls}
        for part in connected_parts(calls):
            if not part & captured:
                first = min((self.calls[index][2] for index in part), key=lambda token: token.offset)
                raise self.error(f"{first.text} is connected to no captured matmul of the pattern", first.offset)

    def check_cycles(self, calls: tuple[Call, ...]) -> None:
        placed: set[int] = set()
        while ready := {k for k, call in enumerate(calls) if k not in placed and _calls_of(call) <= placed}:
            placed |= ready
        for name, ref in self.captures.items():
            if ref.call not in placed:
                raise self.error(f"{name} is computed from itself", self.calls[ref.call][2].offset)


def _calls_of(call: Call) -> set[int]:
    return {arg.call for arg in call.args if isinstance(arg, Ref)}


def connected_parts(calls: tuple[Call, ...]) -> tuple[frozenset[int], ...]:
    """Calls that hang together through results or free names."""
    names: list[set[object]] = [{k, *(arg.call if isinstance(arg, Ref) else arg for arg in call.args)} for k, call in enumerate(calls)]
    parts: list[set[object]] = []
    for group in names:
        touching = [part for part in parts if part & group]
        parts = [part for part in parts if not part & group] + [group.union(*touching)]
    return tuple(frozenset(item for item in part if isinstance(item, int)) for part in parts)
