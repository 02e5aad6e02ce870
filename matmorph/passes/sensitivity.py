"""How much a loss feels an error at the output of a site: `calibration.sensitivity: fisher`.

With g = d(loss of a sample) / d(one row of the site's output), an error d of that row changes the loss by g.d to first order and, where the
loss is a log-likelihood, by E[(g.d)^2] / 2 in expectation to second order (the Fisher information stands for the Hessian; Kunstner et al.,
arXiv 1905.12558, on when it does). Taking the directions of g and d as independent, E[(g.d)^2] = |g|^2 E|d|^2 / out. So the weight of a
site is the sum of |g|^2 / out over the rows of a sample, for squared errors of one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matmorph.errors import SpecError
from matmorph.ir.build import Builder
from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.evaluate import run_node
from matmorph.ir.infer import Inference
from matmorph.ir.losses import Loss, label_inputs, write_loss
from matmorph.ir.site import Site
from matmorph.passes.calibrate import Progress, bound_batch, cut_batch
from matmorph.specs.schema import Train


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
    return tuple(name for name, _ in label_inputs(_loss(train), graph))


def fisher(
    graph: Graph, sites: Sequence[Site], batches: Iterable[Any], samples: int, train: Train, progress: Progress | None = None
) -> dict[Site, float]:
    """The weight of each site, from at most `samples` samples of batches that are mappings with the labels beside the inputs.

    Raises SpecError where a batch has no labels, InputError as `calibrate`.
    """
    judged = _with_loss(graph, train)
    sums = dict.fromkeys(sites, 0.0)
    done = 0
    for number, batch in enumerate(batches):
        inputs, labels = _split(judged, batch, number)
        tensors, count = cut_batch(graph, bound_batch(graph, inputs, number), samples - done)
        known = {**dict(zip(graph.inputs, tensors, strict=True)), **{value: labels[name][:count] for name, value in judged.labels.items()}}
        for site, total in _squared_gradients(judged, known, sites).items():
            sums[site] += total
        done += count
        if progress is not None:
            progress(done, None)
        if done >= samples:
            break
    return {site: total / (site.out_features * max(done, 1)) for site, total in sums.items()}


def _loss(train: Train) -> Loss:
    return Loss(train.loss, train.output, train.ignore_index)


def _with_loss(graph: Graph, train: Train) -> _Judged:
    inference = Inference(graph.ranges, graph.device)
    b = Builder(graph, inference=inference)
    labels = {name: Value(f"label.{name}", kind) for name, kind in label_inputs(_loss(train), graph)}
    written = write_loss(b, inference, _loss(train), graph, labels)
    return _Judged(graph, (*graph.nodes, *b.nodes), labels, written.loss, written.count)


def _split(judged: _Judged, batch: Any, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    names = tuple(judged.labels)
    missing = [name for name in names if not isinstance(batch, Mapping) or name not in batch]
    if missing:
        raise SpecError(
            f"fisher needs labels, and calibration batch {number + 1} has no {', '.join(missing)}",
            keypath="calibration.sensitivity",
            details=[f"a batch is a mapping of the model's inputs and {', '.join(names)}"],
        )
    labels = {name: _tensor(batch[name], judged.graph.device) for name in names}
    return {name: leaf for name, leaf in batch.items() if name not in names}, labels


def _tensor(leaf: Any, device: str) -> Tensor:
    return (torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else torch.as_tensor(leaf)).to(device)


def _squared_gradients(judged: _Judged, known: dict[Value, Any], sites: Sequence[Site]) -> dict[Site, float]:
    """Sum of |g|^2 over the rows of all samples. The loss is a mean: times its count it is the sum over samples."""
    owners = {value: site for site in sites for value in _outputs(site)}
    probes: dict[Value, Tensor] = {}

    def read(value: Value) -> Any:
        if value not in known and isinstance(value, Const):
            known[value] = value.load().detach()
        return known[value]

    with torch.enable_grad():
        for node in judged.nodes:
            for value, result in zip(node.outputs, run_node(node, read), strict=True):
                known[value] = result
                if value in owners:
                    probes[value] = torch.zeros_like(result, requires_grad=True)
                    known[value] = result + probes[value]
        total = known[judged.loss] * known[judged.count]
        found = torch.autograd.grad(total, list(probes.values()), allow_unused=True)
    sums = dict.fromkeys(sites, 0.0)
    for value, gradient in zip(probes, found, strict=True):
        sums[owners[value]] += 0.0 if gradient is None else float(gradient.double().square().sum())
    return sums


def _outputs(site: Site) -> Iterator[Value]:
    yield from (application.output for application in site.applications)
    yield from (node.outputs[0] for node in site.gathers)


class Unlabelled:
    """Batches without the labels that fisher reads: what the model itself is given. Sized where the batches are."""

    def __init__(self, batches: Iterable[Any], names: Sequence[str]) -> None:
        self._batches = batches
        self._names = frozenset(names)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            plain = isinstance(batch, Mapping)
            yield {name: leaf for name, leaf in batch.items() if name not in self._names} if plain else batch
