"""What lies between two blocks of a graph, batch by batch: in memory while it is small, else in a temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import InputError
from matmorph.ir.core import Value

LIMIT = 1 << 30
"""Bytes of activations that are held in memory between two blocks."""


class _File:
    """A temporary file without a name, closed with the last tensor that lies in it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="matmorph-")  # noqa: SIM115  (see above)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def append(self, tensor: Tensor) -> int:
        """The byte that it begins at."""
        start = self._file.seek(0, 2)
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._file.flush()  # a full disk must show now
        return start

    def read(self, start: int, size: int) -> bytearray:
        self._file.seek(start)
        return bytearray(self._file.read(size))


@dataclass(frozen=True, slots=True, eq=False)
class _Filed:
    """A tensor that lies in a file, from byte `start`."""

    file: _File
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        data = self.file.read(self.start, prod(self.shape) * self.dtype.itemsize)
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


class KeptBatches:
    """The values of each batch, in the order of the batches. `limit`: bytes in memory; what comes when they are full goes to a file."""

    def __init__(self, limit: int = LIMIT, batches: Sequence[Mapping[Value, Any] | None] = ()) -> None:
        self._limit = limit
        self._batches: list[Mapping[Value, Any] | None] = list(batches)
        self._size = 0
        self._file: _File | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, values: Mapping[Value, Any]) -> None:
        """InputError where there is no room on the disk."""
        self._batches.append({value: self._placed(held) for value, held in values.items()})

    def read(self, number: int) -> dict[Value, Any]:
        """The values of one batch, all in memory."""
        found = self._batches[number]
        if found is None:
            raise KeyError(f"batch {number} was taken")
        return {value: held.read() if isinstance(held, _Filed) else held for value, held in found.items()}

    def take(self, number: int) -> dict[Value, Any]:
        """The same, and let go of here."""
        found = self.read(number)
        self._batches[number] = None
        return found

    def copy(self) -> KeptBatches:
        """The same batches, of which each of the two lets go by itself; tensors and files are shared."""
        return KeptBatches(self._limit, self._batches)

    def _placed(self, held: Any) -> Any:
        if not isinstance(held, Tensor) or not held.numel() or held.device.type != "cpu":
            return held
        size = held.numel() * held.element_size()
        if self._size + size <= self._limit:
            self._size += size
            return held
        try:
            return self._filed(held)
        except OSError as error:
            place = tempfile.gettempdir()
            raise InputError(f"calibration needs temporary files for activations in {place}: {error.strerror}") from error

    def _filed(self, held: Tensor) -> _Filed:
        self._file = self._file or _File()
        return _Filed(self._file, self._file.append(held), held.dtype, tuple(held.shape))
