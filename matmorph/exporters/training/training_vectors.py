"""Check vectors of a training graph: losses and gradients that torch's autograd gives, against which ONNX Runtime is held here and later.

Autograd runs over the loss graph, so that it shares nothing with the gradient graph but the definition of the loss, in float64: what is
expected has no rounding of its own. It runs in float32 beside it, which tells how much of float32's rounding this model's gradients feel,
and with that how far another float32 may lie off. The trainables are moved a little from where they start: many adapters start at zero,
where half of the gradient is zero whatever the graph computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from matmorph.errors import InputError, did_you_mean
from matmorph.exporters.artifact import npz_bytes
from matmorph.exporters.onnx.precision import PARITY_TOLERANCE
from matmorph.exporters.vectors import check_shapes, concrete, example_sizes, padded_examples, resized, widened
from matmorph.ir.core import Graph, Range, Value
from matmorph.ir.evaluate import evaluate
from matmorph.ir.types import TensorType, dim_symbols
from matmorph.runtime.format.cases import Array, TrainingCase, TrainingVectors, training_arrays
from matmorph.runtime.format.distillation import TEACHER_IDS, TEACHER_LOGS
from matmorph.runtime.format.training import THETA

NUDGE = 0.01
"""Largest move of a trainable: below the spread of trained weights, far above rounding."""

PERIOD = 1009  # prime, so that neighbouring rows of a matrix do not move alike
CHECKED_SCALE = 128.0
"""The loss scale at which gradients are checked."""

TIMES_ROUNDING = 4.0
"""Another order of the same float32 operations may err by this many times what torch's does: the largest of some thousand errors, each a
sum of many roundings, varies by a factor of two or three between two orders."""

SAMPLES = 4096
"""Entries of a parameter's gradient that are kept, spread evenly."""

FLOOR = 1e-3
"""A parameter's largest entry counts as at least this share of the largest of all: a gradient that is zero but for rounding (the bias of a
key in attention) has nothing to be relative to."""


def training_vectors(
    loss_graph: Graph,
    theta: torch.Tensor,
    lengths: Sequence[int],
    feeds: Mapping[str, torch.Tensor],
    ranges: Mapping[str, Range],
) -> TrainingVectors:
    """Loss and gradient at up to three shapes, the example's first, and with padding where an input is an attention mask.

    loss_graph: inputs `theta`, the model's and the labels, outputs `loss`, `count` and more. theta: float32 [n], where training starts.
    lengths: of each parameter in it. feeds: an example of every input but theta, on the graph's device; labels that have axes of the
    model's inputs are cropped and repeated with them. Raises InputError where the loss is not finite on the example.
    """
    entries = [entry for entry in loss_graph.signature.inputs if entry.value is not None]
    named = {entry.name: entry.value for entry in entries if entry.value is not None}
    data = [name for name in named if name != THETA]
    values: list[Value] = [named[name] for name in data]
    nudge = nudges()
    index, owners = _entries(lengths)
    moved = theta + torch.from_numpy(np.resize(nudge, len(theta))).to(theta)
    single, double = widened(loss_graph), widened(loss_graph, torch.float64)
    felt = 0.0
    cases = []
    shapes = check_shapes(example_sizes(values, [feeds[name] for name in data]), ranges)
    batches = [{name: resized(feeds[name], value, sizes) for name, value in zip(data, values, strict=True)} for sizes in shapes]
    padded = [dict(zip(named, tensors, strict=True)) for tensors in padded_examples(loss_graph, [feeds.get(name, theta) for name in named])]
    for number, batch in enumerate([*batches, *padded]):
        inputs = {name: batch[name] for name in data}
        inputs = {name: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor for name, tensor in inputs.items()}
        loss, count, gradient = _autograd(single, moved, [inputs.get(name, moved) for name in named])
        if number >= len(batches) and not (np.isfinite(loss) and np.isfinite(gradient).all()):
            continue  # the model itself has no answer for rows without any key
        if not np.isfinite(loss):
            raise InputError(f"the loss is {loss.item()} on the example inputs: nothing can be learnt from there, and nothing checked")
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        moved_wide = moved.double()
        true_loss, _, true_gradient = _autograd(double, moved_wide, [wide.get(name, moved_wide) for name in named])
        reference = _references(true_gradient, lengths)[owners]
        off = np.abs(gradient[index].astype(np.float64) - true_gradient[index]) / reference
        felt = max(felt, float(off.max()), abs(float(loss) - float(true_loss)) / max(1.0, abs(float(true_loss))))
        arrays = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
        cases.append(TrainingCase(arrays, float(true_loss), float(count), true_gradient[index].astype(np.float32), reference))
    return TrainingVectors(nudge, index, CHECKED_SCALE, tuple(cases), felt)


def nudges() -> Array:
    """float32 [PERIOD] within +- NUDGE."""
    return np.asarray(NUDGE * np.cos(0.7 * np.arange(PERIOD)), np.float32)


def _autograd(graph: Graph, theta: torch.Tensor, inputs: Sequence[torch.Tensor]) -> tuple[Array, Array, Array]:
    """Loss, count and the gradient of loss * CHECKED_SCALE, in the type of `theta`, which is the entry of `inputs` that is this very
    tensor."""
    leaf = theta.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss, count, *_ = evaluate(graph, [leaf if tensor is theta else tensor for tensor in inputs])
        (gradient,) = torch.autograd.grad(loss * CHECKED_SCALE, [leaf])
    return loss.detach().cpu().numpy(), count.detach().cpu().numpy(), gradient.cpu().numpy()


def _entries(lengths: Sequence[int]) -> tuple[Array, Array]:
    """Which entries of theta are kept, and the parameter of each."""
    index, owners, offset = [], [], 0
    for owner, length in enumerate(lengths):
        taken = np.arange(0, length, max(1, -(-length // SAMPLES)), dtype=np.int64)
        index.append(offset + taken)
        owners.append(np.full(len(taken), owner, np.int64))
        offset += length
    return np.concatenate(index), np.concatenate(owners)


def _references(gradient: Array, lengths: Sequence[int]) -> Array:
    """Per parameter its largest entry, at least FLOOR times the largest of all."""
    starts = np.cumsum([0, *lengths[:-1]])
    largest = np.maximum.reduceat(np.abs(gradient), starts)
    return np.maximum(largest, max(FLOOR * float(largest.max()), float(np.finfo(np.float32).tiny))).astype(np.float32)


def vectors_bytes(vectors: TrainingVectors, precision: str, dtypes: Mapping[str, str]) -> bytes:
    """train_check.npz. precision: fp32, fp16 or bf16, in which the graphs compute; dtypes: of their inputs by name."""
    cases = [
        replace(case, inputs={name: np.asarray(array, np.dtype(dtypes[name])) for name, array in case.inputs.items()})
        for case in vectors.cases
    ]
    return npz_bytes(training_arrays(replace(vectors, cases=tuple(cases)), _tolerance(precision, vectors.felt)))


def _tolerance(precision: str, felt: float) -> float:
    """That of model.onnx; in float32 more where the gradients feel more of its rounding. In half precision autocast keeps what is sensitive
    in float32."""
    return max(PARITY_TOLERANCE[precision], TIMES_ROUNDING * felt if precision == "fp32" else 0.0)


# ---- labels


def check_labels(
    wanted: Mapping[str, TensorType],
    given: Mapping[str, Any] | None,
    sizes: Mapping[str, int],
    classes: int,
    ignore_index: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """An example of every label: the caller's, or drawn from `seed`: classes, every fourth of them ignored, normal
    numbers, or a teacher's answers.

    Raises InputError for a label that is missing, unknown, or of another type or shape than the loss takes.
    """
    if given is None:
        generator = torch.Generator().manual_seed(seed)
        return {name: _drawn(name, kind, sizes, classes, ignore_index, generator) for name, kind in wanted.items()}
    for name in given:
        if name not in wanted:
            raise InputError(f"labels: the loss takes no {name}{did_you_mean(name, wanted)}", [f"it takes {', '.join(wanted) or 'none'}"])
    missing = [name for name in wanted if name not in given]
    if missing:
        raise InputError(f"labels: {missing[0]} is missing; the loss takes {', '.join(wanted)}")
    return {name: _fitting(name, torch.as_tensor(given[name]), kind, sizes) for name, kind in wanted.items()}


def _drawn(
    name: str, kind: TensorType, sizes: Mapping[str, int], classes: int, ignore_index: int, generator: torch.Generator
) -> torch.Tensor:
    if not dim_symbols(kind.shape) <= sizes.keys():
        raise InputError(f"labels: the shape of {name} {kind} does not follow from the example inputs: give labels={{'{name}': tensor}}")
    shape = [concrete(dim, sizes) for dim in kind.shape]
    if kind.torch_dtype.is_floating_point:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float32).to(kind.torch_dtype)
        return torch.log_softmax(numbers, -1) if name == TEACHER_LOGS else numbers
    if name == TEACHER_IDS:  # distinct words at each place
        return torch.rand([*shape[:-1], classes], generator=generator).argsort(-1)[..., : shape[-1]].contiguous()
    drawn = torch.randint(0, classes, shape, generator=generator, dtype=torch.int64)
    drawn.view(-1)[1::4] = ignore_index
    return drawn.to(kind.torch_dtype)


def _fitting(name: str, tensor: torch.Tensor, kind: TensorType, sizes: Mapping[str, int]) -> torch.Tensor:
    found = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if tensor.dtype != kind.torch_dtype or tensor.dim() != len(kind.shape):
        raise InputError(f"labels: {name} must be {kind}, got {found}")
    wanted = [
        concrete(dim, sizes) if dim_symbols([dim]) <= sizes.keys() else size for dim, size in zip(kind.shape, tensor.shape, strict=True)
    ]
    if list(tensor.shape) != wanted:
        raise InputError(f"labels: {name} must be {kind}, that is {wanted} beside the example inputs, got {found}")
    return tensor.detach()
