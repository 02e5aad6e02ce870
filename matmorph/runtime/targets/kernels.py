"""Which kernels a provider has: ONNX Runtime's own list, and how it looks a node up in it.

The list is text, `kernels.txt` beside this file, written by `tools/kernel_table.py`:

    ai.onnx MatMul                         an operator: domain and name
     9 T T -> T                            a version of it: since when, the type names of its inputs and outputs ("..." takes the rest)
     cuda 13+ T=bfloat16,float16           a kernel: provider, versions ("9-12", or "13+": version 13 alone, the newest when it was written)

A value's type is written as numpy names it; a sequence of tensors is seq(float32).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

_FILE = "kernels.txt"
_LINE = re.compile(r"(?P<provider>\w+) (?P<first>\d+)(?:\+|-(?P<last>\d+))(?P<types>( \S+=\S+)*)")


@dataclass(frozen=True, slots=True)
class Signature:
    """The type names of an operator's inputs and outputs from version `since` on; the last of either may end in "..."."""

    since: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def types(self, inputs: Sequence[str | None], outputs: Sequence[str | None]) -> Mapping[str, str]:
        """Element type by type name, of the first value that has the name and a known type: that one alone is looked at."""
        found: dict[str, str] = {}
        for name, dtype in (*_bound(self.inputs, inputs), *_bound(self.outputs, outputs)):
            if dtype is not None:
                found.setdefault(name, dtype)
        return found


def _bound(names: Sequence[str], values: Sequence[str | None]) -> Iterator[tuple[str, str | None]]:
    for name, value in zip(names, values, strict=False):
        yield name.removesuffix("..."), value


@dataclass(frozen=True, slots=True)
class Registered:
    """One kernel: versions `first` to `last` of its operator, None where it was registered for `first` alone; types by type name."""

    first: int
    last: int | None
    types: Mapping[str, frozenset[str]]

    def covers(self, since: int) -> bool:
        """Whether it is a kernel of the version of an operator that stands since `since`."""
        return self.first == since if self.last is None else self.first <= since <= self.last

    def takes(self, types: Mapping[str, str]) -> bool:
        """A name without a type (an input left out) is not looked at."""
        return all(types[name] in allowed for name, allowed in self.types.items() if name in types)


@dataclass(frozen=True, slots=True)
class Operator:
    """`versions` from the oldest to the newest; `kernels`: of one provider."""

    versions: tuple[Signature, ...]
    kernels: tuple[Registered, ...] = ()

    def at(self, opset: int) -> Signature | None:
        """The version that a file of that opset means."""
        return max((one for one in self.versions if one.since <= opset), key=lambda one: one.since, default=None)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of one provider. `operators`: by domain ("" is ONNX's own) and name, those without a kernel included.

    `source`: where the list is from, "" for one that is not ONNX Runtime's.
    """

    operators: Mapping[tuple[str, str], Operator] = field(default_factory=dict)
    source: str = ""

    def knows(self, domain: str, name: str) -> bool:
        """Whether it is an operator of the list at all, with or without a kernel."""
        return (domain, name) in self.operators

    def lacks(self, domain: str, name: str, opset: int, inputs: Sequence[str | None], outputs: Sequence[str | None]) -> str | None:
        """Why no kernel takes a node, None where one does. A type that is not known (None) fits every kernel."""
        operator = self.operators.get((domain, name))
        version = operator.at(opset) if operator is not None else None
        if operator is None or version is None:
            return "at all"
        if not operator.kernels:
            return "at all"
        kernels = [kernel for kernel in operator.kernels if kernel.covers(version.since)]
        if not kernels:
            return f"for version {version.since} of it"
        types = version.types(inputs, outputs)
        if any(kernel.takes(types) for kernel in kernels):
            return None
        named = {name for kernel in kernels for name in kernel.types if name in types}
        return f"for {', '.join(f'{name} {types[name]}' for name in sorted(named))}"

    def results(self, domain: str, name: str) -> tuple[str, ...]:
        """Types that the first output may have, over all kernels of the operator."""
        operator = self.operators.get((domain, name))
        if operator is None:
            return ()
        names = {version.outputs[0].removesuffix("...") for version in operator.versions if version.outputs}
        return tuple(sorted({dtype for kernel in operator.kernels for one in names for dtype in kernel.types.get(one, ())}))


NONE = Kernels()


@cache
def shipped(provider: str) -> Kernels:
    """The list of a provider ("cuda", "cpu") of the tested ONNX Runtime."""
    from importlib import resources  # on use: most who load a record never ask

    return read_kernels((resources.files(__package__) / _FILE).read_text(encoding="utf-8"), provider)


def read_kernels(text: str, provider: str) -> Kernels:
    """The kernels of one provider. Raises ValueError with the line for text that is not such a list."""
    lines = text.splitlines()
    source = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    operators: dict[tuple[str, str], Operator] = {}
    for number, block in _blocks(lines):
        domain, _, name = block[0].partition(" ")
        versions = [_signature(line) for line in block[1:] if " -> " in line]
        kernels = [_registered(line, number) for line in block[1:] if " -> " not in line]
        own = tuple(kernel for of, kernel in kernels if of == provider)
        operators["" if domain == "ai.onnx" else domain, name] = Operator(tuple(versions), own)
    return Kernels(operators, source)


def _blocks(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The number of its first line and the lines of each operator."""
    block: list[str] = []
    first = 1
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        if not line.startswith(" ") and block:
            yield first, block
            block = []
        if not block:
            first = number
        block.append(line.strip())
    if block:
        yield first, block


def _signature(line: str) -> Signature:
    left, _, right = line.partition(" -> ")
    since, *inputs = left.split()
    return Signature(int(since), tuple(inputs), tuple(right.split()))


def _registered(line: str, number: int) -> tuple[str, Registered]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"after line {number}: not a kernel: {line}")
    types = dict(pair.split("=", 1) for pair in match["types"].split())
    last = int(match["last"]) if match["last"] else None
    return match["provider"], Registered(int(match["first"]), last, {name: frozenset(of.split(",")) for name, of in types.items()})
