"""The tape: a graph walked forwards while it is copied, then backwards while cotangents are written behind it.

A rule is called once per node that lies between a trainable and the loss. It writes the forward nodes (the node itself, or a form whose
intermediate results the gradient can use again) and returns a `TapeStep`: the results, and the function that turns their cotangents into
those of the operands. Backward nodes carry the origin of the node that they belong to.

A cotangent may be smaller than its value, with ones where it is constant along an axis (the gradient of a mean): pointwise rules broadcast
it anyway, and nothing is expanded for them. The other rules get it in full (`Rules.broadcasting` lists those that do not need it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from matmorph.errors import VerifyError
from matmorph.ir.build import Builder
from matmorph.ir.core import Arg, Node, Value, map_values
from matmorph.ir.infer import Inference
from matmorph.ir.rewiring import rewired
from matmorph.ir.types import Dim, TensorType, format_dim

_HALVES = ("float16", "bfloat16")
_ARITHMETIC = {
    sympy.Add: "operator.add",
    sympy.Mul: "operator.mul",
    sympy.Pow: "operator.pow",
    FloorDiv: "operator.floordiv",
    Mod: "operator.mod",
    PythonMod: "operator.mod",
}

Cotangents = tuple[Value | None, ...]
Pull = Callable[[Cotangents], None]


@dataclass(frozen=True, slots=True)
class TapeStep:
    """What a rule did: the node's results, and how cotangents go back through it (None for a result that the loss does not reach)."""

    outputs: tuple[Value, ...]
    pull: Pull


AdjointRule = Callable[["Tape", Node], TapeStep]


@dataclass(frozen=True, slots=True)
class Rules:
    """`table`: rule by operator; `otherwise`: the rule of any other; `broadcasting`: operators whose rule takes small cotangents."""

    table: Mapping[str, AdjointRule]
    otherwise: AdjointRule
    broadcasting: frozenset[str]


@dataclass(slots=True)
class Tape:
    """State of one differentiation. `sizes` gives a node's output for each named axis of the inputs; `device` goes into new factories."""

    b: Builder
    inference: Inference
    rules: Rules
    sizes: Mapping[str, Callable[[], Value]]
    device: torch.device
    wanted: set[Value] = field(default_factory=set)
    made: dict[Any, Value] = field(default_factory=dict)
    steps: list[tuple[Node, TapeStep]] = field(default_factory=list)
    cotangents: dict[Value, list[Value]] = field(default_factory=dict)

    # forwards

    def run(self, nodes: Iterable[Node], wanted: frozenset[Value], env: dict[Value, Value]) -> None:
        """Copies nodes to the builder. `wanted`: results whose cotangents are needed; `env`: what stands for a value in the copy."""
        for node in nodes:
            copied = rewired(node, env)
            if wanted.isdisjoint(node.outputs):
                self.b.nodes.append(copied)
                continue
            results = self.record(copied)
            for old, new in zip(node.outputs, results, strict=True):
                if old is not new:
                    env[old] = new

    def record(self, node: Node) -> tuple[Value, ...]:
        """The results of a node through its rule, which is kept for the way back."""
        self.b.origin = node.origin
        step = self.rules.table.get(node.op, self.rules.otherwise)(self, node)
        self.wanted.update(value for value in step.outputs if is_float(value))
        self.steps.append((node, step))
        return step.outputs

    def call(self, op: str, *args: Arg, **attrs: Arg) -> Value:
        """An operator as part of another one's forward: recorded where an operand wants a cotangent, else only written."""
        if not any(self.wants(value) for value in Node(op, args, (), attrs).inputs()):
            return self.b(op, *args, **attrs)
        self.b(op, *args, **attrs)
        (result,) = self.record(self.b.nodes.pop())
        return result

    def keep(self, node: Node) -> tuple[Value, ...]:
        """The node as it is."""
        self.b.nodes.append(node)
        return node.outputs

    def wants(self, value: Arg) -> bool:
        return isinstance(value, Value) and value in self.wanted

    def once(self, key: Any, make: Callable[[], Value]) -> Value:
        """A value that several nodes share (a mask as numbers): written where it is first needed."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    # backwards

    def back(self, result: Value, cotangent: Value) -> None:
        """Pulls the cotangent of one result through every step; those of the trainables are left in `cotangents`."""
        self.give(result, cotangent)
        for node, step in reversed(self.steps):
            self.b.origin = node.origin
            found = [self.take(value) for value in step.outputs]
            if all(value is None for value in found):
                continue
            if node.op not in self.rules.broadcasting:
                found = [self.full(ct, value) if ct is not None else None for ct, value in zip(found, step.outputs, strict=True)]
            step.pull(tuple(found))

    def give(self, value: Arg, cotangent: Value, over: Sequence[Dim] | None = None) -> None:
        """Adds a cotangent to those of `value`, summed over the axes along which `value` was broadcast, in its element type.

        `over`: the shape that the operator computed in, where the cotangent may itself be smaller than that.
        """
        if not self.wants(value):
            return
        fitted = self._summed(cotangent, value.tensor.shape, tuple(over if over is not None else cotangent.tensor.shape))
        self.cotangents.setdefault(value, []).append(self.cast(fitted, value.tensor.dtype))

    def give_product(self, value: Value, dy: Value, weight: Value) -> None:
        """Gives dy weight, [n, out] times [out, in], as `value` [.., in]; what is there already is added within the product."""
        known = self.take(value)
        if known is None:
            flat = self.b("aten.mm.default", dy, weight)
        else:
            flat = self.b("aten.addmm.default", self.rows(self.full(known, value)), dy, weight)
        self.give(value, self.reshape(flat, value))

    def take(self, value: Value) -> Value | None:
        """The sum of what was given to a value, which then has none."""
        found = self.cotangents.pop(value, None)
        if found is None:
            return None
        total = found[0]
        for other in found[1:]:
            total = self.b("aten.add.Tensor", total, other)
        return total

    def _summed(self, cotangent: Value, shape: Sequence[Dim], over: Sequence[Dim]) -> Value:
        have = (1,) * (len(over) - len(cotangent.tensor.shape)) + tuple(cotangent.tensor.shape)
        lead = len(over) - len(shape)
        spread = [axis for axis, dim in enumerate(over) if dim != 1 and (axis < lead or shape[axis - lead] == 1)]
        if any(have[axis] == 1 for axis in spread):
            # Constant along an axis that is summed: as many times itself. Rare enough to write it out.
            cotangent, have = self.b("aten.expand.default", cotangent, self.shape_of(over)), tuple(over)
        elif lead < 0 or len(have) != len(cotangent.tensor.shape):
            return cotangent
        drop = list(range(lead))
        inner = [axis - lead for axis in spread if axis >= lead]
        if drop:
            cotangent = self.b("aten.sum.dim_IntList", cotangent, drop)
        return self.b("aten.sum.dim_IntList", cotangent, inner, True) if inner else cotangent

    def full(self, cotangent: Value, value: Value) -> Value:
        """The cotangent in the shape of its value."""
        if cotangent.tensor.shape == value.tensor.shape or self.inference.equal(cotangent.type, value.type):
            return cotangent
        return self.b("aten.expand.default", cotangent, self.shape_of(value.tensor.shape))

    # writing

    def cast(self, value: Value, dtype: str) -> Value:
        return value if value.tensor.dtype == dtype else self.b("aten._to_copy.default", value, dtype=TensorType(dtype, ()).torch_dtype)

    def wide(self, value: Value) -> Value:
        """In float32 or better: sums of any number of rows leave half precision, and no kernel of ONNX Runtime's CPU adds them there."""
        return self.cast(value, "float32") if value.tensor.dtype in _HALVES else value

    def size(self, dim: Dim) -> int | Value:
        """A number, or a node's output for a dim over named axes."""
        if isinstance(dim, int):
            return dim
        return self.once(("size", dim), lambda: self._size(dim))

    def _size(self, dim: Any) -> Value:
        if dim.is_Symbol and str(dim) in self.sizes:
            return self.sizes[str(dim)]()
        op = _ARITHMETIC.get(dim.func)
        if op is None:
            raise VerifyError(f"no input has an axis of {format_dim(dim)}")
        found: Any = None
        for part in dim.args:
            size = self.size(int(part) if part.is_Integer else part)
            found = size if found is None else self.b(op, found, size)
        return cast(Value, found)

    def shape_of(self, shape: Sequence[Dim]) -> list[int | Value]:
        """Sizes as arguments of an operator."""
        return [self.size(dim) for dim in shape]

    def reshape(self, value: Value, like: Value) -> Value:
        """`value` in the shape of `like`, with -1 for a lone symbolic axis."""
        shape = like.tensor.shape
        if value.tensor.shape == shape:
            return value
        symbolic = [axis for axis, dim in enumerate(shape) if not isinstance(dim, int)]
        unknown = symbolic[-1] if symbolic and 0 not in shape else None
        known = [self._axis(like, axis) if axis != unknown else -1 for axis in range(len(shape))]
        return self.b("aten.reshape.default", value, known)

    def axes(self, like: Value) -> list[int | Value]:
        """Every size of a value, as arguments of an operator."""
        return [self._axis(like, axis) for axis in range(len(like.tensor.shape))]

    def _axis(self, like: Value, axis: int) -> int | Value:
        dim = like.tensor.shape[axis]
        known = isinstance(dim, int) or str(dim) in self.sizes
        return self.size(dim) if known else self.once(("axis", like, axis), lambda: self._measured(like, axis))

    def _measured(self, like: Value, axis: int) -> Value:
        return self.b("aten.sym_size.int", like, axis)

    def rows(self, value: Value) -> Value:
        """[.., n] as [rows, n]."""
        shape = value.tensor.shape
        if len(shape) == 2:
            return value
        return self.once(("rows", value), lambda: self.b("aten.reshape.default", value, [-1, self._axis(value, len(shape) - 1)]))


def composite(t: Tape, *results: Value) -> TapeStep:
    """The step of a node that was written with `Tape.call`: its parts have recorded how they go back."""

    def pull(found: Cotangents) -> None:
        for value, cotangent in zip(results, found, strict=True):
            if cotangent is not None:
                t.give(value, cotangent)

    return TapeStep(results, pull)


def in_float32(rule: AdjointRule) -> AdjointRule:
    """The rule on operands widened from half precision, as autocast runs norms, softmax and transcendental functions."""

    def widened(t: Tape, node: Node) -> TapeStep:
        halves = [value.tensor.dtype for value in node.inputs() if is_float(value) and value.tensor.dtype in _HALVES]
        if not halves:
            return rule(t, node)
        wide = map_values(node.args, lambda value: _widened(t, value))
        y = t.call(node.op, *wide, **node.attrs)
        dtype = node.output.tensor.torch_dtype
        return composite(t, y if y.tensor.torch_dtype is dtype else t.call("aten._to_copy.default", y, dtype=dtype))

    return widened


def _widened(t: Tape, value: Value) -> Value:
    if not (is_float(value) and value.tensor.dtype in _HALVES):
        return value
    return t.call("aten._to_copy.default", value, dtype=torch.float32)


def is_float(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.torch_dtype.is_floating_point


def argument(node: Node, position: int, name: str, default: Arg = None) -> Arg:
    """An argument by position, by name where it is a keyword, or its default."""
    if len(node.args) > position:
        return node.args[position]
    return node.attrs.get(name, default)


def axis_of(axis: int, value: Value) -> int:
    """A non-negative axis."""
    rank = len(value.tensor.shape)
    return axis + rank if axis < 0 else axis
