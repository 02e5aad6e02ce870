"""New weights on disk as soon as they exist: a file without a name, from which each is mapped when it is read.

The file is in the temporary folder (`TMPDIR`) and has lost its name before anything is in it, so that it is gone with the process however
that ends; on Windows, where no open file can lose its name, the system takes it away. It lives as long as a weight that lies in it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import InputError
from matmorph.ir.mapped import tensor_at
from matmorph.runtime.disk.files import is_full

LEAST = 1 << 16
"""Bytes from which on a weight is worth a place on disk: all smaller ones together are little, and each mapping takes pages."""
_LINE = 64
"""Bytes of a cache line, on which kernels like to begin."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Spill:
    """The file, made with the first weight."""

    _file: Any = None
    _end: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def kept(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What gives the tensor again, in its layout where that is the axes in some order, else row by row; small ones and those of a
        device stay in memory. InputError where the disk has no room."""
        if tensor.nbytes < LEAST or tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized:
            return lambda: tensor
        order = sorted(range(tensor.dim()), key=lambda axis: (-tensor.stride()[axis], axis))
        stored = tensor.permute(order)
        if not stored.is_contiguous():
            order, stored = list(range(tensor.dim())), tensor.contiguous()
        offset = self._written(stored)
        back = [order.index(axis) for axis in range(tensor.dim())]
        return partial(self._read, offset, stored.dtype, tuple(stored.shape), back)

    def _written(self, stored: Tensor) -> int:
        data = stored.reshape(-1).view(torch.uint8).numpy().data
        with self._lock:
            try:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(prefix="matmorph-weights-")  # noqa: SIM115  (open as long as the weights)
                    weakref.finalize(self, self._file.close)
                offset = self._end + -self._end % _LINE
                self._file.seek(offset)
                self._file.write(data)
                self._file.flush()
            except OSError as error:
                raise _told(error, len(data)) from error
            self._end = offset + len(data)
        return offset

    def _read(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...], back: list[int]) -> Tensor:
        return tensor_at(self._file.fileno(), offset, dtype, shape).permute(back)


def _told(error: OSError, size: int) -> InputError:
    place = tempfile.gettempdir()
    hint = ["set TMPDIR to a folder on a disk with room for the new weights"]
    if is_full(error.errno):
        return InputError(f"{place}: has no room for new weights, of which the next takes {size / 2**20:.1f} MiB", hint)
    return InputError(f"{place}: new weights cannot be kept there: {error.strerror or os.strerror(error.errno or 0)}", hint)
