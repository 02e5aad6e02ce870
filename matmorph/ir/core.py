"""The IR: an immutable SSA graph over ATen operators.

A `Graph` is a signature, a tuple of nodes in topological order, and outputs. Nothing here is ever mutated; a pass returns a new graph.
Values and nodes are compared by identity (as SSA names are), types by value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, TypeAlias

import torch
from torch.utils._pytree import TreeSpec, tree_structure

from matmorph.ir.types import TensorType, Type, dim_symbols, element_size
from matmorph.runtime.format.artifact import Range as Range

Arg: TypeAlias = Any
"""A nest (tuple, list) of Values, Graphs (bodies of higher-order operators) and literals: None, bool, int, float, str, and torch's dtypes,
devices, layouts and memory formats."""

ConstKind = Literal["parameter", "buffer", "constant"]


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One SSA name. `name` is unique within a graph."""

    name: str
    type: Type

    @property
    def tensor(self) -> TensorType:
        """The type of a value that is known to be a tensor."""
        if not isinstance(self.type, TensorType):
            raise TypeError(f"%{self.name} is a {self.type}, not a tensor")
        return self.type


@dataclass(frozen=True, slots=True, eq=False)
class Const(Value):
    """A weight, buffer or lifted constant, loaded lazily and never copied by the IR.

    `names`: every dotted name it goes by, the first is canonical. `storage`: equal keys = the same bytes. `persistent`: a buffer that
    belongs to the state_dict. `rule`: the rule that made it, None for the source model's own; with it `site`, `method` and `part`: the site
    that it was made for, the method that made it and what that calls it ("down"). `load()` gives the tensor on the run's compute device, in
    the stored shape and dtype; for weights on the meta device it gives a meta tensor.
    """

    load: Callable[[], torch.Tensor] = field(repr=False)
    names: tuple[str, ...]
    kind: ConstKind = "parameter"
    trainable: bool = False
    persistent: bool = True
    storage: str = ""
    rule: str | None = None
    site: str | None = None
    method: str | None = None
    part: str | None = None

    @property
    def path(self) -> str:
        return self.names[0]

    @property
    def numel(self) -> int:
        """Number of elements (a constant has no symbolic dim)."""
        return prod(int(d) for d in self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * element_size(self.tensor.dtype)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from. `scopes`: the stack of (module path, class name), outermost first; the last path is the module that ran it.

    `layer`: index in the outermost numbered container. `rule`/`location`: for inserted nodes, the rule's name and `file:line` of the spec.
    `source`: `file:line: code` of the model's own Python line, where the trace knows it.
    """

    scopes: tuple[tuple[str, str], ...] = ()
    layer: int | None = None
    rule: str | None = None
    location: str | None = None
    source: str | None = None

    @property
    def path(self) -> str:
        return self.scopes[-1][0] if self.scopes else ""

    @property
    def container(self) -> str | None:
        """Dotted path of the container that `layer` counts in; None outside of any."""
        if self.layer is None:
            return None
        parts = self.path.split(".")
        return ".".join(parts[: next((k for k, part in enumerate(parts) if part.isdigit()), 0)])


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operation. `op` is the full overload ("aten.linear.default"), one of ours ("matmorph.x.default"), a Python operator on sizes
    ("operator.mul") or a higher-order operator ("higher_order.cond"). `attrs` are its keyword arguments, which may hold Values too."""

    op: str
    args: tuple[Arg, ...]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Arg] = field(default_factory=dict)
    origin: Origin = Origin()

    @property
    def output(self) -> Value:
        """The only output; a node with several has no `output`."""
        if len(self.outputs) != 1:
            raise ValueError(f"{self.op} has {len(self.outputs)} outputs")
        return self.outputs[0]

    def inputs(self) -> tuple[Value, ...]:
        """Values read, in order, repeats included; those captured inside sub-graphs are passed as arguments, so they are here too."""
        return tuple(values_in((self.args, tuple(self.attrs.values()))))

    @property
    def name(self) -> str:
        return self.outputs[0].name if self.outputs else self.op


def values_in(arg: Arg) -> Iterator[Value]:
    """All Values of a nest, in order."""
    if isinstance(arg, Value):
        yield arg
    elif isinstance(arg, tuple | list):
        for item in arg:
            yield from values_in(item)


def map_values(arg: Arg, change: Callable[[Value], Any]) -> Arg:
    """The same nest with every Value replaced by `change(value)`."""
    if isinstance(arg, Value):
        return change(arg)
    if isinstance(arg, tuple | list):
        return type(arg)(map_values(item, change) for item in arg)
    return arg


def mapped_arguments(node: Node, change: Callable[[Value], Any]) -> tuple[tuple[Arg, ...], dict[str, Arg]]:
    """The positional and the keyword arguments of a node with every Value replaced by `change(value)`."""
    return map_values(node.args, change), {name: map_values(arg, change) for name, arg in node.attrs.items()}


@dataclass(frozen=True, slots=True)
class Input:
    """One flat input of a call. `value` is None where the example had a literal (None, bool ...): a call must give `literal` again."""

    name: str
    value: Value | None
    literal: Any = None


@dataclass(frozen=True, slots=True)
class Signature:
    """The call structure. `in_spec` is the pytree of (args, kwargs), `out_spec` that of the result, `outputs` a name per flat output
    (from the model's own keys: "last_hidden_state"; "output" for a single unnamed tensor, "output_0" ... in a tuple)."""

    inputs: tuple[Input, ...]
    in_spec: TreeSpec
    outputs: tuple[str, ...]
    out_spec: TreeSpec

    @classmethod
    def of_keywords(cls, inputs: Sequence[Input], outputs: Sequence[str]) -> Signature:
        """Of a call with each input by its name that gives a dict."""
        in_spec, out_spec = tree_structure(((), {entry.name: 0 for entry in inputs})), tree_structure(dict.fromkeys(outputs, 0))
        return cls(tuple(inputs), in_spec, tuple(outputs), out_spec)


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """`outputs` are Values or literals (None, numbers), aligned with `signature.outputs`. `state` lists every Const of the model, used by a
    node or not, in state_dict order; `ranges` what the trace assumed of each symbol; `device` the traced module's; `notes` one plain line
    for each thing that the trace did to the model ("train mode switched to eval for the trace")."""

    signature: Signature
    nodes: tuple[Node, ...]
    outputs: tuple[Arg, ...]
    state: tuple[Const, ...] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    device: str = "cpu"
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The tensor inputs, in order."""
        return tuple(entry.value for entry in self.signature.inputs if entry.value is not None)

    @property
    def results(self) -> tuple[tuple[str, Value], ...]:
        """Name and value of each output that is no literal, in order."""
        named = zip(self.signature.outputs, self.outputs, strict=True)
        return tuple((name, output) for name, output in named if isinstance(output, Value))

    def used_state(self) -> tuple[Const, ...]:
        """Consts that some node reads or that are outputs, in `state` order: exactly the initializers of an export."""
        seen = {value for node in self.nodes for value in node.inputs()} | set(values_in(self.outputs))
        return tuple(const for const in self.state if const in seen)

    def producers(self) -> dict[Value, Node]:
        return {value: node for node in self.nodes for value in node.outputs}

    def users(self) -> dict[Value, tuple[Node, ...]]:
        """Nodes that read a value, each once, in order; graph outputs do not count."""
        found: dict[Value, dict[Node, None]] = {}
        for node in self.nodes:
            for value in node.inputs():
                found.setdefault(value, {})[node] = None
        return {value: tuple(nodes) for value, nodes in found.items()}

    def symbols(self) -> tuple[str, ...]:
        """Names of the symbols of the inputs, in order of first use."""
        names: dict[str, None] = {}
        for value in self.inputs:
            for dim in value.tensor.shape:
                names.update(dict.fromkeys(sorted(dim_symbols([dim]))))
        return tuple(names)
