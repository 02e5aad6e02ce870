"""The training files of an artefact folder, beside `model.onnx` and on its data file.

    grad.onnx              theta, loss_scale, model inputs, labels -> loss, count, grad (and model outputs that were asked for)
    eval.onnx              theta, model inputs, labels -> loss, count, model outputs
    apply.onnx             theta, grad, optimizer state, step, lr ... -> the next theta and state
    trainable.safetensors  where training starts: each parameter under its dotted name, float32, in its own shape
    graph.ir               the graph as text, for whoever merges what was trained
    train.json             what is where
    train_check.npz        inputs, and the loss and gradient that torch's autograd gives for them

theta is every trainable parameter in one float32 vector, whatever the precision of the export: half-precision graphs cast it inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from matmorph.errors import VerifyError
from matmorph.exporters.artifact import graph_bytes, json_bytes, write_files
from matmorph.exporters.data_file import DataFile, names_sha256, weights_sha256
from matmorph.exporters.onnx.lowering import Lowerings
from matmorph.exporters.onnx.onnx_model import OnnxInfo, write_model
from matmorph.exporters.onnx.precision import computed_in
from matmorph.exporters.training.apply_graph import Kept, optimizer_model
from matmorph.exporters.training.training_vectors import vectors_bytes
from matmorph.ir.core import Graph
from matmorph.ir.training.losses import Loss
from matmorph.optimizers import AnyOptimizer, optimizer_name
from matmorph.passes.adapters.trainables import Trainable
from matmorph.runtime.format.artifact import DATA, GRAPH, FileRecord
from matmorph.runtime.format.cases import TrainingVectors
from matmorph.runtime.format.distillation import DISTILL
from matmorph.runtime.format.training import (
    APPLY_MODEL,
    COUNT,
    EVAL_MODEL,
    GRAD_MODEL,
    GRADIENT,
    LOSS,
    LOSS_SCALE,
    THETA,
    TRAIN_CHECK_VECTORS,
    TRAIN_MANIFEST,
    TRAINABLE,
    Parameter,
    SearchSpace,
    Segment,
    TrainedLoss,
    TrainManifest,
)

if TYPE_CHECKING:
    from matmorph.specs.schema import Export


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """Everything the training files are made of.

    `graph`: the compiled model; `gradient` and `evaluation`: its gradient and loss graph (see `ir.training.gradient`). `trainables`: in the
    order of theta. `labels`: names of the label inputs. `vectors`: what torch answers. `adapters`: what each inserted adapter is made of,
    for whoever merges or exchanges it. `inputs`: those that training alone has. `space`: what is searched, of a supernet. `kept`: by dotted
    name, how many entries of a parameter take part in an update; what is not named takes part whole.
    """

    graph: Graph
    gradient: Graph
    evaluation: Graph
    trainables: tuple[Trainable, ...]
    loss: Loss
    labels: tuple[str, ...]
    optimizer: AnyOptimizer
    vectors: TrainingVectors
    adapters: Sequence[Mapping[str, Any]] = ()
    inputs: tuple[str, ...] = ()
    space: SearchSpace | None = None
    kept: Mapping[str, int] = field(default_factory=dict)


def initial_theta(trainables: Sequence[Trainable]) -> torch.Tensor:
    """Every trainable as it is now, float32 [n], on the CPU."""
    return torch.cat([item.const.load().detach().cpu().float().reshape(-1) for item in trainables])


def write_training(
    folder: Path,
    data: DataFile,
    training: Training,
    export: Export,
    version: str,
    onnx_lowerings: Lowerings | None = None,
) -> dict[str, FileRecord]:
    """Writes the files into a folder whose data file is open, and is the last to write to it; their hashes, the data file's among them.

    Frozen weights that `model.onnx` has too are found in the data file, not written again. Activations are never rounded to 8 bits here:
    no gradient flows through the rounding. Raises what `write_model` raises.
    """
    export = replace(export, activations="fp32", fuse="none")
    parameters = _parameters(training.trainables, training.kept)
    pieces = [Kept(one.offset, one.size, one.keep) for one in parameters if one.keep is not None]
    grad = write_model(training.gradient, folder / GRAD_MODEL, data, export, onnx_lowerings)
    evaluation = write_model(training.evaluation, folder / EVAL_MODEL, data, export, onnx_lowerings)
    apply = optimizer_model(training.optimizer, [segment.length for segment in _segments(parameters)], pieces)
    dtypes = {port.name: port.dtype for port in grad.inputs}
    precision = computed_in(export.precision, [const.tensor.dtype for const in training.graph.used_state()])
    files = {**grad.files, **evaluation.files, DATA: data.info()}
    files |= write_files(
        folder,
        {
            APPLY_MODEL: apply.SerializeToString(deterministic=True),
            TRAINABLE: _tensors(training.trainables),
            GRAPH: graph_bytes(training.graph),
            TRAIN_CHECK_VECTORS: vectors_bytes(training.vectors, precision, dtypes),
        },
    )
    described = _described(training, parameters, grad, evaluation, files, version)
    return {**files, **write_files(folder, {TRAIN_MANIFEST: json_bytes(described.to_dict())})}


def _trained(loss: Loss) -> TrainedLoss:
    return TrainedLoss(loss.name, loss.output, loss.ignore_index, loss.distill if loss.name == DISTILL else None)


def _parameters(trainables: Sequence[Trainable], kept: Mapping[str, int]) -> tuple[Parameter, ...]:
    """Where each trainable lies in theta."""
    found, offset = [], 0
    for item in trainables:
        shape = tuple(int(dim) for dim in item.const.tensor.shape)
        found.append(Parameter(item.const.path, shape, offset, item.segment, kept.get(item.const.path)))
        offset += item.const.numel
    return tuple(found)


def _segments(parameters: Sequence[Parameter]) -> tuple[Segment, ...]:
    segments = []
    for name, members in groupby(parameters, key=lambda parameter: parameter.segment):
        run = list(members)
        segments.append(Segment(name, run[0].offset, sum(parameter.size for parameter in run)))
    if len({segment.name for segment in segments}) < len(segments):
        raise VerifyError("the trainables of a segment are not together")
    return tuple(segments)


def _tensors(trainables: Sequence[Trainable]) -> bytes:
    """safetensors of the trainables, float32. The format orders tensors itself, so equal values give equal bytes."""
    return safetensors.torch.save({item.const.path: item.const.load().detach().cpu().float().contiguous() for item in trainables})


def _described(
    training: Training,
    parameters: tuple[Parameter, ...],
    grad: OnnxInfo,
    evaluation: OnnxInfo,
    files: Mapping[str, FileRecord],
    version: str,
) -> TrainManifest:
    """What train.json says."""
    own = {THETA, LOSS_SCALE, *training.inputs, *training.labels}
    trained = {item.const for item in training.trainables}
    frozen = [const for const in training.graph.used_state() if const not in trained]
    return TrainManifest(
        version=version,
        fingerprint=weights_sha256(frozen),
        trainable_fingerprint=names_sha256(item.const for item in training.trainables),
        precision=grad.precision,
        features=tuple(port for port in grad.inputs if port.name not in own),
        labels=tuple(port for port in grad.inputs if port.name in training.labels),
        outputs=tuple(port for port in evaluation.outputs if port.name not in (LOSS, COUNT)),
        kept=tuple(port for port in grad.outputs if port.name not in (LOSS, COUNT, GRADIENT)),
        ranges=training.gradient.ranges,
        loss=_trained(training.loss),
        optimizer={"name": optimizer_name(training.optimizer), **asdict(training.optimizer)},
        states=training.optimizer.STATES,
        length=sum(parameter.size for parameter in parameters),
        parameters=parameters,
        segments=_segments(parameters),
        adapters=[dict(adapter) for adapter in training.adapters],
        supernet=training.space,
        initial=TRAINABLE,
        files=files,
    )
