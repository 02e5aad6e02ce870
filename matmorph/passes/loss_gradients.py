"""Gradients of a loss with respect to values of a graph, on calibration batches that bring their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from matmorph.errors import SpecError
from matmorph.ir.build import Builder
from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.evaluate import run_node
from matmorph.ir.infer import Inference
from matmorph.ir.losses import Loss, label_inputs, write_loss
from matmorph.passes.calibrate import Progress, bound_batch, cut_batch
from matmorph.specs.schema import Train

Unlabelled: TypeAlias = Callable[[str, str], SpecError]
"""The error for a batch without labels: from what it lacks, and what a batch should be."""


@dataclass(frozen=True, slots=True, eq=False)
class Slopes:
    """Of one batch: each value [..] with the gradient of the summed loss by it (None where the loss does not depend on it), and how many
    samples the batch had."""

    values: Mapping[Value, tuple[Tensor, Tensor | None]]
    samples: int


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
    progress: Progress | None = None,
) -> Iterator[Slopes]:
    """Batch by batch until `samples` samples are read. Batches are mappings with the labels beside the inputs.

    The loss is a mean; its gradient is taken times its count, so that sums over batches do not depend on how the samples are divided.
    Raises `unlabelled` where a batch has no labels, InputError as `calibrate`.
    """
    judged = _with_loss(graph, train)
    done = 0
    for number, batch in enumerate(batches):
        inputs, labels = split_labels(batch, number, tuple(judged.labels), graph.device, unlabelled)
        tensors, count = cut_batch(graph, bound_batch(graph, inputs, number), samples - done)
        known = {**dict(zip(graph.inputs, tensors, strict=True)), **{value: labels[name][:count] for name, value in judged.labels.items()}}
        found = differentiated(judged.nodes, known, values, lambda held: held[judged.loss] * held[judged.count])
        yield Slopes(found, count)
        done += count
        if progress is not None:
            progress(done, None)
        if done >= samples:
            break


def loss_of(train: Train) -> Loss:
    """The loss that the spec names."""
    return Loss(train.loss, train.output, train.ignore_index)


def _with_loss(graph: Graph, train: Train) -> _Judged:
    inference = Inference(graph.ranges, graph.device)
    b = Builder(graph, inference=inference)
    labels = {name: Value(f"label.{name}", kind) for name, kind in label_inputs(loss_of(train), graph)}
    written = write_loss(b, inference, loss_of(train), graph, labels)
    return _Judged(graph, (*graph.nodes, *b.nodes), labels, written.loss, written.count)


def split_labels(
    batch: Any, number: int, names: Sequence[str], device: str, unlabelled: Unlabelled
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the model's inputs, the labels `names` on the device) of batch `number`, from 0. Raises `unlabelled` where one is missing."""
    missing = [name for name in names if not isinstance(batch, Mapping) or name not in batch]
    if missing:
        raise unlabelled(
            f"calibration batch {number + 1} has no {', '.join(missing)}",
            f"a batch is a mapping of the model's inputs and {', '.join(names)}",
        )
    labels = {name: _tensor(batch[name], device) for name in names}
    return {name: leaf for name, leaf in batch.items() if name not in names}, labels


def _tensor(leaf: Any, device: str) -> Tensor:
    return (torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else torch.as_tensor(leaf)).to(device)


def differentiated(
    nodes: Sequence[Node], known: dict[Value, Any], values: Sequence[Value], total: Callable[[Mapping[Value, Any]], Tensor]
) -> dict[Value, tuple[Tensor, Tensor | None]]:
    """Each value and the gradient of `total` (given all values once the nodes have run) by it.

    Zeros are added to each value, and the total is differentiated by them: weights stay without gradients."""
    wanted = frozenset(values)
    probes: dict[Value, Tensor] = {}

    def read(value: Value) -> Any:
        if value not in known and isinstance(value, Const):
            known[value] = value.load().detach()
        return known[value]

    with torch.enable_grad():
        for node in nodes:
            for value, result in zip(node.outputs, run_node(node, read), strict=True):
                known[value] = result
                if value in wanted:
                    probes[value] = torch.zeros_like(result, requires_grad=True)
                    known[value] = result + probes[value]
        summed = total(known)
        reached = bool(probes) and summed.requires_grad
        found = torch.autograd.grad(summed, list(probes.values()), allow_unused=True) if reached else [None] * len(probes)
    return {value: (known[value].detach(), gradient) for value, gradient in zip(probes, found, strict=True)}


class WithoutLabels:
    """Batches without the labels that gradients read: what the model itself is given."""

    def __init__(self, batches: Iterable[Any], names: Sequence[str]) -> None:
        self._batches = batches
        self._names = frozenset(names)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            plain = isinstance(batch, Mapping)
            yield {name: leaf for name, leaf in batch.items() if name not in self._names} if plain else batch
