"""The header of a GGUF file, walked through before a reader that trusts it: each length in it is held against the bytes that there are.

The format is that of ggml's docs/gguf.md, little-endian: magic, version, two counts, keys with values, names and shapes of tensors.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SIZES: Mapping[int, int] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a plain value by its type."""
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4
_LONGEST_NAME = 1 << 16
_ARCHITECTURE = b"general.architecture"


def architecture_of(file: Path) -> str | None:
    """What the header says under general.architecture, None where it says nothing. Raises ValueError for what is no whole header."""
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"it does not begin with {_MAGIC.decode()}")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(data).header()


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, len(_MAGIC)

    def header(self) -> str | None:
        version = self._number(4)
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, and {' and '.join(map(str, _VERSIONS))} are read (little-endian)")
        tensors, keys = self._number(8), self._number(8)
        found: bytes | None = None
        for _ in range(keys):
            key, kind = self._text(), self._number(4)
            if key == _ARCHITECTURE and kind == _STRING:
                found = self._text()
            else:
                self._pass_value(kind, nested=False)
        for _ in range(tensors):
            self._pass_tensor()
        if not tensors:
            raise ValueError("it holds no weights")
        return None if found is None else found.decode("utf-8")

    def _pass_value(self, kind: int, nested: bool) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _STRING:
            self._skip(self._number(8))
        elif kind == _ARRAY and not nested:
            each, count = self._number(4), self._number(8)
            if each in _SIZES:
                self._skip(count * _SIZES[each])
                return
            for _ in range(count):  # each takes eight bytes at least, so a wrong count meets the end of the file
                self._pass_value(each, nested=True)
        else:
            raise ValueError(f"a value at byte {self._at} has the type {kind}, which is none")

    def _pass_tensor(self) -> None:
        self._text()
        dimensions = self._number(4)
        if dimensions > _DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions at byte {self._at}")
        self._skip(8 * dimensions + 4 + 8)

    def _text(self) -> bytes:
        length = self._number(8)
        if length > _LONGEST_NAME:
            raise ValueError(f"a name of {length} bytes at byte {self._at}")
        self._skip(length)
        return self._data[self._at - length : self._at]

    def _number(self, size: int) -> int:
        self._skip(size)
        return int.from_bytes(self._data[self._at - size : self._at], "little")

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise ValueError(f"its header goes on behind its last byte ({len(self._data)})")
