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


class Shared:
    """Tensors of tasks under way, each put once into a place that workers read, and out of it with the last task that reads it."""

    def __init__(self, how: str, put: Callable[[Tensor], Any], drop: Callable[[Any], None]) -> None:
        """`how`: the word of `_FOUND` or "there"; `put` gives where the tensor is, and `drop` is given that."""
        self._how, self._put, self._drop = how, put, drop
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Tensor, Any, list[int]]] = {}

    @contextmanager
    def placing(self) -> Iterator[Callable[[Tensor], Any]]:
        """What puts tensors there for the block; small ones come along. Raises what `put` raises."""
        taken: list[int] = []

        def place(tensor: Tensor) -> Any:
            if tensor.numel() * tensor.element_size() <= _INLINE:
                return _inline(tensor)
            with self._lock:
                where = self._placed(tensor)
            taken.append(id(tensor))
            return self._how, where, tensor.dtype, tuple(tensor.shape)

        try:
            yield place
        finally:
            with self._lock:
                for key in taken:
                    self._released(key)

    def _placed(self, tensor: Tensor) -> Any:
        key = id(tensor)  # no other tensor has it while this one is held
        if key not in self._held:
            self._held[key] = (tensor, self._put(tensor), [0])
        _, where, count = self._held[key]
        count[0] += 1
        return where

    def _released(self, key: int) -> None:
        _, where, count = self._held[key]
        count[0] -= 1
        if not count[0]:
            del self._held[key]
            self._drop(where)


class Shelf(Shared):
    """In files of a temporary folder. `placing` raises InputError where there is no room."""

    def __init__(self) -> None:
        super().__init__("file", self._written, lambda where: Path(where).unlink(missing_ok=True))
        self.folder = Path(tempfile.mkdtemp(prefix="matmorph-"))
        self._number = 0

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _written(self, tensor: Tensor) -> str:
        self._number += 1
        path = self.folder / str(self._number)
        try:
            raw(tensor).tofile(path)
        except OSError as error:
            raise InputError(f"workers read their matrices from {self.folder.parent}: {error.strerror or 'no room is left'}") from error
        return str(path)
