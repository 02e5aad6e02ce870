"""An artefact folder: the names of its files, and manifest.json, which says what goes in, what comes out, which sizes are allowed, and
which files belong to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from matmorph.runtime.format.cache import CacheInfo
from matmorph.runtime.format.plain import Codec, ManifestError, from_plain, stored, to_plain, typed
from matmorph.runtime.format.reading import check_name

MANIFEST_FORMAT = 1
"""Version of manifest.json."""

MODEL, DATA = "model.onnx", "model.onnx.data"
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
"""The two parts of a model that reads once and writes token by token, on the data file of the whole."""
MANIFEST, REPORT, PAGE, SPEC = "manifest.json", "report.json", "report.html", "spec.yaml"
CHECK_VECTORS = "check.npz"
RUN = "run.json"
SOURCE_GRAPH, GRAPH = "source.ir", "graph.ir"
"""The graphs as text, without weights: of the source model, and as rewritten."""
PARETO, PARETO_PICTURE = "pareto.json", "pareto.svg"

UNHASHED = frozenset({MANIFEST, RUN})
"""Files beside those that the manifest lists: itself, and the timings, which differ from run to run."""

NamedDim: TypeAlias = int | str
"""A size, the name of a dynamic axis ("seq"), or an expression over such names ("batch*seq")."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output: `dtype` as numpy and torch both call it ("int64"), `shape` with named dynamic axes."""

    name: str
    dtype: str
    shape: tuple[NamedDim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be: `sha256` in lower-case hex and its size in bytes."""

    sha256: str
    bytes: int


def file_record(data: bytes) -> FileRecord:
    """Of a file that holds this."""
    return FileRecord(hashlib.sha256(data).hexdigest(), len(data))


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
class ModelPart:
    """A model of its own among the files: what it takes and gives."""

    model: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class Handed:
    """What the encoder gives as `made` and the decoder takes as `taken`."""

    made: str
    taken: str


@dataclass(frozen=True, slots=True)
class ModelParts:
    """The model in two: the encoder, which runs once, and the decoder, which takes what that gave again for each token."""

    encoder: ModelPart
    decoder: ModelPart
    handed: tuple[Handed, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """The model that the artefact was made from: sha256 over its weights."""

    weights_sha256: str


def _read_ranges(data: Any, where: str) -> dict[str, Range]:
    return {name: _range(value, f"{where}.{name}") for name, value in typed(data, dict, where).items()}


def _range(data: Any, where: str) -> Range:
    if not isinstance(data, list) or len(data) != 2:
        raise ManifestError(f"{where}: expected [low, high], found {data!r:.80}")
    low, high = data
    return Range(typed(low, int, where), None if high is None else typed(high, int, where))


def _read_files(data: Any, where: str) -> dict[str, FileRecord]:
    return {name: _file(name, record, f"{where}[{name!r}]") for name, record in typed(data, dict, where).items()}


def _file(name: str, data: Any, where: str) -> FileRecord:
    check_name(name, where)
    return from_plain(FileRecord, data, where)


RANGES_CODEC = Codec(_read_ranges, lambda ranges: {name: [one.low, one.high] for name, one in ranges.items()})
"""By axis, [low, high]."""
FILES_CODEC = Codec(_read_files, lambda files: {name: to_plain(files[name]) for name in sorted(files)})
"""By name, in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`tolerance` is the largest allowed difference of the check outputs, relative to max(1, max |expected|). `notes`: plain lines.
    `adapters`: plain data of `Slots` for a model whose adapters are inputs, None where it takes none. `cache`: of a model that takes its
    key/value cache and gives it back, else None. `parts`: of a model with an encoder and a cache. What has a default may lack in a file."""

    version: str = field(metadata=stored(key="matmorph"))
    source: Source | None = field(default=None, metadata=stored(omitted=True))
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ranges: Mapping[str, Range] = field(metadata=stored(codec=RANGES_CODEC))
    precision: str
    tolerance: float
    opset: int | None = field(default=None, metadata=stored(omitted=True))
    target: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    adapters: Mapping[str, Any] | None = field(default=None, metadata=stored(omitted=True))
    cache: CacheInfo | None = field(default=None, metadata=stored(omitted=True))
    parts: ModelParts | None = field(default=None, metadata=stored(omitted=True))
    files: Mapping[str, FileRecord] = field(metadata=stored(codec=FILES_CODEC))

    def to_dict(self) -> dict[str, Any]:
        """manifest.json as plain data."""
        return {"format": MANIFEST_FORMAT, **to_plain(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Raises ManifestError for another format, and for data that is no manifest."""
        return from_plain(cls, of_format(data, MANIFEST_FORMAT, "manifest"))


def of_format(data: Any, number: int, called: str) -> dict[str, Any]:
    """The data, where it is a table of this format. ManifestError."""
    top: dict[str, Any] = typed(data, dict, called)
    if top.get("format") != number:
        raise ManifestError(f"format: this matmorph reads format {number}, the file has {top.get('format')!r}")
    return top


def is_manifest(data: Any) -> bool:
    """Whether the data is a manifest of any version of matmorph."""
    return isinstance(data, dict) and "matmorph" in data and "format" in data


def with_file(data: Any, name: str, record: FileRecord) -> dict[str, Any] | None:
    """A manifest's data, of any version, with another record of a file that it lists; None where it lists no such file."""
    files = data.get("files") if isinstance(data, dict) else None
    return {**data, "files": {**files, name: to_plain(record)}} if isinstance(files, dict) and name in files else None


def shown(data: Any) -> tuple[str, dict[str, FileRecord]]:
    """(hash of the source's weights, the files) as far as a manifest's data, which may be damaged, says them."""
    top = data if isinstance(data, dict) else {}
    source, files = top.get("source"), top.get("files")
    records = files if isinstance(files, dict) else {}
    return (
        str(source.get("weights_sha256", "")) if isinstance(source, dict) else "",
        {name: found for name, record in records.items() if (found := _shown(record)) is not None},
    )


def _shown(data: Any) -> FileRecord | None:
    """What a damaged record still says."""
    table = data if isinstance(data, dict) else {}
    digest, size = table.get("sha256", ""), table.get("bytes", 0)
    return FileRecord(str(digest), size) if isinstance(data, dict) and type(size) is int else None
