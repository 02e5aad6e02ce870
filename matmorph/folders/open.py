"""A folder with training graphs opened again: its graph (graph.ir), weights, spec and report as a Job, and trained values from files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from matmorph.errors import InputError
from matmorph.exporters.adapters import base_fingerprint
from matmorph.exporters.peft import CONFIG, read_peft
from matmorph.folders.job import Job
from matmorph.ir.adapter import Adapter, read_adapters
from matmorph.ir.core import Const, Graph
from matmorph.ir.text.printing import parse_graph
from matmorph.passes.methods import all_methods, method_table
from matmorph.report.reading import read_report
from matmorph.runtime.adapters import read_adapter
from matmorph.runtime.check import read_cases
from matmorph.runtime.checkpoint import read_tensors
from matmorph.runtime.errors import AdapterError, InputMismatch, SessionError
from matmorph.runtime.format.adapters import ADAPTER_SUFFIX, Slots
from matmorph.runtime.format.artifact import DATA, GRAPH, MODEL, REPORT, SPEC, Manifest
from matmorph.runtime.format.training import TRAIN_MANIFEST, TrainManifest
from matmorph.runtime.manifest import read_manifest
from matmorph.runtime.train_manifest import read_train_manifest
from matmorph.runtime.train_values import belonging
from matmorph.specs.load import load_spec

_CLASS = re.compile(r'^(?:result|call) .*"[\w.]+\.\w+" ', re.MULTILINE)
"""A pytree of some package's class: what it is called with does not matter to weights, and its package may not be here
(decision A10)."""


def reopen(folder: Path) -> tuple[Job, tuple[Adapter, ...]]:
    """The compiled model of a folder, with its values as training started, and its table of adapters. Weights are mapped, not read.

    InputError for a folder without training graphs, and for one that is damaged.
    """
    train = _train_manifest(folder)
    text = _text(folder / GRAPH)
    lines = [line for line in text.splitlines(keepends=True) if not _CLASS.match(line)]
    plain = parse_graph("".join(lines))
    weights = _Weights({const.path: const for const in plain.state}, folder, train.initial)
    graph = parse_graph("".join(lines), weights)
    missing = [const.path for const in graph.used_state() if const.path not in weights]
    if missing:
        raise InputError(f"{folder}: no file in it holds the weight {missing[0]} of {GRAPH}")
    spec = load_spec(folder / SPEC, method_table())
    report, manifest = read_report(folder / REPORT), _manifest(folder)
    source = None if manifest.source is None else manifest.source.weights_sha256
    adapters = read_adapters(train.adapters, str(folder / TRAIN_MANIFEST))
    job = Job(spec, graph, graph, report, _examples(folder, manifest, graph), {}, {}, source_sha256=source, adapters=adapters)
    return job, adapters


def _train_manifest(folder: Path) -> TrainManifest:
    try:
        return read_train_manifest(folder)
    except SessionError as error:
        raise InputError(str(error)) from error


def _manifest(folder: Path) -> Manifest:
    try:
        return read_manifest(folder)
    except SessionError as error:
        raise InputError(str(error)) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


class _Weights(Mapping[str, torch.Tensor]):
    """Tensors by dotted name, in the type of the graph, mapped from the folder's data file. Where training starts comes first."""

    def __init__(self, consts: Mapping[str, Const], folder: Path, initial: str) -> None:
        self._consts = consts
        self._first = _safetensors(folder / initial)
        self._rest: dict[str, onnx.TensorProto] = {}
        for path in sorted(folder.glob("*.onnx")):
            for tensor in onnx.load(path, load_external_data=False).graph.initializer:
                if tensor.name in consts and list(tensor.dims) == [int(d) for d in consts[tensor.name].tensor.shape]:
                    self._rest.setdefault(tensor.name, tensor)
        self._data = folder / DATA

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._first[name] if name in self._first else _mapped(self._rest[name], self._data)
        return found.to(self._consts[name].tensor.torch_dtype)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._rest, **self._first})

    def __len__(self) -> int:
        return len({**self._rest, **self._first})


def initializers(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of `folder/model.onnx` by name. InputError where there is no such file."""
    path = folder / MODEL
    if not path.is_file():
        raise InputError(f"{path}: missing, so {folder} is no artefact folder")
    return {tensor.name: _mapped(tensor, folder / DATA) for tensor in onnx.load(path, load_external_data=False).graph.initializer}


def _mapped(tensor: onnx.TensorProto, data: Path) -> torch.Tensor:
    """One initializer as a torch tensor on the mapped bytes of the data file; bfloat16, which numpy does not have, through its bits."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    if tensor.data_type == onnx.TensorProto.BFLOAT16 and place:
        return torch.from_numpy(np.array(_bytes(data, place, np.int16, tensor))).view(torch.bfloat16)
    if not place:
        return torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor)))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return torch.from_numpy(np.array(_bytes(data, place, dtype, tensor)))


def _bytes(data: Path, place: Mapping[str, str], dtype: Any, tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
    return np.memmap(data, dtype, "r", int(place.get("offset", 0)), tuple(tensor.dims))


def _examples(folder: Path, manifest: Manifest, graph: Graph) -> tuple[torch.Tensor, ...]:
    """The inputs of the first check case, in the graph's order and types."""
    try:
        case = read_cases(folder, manifest)[0]
    except SessionError as error:
        raise InputError(str(error)) from error
    entries = [entry for entry in graph.signature.inputs if entry.value is not None]
    return tuple(torch.from_numpy(case.inputs[entry.name]).to(value.tensor.torch_dtype) for entry in entries if (value := entry.value))


# values


def read_trained(folder: Path, graph: Graph, adapters: Sequence[Adapter], source: Path | None, prefix: str = "") -> Mapping[str, Any]:
    """Trained values by dotted name: what `matmorph train` or `Trainer.save_parameters` wrote, a checkpoint, an `.onnx_adapter` file or a
    PEFT folder; None: as training started. InputError for a file of another base, and for what cannot be read."""
    if source is None:
        return {}
    if source.is_dir():
        if not (source / CONFIG).is_file():
            raise InputError(f"{source}: a folder without {CONFIG}: trained values are a file, or a PEFT folder")
        return read_peft(source, adapters, all_methods(), prefix=prefix)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    return _of_adapter(source, graph, adapters) if source.suffix == ADAPTER_SUFFIX else _of_tensors(source, _train_manifest(folder))


def _of_tensors(source: Path, train: TrainManifest) -> Mapping[str, Any]:
    try:
        tensors, about = read_tensors(source)
    except SessionError:
        return _safetensors(source)  # of another program: names and shapes are checked when the values are put in
    try:
        return belonging(train, source, tensors, about)
    except InputMismatch as error:
        raise InputError(str(error)) from error


def _of_adapter(source: Path, graph: Graph, adapters: Sequence[Adapter]) -> Mapping[str, Any]:
    try:
        arrays, version = read_adapter(source)
    except AdapterError as error:
        raise InputError(str(error)) from error
    if version != Slots(base_fingerprint(graph, adapters), ()).model_version:
        raise InputError(f"{source}: made for another base")
    found: dict[str, Any] = {}
    for adapter in adapters:
        stem = next(iter(adapter.consts.values())).rpartition(".")[0]
        if f"{stem}.up" not in arrays:
            continue
        if set(adapter.consts) != {"down", "up"}:
            raise InputError(f"{source}: holds two factors for {adapter.site}, where the model has a {adapter.method} adapter")
        found[adapter.consts["down"]] = arrays[f"{stem}.down"].astype(np.float64)
        found[adapter.consts["up"]] = arrays[f"{stem}.up"].astype(np.float64) / adapter.scale
    return found


def _safetensors(path: Path) -> Mapping[str, Any]:
    try:
        tensors: Mapping[str, Any] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error
    return tensors
