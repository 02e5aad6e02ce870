"""A task on its way to another process of this machine, and its result on the way back: pickled, with tensors by themselves.

What goes to a worker lies in files of one temporary folder, each tensor once for as long as a task that reads it is under way, and is
mapped there; what comes back, which is small, goes through the pipe. Pickles go between processes that this one started, and come from
nowhere else.
"""

from __future__ import annotations

import io
import pickle
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matmorph.errors import InputError

_INLINE = 1 << 16
"""Bytes of a tensor that are worth no file."""


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, place: Callable[[Tensor], Any]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._place = place

    def persistent_id(self, item: Any) -> Any:
        return self._place(item) if isinstance(item, Tensor) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arrays: Sequence[Any]) -> None:
        super().__init__(file)
        self._arrays = arrays

    def persistent_load(self, place: Any) -> Tensor:
        how, where, dtype, shape = place
        made = torch.empty(shape, dtype=dtype)
        size = prod(shape) * dtype.itemsize
        if size:
            raw(made)[...] = self._arrays[where] if how == "there" else _FOUND[how](where, size)
        return made


_FOUND: Mapping[str, Callable[[Any, int], Any]] = {
    "here": lambda where, size: np.frombuffer(where, np.uint8),
    "file": lambda where, size: np.memmap(where, np.uint8, "r", 0, (size,)),
}


def pickled(item: Any, place: Callable[[Tensor], Any] | None = None) -> bytes:
    """`place`: puts a tensor elsewhere and says where, None = all of it comes along."""
    file = io.BytesIO()
    _Pickler(file, place or _inline).dump(item)
    return file.getvalue()


def unpickled(data: bytes, arrays: Sequence[Any] = ()) -> Any:
    """Each tensor in memory of its own; `arrays`: the bytes of those that came by themselves."""
    return _Unpickler(io.BytesIO(data), arrays).load()


def _inline(tensor: Tensor) -> Any:
    return "here", raw(tensor).tobytes(), tensor.dtype, tuple(tensor.shape)


def raw(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes; of a tensor that is laid out, its own."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class Shelf:
    """Tensors of tasks under way, in files: `placing` gives what puts them there for the block."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="matmorph-"))
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Tensor, Path, list[int]]] = {}
        self._number = 0

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def placing(self) -> Iterator[Callable[[Tensor], Any]]:
        """InputError where there is no room."""
        taken: list[int] = []

        def place(tensor: Tensor) -> Any:
            if tensor.numel() * tensor.element_size() <= _INLINE:
                return _inline(tensor)
            with self._lock:
                path = self._placed(tensor)
            taken.append(id(tensor))
            return "file", str(path), tensor.dtype, tuple(tensor.shape)

        try:
            yield place
        finally:
            with self._lock:
                for key in taken:
                    self._released(key)

    def _placed(self, tensor: Tensor) -> Path:
        key = id(tensor)  # no other tensor has it while this one is held
        if key not in self._held:
            self._number += 1
            path = self.folder / str(self._number)
            try:
                raw(tensor).tofile(path)
            except OSError as error:
                raise InputError(f"workers read their matrices from {self.folder.parent}: {error.strerror or 'no room is left'}") from error
            self._held[key] = (tensor, path, [0])
        _, path, count = self._held[key]
        count[0] += 1
        return path

    def _released(self, key: int) -> None:
        _, path, count = self._held[key]
        count[0] -= 1
        if not count[0]:
            del self._held[key]
            path.unlink(missing_ok=True)
