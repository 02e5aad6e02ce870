"""apply.onnx: one update of all trainable parameters, written by hand on flat vectors, so that no exporter can touch its constants.

Inputs (n = number of trainable scalars; every vector float32):

    theta [n], grad [n], one vector [n] per state of the optimizer    parameters, gradient, moments
    step int64 []          number of this update, from 1
    lr, weight_decay []    learning rate; decoupled weight decay, in units of the learning rate
    grad_scale []          what the gradient is multiplied by first: 1 / (accumulated weight * loss scale)
    max_norm []            largest global norm of the scaled gradient, inf = no clipping (as torch.nn.utils.clip_grad_norm_)
    mask [n] or [1]        optional, above 0 trains; 0 keeps parameter and moments to the bit, and its gradient counts nowhere
    segment_lr, segment_decay [segments]    optional factors of lr and weight_decay, one per segment of theta

Outputs: `theta_next`, `<state>_next`, `grad_norm` [] (of the scaled gradient, before clipping) and `skipped` bool []: the norm is not
finite, and parameters and state come back to the bit.

Of a `Kept` piece of theta only the entries with the largest |gradient| take part in an update, chosen anew each time: the others keep
parameter and moments to the bit (no decay either), and their gradient counts in no norm. Scaling comes first and does not change the
choice; clipping comes after it. A gradient that is not finite anywhere skips the update.

What the rule of an optimizer is stands in its file in `matmorph.optimizers`; everything around the rule is here. Every operator has a CUDA
kernel. On the CPU each elementwise node is one pass over memory; scalars are worked out first, so that AdamW takes 17 passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from matmorph.errors import ExportError
from matmorph.optimizers import AnyOptimizer, optimizer_name
from matmorph.optimizers.rule import UpdateRule

OPSET = 21
IR_VERSION = 10
_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_
_BLOCKED_FROM = 1 << 12


@dataclass(frozen=True, slots=True)
class Kept:
    """`length` entries of theta from `offset`, of which the `count` with the largest |gradient| take part in each update."""

    offset: int
    length: int
    count: int


def optimizer_model(optimizer: AnyOptimizer, segments: Sequence[int], kept: Sequence[Kept] = ()) -> onnx.ModelProto:
    """apply.onnx for trainables of `segments` scalars each, in the order in which they lie in theta.

    Raises ExportError for no segment, an empty one, and pieces of `kept` that are not apart, in order, and in one segment each.
    """
    if not segments or min(segments) < 1:
        raise ExportError(f"the optimizer's segments must hold one parameter or more each, got lengths {list(segments)}")
    pieces = [piece for piece in kept if piece.count < piece.length]
    if pieces:
        return _of_pieces(optimizer, segments, pieces)
    name = optimizer_name(optimizer)
    length, states = sum(segments), optimizer.STATES
    b = _Body()
    everything = b("Greater", b("ReduceMin", "mask", keepdims=0), b.number(0.0))
    norm = b("Mul", b("Sqrt", _squares(b, everything, length)), "grad_scale", out="grad_norm")
    finite = b("LessOrEqual", norm, b.number(float(np.finfo(np.float32).max)))  # false for NaN; a norm that overflows is infinite
    b("Not", finite, out="skipped")
    clip = b("Min", b.number(1.0), b("Div", "max_norm", b("Add", norm, b.number(_CLIP_EPS))))
    rule = optimizer.rule(b)
    rate, decay = _rates(b, segments)
    update = _Update(b("Mul", "grad_scale", clip), b("Mul", rate, rule.factor) if rule.factor else rate, decay, rule)
    _choose(b, update, ("theta", *states), everything, finite, length)
    return _model(b, f"apply {name}", states, length, len(segments))


@dataclass(slots=True)
class _Body:
    """Nodes of a graph or of a branch. Names are counted over all bodies of a model; constants are initializers of the outermost."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    names: itertools.count[int] = field(default_factory=itertools.count)
    stands_for: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """The name of the only result."""
        made = out or f"{op.lower()}_{next(self.names)}"
        read = [self.stands_for.get(name, name) for name in inputs]
        self.nodes.append(helper.make_node(op, read, [made], name=f"node_{made}", **attributes))
        return made

    def pair(self, op: str, *inputs: str, **attributes: Any) -> tuple[str, str]:
        """The names of the two results."""
        made = f"{op.lower()}_{next(self.names)}"
        self.nodes.append(helper.make_node(op, inputs, [made, f"{made}_at"], name=f"node_{made}", **attributes))
        return made, f"{made}_at"

    def constant(self, value: NDArray[Any]) -> str:
        name = f"constant_{next(self.names)}"
        self.constants[name] = value
        return name

    def number(self, value: float, double: bool = False) -> str:
        return self.constant(np.asarray(value, np.float64 if double else np.float32))

    def single(self, value: str) -> str:
        return self("Cast", value, to=TensorProto.FLOAT)

    def double(self, value: str) -> str:
        return self("Cast", value, to=TensorProto.DOUBLE)

    def ints(self, *values: int) -> str:
        return self.constant(np.asarray(values, np.int64))

    def branch(self) -> _Body:
        return _Body([], self.constants, self.names)

    def over(self, stands_for: Mapping[str, str]) -> _Body:
        """The same body, whose nodes read other vectors by the names of these."""
        return _Body(self.nodes, self.constants, self.names, stands_for)


@dataclass(frozen=True, slots=True)
class _Update:
    """`scale` []: of the gradient. `rate` and `decay` [1] or [n]: of the rule's step and of theta."""

    scale: str
    rate: str
    decay: str
    rule: UpdateRule


def _squares(b: _Body, everything: str, length: int) -> str:
    """The sum of squares of the gradient, of what the mask lets train."""
    whole, masked = b.branch(), b.branch()
    chosen = masked("Where", masked("Greater", "mask", masked.number(0.0)), "grad", masked.number(0.0))
    totals = [_sum_of_squares(whole, "grad", length)], [_sum_of_squares(masked, chosen, length)]
    return _either(b, everything, (whole, totals[0]), (masked, totals[1]), ["squares"], [])[0]


def _sum_of_squares(b: _Body, vector: str, length: int) -> str:
    """[]. The CPU kernel adds one square after the other (1 % off for 1e8 of them): rows of about sqrt(n) first, then their sums
    (decision A14)."""
    if length < _BLOCKED_FROM:
        return b("ReduceSumSquare", vector, keepdims=0)
    columns = 1 << (length.bit_length() // 2)
    whole = length // columns * columns
    rows = b("Reshape", b("Slice", vector, b.ints(0), b.ints(whole)), b.ints(-1, columns))
    total = b("ReduceSum", b("ReduceSumSquare", rows, b.ints(1), keepdims=0), keepdims=0)
    if whole == length:
        return total
    return b("Add", total, b("ReduceSumSquare", b("Slice", vector, b.ints(whole), b.ints(length)), keepdims=0))


def _rates(b: _Body, segments: Sequence[int]) -> tuple[str, str]:
    """Learning rate, and learning rate times weight decay: [1] where they are the same for all segments, else [n]."""
    rate = b("Mul", "segment_lr", "lr")
    decay = b("Mul", b("Mul", "segment_decay", "weight_decay"), rate)
    if len(segments) == 1:
        return rate, decay
    highest = [b("ReduceMax", one, keepdims=1) for one in (rate, decay)]
    alike = [b("Equal", high, b("ReduceMin", one, keepdims=1)) for high, one in zip(highest, (rate, decay), strict=True)]
    same = b.branch()
    same_results = [same("Identity", high) for high in highest]
    spread = b.branch()
    row = spread.ints(1, -1)
    table = spread("Concat", spread("Reshape", rate, row), spread("Reshape", decay, row), axis=0)
    parts = [f"segment_{k}" for k in range(len(segments))]
    spread.nodes.append(helper.make_node("Split", [table], parts, name="node_segments", axis=1, num_outputs=len(parts)))
    wide = [spread("Expand", part, spread.ints(2, size)) for part, size in zip(parts, segments, strict=True)]
    whole = spread("Concat", *wide, axis=1)
    spread_results = [spread("Gather", whole, spread.constant(np.asarray(which, np.int64)), axis=0) for which in (0, 1)]
    made = _either(b, b("And", *alike), (same, same_results), (spread, spread_results), ["rate", "decay"], None)
    return made[0], made[1]


def _choose(b: _Body, update: _Update, vectors: Sequence[str], everything: str, finite: str, length: int) -> None:
    """The plain update where all is well and everything trains, else the one that keeps what must stay."""
    plain, kept = b.branch(), b.branch()
    trains = kept("And", kept("Greater", "mask", kept.number(0.0)), finite)
    # The CPU kernel turns a chosen -0.0 of its second argument into 0.0 and keeps the third to the bit: the old value comes third.
    # The old value comes last: of the second operand the CPU kernel turns a chosen -0.0 into 0.0 (decision A12).
    kept_results = [kept("Where", trains, new, old) for new, old in zip(_updated(kept, update), vectors, strict=True)]
    outputs = [f"{name}_next" for name in vectors]
    _either(b, b("And", finite, everything), (plain, _updated(plain, update)), (kept, kept_results), outputs, [length])


def _updated(b: _Body, update: _Update) -> list[str]:
    """The new theta, then the new states."""
    made = update.rule.step(b, b("Mul", "grad", update.scale))
    step = b("Mul", made.pop("step"), update.rate)
    return [b("Sub", "theta", b("Add", step, b("Mul", "theta", update.decay))), *made.values()]


# some of the entries


def _of_pieces(optimizer: AnyOptimizer, segments: Sequence[int], pieces: Sequence[Kept]) -> onnx.ModelProto:
    """The entries that take part are gathered, updated as if there were no others, and put back."""
    name = optimizer_name(optimizer)
    length, states = sum(segments), optimizer.STATES
    lengths = _lengths(segments, pieces)
    b = _Body()
    everything = b("Greater", b("ReduceMin", "mask", keepdims=0), b.number(0.0))
    whole = b("Mul", b("Sqrt", _squares(b, everything, length)), "grad_scale")
    finite = b("LessOrEqual", whole, b.number(float(np.finfo(np.float32).max)))
    b("Not", finite, out="skipped")
    places, trains = _places(b, finite, length, pieces)
    vectors = ("theta", *states)
    some = b.over({vector: b("Gather", vector, places) for vector in ("grad", *vectors)})
    taken = some("Where", trains, "grad", some.number(0.0))
    norm = b("Mul", b("Sqrt", _sum_of_squares(b, taken, sum(lengths))), "grad_scale")
    b("Where", finite, norm, whole, out="grad_norm")
    clip = b("Min", b.number(1.0), b("Div", "max_norm", b("Add", norm, b.number(_CLIP_EPS))))
    rule = optimizer.rule(b)
    rate, decay = _rates(b, lengths)
    update = _Update(b("Mul", "grad_scale", clip), b("Mul", rate, rule.factor) if rule.factor else rate, decay, rule)
    for vector, new in zip(vectors, _updated(some, update), strict=True):
        b("ScatterElements", vector, places, some("Where", trains, new, vector), out=f"{vector}_next", axis=0)
    return _model(b, f"apply {name}", states, length, len(segments))


def _lengths(segments: Sequence[int], pieces: Sequence[Kept]) -> list[int]:
    """How many entries of each segment take part. Raises ExportError for pieces that are not apart and in order, or leave a segment."""
    ends = list(itertools.accumulate(segments))
    found, last = list(segments), 0
    for piece in pieces:
        end = piece.offset + piece.length
        inside = [k for k, limit in enumerate(ends) if limit - segments[k] <= piece.offset and end <= limit]
        if not inside or piece.offset < last or piece.count < 1:
            raise ExportError(
                f"{piece.count} of {piece.length} entries from {piece.offset} on cannot be chosen in segments of {list(segments)}"
            )
        found[inside[0]] -= piece.length - piece.count
        last = end
    return found


def _places(b: _Body, finite: str, length: int, pieces: Sequence[Kept]) -> tuple[str, str]:
    """(int64 [d]: where the entries that take part lie; bool [d]: whether the mask and the gradient let them). What is masked comes last
    in the choice, and a gradient with NaN is not looked at: no order of it would be one."""
    lets = b("And", b("Greater", "mask", b.number(0.0)), finite)
    scores = b("Where", lets, b("Abs", "grad"), b.number(-1.0))
    places: list[str] = []
    found: list[str] = []

    def dense(start: int, end: int) -> None:
        if start < end:
            places.append(b("Range", *(b.constant(np.asarray(number, np.int64)) for number in (start, end, 1))))
            found.append(b("Slice", scores, b.ints(start), b.ints(end)))

    last = 0
    for piece in pieces:
        dense(last, piece.offset)
        last = piece.offset + piece.length
        part = scores if piece.length == length else b("Slice", scores, b.ints(piece.offset), b.ints(last))
        values, at = b.pair("TopK", part, b.ints(piece.count), axis=0, largest=1, sorted=0)
        places.append(b("Add", at, b.constant(np.asarray(piece.offset, np.int64))) if piece.offset else at)
        found.append(values)
    dense(last, length)
    joined = [parts[0] if len(parts) == 1 else b("Concat", *parts, axis=0) for parts in (places, found)]
    return joined[0], b("GreaterOrEqual", joined[1], b.number(0.0))


# graphs


_Branch: TypeAlias = tuple[_Body, Sequence[str]]
"""A body and the names of its results."""


def _either(b: _Body, condition: str, then: _Branch, other: _Branch, outputs: list[str], shape: Sequence[int] | None) -> list[str]:
    """An If of two branches; `shape` of every result, None where it is known at run time only."""
    graphs = {
        key: helper.make_graph(body.nodes, key, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in results])
        for key, (body, results) in zip(("then_branch", "else_branch"), (then, other), strict=True)
    }
    b.nodes.append(helper.make_node("If", [condition], outputs, name=f"node_{outputs[0]}", **graphs))
    return outputs


def _model(b: _Body, name: str, states: Sequence[str], length: int, segments: int) -> onnx.ModelProto:
    single, vectors = TensorProto.FLOAT, ("theta", "grad", *states)
    inputs = [helper.make_tensor_value_info(vector, single, [length]) for vector in vectors]
    inputs.append(helper.make_tensor_value_info("step", TensorProto.INT64, []))
    inputs += [helper.make_tensor_value_info(number, single, []) for number in ("lr", "weight_decay", "grad_scale", "max_norm")]
    defaults = {"mask": np.ones(1, np.float32)} | {key: np.ones(segments, np.float32) for key in ("segment_lr", "segment_decay")}
    inputs.append(helper.make_tensor_value_info("mask", single, ["mask"]))
    inputs += [helper.make_tensor_value_info(key, single, [segments]) for key in ("segment_lr", "segment_decay")]
    outputs = [helper.make_tensor_value_info(f"{vector}_next", single, [length]) for vector in ("theta", *states)]
    outputs.append(helper.make_tensor_value_info("grad_norm", single, []))
    outputs.append(helper.make_tensor_value_info("skipped", TensorProto.BOOL, []))
    initializers = [numpy_helper.from_array(value, key) for key, value in {**b.constants, **defaults}.items()]
    graph = helper.make_graph(b.nodes, name, inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="matmorph")
    onnx.checker.check_model(model)
    return model
