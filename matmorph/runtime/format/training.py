"""A training folder: the names of its files and of its graphs' tensors, and train.json, which says what the graphs take and give, how the
trainable vector is laid out, and what it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matmorph.runtime.format.artifact import FILES_CODEC, RANGES_CODEC, FileRecord, Range, TensorInfo, of_format
from matmorph.runtime.format.distillation import Distill
from matmorph.runtime.format.plain import Codec, ManifestError, from_plain, many, stored, to_plain, typed
from matmorph.runtime.format.reading import check_name

TRAIN_FORMAT = 2
"""Version of train.json, and of the table of adapters and the graph that it goes with."""

TRAIN_MANIFEST = "train.json"
GRAD_MODEL, EVAL_MODEL, APPLY_MODEL = "grad.onnx", "eval.onnx", "apply.onnx"
TRAINABLE, PARAMETERS = "trainable.safetensors", "parameters.safetensors"
"""Where training starts, by dotted name; and values of a trained model in a folder of their own."""
TRAIN_CHECK_VECTORS = "train_check.npz"

THETA, LOSS_SCALE, GATES = "theta", "loss_scale", "gates"
"""Inputs of grad.onnx and eval.onnx beside a batch: all trainable parameters as one float32 vector, what the loss is multiplied by before
the gradient is taken, and of a supernet which tensors count."""
LOSS, COUNT, GRADIENT = "loss", "count", "grad"
"""Their outputs: the loss, what it counts (the weight of its mean), the gradient of theta."""

PRECISIONS = ("fp32", "fp16", "bf16", "keep")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One trainable tensor: `offset` of its first scalar in the flat vector, row-major from there; `name` as in the compiled module;
    `keep`: how many of its entries an update changes, None = all."""

    name: str
    shape: tuple[int, ...]
    offset: int
    segment: str
    keep: int | None = field(default=None, metadata=stored(omitted=True))

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous piece of the flat vector with a learning rate and decay of its own."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TrainedLoss:
    """What is minimised: `name` of the loss, the model output that it reads (None: a function of all), the label that it leaves out;
    `distill`: settings of that loss, None = another one."""

    name: str
    output: str | None = None
    ignore_index: int = -100
    distill: Distill | None = field(default=None, metadata=stored(omitted=True))


@dataclass(frozen=True, slots=True)
class SearchTensor:
    """What a tensor of a supernet's site may be, and the names of its parameters, None where it has none."""

    words: tuple[str, ...]
    up: str | None = None
    down: str | None = None


@dataclass(frozen=True, slots=True)
class SearchedSite:
    """A layer of a supernet."""

    site: str
    tensors: Mapping[str, SearchTensor]


def _column(data: Any, where: str) -> tuple[str, str]:
    pair = typed(data, list, where)
    if len(pair) != 2:
        raise ManifestError(f"{where}: expected a tensor and a word")
    return str(pair[0]), str(pair[1])


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """The supernet that is trained. `columns`: (tensor, word) of each column of a row of gates; `sites`: in the order of the rows."""

    columns: tuple[tuple[str, str], ...] = field(metadata=stored(codec=many(Codec(_column, list))))
    sites: tuple[SearchedSite, ...]


def _precision(data: Any, where: str) -> str:
    if data not in PRECISIONS:
        raise ManifestError(f"{where}: unexpected value {data!r:.80}; known are {', '.join(PRECISIONS)}")
    return str(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainManifest:
    """`length`: trainable scalars. `states`: vectors that the optimizer keeps. `precision`: of the graph's products; state is float32.

    `fingerprint` is of the frozen weights, `trainable_fingerprint` of the trainable names and shapes. `features`: the model's inputs;
    `kept`: outputs that grad.onnx gives too. `optimizer`: its settings, lr and weight_decay among them. `adapters`: what each inserted
    adapter is made of, as plain data. `initial`: the file where training starts. `supernet`: what is searched, None where nothing is.
    What has a default may lack in a file.
    """

    version: str = field(metadata=stored(key="matmorph"))
    fingerprint: str
    trainable_fingerprint: str
    precision: str = field(default="fp32", metadata=stored(codec=Codec(_precision)))
    features: tuple[TensorInfo, ...] = field(metadata=stored(key="inputs"))
    labels: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    kept: tuple[TensorInfo, ...] = field(default=(), metadata=stored(key="kept_outputs"))
    ranges: Mapping[str, Range] = field(metadata=stored(codec=RANGES_CODEC))
    loss: TrainedLoss
    optimizer: Mapping[str, Any]
    states: tuple[str, ...]
    length: int
    parameters: tuple[Parameter, ...]
    segments: tuple[Segment, ...]
    adapters: Any = ()
    supernet: SearchSpace | None = field(default=None, metadata=stored(omitted=True))
    initial: str = field(metadata=stored(codec=Codec(lambda data, where: check_name(data, f"{where}: {data!r:.80}"))))
    files: Mapping[str, FileRecord] = field(metadata=stored(codec=FILES_CODEC))

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a file of trained values says of what they belong to."""
        return {"fingerprint": self.fingerprint, "trainable_fingerprint": self.trainable_fingerprint}

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """What a batch holds: the model's inputs, then the labels."""
        return (*self.features, *(info for info in self.labels if info not in self.features))

    @property
    def update_rule(self) -> dict[str, Any]:
        """What apply.onnx computes: the optimizer's settings, and how many entries of a tensor change where not all do."""
        return {**self.optimizer, **{f"kept entries of {one.name}": one.keep for one in self.parameters if one.keep is not None}}

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """Inputs of grad.onnx and eval.onnx but for theta and the loss scale."""
        return (*(info.name for info in self.inputs), *(() if self.supernet is None else (GATES,)))

    def to_dict(self) -> dict[str, Any]:
        """train.json as plain data."""
        return {"format": TRAIN_FORMAT, **to_plain(self)}

    @classmethod
    def from_dict(cls, data: Any) -> TrainManifest:
        """Raises ManifestError for another format, for data that is no such file, and for parts that do not fit each other."""
        found = from_plain(cls, of_format(data, TRAIN_FORMAT, "train"))
        _check_layout("parameters", [(one.name, one.offset, one.size) for one in found.parameters], found.length)
        _check_layout("segments", [(one.name, one.offset, one.length) for one in found.segments], found.length)
        for key in ("lr", "weight_decay"):
            if key not in found.optimizer:
                raise ManifestError(f"optimizer.{key}: missing")
            typed(found.optimizer[key], (int, float), f"optimizer.{key}")
        if found.supernet is not None:
            _check_space(found.supernet, {one.name for one in found.parameters})
        return found


def _check_layout(what: str, pieces: Sequence[tuple[str, int, int]], length: int) -> None:
    """One after the other, without a gap, to the end."""
    end = 0
    for name, offset, size in pieces:
        if offset != end or size < 1:
            raise ManifestError(f"{what}: {name} lies at {offset} with {size} scalars, the one before ends at {end}")
        end += size
    if end != length or not pieces:
        raise ManifestError(f"{what}: they end at {end}, length is {length}")
    names = [name for name, _, _ in pieces]
    if len(set(names)) != len(names):
        raise ManifestError(f"{what}: a name stands there twice")


def _check_space(space: SearchSpace, parameters: set[str]) -> None:
    """Each tensor's parameters are there, and there is a column for each of its words."""
    for index, one in enumerate(space.sites):
        for name in (name for tensor in one.tensors.values() for name in (tensor.up, tensor.down) if name is not None):
            if name not in parameters:
                raise ManifestError(f"supernet.sites[{index}]: no parameter is called {name!r}")
    known = set(space.columns)
    for one in space.sites:
        missing = [(name, word) for name, tensor in one.tensors.items() for word in tensor.words if (name, word) not in known]
        if missing:
            raise ManifestError(f"supernet: {one.site} may be {missing[0]}, for which there is no column")
