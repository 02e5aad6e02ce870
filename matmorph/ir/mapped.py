"""Tensors that lie in files: mapped into memory when they are asked for, and out of it again with the last one that holds them.

A mapping of its own for each `load` keeps the resident memory at what is in use: pages of a file that stays mapped would stay resident,
one matrix after the other, until all of the model is.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import torch

from matmorph.errors import InputError

Identity: TypeAlias = tuple[int, int, int]
"""Inode, size and time of the last change, in nanoseconds."""

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""As the headers of safetensors files write them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's numbers lie, row by row, little-endian. `identity`: of the file, when its header was read."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    identity: Identity

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """The tensor over the file's own pages; what is written to it stays in memory. InputError where the file is not the one that was
        looked at, whose mapping might end the process."""
        try:
            with self.path.open("rb") as file:
                self.refuse_changed(file.fileno())
                return tensor_at(file.fileno(), self.offset, self.dtype, self.shape)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read any more: {error.strerror or error}", ["open the model again"]) from error

    def refuse_changed(self, file: int) -> None:
        """InputError where the open file is not the one that was looked at."""
        if identity_of(file) != self.identity:
            raise InputError(f"{self.path}: has changed since the model was opened", ["open the model again"])


def identity_of(file: int | Path) -> Identity:
    """Of a file by its name, or by its descriptor. OSError."""
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def tensor_at(file: int, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor at a place of an open file, which may be closed afterwards. OSError where it cannot be mapped."""
    count = prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(file, offset - start + count * dtype.itemsize, access=mmap.ACCESS_COPY, offset=start)
    return tensor_in(pages, offset - start, dtype, shape)


def tensor_in(pages: mmap.mmap, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor over a part of a mapping, which lives as long as it; a copy where its numbers do not lie at multiples of their size, as
    in files of old writers."""
    count = prod(shape)
    source: Any = pages
    if offset % dtype.itemsize:
        source, offset = bytearray(pages[offset : offset + count * dtype.itemsize]), 0
    return torch.frombuffer(source, dtype=dtype, count=count, offset=offset).view(shape)
