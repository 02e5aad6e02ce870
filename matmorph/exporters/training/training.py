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

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from matmorph.errors import VerifyError
from matmorph.exporters.artifact import graph_bytes, json_bytes
from matmorph.exporters.data_file import DATA, DataFile, FileInfo
from matmorph.exporters.fingerprint import names_sha256, weights_sha256
from matmorph.exporters.onnx.lowering import Lowerings
from matmorph.exporters.onnx.onnx_model import OnnxInfo, Port, write_model
from matmorph.exporters.onnx.precision import computed_in
from matmorph.exporters.training.optimizers import STATES, Kept, optimizer_model
from matmorph.exporters.training.training_vectors import TrainingVectors, vectors_bytes
from matmorph.ir.core import Const, Graph
from matmorph.ir.training.losses import Loss
from matmorph.passes.adapters.table import GATES
from matmorph.passes.adapters.trainables import Trainable
from matmorph.passes.methods.glora import COLUMNS, WORDS
from matmorph.specs.optimizers import AnyOptimizer, optimizer_name

if TYPE_CHECKING:
    from matmorph.specs.schema import Export

FORMAT = 1
"""Of train.json; `matmorph.runtime` reads this one."""

GRAD, EVAL, APPLY = "grad.onnx", "eval.onnx", "apply.onnx"
TRAINABLE, TRAIN, GRAPH, CHECK = "trainable.safetensors", "train.json", "graph.ir", "train_check.npz"
THETA, LOSS_SCALE, LOSS, COUNT, GRADIENT = "theta", "loss_scale", "loss", "count", "grad"


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """Everything the training files are made of.

    `graph`: the compiled model; `gradient` and `evaluation`: its gradient and loss graph (see `ir.gradient`). `trainables`: in the order of
    theta. `labels`: names of the label inputs. `vectors`: what torch answers. `adapters`: what each inserted adapter is made of, for
    whoever merges or exchanges it. `supernet`: the sites of a search, in the order of the rows of the input `gates`.
    `kept`: by dotted name, how many entries of a parameter take part in an update; what is not named takes part whole.
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
    supernet: tuple[str, ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of theta with one learning rate and decay."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """Where a trainable lies in theta. `keep`: how many of its entries take part in an update, None = all."""

    const: Const
    offset: int
    segment: str
    keep: int | None = None

    @property
    def shape(self) -> list[int]:
        return [int(dim) for dim in self.const.tensor.shape]


@dataclass(frozen=True, slots=True)
class _Layout:
    """theta, parameter by parameter."""

    parameters: tuple[Parameter, ...]
    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        return sum(parameter.const.numel for parameter in self.parameters)

    @property
    def pieces(self) -> list[Kept]:
        """Of which only some entries take part in an update."""
        return [Kept(one.offset, one.const.numel, one.keep) for one in self.parameters if one.keep is not None]


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
) -> dict[str, FileInfo]:
    """Writes the files into a folder whose data file is open, and is the last to write to it; their hashes, the data file's among them.

    Frozen weights that `model.onnx` has too are found in the data file, not written again. Activations are never rounded to 8 bits here:
    no gradient flows through the rounding. Raises what `write_model` raises.
    """
    export = replace(export, activations="fp32")
    layout = _laid_out(training.trainables, training.kept)
    grad = write_model(training.gradient, folder / GRAD, data, export, onnx_lowerings)
    evaluation = write_model(training.evaluation, folder / EVAL, data, export, onnx_lowerings)
    apply = optimizer_model(training.optimizer, [segment.length for segment in layout.segments], layout.pieces)
    dtypes = {port.name: port.dtype for port in grad.inputs}
    precision = computed_in(export.precision, [const.tensor.dtype for const in training.graph.used_state()])
    files = {**grad.files, **evaluation.files, DATA: data.info()}
    files |= _written(
        folder,
        {
            APPLY: apply.SerializeToString(deterministic=True),
            TRAINABLE: _tensors(training.trainables),
            GRAPH: graph_bytes(training.graph),
            CHECK: vectors_bytes(training.vectors, precision, dtypes),
        },
    )
    described = _described(training, layout, grad, evaluation, files, version)
    return {**files, **_written(folder, {TRAIN: json_bytes(described)})}


def _laid_out(trainables: Sequence[Trainable], kept: Mapping[str, int]) -> _Layout:
    parameters, offset = [], 0
    for item in trainables:
        parameters.append(Parameter(item.const, offset, item.segment, kept.get(item.const.path)))
        offset += item.const.numel
    segments = []
    for name, members in groupby(parameters, key=lambda parameter: parameter.segment):
        run = list(members)
        segments.append(Segment(name, run[0].offset, sum(parameter.const.numel for parameter in run)))
    if len({segment.name for segment in segments}) < len(segments):
        raise VerifyError("the trainables of a segment are not together")
    return _Layout(tuple(parameters), tuple(segments))


def _tensors(trainables: Sequence[Trainable]) -> bytes:
    """safetensors of the trainables, float32. The format orders tensors itself, so equal values give equal bytes."""
    return safetensors.torch.save({item.const.path: item.const.load().detach().cpu().float().contiguous() for item in trainables})


def _written(folder: Path, files: Mapping[str, bytes]) -> dict[str, FileInfo]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: FileInfo(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}


def _described(
    training: Training, layout: _Layout, grad: OnnxInfo, evaluation: OnnxInfo, files: Mapping[str, FileInfo], version: str
) -> dict[str, Any]:
    """train.json as plain data."""
    own = {THETA, LOSS_SCALE, *((GATES,) if training.supernet else ()), *training.labels}
    trained = {item.const for item in training.trainables}
    frozen = [const for const in training.graph.used_state() if const not in trained]
    name = optimizer_name(training.optimizer)
    return {
        "format": FORMAT,
        "matmorph": version,
        "fingerprint": weights_sha256(frozen),
        "trainable_fingerprint": names_sha256(item.const for item in training.trainables),
        "precision": grad.precision,
        "inputs": _ports(port for port in grad.inputs if port.name not in own),
        "labels": _ports(port for port in grad.inputs if port.name in training.labels),
        "outputs": _ports(port for port in evaluation.outputs if port.name not in (LOSS, COUNT)),
        "kept_outputs": _ports(port for port in grad.outputs if port.name not in (LOSS, COUNT, GRADIENT)),
        "ranges": {symbol: [limits.low, limits.high] for symbol, limits in training.gradient.ranges.items()},
        "loss": {"name": training.loss.name, "output": training.loss.output, "ignore_index": training.loss.ignore_index},
        "optimizer": {"name": name, **asdict(training.optimizer)},
        "states": list(STATES[name]),
        "length": layout.length,
        "parameters": [
            {"name": one.const.path, "shape": one.shape, "offset": one.offset, "segment": one.segment}
            | ({} if one.keep is None else {"keep": one.keep})
            for one in layout.parameters
        ],
        "segments": [asdict(segment) for segment in layout.segments],
        "adapters": [dict(adapter) for adapter in training.adapters],
        **({"supernet": _supernet(training)} if training.supernet else {}),
        "initial": TRAINABLE,
        "files": {name: files[name].to_dict() for name in sorted(files)},
    }


def _supernet(training: Training) -> dict[str, Any]:
    """What a Trainer needs to choose: the columns of a gate row, and by site and tensor its words and parameters."""
    adapters = {adapter["site"]: adapter for adapter in training.adapters if adapter.get("words")}
    sites = []
    for site in training.supernet:
        consts, words = adapters[site]["consts"], adapters[site]["words"]
        tensors = {
            tensor: {
                "words": list(words[tensor]),
                "up": consts.get(f"{tensor}_up", consts.get(tensor)),
                "down": consts.get(f"{tensor}_down"),
            }
            for tensor in WORDS
        }
        sites.append({"site": site, "tensors": tensors})
    return {"columns": [list(pair) for pair in COLUMNS], "sites": sites}


def _ports(ports: Any) -> list[dict[str, Any]]:
    found: list[Port] = list(ports)
    return [port.to_dict() for port in found]
