"""`manifest.json`, typed: what goes in, what comes out, which sizes are allowed, and which files belong to the artefact."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from matmorph.runtime.errors import ArtifactError

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
CHECK_VECTORS = "check.npz"
UNHASHED = frozenset({MANIFEST, "run.json"})
"""Files beside those that the manifest lists: itself, and the timings, which differ from run to run."""

T = TypeVar("T")
Dim = int | str
"""A size, the name of a dynamic axis ("seq"), or an expression over such names ("batch*seq")."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output: `dtype` as numpy and torch both call it ("int64"), `shape` with named dynamic axes."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be: `sha256` in lower-case hex and its size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Range:
    """Inclusive sizes of a dynamic axis; `high` None = no upper limit."""

    low: int = 1
    high: int | None = None

    def __contains__(self, size: int) -> bool:
        return self.low <= size and (self.high is None or size <= self.high)

    def __str__(self) -> str:
        return f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """`tolerance` is the largest allowed difference of the check outputs, relative to max(1, max |expected|). `notes`: plain lines.
    `adapters`: what `runtime.adapters` reads of inputs for adapters, None where the model takes none."""

    version: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ranges: Mapping[str, Range]
    precision: str
    tolerance: float
    files: Mapping[str, FileRecord]
    notes: tuple[str, ...] = ()
    adapters: Mapping[str, Any] | None = None


def artifact_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path. Raises ArtifactError where there is none, or nothing in it looks like an artefact."""
    path = Path(folder)
    if not path.exists():
        raise ArtifactError(f"{path}: no such folder")
    if not path.is_dir():
        raise ArtifactError(f"{path}: not a folder")
    if not (path / MANIFEST).is_file() and not (path / MODEL).is_file():
        raise ArtifactError(f"{path}: not an artefact folder (neither {MANIFEST} nor {MODEL} is in it)")
    return path


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads `folder/manifest.json`. Raises ArtifactError with the file's path and what is wrong in it."""
    path = artifact_folder(folder) / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{path}: missing")
    return read_json(path, _manifest)


def read_json(path: Path, read: Callable[[Any], T]) -> T:
    """What `read` makes of the data. Raises ArtifactError, with the path, for an unreadable file and for a ManifestError of `read`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error
    try:
        return read(data)
    except ManifestError as error:
        raise ArtifactError(f"{path}: {error}") from error


class ManifestError(Exception):
    """`KEY: what is wrong`; the caller adds the path."""


def _manifest(data: Any) -> Manifest:
    top = typed(data, dict, "manifest")
    if top.get("format") != FORMAT:
        raise ManifestError(f"format: this matmorph reads format {FORMAT}, the file has {top.get('format')!r}")
    return Manifest(
        version=entry(top, "matmorph", str),
        inputs=items(top, "inputs", tensor_info),
        outputs=items(top, "outputs", tensor_info),
        ranges={name: size_range(value, f"ranges.{name}") for name, value in entry(top, "ranges", dict).items()},
        precision=entry(top, "precision", str),
        tolerance=float(entry(top, "tolerance", (int, float))),
        files={name: file_record(name, value) for name, value in entry(top, "files", dict).items()},
        notes=tuple(map(str, top.get("notes", ()))),
        adapters=entry(top, "adapters", dict) if "adapters" in top else None,
    )


def typed(value: Any, kind: type | tuple[type, ...], key: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ManifestError(f"{key}: unexpected value {value!r:.80}")
    return value


def entry(table: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    if key not in table:
        raise ManifestError(f"{where}{key}: missing")
    return typed(table[key], kind, f"{where}{key}")


def items(table: Mapping[str, Any], key: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
    return tuple(read(item, f"{key}[{index}]") for index, item in enumerate(entry(table, key, list)))


def tensor_info(data: Any, where: str) -> TensorInfo:
    table = typed(data, dict, where)
    shape = tuple(typed(dim, (int, str), f"{where}.shape") for dim in entry(table, "shape", list, f"{where}."))
    return TensorInfo(entry(table, "name", str, f"{where}."), entry(table, "dtype", str, f"{where}."), shape)


def size_range(data: Any, where: str) -> Range:
    low, high = typed(data, list, where) if isinstance(data, list) and len(data) == 2 else (None, None)
    if not isinstance(low, int) or not isinstance(high, int | None):
        raise ManifestError(f"{where}: expected [low, high], found {data!r:.80}")
    return Range(low, high)


def file_record(name: str, data: Any) -> FileRecord:
    where = f"files[{name!r}]"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ManifestError(f"{where}: a file must lie inside the folder")
    table = typed(data, dict, where)
    return FileRecord(entry(table, "sha256", str, f"{where}."), entry(table, "bytes", int, f"{where}."))
