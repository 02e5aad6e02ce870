"""From a compiled graph and what should train to everything that the training files are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from matmorph.errors import InputError, Position, SpecError, did_you_mean
from matmorph.exporters.training.training import Training, initial_theta
from matmorph.exporters.training.training_vectors import check_labels, training_vectors
from matmorph.exporters.vectors import example_sizes, resized
from matmorph.ir.adapter import Adapter, as_data
from matmorph.ir.core import Const, Graph, Value, values_in
from matmorph.ir.training.gradient import gradient_graph, loss_graph
from matmorph.ir.training.losses import FUNCTION, Loss, LossFunction, judged, label_inputs, tensor_outputs
from matmorph.ir.types import TensorType, dtype_name, symbol
from matmorph.ir.without_cache import without_cache
from matmorph.optimizers import AdamW, AnyOptimizer
from matmorph.passes.adapters.trainables import Trainable, resolve
from matmorph.passes.methods.protocol import Methods, TrainingForm
from matmorph.runtime.format.distillation import Distill
from matmorph.specs.schema import ParameterSelector, Train

LabelAxes: TypeAlias = Mapping[str, Mapping[int, str]]
"""Names of the dynamic axes of labels: {"labels": {0: "batch"}}."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainRequest:
    """What training files a user asks for.

    `loss`: the name of one, or a function (`ir.training.losses.LossFunction`). `labels`: example labels by name; a function's labels have
    the types of these, with the axes that `label_shapes` names. `distill`: settings of that loss. `keep`: model outputs that
    grad.onnx gives too. `at`: the spec's
    `train:`.
    """

    loss: str | LossFunction
    output: str | None = None
    ignore_index: int = -100
    optimizer: AnyOptimizer = field(default_factory=lambda: AdamW(lr=1e-4))
    trainable: Sequence[ParameterSelector] = (ParameterSelector("adapters"),)
    frozen: Sequence[ParameterSelector] = ()
    distill: Distill = field(default_factory=Distill)
    labels: Mapping[str, torch.Tensor] | None = None
    label_shapes: LabelAxes | None = None
    keep: Sequence[str] = ()
    at: Position | None = None


def of_spec(train: Train) -> TrainRequest:
    """What the `train:` of a spec asks for."""
    return TrainRequest(
        loss=train.loss,
        output=train.output,
        ignore_index=train.ignore_index,
        optimizer=train.optimizer.chosen,
        trainable=train.trainable,
        frozen=train.frozen,
        distill=train.distill or Distill(),
        at=train.at,
    )


def prepare_training(
    graph: Graph,
    request: TrainRequest,
    examples: Sequence[torch.Tensor],
    methods: Methods,
    adapters: Sequence[Adapter] = (),
    seed: int = 0,
) -> Training:
    """examples: flat tensor inputs in `graph.inputs` order, on the graph's device. methods: those that made weights of the graph. adapters:
    what of them the graph has. seed: of the labels that are drawn where none are given.

    Raises SpecError (what trains, an unknown output), InputError (labels that do not fit, a loss that is not finite), ExportError (an
    operator without a gradient).
    """
    _check_output(graph, request)
    compiled = graph
    graph, examples = _whole(graph, examples)
    forms: list[TrainingForm] = []
    for name, method in methods.items():
        form = method.for_training(graph, [adapter for adapter in adapters if adapter.method == name])
        if form is not None:
            forms.append(form)
            graph, examples = form.graph, [*examples, *form.inputs.values()]
    loss = _loss(graph, request)
    trainables = resolve(graph, methods, request.trainable, request.frozen, _reached(graph, loss))
    _refuse_wide(trainables)
    _refuse_partly(forms, trainables)
    consts = [item.const for item in trainables]
    evaluation = loss_graph(graph, consts, loss)
    gradient = gradient_graph(graph, consts, loss, request.keep)
    labels = label_inputs(loss, graph)
    feeds = _feeds(graph, loss, request, labels, examples, seed)
    theta = initial_theta(trainables).to(graph.device)
    return Training(
        graph=compiled,
        gradient=gradient,
        evaluation=evaluation,
        trainables=trainables,
        loss=replace(loss, output=None if loss.function else judged(loss, graph)[0]),
        labels=tuple(name for name, _ in labels),
        optimizer=request.optimizer,
        vectors=training_vectors(evaluation, theta, [const.numel for const in consts], feeds, graph.ranges),
        adapters=as_data(adapters),
        inputs=tuple(name for form in forms for name in form.inputs),
        space=next((form.space for form in forms if form.space is not None), None),
        kept={adapter.consts[part]: count for adapter in adapters for part, count in adapter.kept.items()},
    )


def _whole(graph: Graph, examples: Sequence[torch.Tensor]) -> tuple[Graph, Sequence[torch.Tensor]]:
    """The graph without its cache, and its examples: tokens as many as the longest of them, the mask's, has."""
    plain = without_cache(graph)
    if plain is graph:
        return graph, examples
    names = {entry.name: tensor for entry, tensor in zip([e for e in graph.signature.inputs if e.value is not None], examples, strict=True)}
    kept = [(entry.value, names[entry.name]) for entry in plain.signature.inputs if entry.value is not None]
    sizes: dict[str, int] = {}
    for value, tensor in kept:
        for dim, size in zip(value.tensor.shape, tensor.shape, strict=True):
            if not isinstance(dim, int) and dim.is_Symbol:
                sizes[str(dim)] = max(size, sizes.get(str(dim), 0))
    return plain, [resized(tensor, value, sizes) for value, tensor in kept]


def _refuse_partly(forms: Sequence[TrainingForm], trainables: Sequence[Trainable]) -> None:
    """InputError for a weight that a form wants to train and that does not."""
    trained = {item.const for item in trainables}
    missing = next(((const, form) for form in forms for const in form.whole if const not in trained), None)
    if missing is not None:
        raise InputError(f"{missing[0].path} {missing[1].why}")


def _check_output(graph: Graph, request: TrainRequest) -> None:
    outputs = tensor_outputs(graph)
    if request.output is not None and request.output not in outputs:
        raise SpecError(
            f"the model has no output {request.output}{did_you_mean(request.output, outputs)}",
            at=request.at,
            keypath="train.output",
            details=[f"outputs: {', '.join(outputs)}"],
        )


def _loss(graph: Graph, request: TrainRequest) -> Loss:
    if isinstance(request.loss, str):
        if request.label_shapes:
            raise InputError(f"label_shapes belongs to a loss of your own; the axes of {request.loss}'s labels are those of the output")
        return Loss(request.loss, request.output, request.ignore_index, distill=request.distill)
    if request.labels is None:
        raise InputError("a loss function needs example labels: labels={'labels': tensor}, and label_shapes={'labels': {0: 'batch'}}")
    axes = request.label_shapes or {}
    _refuse_unknown("label_shapes", axes, request.labels)
    types = {name: _typed(graph, name, torch.as_tensor(tensor), axes.get(name, {})) for name, tensor in request.labels.items()}
    return Loss(FUNCTION, request.output, request.ignore_index, request.loss, types)


def _refuse_unknown(what: str, given: Mapping[str, object], known: Mapping[str, object]) -> None:
    for name in given:
        if name not in known:
            raise InputError(f"{what}: there is no label {name}{did_you_mean(name, known)}")


def _typed(graph: Graph, name: str, tensor: torch.Tensor, axes: Mapping[int, str]) -> TensorType:
    symbols = graph.symbols()
    for axis, word in axes.items():
        if word not in symbols or not 0 <= axis < tensor.dim():
            raise InputError(
                f"label_shapes: axis {axis} of {name} cannot be {word}{did_you_mean(word, symbols)}",
                [f"{name} has {tensor.dim()} axes; the model's dynamic axes are {', '.join(symbols) or 'none'}"],
            )
    return TensorType(
        dtype_name(tensor.dtype), tuple(symbol(axes[axis]) if axis in axes else int(size) for axis, size in enumerate(tensor.shape))
    )


def _reached(graph: Graph, loss: Loss) -> frozenset[Value]:
    """What the loss depends on: everything behind the outputs that it looks at."""
    found = set(tensor_outputs(graph).values()) if loss.function else {judged(loss, graph)[1]}
    for node in reversed(graph.nodes):
        if not found.isdisjoint(node.outputs):
            found.update(values_in((node.args, tuple(node.attrs.values()))))
    return frozenset(found)


def _refuse_wide(trainables: Sequence[Trainable]) -> None:
    """theta is float32."""
    wide: list[Const] = [item.const for item in trainables if item.const.tensor.dtype == "float64"]
    if wide:
        raise InputError(f"{wide[0].path} is float64, and training keeps its parameters in float32", ["convert the model: model.float()"])


def _feeds(
    graph: Graph,
    loss: Loss,
    request: TrainRequest,
    labels: Sequence[tuple[str, TensorType]],
    examples: Sequence[torch.Tensor],
    seed: int,
) -> dict[str, torch.Tensor]:
    """An example of every input of the loss graph but theta, by name."""
    names = [entry.name for entry in graph.signature.inputs if entry.value is not None]
    kinds = dict(labels)
    sizes = example_sizes(graph.inputs, examples)
    found = check_labels(kinds, request.labels, sizes, _classes(graph, loss), loss.ignore_index, seed)
    return {**dict(zip(names, examples, strict=True)), **{name: tensor.to(graph.device) for name, tensor in found.items()}}


def _classes(graph: Graph, loss: Loss) -> int:
    """How many classes drawn labels may name."""
    shape = () if loss.function else judged(loss, graph)[1].tensor.shape
    return shape[-1] if shape and isinstance(shape[-1], int) else 2
