"""Gradients of a loss with respect to values of a graph, on calibration batches that bring their labels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from matmorph.errors import InputError, SpecError
from matmorph.ir.build import Builder
from matmorph.ir.core import Graph, Node, Value
from matmorph.ir.evaluate import check_tensors
from matmorph.ir.infer import Inference
from matmorph.ir.training.losses import LABELS, OF_CLASSES, Loss, judged, label_inputs, write_loss
from matmorph.ir.types import TensorType
from matmorph.passes.statistics.backward import PASS_BYTES, Backward, Take, slice_samples
from matmorph.passes.statistics.calibrate import bound_batch, cut_batch
from matmorph.passes.statistics.stream import of_batch
from matmorph.progress import StepProgress
from matmorph.runtime.format.distillation import Distill
from matmorph.specs.schema import Train

Unlabelled: TypeAlias = Callable[[str, str], SpecError]
"""The error for a batch without labels: from what it lacks, and what a batch should be."""


@dataclass(frozen=True, slots=True, eq=False)
class _Judged:
    """The graph with its loss behind it."""

    graph: Graph
    nodes: tuple[Node, ...]
    labels: Mapping[str, Value]
    loss: Value
    count: Value


def label_names(graph: Graph, train: Train) -> tuple[str, ...]:
    """What the batches must have beside the model's inputs. InputError for a loss that does not fit the model's outputs."""
    return tuple(name for name, _ in label_inputs(loss_of(train), graph))


def loss_gradients(
    graph: Graph,
    values: Sequence[Value],
    batches: Iterable[Any],
    samples: int,
    train: Train,
    unlabelled: Unlabelled,
    take: Take,
    progress: StepProgress | None = None,
    *,
    limit: int = PASS_BYTES,
) -> int:
    """The gradients of the loss by `values`, in as many parts as memory asks for, until `samples` samples are read; how many there were.
    Batches are mappings with the labels beside the inputs. Of a value that the loss does not depend on there is nothing to take.

    The loss is a mean; its gradient is taken times its count, so that sums over parts do not depend on how the samples are divided.
    Raises `unlabelled` where a batch has no labels, InputError as `calibrate`.
    """
    behind, classes = _with_loss(graph, train), classes_of(graph, train)
    backward = Backward.of(behind.nodes, values, (behind.loss, behind.count), limit)
    done = 0
    for number, batch in enumerate(batches):
        inputs, labels = labelled_batch(graph, behind.labels, classes, batch, number, unlabelled)
        tensors, count = cut_batch(graph, inputs, samples - done)
        pairs = [*zip(graph.inputs, tensors, strict=True), *((value, labels[name]) for name, value in behind.labels.items())]
        known = slice_samples(graph, pairs, (0, count))
        with of_batch(number):
            backward.run_parts(graph, known, lambda held: {behind.loss: held[behind.count].to(held[behind.loss])}, take)
        done += count
        if progress is not None:
            progress(done, None)
        if done >= samples:
            break
    return done


def loss_of(train: Train) -> Loss:
    """The loss that the spec names."""
    return Loss(train.loss, train.output, train.ignore_index, distill=train.distill or Distill())


def _with_loss(graph: Graph, train: Train) -> _Judged:
    inference = Inference(graph.ranges, graph.device)
    b = Builder(graph, inference=inference)
    labels = {name: Value(f"label.{name}", kind) for name, kind in label_inputs(loss_of(train), graph)}
    written = write_loss(b, inference, loss_of(train), graph, labels)
    return _Judged(graph, (*graph.nodes, *b.nodes), labels, written.loss, written.count)


def labelled_batch(
    graph: Graph, labels: Mapping[str, Value], classes: Classes | None, batch: Any, number: int, unlabelled: Unlabelled
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(the model's inputs in `graph.inputs` order, the labels by name) of batch `number`, from 0, on the graph's device.

    Raises `unlabelled` where one is missing, InputError for labels of another type or shape and for classes that the model has not.
    """
    missing = [name for name in labels if not isinstance(batch, Mapping) or name not in batch]
    if missing:
        raise unlabelled(
            f"calibration batch {number + 1} has no {', '.join(missing)}",
            f"a batch is a mapping of the model's inputs and {', '.join(labels)}",
        )
    inputs = bound_batch(graph, _dropped(batch, tuple(labels)), number)
    found = {name: _label(batch[name], value.tensor, graph.device) for name, value in labels.items()}
    names = (entry.name for entry in graph.signature.inputs if entry.value is not None)
    known = zip(names, graph.inputs, inputs, strict=True)  # sizes that the labels must agree with
    try:
        check_tensors(graph, [*known, *((name, labels[name], tensor) for name, tensor in found.items())])
        if classes is not None:
            classes.check(found[LABELS])
    except InputError as error:
        raise InputError(f"calibration batch {number + 1}: {error.message}", error.details) from error
    return inputs, found


def _label(leaf: Any, kind: TensorType, device: str) -> Tensor:
    """Integers of any width and floating-point numbers of any precision are taken for the loss's own."""
    tensor = torch.as_tensor(leaf, device=device)
    same = tensor.is_floating_point() == kind.torch_dtype.is_floating_point and tensor.dtype != torch.bool
    return tensor.to(kind.torch_dtype) if same else tensor


@dataclass(frozen=True, slots=True)
class Classes:
    """Which labels a loss over classes takes: 0 to `count` - 1, and `ignored`, which does not count."""

    count: int
    ignored: int

    def check(self, labels: Tensor) -> None:
        wrong = labels[((labels < 0) | (labels >= self.count)) & (labels != self.ignored)]
        if wrong.numel():
            raise InputError(f"labels are classes, 0 to {self.count - 1}, or {self.ignored}, which does not count; found {int(wrong[0])}")


def classes_of(graph: Graph, train: Train) -> Classes | None:
    """None for a loss of other labels than classes, and where their number is no constant."""
    loss = loss_of(train)
    last = judged(loss, graph)[1].tensor.shape[-1:]
    if loss.name not in OF_CLASSES or not isinstance(last[0], int):
        return None
    return Classes(last[0], loss.ignore_index)


def dropped(batches: Iterable[Any], names: Collection[str]) -> Iterable[Any]:
    """The batches without the entries `names`; a list stays one, so that its samples can be counted."""
    return [_dropped(batch, names) for batch in batches] if isinstance(batches, list | tuple) else _Dropped(batches, names)


def _dropped(batch: Any, names: Collection[str]) -> Any:
    return {name: leaf for name, leaf in batch.items() if name not in names} if isinstance(batch, Mapping) else batch


class _Dropped:
    """Batches that are read when they are asked for, and again for every stage."""

    def __init__(self, batches: Iterable[Any], names: Collection[str]) -> None:
        self._batches = batches
        self._names = names

    def __iter__(self) -> Iterator[Any]:
        return (_dropped(batch, self._names) for batch in self._batches)
