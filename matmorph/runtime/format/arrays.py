"""Arrays of a .npz file, apart from the readers of text: a command that reads no arrays loads no numpy."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matmorph.runtime.format.reading import StoredError, reading

_UNPACKED = 1 << 24
"""Bytes by which arrays may exceed their file: what we write is not compressed."""


def read_arrays(path: Path, largest: int | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by name, never unpickled. `largest`: bytes that they may have, None = little more than the file.

    Raises StoredError for a file that is missing or none.
    """
    if not path.is_file():
        raise StoredError(f"{path}: {'not a file' if path.exists() else 'missing'}")
    with reading(path):
        most = path.stat().st_size + _UNPACKED if largest is None else largest
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > most:
            raise StoredError(f"{path}: unpacks to {size} bytes, at most {most} are read")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in arrays.files}
