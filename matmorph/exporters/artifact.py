"""What an artefact folder holds, written whole or not at all (`exporters.staging`)."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matmorph.errors import VerifyError
from matmorph.exporters.data_file import DataFile, WeightProgress, data_file
from matmorph.exporters.onnx.lowering import Lowerings
from matmorph.exporters.onnx.onnx_model import OnnxInfo, write_model
from matmorph.exporters.staging import staged_folder
from matmorph.ir.core import Graph
from matmorph.ir.crossing import Halves
from matmorph.ir.text.printing import print_graph
from matmorph.runtime.disk.files import write_whole
from matmorph.runtime.format.artifact import (
    CHECK_VECTORS,
    DATA,
    DECODER,
    ENCODER,
    MANIFEST,
    MODEL,
    PAGE,
    REPORT,
    RUN,
    SPEC,
    FileRecord,
    Handed,
    Manifest,
    ModelPart,
    ModelParts,
    Source,
    TensorInfo,
    file_record,
    with_file,
)
from matmorph.runtime.format.cache import CacheInfo
from matmorph.runtime.format.cases import Case, case_arrays
from matmorph.runtime.format.reading import StoredError, read_json

if TYPE_CHECKING:
    from matmorph.specs.schema import Export


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """`report`: the data of report.json; `html`: the text of report.html; `tolerance`: what the outputs were held to, None = that of
    the precision."""

    report: Mapping[str, Any]
    html: str
    tolerance: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """All that goes into a folder. `version`: matmorph's; `source_sha256`: of the source model's weights; `cases`: inputs and what torch
    answers; `describe`: asked for the report once model, spec, check vectors and a manifest of these stand in the folder, so that it can
    run them, and what it raises leaves nothing behind; `more`: further files by name; `companions`: writes further graphs on the open data
    file, and gives the hashes of all it wrote; `run`: timings and machine, not hashed; `notes`: plain lines for the manifest; `join`:
    whether weights may be joined in the file, as nobody looks for them by name; `adapters`, `cache`: those that are inputs, for it too;
    `tolerance`: least one of the outputs, beside that of the precision; `halves`: the graph in two files more."""

    graph: Graph
    export: Export
    version: str
    source_sha256: str
    spec: str
    describe: Callable[[Path, OnnxInfo], WrittenReport]
    cases: Sequence[Case]
    companions: Callable[[Path, DataFile], Mapping[str, FileRecord]] | None = None
    more: Mapping[str, bytes] = field(default_factory=dict)
    run: Callable[[], Mapping[str, Any]] = dict
    notes: Sequence[str] = ()
    adapters: Mapping[str, Any] | None = None
    cache: CacheInfo | None = None
    onnx_lowerings: Lowerings | None = field(default=None)
    tolerance: float = 0.0
    join: bool = False
    halves: Halves | None = None


def write_artifact(
    folder: str | Path,
    artifact: Artifact,
    force: bool = False,
    progress: WeightProgress | None = None,
) -> OnnxInfo:
    """Writes the folder, whole or not at all.

    Raises InputError for a folder that exists or cannot be written (see `staged_folder`), and what `write_model` raises.
    """
    with staged_folder(folder, force) as staging:
        info, parts = _written_graphs(staging, artifact, progress)
        beside = {
            SPEC: artifact.spec.encode(),
            CHECK_VECTORS: npz_bytes(case_arrays([_typed(case, info) for case in artifact.cases])),
            **artifact.more,
        }
        files = {**info.files, **write_files(staging, beside)}
        (staging / MANIFEST).write_bytes(json_bytes(manifest(artifact, info, files, parts).to_dict()))
        described = artifact.describe(staging, info)
        info = info if described.tolerance is None else replace(info, tolerance=described.tolerance)
        files |= write_files(staging, {REPORT: json_bytes(described.report), PAGE: described.html.encode()})
        (staging / MANIFEST).write_bytes(json_bytes(manifest(artifact, info, files, parts).to_dict()))
        (staging / RUN).write_bytes(json_bytes(artifact.run()))
    return info


def _written_graphs(folder: Path, artifact: Artifact, progress: WeightProgress | None) -> tuple[OnnxInfo, ModelParts | None]:
    """model.onnx, its parts, what lies beside it, and the data file of them all."""
    with data_file(folder) as data:
        info = write_model(artifact.graph, folder / MODEL, data, artifact.export, artifact.onnx_lowerings, progress, artifact.join)
        parts, halves = (None, {}) if artifact.halves is None else _written_halves(folder, artifact, artifact.halves, data)
        beside = artifact.companions(folder, data) if artifact.companions is not None else {}
    files = {**info.files, **halves, **beside, DATA: data.info()}
    return replace(info, files=files, tolerance=max(info.tolerance, artifact.tolerance)), parts


def _written_halves(folder: Path, artifact: Artifact, halves: Halves, data: DataFile) -> tuple[ModelParts, Mapping[str, FileRecord]]:
    """Both on the weights that model.onnx has in the data file already."""
    encoder, decoder = (
        write_model(half, folder / name, data, artifact.export, artifact.onnx_lowerings, join=artifact.join)
        for name, half in ((ENCODER, halves.encoder), (DECODER, halves.decoder))
    )
    parts = ModelParts(
        ModelPart(ENCODER, encoder.inputs, encoder.outputs),
        ModelPart(DECODER, decoder.inputs, decoder.outputs),
        tuple(Handed(one.made, one.taken) for one in halves.crossings),
    )
    return parts, {**encoder.files, **decoder.files}


def write_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, FileRecord]:
    """Writes the files; their hashes and sizes."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: file_record(data) for name, data in files.items()}


def manifest(artifact: Artifact, info: OnnxInfo, files: Mapping[str, FileRecord], parts: ModelParts | None = None) -> Manifest:
    """What manifest.json says; `ranges`: what the model demands of each axis."""
    return Manifest(
        version=artifact.version,
        source=Source(artifact.source_sha256),
        inputs=info.inputs,
        outputs=info.outputs,
        ranges=artifact.graph.ranges,
        precision=info.precision,
        tolerance=info.tolerance,
        opset=info.opset,
        target=tuple(artifact.export.target),
        notes=tuple(artifact.notes),
        adapters=artifact.adapters,
        cache=artifact.cache,
        parts=parts,
        files=files,
    )


def _typed(case: Case, info: OnnxInfo) -> Case:
    """Inputs take the dtype of the exported graph (float32 where the source took half)."""
    inputs = {port.name: _as(case.inputs[port.name], port) for port in info.inputs}
    return Case(inputs, {port.name: np.asarray(case.outputs[port.name]) for port in info.outputs}, case.compared)


def _as(array: np.ndarray[Any, Any], port: TensorInfo) -> np.ndarray[Any, Any]:
    return array if port.dtype == "bfloat16" else np.asarray(array, np.dtype(port.dtype))


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """Readable, and the same bytes for the same data. Raises VerifyError for NaN or infinity, which JSON does not have."""
    try:
        return (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise VerifyError(f"a figure that is not finite cannot be written to JSON ({error})") from error


def graph_bytes(graph: Graph) -> bytes:
    """The text form, without the lines of the model's own Python files: where those lie says nothing of the model."""
    nodes = tuple(replace(node, origin=replace(node.origin, source=None)) for node in graph.nodes)
    return print_graph(replace(graph, nodes=nodes)).encode()


def rewrite_page(folder: Path, html: str) -> None:
    """Another report.html into a folder, and its hash into the manifest where that lists the page. Each file is exchanged as a whole."""
    record = _exchanged(folder / PAGE, html.encode())
    try:
        data = read_json(folder / MANIFEST, lambda found: found)
    except StoredError:
        return  # no manifest, or a damaged one: `check` says so
    changed = with_file(data, PAGE, record)
    if changed is not None:
        _exchanged(folder / MANIFEST, json_bytes(changed))


def _exchanged(path: Path, data: bytes) -> FileRecord:
    write_whole(path, data)
    return file_record(data)


def npz_bytes(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """What `numpy.load` reads, without the clock that `numpy.savez` puts into the zip directory; stored, not compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), entry.getvalue())
    return buffer.getvalue()
