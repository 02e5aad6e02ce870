"""`train.json`, typed: what the training graphs take and give, how the trainable vector is laid out, and what it was made from."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matmorph.runtime.errors import ArtifactError
from matmorph.runtime.manifest import (
    FileRecord,
    ManifestError,
    Range,
    TensorInfo,
    entry,
    file_record,
    items,
    read_json,
    size_range,
    tensor_info,
    typed,
)
from matmorph.runtime.supernet import GATES, Supernet, read_supernet

FORMAT = 1
TRAIN_MANIFEST, GRAD, APPLY, EVAL = "train.json", "grad.onnx", "apply.onnx", "eval.onnx"
PRECISIONS = ("fp32", "fp16", "bf16", "keep")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One trainable tensor: `offset` of its first scalar in the flat vector, row-major from there; `name` as in the compiled module;
    `keep`: how many of its entries an update changes, None = all."""

    name: str
    shape: tuple[int, ...]
    offset: int
    segment: str
    keep: int | None = None

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
class TrainManifest:
    """`length`: trainable scalars. `states`: vectors that the optimizer keeps. `precision`: of the graph's products; state is float32.

    `fingerprint` is of the frozen weights, `trainable_fingerprint` of the trainable names and shapes. `supernet`: what is searched, None
    where nothing is.
    """

    version: str
    fingerprint: str
    trainable_fingerprint: str
    features: tuple[TensorInfo, ...]
    labels: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ranges: Mapping[str, Range]
    loss: str
    optimizer: Mapping[str, Any]
    states: tuple[str, ...]
    length: int
    parameters: tuple[Parameter, ...]
    segments: tuple[Segment, ...]
    files: Mapping[str, FileRecord]
    initial: str
    precision: str = "fp32"
    supernet: Supernet | None = None

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


def read_train_manifest(folder: str | os.PathLike[str]) -> TrainManifest:
    """Reads `folder/train.json`. Raises ArtifactError with the file's path and what is wrong in it."""
    path = Path(folder)
    if not path.is_dir():
        raise ArtifactError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    if not (path / TRAIN_MANIFEST).is_file():
        raise ArtifactError(
            f"{path}: holds no training graphs ({TRAIN_MANIFEST} is missing); export_training or `compile --train` writes them"
        )
    return read_json(path / TRAIN_MANIFEST, _manifest)


def _manifest(data: Any) -> TrainManifest:
    top = typed(data, dict, "train")
    if top.get("format") != FORMAT:
        raise ManifestError(f"format: this matmorph reads format {FORMAT}, the file has {top.get('format')!r}")
    length = entry(top, "length", int)
    parameters = items(top, "parameters", _parameter)
    segments = items(top, "segments", _segment)
    _check_layout("parameters", [(one.name, one.offset, one.size) for one in parameters], length)
    _check_layout("segments", [(one.name, one.offset, one.length) for one in segments], length)
    optimizer = entry(top, "optimizer", dict)
    for key in ("lr", "weight_decay"):
        entry(optimizer, key, (int, float), "optimizer.")
    return TrainManifest(
        version=entry(top, "matmorph", str),
        fingerprint=entry(top, "fingerprint", str),
        trainable_fingerprint=entry(top, "trainable_fingerprint", str),
        features=items(top, "inputs", tensor_info),
        labels=items(top, "labels", tensor_info),
        outputs=items(top, "outputs", tensor_info),
        ranges={name: size_range(value, f"ranges.{name}") for name, value in entry(top, "ranges", dict).items()},
        loss=entry(entry(top, "loss", dict), "name", str, "loss."),
        optimizer=optimizer,
        states=items(top, "states", lambda value, where: str(typed(value, str, where))),
        length=length,
        parameters=parameters,
        segments=segments,
        files={name: file_record(name, value) for name, value in entry(top, "files", dict).items()},
        initial=entry(top, "initial", str),
        precision=_precision(top.get("precision", "fp32")),
        supernet=read_supernet(top.get("supernet"), {one.name: (one.offset, one.shape) for one in parameters}),
    )


def _precision(value: Any) -> str:
    if value not in PRECISIONS:
        raise ManifestError(f"precision: unexpected value {value!r:.80}; known are {', '.join(PRECISIONS)}")
    return str(value)


def _parameter(data: Any, where: str) -> Parameter:
    table = typed(data, dict, where)
    shape = tuple(typed(size, int, f"{where}.shape") for size in entry(table, "shape", list, f"{where}."))
    name, segment = (entry(table, key, str, f"{where}.") for key in ("name", "segment"))
    keep = entry(table, "keep", int, f"{where}.") if "keep" in table else None
    return Parameter(name, shape, entry(table, "offset", int, f"{where}."), segment, keep)


def _segment(data: Any, where: str) -> Segment:
    table = typed(data, dict, where)
    offset, length = (entry(table, key, int, f"{where}.") for key in ("offset", "length"))
    return Segment(entry(table, "name", str, f"{where}."), offset, length)


def _check_layout(what: str, pieces: list[tuple[str, int, int]], length: int) -> None:
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
