"""A folder with training graphs opened again: its graph (graph.ir), weights, spec and report as a Job, and trained values from files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from safetensors.torch import load_file

from matmorph.errors import InputError
from matmorph.exporters.adapters import base_fingerprint
from matmorph.exporters.peft import CONFIG, read_peft
from matmorph.folders.beside import stored_companions
from matmorph.folders.job import Job
from matmorph.ir.adapter import Adapter, read_adapters
from matmorph.ir.core import Const, Graph
from matmorph.ir.text.reading import read_graph
from matmorph.passes.methods import all_methods, method_table
from matmorph.report.reading import read_report
from matmorph.runtime.adapters import read_adapter
from matmorph.runtime.check import read_cases
from matmorph.runtime.checkpoint import read_tensors
from matmorph.runtime.errors import AdapterError, InputMismatch, SessionError
from matmorph.runtime.format.adapters import ADAPTER_SUFFIX, Slots
from matmorph.runtime.format.artifact import CHECK_VECTORS, DATA, GRAPH, MODEL, REPORT, SPEC, Manifest
from matmorph.runtime.format.folder import StoredFolder
from matmorph.runtime.format.reading import StoredError, read_text, reading
from matmorph.runtime.format.training import TRAIN_MANIFEST, TrainManifest
from matmorph.runtime.manifest import open_folder
from matmorph.runtime.train_manifest import open_training, read_train_manifest
from matmorph.runtime.train_values import belonging
from matmorph.specs.load import load_spec
from matmorph.specs.tree import read

_CLASS = re.compile(r'^(?:result|call) .*"[\w.]+\.\w+" ', re.MULTILINE)
"""A pytree of some package's class: what it is called with does not matter to weights, and its package may not be here
(decision A10)."""


def reopen(folder: Path, verify: bool = True) -> tuple[Job, tuple[Adapter, ...]]:
    """The compiled model of a folder, with its values as training started, and its table of adapters. Weights are mapped, not read.

    verify: every file that is read must be what the manifest lists. InputError for a folder without training graphs, and for one that is
    damaged.
    """
    with _stored_errors():
        train, _ = open_training(folder, verify)
        manifest, stored = open_folder(folder, verify)
        graph_file, report_file, spec_file = (stored.checked(name) for name in (GRAPH, REPORT, SPEC))
        stored.checked(CHECK_VECTORS)
        beside = stored_companions(stored)
    plain = read_graph(graph_file, _no_class)
    weights = _Weights({const.path: const for const in plain.state}, stored, train.initial)
    graph = read_graph(graph_file, _no_class, weights)
    missing = [const.path for const in graph.used_state() if const.path not in weights]
    if missing:
        raise InputError(f"{folder}: no file in it holds the weight {missing[0]} of {GRAPH}")
    spec = load_spec(_alone(spec_file), method_table())
    source = None if manifest.source is None else manifest.source.weights_sha256
    adapters = _fitting(read_adapters(train.adapters, str(folder / TRAIN_MANIFEST)), graph, folder / TRAIN_MANIFEST)
    examples = _examples(folder, manifest, graph)
    length = None if manifest.cache is None else manifest.cache.max_length
    report = read_report(report_file)
    job = Job(spec, graph, graph, report, examples, {}, {}, source_sha256=source, adapters=adapters, max_length=length, source_files=beside)
    return job, adapters


def stored_graph(folder: Path, name: str, verify: bool = True) -> Graph:
    """A graph of the folder as its text says it, without weights. InputError where it is damaged."""
    with _stored_errors():
        path = open_folder(folder, verify)[1].checked(name)
    return read_graph(path, _no_class)


def _alone(path: Path) -> Path:
    """The stored spec, which is resolved: one that extends another would be read outside the folder. InputError."""
    with _stored_errors():
        text = read_text(path)
    if "extends" in read(text, str(path)).items:
        raise InputError(f"{path}: extends: the spec of a folder stands alone, and nothing outside the folder is read")
    return path


def _no_class(line: str) -> bool:
    return _CLASS.match(line) is None


@contextmanager
def _stored_errors() -> Iterator[None]:
    """Errors of the runtime and of its readers as those of the compiler."""
    try:
        yield
    except (SessionError, StoredError) as error:
        raise InputError(str(error)) from error


def _fitting(adapters: tuple[Adapter, ...], graph: Graph, path: Path) -> tuple[Adapter, ...]:
    """The adapters, whose weights and methods exist. InputError."""
    state, methods = {const.path for const in graph.state}, all_methods()
    for adapter in adapters:
        missing = [name for name in (*adapter.consts.values(), *adapter.base_consts.values()) if name not in state]
        if missing or adapter.method not in methods:
            lacking = f"weight {missing[0]!r:.80}" if missing else f"method {adapter.method!r:.80}"
            raise InputError(f"{path}: the adapter at {adapter.site:.80} has no {lacking} here")
    return adapters


class _Weights(Mapping[str, torch.Tensor]):
    """Tensors by dotted name, in the type of the graph, mapped from the folder's data file. Where training starts comes first."""

    def __init__(self, consts: Mapping[str, Const], stored: StoredFolder, initial: str) -> None:
        self._consts = consts
        with _stored_errors():
            self._first = _safetensors(stored.checked(initial))
        self._rest: dict[str, onnx.TensorProto] = {}
        for name in sorted(name for name in stored.files if name.endswith(".onnx")):
            for tensor in _initializers(stored, name):
                if tensor.name in consts and list(tensor.dims) == [int(d) for d in consts[tensor.name].tensor.shape]:
                    self._rest.setdefault(tensor.name, tensor)
        self._data = stored.path / DATA
        if any(tensor.external_data for tensor in self._rest.values()):
            with _stored_errors():
                stored.checked(DATA)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._first and not self._consts[name].numel:  # nothing is stored of it
            return torch.empty([int(dim) for dim in self._consts[name].tensor.shape], dtype=self._consts[name].tensor.torch_dtype)
        found = self._first[name] if name in self._first else _mapped(self._rest[name], self._data)
        return found.to(self._consts[name].tensor.torch_dtype)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._rest, **self._first})

    def __len__(self) -> int:
        return len({**self._rest, **self._first})


def initializers(folder: Path, verify: bool = True) -> dict[str, torch.Tensor]:
    """The weights of `folder/model.onnx` by name. InputError where there is no such file, and as `reopen`."""
    if not (folder / MODEL).is_file():
        raise InputError(f"{folder / MODEL}: missing, so {folder} is no artefact folder")
    with _stored_errors():
        _, stored = open_folder(folder, verify)
        tensors = _initializers(stored, MODEL)
        if any(tensor.external_data for tensor in tensors):
            stored.checked(DATA)
    return {tensor.name: _mapped(tensor, folder / DATA) for tensor in tensors}


def _initializers(stored: StoredFolder, name: str) -> list[onnx.TensorProto]:
    with _stored_errors():
        path = stored.checked(name)
        with reading(path):
            return list(onnx.load(path, load_external_data=False).graph.initializer)


def _mapped(tensor: onnx.TensorProto, data: Path) -> torch.Tensor:
    """One initializer as a torch tensor on the mapped bytes of the data file; bfloat16, which numpy does not have, through its bits.
    InputError for a place that is not in the file."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    with _stored_errors(), reading(data):
        if not place:
            return torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor)))
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            return torch.from_numpy(_bytes(data, place, np.dtype(np.int16), tensor)).view(torch.bfloat16)
        return torch.from_numpy(_bytes(data, place, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), tensor))


def _bytes(data: Path, place: Mapping[str, str], dtype: np.dtype[Any], tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
    where = f"{tensor.name!r:.80}: "
    if place.get("location") != data.name:
        raise StoredError(
            f"{data.with_name(MODEL)}: {where}lies in {place.get('location')!r:.80}, which is not read; weights lie in {DATA}"
        )
    if dtype.hasobject:  # of texts, which numpy would read as addresses
        raise StoredError(f"{data.with_name(MODEL)}: {where}is text, which no weight is")
    offset = place.get("offset", "0")
    size = prod(tensor.dims) * dtype.itemsize
    if not offset.isdecimal() or min(tensor.dims, default=1) < 0 or int(offset[:20]) + size > data.stat().st_size:
        raise StoredError(f"{data}: {where}{size} bytes at {offset:.20} are not in the file")
    return np.array(np.memmap(data, dtype, "r", int(offset), tuple(tensor.dims)))


def _examples(folder: Path, manifest: Manifest, graph: Graph) -> tuple[torch.Tensor, ...]:
    """The inputs of the first check case, in the graph's order and types."""
    path = folder / CHECK_VECTORS
    with _stored_errors(), reading(path):
        case = read_cases(folder, manifest)[0]
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
    if source.suffix == ADAPTER_SUFFIX:
        return _of_adapter(source, graph, adapters)
    with _stored_errors():
        return _of_tensors(source, read_train_manifest(folder))


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
        down, up = (arrays.pop(f"{stem}.{short}", None) for short in ("down", "up"))
        if down is None and up is None:
            continue
        if down is None or up is None:
            raise InputError(f"{source}: holds one factor for {adapter.site}, and not the other")
        if set(adapter.consts) != {"down", "up"}:
            raise InputError(f"{source}: holds two factors for {adapter.site}, where the model has a {adapter.method} adapter")
        found[adapter.consts["down"]] = down.astype(np.float64)
        found[adapter.consts["up"]] = up.astype(np.float64) / adapter.scale
    if arrays:
        raise InputError(f"{source}: holds {next(iter(arrays))!r:.80}, which is no factor of the model")
    return found


def _safetensors(path: Path) -> Mapping[str, Any]:
    try:
        tensors: Mapping[str, Any] = load_file(path)
    except Exception as error:  # of a header that is damaged, or a type that torch lacks
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error
    return tensors
