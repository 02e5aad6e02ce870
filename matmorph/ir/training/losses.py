"""Losses: nodes behind a graph's outputs that give the mean loss and the number of elements that the mean runs over.

| name          | output          | labels                    | mean over                                                     |
|---------------|-----------------|---------------------------|---------------------------------------------------------------|
| cross_entropy | logits [.., C]  | int64 [..]                | labels other than `ignore_index`                              |
| causal_lm     | logits [b, s, C]| int64 [b, s]              | the same, of labels[:, 1:] against logits[:, :-1]             |
| mse           | [..]            | float, the output's shape | all elements                                                  |
| cosine        | [.., D]         | float, the output's shape | vectors: 1 - cosine similarity                                |
| distill       | logits [b, s, C]| those of causal_lm, and a | the same as causal_lm: divergence from the teacher, with      |
|               |                 | teacher's likeliest words | a share of causal_lm where that is asked for                  |
| a function    | all outputs     | as given                  | what it says, `f(outputs, labels) -> loss` or `(loss, count)` |

With nothing to average over (every label ignored) loss, count and gradient are 0, where torch gives NaN. Labels are shifted, not logits:
the last position of each row has no label, so no length is too short and no logits are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from matmorph.errors import InputError, did_you_mean
from matmorph.ir.build import Builder
from matmorph.ir.core import Graph, Value
from matmorph.ir.infer import Inference
from matmorph.ir.training.adjoints.traced import emit, trace_function
from matmorph.ir.training.distillation import divergence, teacher_inputs
from matmorph.ir.types import TensorType
from matmorph.runtime.format.distillation import DISTILL, Distill

LossFunction = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], Any]
"""`f(outputs, labels)` with tensors by name; gives the mean loss, a scalar, or (mean loss, count). It is traced on symbolic shapes."""

COSINE_EPS = 1e-8
"""Smallest norm in a cosine, as in `torch.nn.functional.cosine_similarity`."""

_PREFERRED = "logits"


@dataclass(frozen=True, slots=True)
class Loss:
    """`name`: a key of `LOSSES`, or "function" with `function` set. `output`: the model output that it looks at (default: the only one, or
    `logits`). `ignore_index`: a class label that does not count. `labels`: types of the label inputs of a function; the others know theirs.
    `distill`: settings of the loss of that name.
    """

    name: str
    output: str | None = None
    ignore_index: int = -100
    function: LossFunction | None = None
    labels: Mapping[str, TensorType] = field(default_factory=dict)
    distill: Distill = field(default_factory=Distill)


@dataclass(frozen=True, slots=True)
class Written:
    """The values of a loss: `loss` and `count`, scalars in float32 or better."""

    loss: Value
    count: Value


def label_inputs(loss: Loss, graph: Graph) -> tuple[tuple[str, TensorType], ...]:
    """(name, type) of each label input, over the graph's axes.

    Raises InputError for an unknown loss or output (nearest name), an output that the loss cannot judge, and labels that have the name of
    an input of the model.
    """
    if loss.function is not None or loss.name == FUNCTION:
        if loss.function is None:
            raise InputError("a loss of the name function needs one: Loss('function', function=f, labels=...)")
        found = tuple(loss.labels.items())
    else:
        if loss.labels:
            raise InputError(f"the labels of {loss.name} follow from its output; leave labels out")
        found = tuple(_entry(loss).labels(judged(loss, graph)[1].tensor, loss).items())
    taken = {entry.name for entry in graph.signature.inputs}
    for name, _ in found:
        if name in taken:
            raise InputError(f"the model has an input {name} of its own; the loss needs that name for its labels")
    return found


def judged(loss: Loss, graph: Graph) -> tuple[str, Value]:
    """Name and value of the output that a loss looks at. Raises InputError where there is none of that name, or none to choose."""
    outputs = tensor_outputs(graph)
    if loss.output is not None:
        if loss.output not in outputs:
            names = ", ".join(outputs)
            raise InputError(f"the model has no output {loss.output}; its outputs are {names}{did_you_mean(loss.output, outputs)}")
        return loss.output, outputs[loss.output]
    if len(outputs) == 1 or _PREFERRED in outputs:
        name = _PREFERRED if _PREFERRED in outputs else next(iter(outputs))
        return name, outputs[name]
    raise InputError(f"the loss needs to know which output it looks at: one of {', '.join(outputs)}")


def tensor_outputs(graph: Graph) -> dict[str, Value]:
    """The outputs that are tensors, by name."""
    return {name: value for name, value in graph.results if isinstance(value.type, TensorType)}


def write_loss(b: Builder, inference: Inference, loss: Loss, graph: Graph, labels: Mapping[str, Value]) -> Written:
    """Nodes of the loss. `labels`: a value per label input of `label_inputs`."""
    if loss.function is not None:
        return _write_function(b, inference, loss.function, tensor_outputs(graph), labels)
    return _entry(loss).write(b, _wide(b, judged(loss, graph)[1]), labels, loss)


# the losses


def _classes(output: TensorType, loss: Loss) -> TensorType:
    if not output.torch_dtype.is_floating_point or not output.shape:
        raise InputError(f"{loss.name} needs logits, a floating-point output [.., classes]; {_named(loss)} is {output}")
    return TensorType("int64", output.shape[:-1])


def _tokens(output: TensorType, loss: Loss) -> TensorType:
    if len(output.shape) != 3:
        raise InputError(f"{loss.name} needs logits [batch, seq, vocabulary]; {_named(loss)} is {output}")
    return _classes(output, loss)


def _same(output: TensorType, loss: Loss) -> TensorType:
    if not output.torch_dtype.is_floating_point:
        raise InputError(f"{loss.name} needs a floating-point output; {_named(loss)} is {output}")
    return TensorType(_wide_dtype(output.dtype), output.shape)


def _vectors(output: TensorType, loss: Loss) -> TensorType:
    if not output.shape:
        raise InputError(f"cosine needs vectors, an output [.., width]; {_named(loss)} is {output}")
    return _same(output, loss)


def _named(loss: Loss) -> str:
    return f"output {loss.output}" if loss.output else "the output"


def _taught(output: TensorType, loss: Loss) -> dict[str, TensorType]:
    labels = _tokens(output, loss)
    return {LABELS: labels, **teacher_inputs(TensorType(_wide_dtype(output.dtype), output.shape), loss.distill)}


def _cross_entropy(b: Builder, logits: Value, labels: Value, loss: Loss) -> Written:
    """Mean of -log softmax(logits)[label] over the labels that count."""
    valid = b("aten.ne.Scalar", labels, loss.ignore_index, name="valid")
    safe = b("aten.where.ScalarOther", valid, labels, 0)
    log_p = b("aten.log_softmax.int", logits, -1)
    picked = b("aten.squeeze.dim", b("aten.gather.default", log_p, -1, b("aten.unsqueeze.default", safe, -1)), -1)
    weights = b("aten._to_copy.default", valid, dtype=logits.tensor.torch_dtype)
    count = b("aten.sum.default", weights, name="count")
    total = b("aten.sum.default", b("aten.mul.Tensor", picked, weights))
    return Written(_ratio(b, b("aten.neg.default", total), count), count)


def _causal_lm(b: Builder, logits: Value, labels: Value, loss: Loss) -> Written:
    """Each position is judged by the label after it; the last has none."""
    return _cross_entropy(b, logits, _next(b, labels, loss), loss)


def _next(b: Builder, labels: Value, loss: Loss) -> Value:
    rest = b("aten.slice.Tensor", labels, 1, 1, 2**63 - 1)
    last = b("aten.full_like.default", b("aten.slice.Tensor", labels, 1, 0, 1), loss.ignore_index)
    return b("aten.cat.default", [rest, last], 1)


def _distill(b: Builder, logits: Value, labels: Mapping[str, Value], loss: Loss) -> Written:
    """The divergence from the teacher, at each position that has a label after it."""
    share = loss.distill.next_token
    valid = b("aten.ne.Scalar", _next(b, labels[LABELS], loss), loss.ignore_index, name="valid")
    weights = b("aten._to_copy.default", valid, dtype=logits.tensor.torch_dtype)
    count = b("aten.sum.default", weights, name="count")
    total = b("aten.sum.default", b("aten.mul.Tensor", divergence(b, logits, labels, loss.distill), weights))
    if share == 0:
        return Written(_ratio(b, total, count), count)
    mixed = b("aten.mul.Scalar", _ratio(b, total, count), 1 - share)
    other = b("aten.mul.Scalar", _causal_lm(b, logits, labels[LABELS], loss).loss, share)
    return Written(b("aten.add.Tensor", mixed, other, name="loss"), count)


def _mse(b: Builder, output: Value, labels: Value, loss: Loss) -> Written:
    difference = b("aten.sub.Tensor", output, labels)
    return _mean(b, b("aten.mul.Tensor", difference, difference), labels)


def _cosine(b: Builder, output: Value, labels: Value, loss: Loss) -> Written:
    """1 - x y / (max(|x|, eps) max(|y|, eps)), over the last axis."""

    def norm(value: Value) -> Value:
        squares = b("aten.sum.dim_IntList", b("aten.mul.Tensor", value, value), [-1])
        # Bounded before the root, whose slope at 0 is infinite.
        return b("aten.sqrt.default", b("aten.clamp.default", squares, COSINE_EPS**2))

    along = b("aten.sum.dim_IntList", b("aten.mul.Tensor", output, labels), [-1])
    cosine = b("aten.div.Tensor", along, b("aten.mul.Tensor", norm(output), norm(labels)))
    return _mean(b, b("aten.rsub.Scalar", cosine, 1.0), b("aten.select.int", labels, -1, 0))


def _mean(b: Builder, terms: Value, counted: Value) -> Written:
    """The mean of `terms`, of which there are as many as elements of `counted` (which no gradient reaches)."""
    count = b("aten.sum.default", b("aten.ones_like.default", counted), name="count")
    return Written(_ratio(b, b("aten.sum.default", terms), count), count)


def _ratio(b: Builder, total: Value, count: Value) -> Value:
    """total / max(count, 1): an empty sum is 0, not NaN."""
    return b("aten.div.Tensor", total, b("aten.clamp.default", count, 1.0), name="loss")


def _write_function(
    b: Builder, inference: Inference, function: LossFunction, outputs: Mapping[str, Value], labels: Mapping[str, Value]
) -> Written:
    """The nodes of a Python function of tensors. Raises InputError where it fails on symbolic shapes or gives no scalar."""
    values = [*outputs.values(), *labels.values()]

    def run(*given: Any) -> Any:
        result = function(dict(zip(outputs, given, strict=False)), dict(zip(labels, given[len(outputs) :], strict=True)))
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    try:
        recorded = trace_function(inference, run, values)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"the loss function cannot be traced: {reason}", [f"outputs: {', '.join(outputs)}; labels: {', '.join(labels)}"]
        ) from error
    found = emit(recorded, values, b.many, b)
    scalars = [value for value in found if isinstance(value, Value) and isinstance(value.type, TensorType) and not value.tensor.shape]
    if len(scalars) != len(found) or len(found) not in (1, 2):
        raise InputError("a loss function gives a scalar tensor, or (loss, count) with two of them")
    result = _wide(b, scalars[0])
    count = scalars[1] if len(scalars) == 2 else b("aten.ones_like.default", result, name="count")
    return Written(result, _wide(b, count))


def _wide(b: Builder, value: Value) -> Value:
    """In float32 or better: sums over a batch leave the range of half precision."""
    wanted = _wide_dtype(value.tensor.dtype)
    return value if wanted == value.tensor.dtype else b("aten._to_copy.default", value, dtype=TensorType(wanted, ()).torch_dtype)


def _wide_dtype(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


@dataclass(frozen=True, slots=True)
class _Entry:
    labels: Callable[[TensorType, Loss], Mapping[str, TensorType]]
    write: Callable[[Builder, Value, Mapping[str, Value], Loss], Written]


def _alone(labels: Callable[[TensorType, Loss], TensorType], write: Callable[[Builder, Value, Value, Loss], Written]) -> _Entry:
    """Of a loss with one input of labels."""
    return _Entry(lambda output, loss: {LABELS: labels(output, loss)}, lambda b, output, given, loss: write(b, output, given[LABELS], loss))


LABELS = "labels"
OF_CLASSES = ("cross_entropy", "causal_lm", DISTILL)
"""Losses whose labels are indices along the last axis of the output."""
FUNCTION = "function"
LOSSES: Mapping[str, _Entry] = {
    "cross_entropy": _alone(_classes, _cross_entropy),
    "causal_lm": _alone(_tokens, _causal_lm),
    "mse": _alone(_same, _mse),
    "cosine": _alone(_vectors, _cosine),
    DISTILL: _Entry(_taught, _distill),
}
"""The losses that have a name."""


def _entry(loss: Loss) -> _Entry:
    if loss.name not in LOSSES:
        raise InputError(f"there is no loss {loss.name}; there are {', '.join(LOSSES)}{did_you_mean(loss.name, LOSSES)}")
    return LOSSES[loss.name]
