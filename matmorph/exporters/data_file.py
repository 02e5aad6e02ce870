"""The data file of an artefact folder: every weight once, whichever of the folder's graphs read it, loaded and written one at a time; and
hashes that tell whether weights are the ones something was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from matmorph.errors import ExportError, VerifyError
from matmorph.ir.core import Const
from matmorph.runtime.format.artifact import DATA, FileRecord

_DTYPES: Mapping[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
}

_PAGE, _LINE, _LARGE = 4096, 64, 65536
"""Large weights start on a memory page so that a session can map them, others on a cache line."""

WeightProgress: TypeAlias = Callable[[str, int], None]
"""Called with the path and the bytes of each weight when it has been written."""


@contextmanager
def data_file(folder: Path) -> Iterator[DataFile]:
    """The new data file of a folder, for the block; it comes to be with the first weights."""
    data = DataFile(folder / DATA)
    try:
        yield data
    finally:
        data.close()


@dataclass(slots=True)
class DataFile:
    """The file while it grows, hashed on the way. Equal storage (or, where that is not known, an equal name) and dtype = written once."""

    path: Path
    position: int = 0
    _file: BinaryIO | None = None
    _digest: Any = field(default_factory=hashlib.sha256)
    _written: dict[Any, tuple[int, int]] = field(default_factory=dict)

    def attach(self, weights: Iterable[tuple[ir.Value, tuple[Const, ...]]], progress: WeightProgress | None = None) -> int:
        """Gives each initializer its place in the file, and writes those that have none yet; the bytes of all of them, each once. One of
        several weights holds their rows one after the other.

        The file is complete on disk afterwards, so that a checker can look at it.
        """
        seen: dict[tuple[int, int], None] = {}
        for value, consts in weights:
            const, *more = consts
            dtype = value.dtype
            if dtype is None:
                raise VerifyError(f"{value.name} has no element type in the translated graph")
            if const.numel == 0 and not more:  # nothing to point at
                value.const_value = ir.Tensor(np.empty([int(d) for d in const.tensor.shape], dtype.numpy()), name=str(value.name))
                continue
            place = self._place(consts, dtype)
            seen[place] = None
            fixed = value.shape is not None and value.shape.is_static()  # an input with a default may have a named size
            shape = ir.Shape(value.shape or ()) if fixed else ir.Shape([int(d) for d in const.tensor.shape])
            value.const_value = ir.ExternalTensor(DATA, *place, dtype, shape=shape, name=str(value.name), base_dir="")
            if progress is not None:
                progress(str(value.name) if more else const.path, place[1])
        self._open().flush()
        return sum(length for _, length in seen)

    def info(self) -> FileRecord:
        """Hash and size of what has been written."""
        return FileRecord(self._digest.hexdigest(), self.position)

    def _place(self, consts: tuple[Const, ...], dtype: ir.DataType) -> tuple[int, int]:
        """(offset, length) of a weight, or of several without a gap; one at a time is loaded, and nothing holds it afterwards."""
        key = tuple(("storage", const.storage) if const.storage else ("name", const.path) for const in consts)
        size = sum(const.numel for const in consts) * _DTYPES[dtype].itemsize if dtype in _DTYPES else 0
        if (key, dtype, size) not in self._written:
            start = -1
            for const in consts:
                data = _bytes_of(const, dtype)
                if start < 0:
                    self._write(bytes(-self.position % (_PAGE if max(size, data.nbytes) >= _LARGE else _LINE)))
                    start = self.position
                self._write(data.data)
            self._written[key, dtype, size] = start, self.position - start
        return self._written[key, dtype, size]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._file = self.path.open("wb")
        return self._file

    def _write(self, block: bytes | memoryview) -> None:
        self._open().write(block)
        self._digest.update(block)
        self.position += len(block)


def _bytes_of(const: Const, dtype: ir.DataType) -> npt.NDArray[np.uint8]:
    tensor = const.load().detach()
    if tensor.is_meta:
        raise ExportError(f"weight {const.path} is on the meta device and has no data; load the model's weights before exporting")
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    wanted = _DTYPES.get(dtype)
    if wanted is None:
        raise ExportError(f"weight {const.path} is {tensor.dtype}, which this export does not write to ONNX")
    cast = tensor.to(device="cpu", dtype=wanted).contiguous()
    if wanted is torch.float16 and tensor.dtype is not wanted and not bool(torch.isfinite(cast).all() or not torch.isfinite(tensor).all()):
        raise ExportError(f"weight {const.path} has values beyond the range of fp16 (65504); export with precision fp32 or bf16")
    flat: npt.NDArray[np.uint8] = cast.reshape(-1).view(torch.uint8).numpy()
    return flat


# hashes of weights


def weights_sha256(consts: Iterable[Const]) -> str:
    """Name, type and bytes of each weight in order, one in memory at a time."""
    digest = hashlib.sha256()
    for const in consts:
        digest.update(f"{const.path} {const.type}\n".encode())
        data = const.load().detach().cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()


def names_sha256(consts: Iterable[Const]) -> str:
    """Name and shape of each weight in order: two sets of values for the same places have one hash."""
    lines = (f"{const.path} {[int(dim) for dim in const.tensor.shape]}\n" for const in consts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
