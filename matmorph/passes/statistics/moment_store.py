"""Square matrices that sums are added to, one per key: in memory while they are few, else in one temporary file that has no name.

Of those in a file no more lies in memory than is being read: a matrix is mapped when it is asked for, and let go of with the tensor.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Hashable, Iterator, Mapping
from typing import IO, TypeVar

import numpy as np
import torch
from torch import Tensor

from matmorph.errors import InputError

SPILL_ABOVE = 1 << 28
"""Bytes that are held in memory."""

Key = TypeVar("Key", bound=Hashable)


class MomentStore(Mapping[Key, Tensor]):
    """float64 [n, n] of each key of `widths`, zeros at first. `spill_above`: bytes of all together from which they lie in a file.

    Raises InputError where there is no room for it.
    """

    def __init__(self, widths: Mapping[Key, int], spill_above: int = SPILL_ABOVE) -> None:
        self._widths = dict(widths)
        sizes = [8 * width**2 for width in self._widths.values()]
        self._starts = dict(zip(self._widths, np.cumsum([0, *sizes]).tolist(), strict=False))
        self._file = _file(sum(sizes)) if sum(sizes) > spill_above else None
        if self._file is not None:
            weakref.finalize(self, self._file.close)  # what is mapped stays so
        shapes = self._widths.items() if self._file is None else ()
        self._held = {key: torch.zeros(width, width, dtype=torch.float64) for key, width in shapes}

    def add(self, key: Key, moment: Tensor) -> None:
        self[key].add_(moment)

    def scale(self, factor: float) -> None:
        """All of them."""
        for key in self:
            self[key].mul_(factor)

    def __getitem__(self, key: Key) -> Tensor:
        """What is changed in it is changed here."""
        if self._file is None:
            return self._held[key]
        width = self._widths[key]
        return torch.from_numpy(np.memmap(self._file, np.float64, "r+", self._starts[key], (width, width)))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)


def _file(size: int) -> IO[bytes]:
    file = tempfile.TemporaryFile(prefix="matmorph-")  # noqa: SIM115  (lives as long as what is mapped of it)
    try:
        if hasattr(os, "posix_fallocate"):  # a full disk must show now, not as a crash while the mapping is written
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as error:
        file.close()
        raise InputError(f"calibration needs {size:,} bytes of temporary files in {tempfile.gettempdir()}: {error.strerror}") from error
    return file
