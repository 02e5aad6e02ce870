"""The safetensors files of a folder, by their headers: which tensor lies where, and whether each of the files is whole.

Only headers are read here, however large the files are. What is wrong is an `InputError` that names the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matmorph.errors import InputError
from matmorph.ir.mapped import DTYPES, Place, identity_of
from matmorph.runtime.format.plain import ManifestError
from matmorph.runtime.format.reading import StoredError, check_name, inside, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000
"""Bytes; what the format's own reader takes at most."""
_AGAIN = ["if it was downloaded or copied, do that again"]


def stored_tensors(folder: Path) -> dict[str, Place] | None:
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json lists; None where the folder has neither.

    InputError for a file that is missing, cut off or none, that lacks a tensor of the index, or that has one of a type that torch has not.
    """
    if (folder / SINGLE).is_file():
        return dict(_tensors(_inside(folder, SINGLE)))
    if not (folder / INDEX).is_file():
        return None
    by_shard = _by_shard(folder / INDEX)
    found: dict[str, Place] = {}
    for name, wanted in by_shard.items():
        path = _inside(folder, name)
        if not path.is_file():
            raise InputError(f"{path}: missing, and {INDEX} says that {_counted(len(wanted))} of the model lie there", _AGAIN)
        inside = dict(_tensors(path))
        lacking = [tensor for tensor in wanted if tensor not in inside]
        if lacking:
            raise InputError(f"{path}: lacks {_counted(len(lacking))} that {INDEX} says are in it", lacking[:5])
        found.update({tensor: inside[tensor] for tensor in wanted})
    return found


def _by_shard(path: Path) -> dict[str, list[str]]:
    def read(data: Any) -> dict[str, list[str]]:
        if not isinstance(data, dict) or not isinstance(data.get("weight_map"), dict):
            raise ManifestError("weight_map: missing")
        shards: dict[str, list[str]] = {}
        for tensor, name in data["weight_map"].items():
            shards.setdefault(check_name(name, f"weight_map: {tensor}: {name!r:.80}"), []).append(tensor)
        return dict(sorted(shards.items()))

    try:
        return read_json(path, read)
    except StoredError as error:
        raise InputError(str(error)) from error


def _inside(folder: Path, name: str) -> Path:
    try:
        return inside(folder, name)
    except StoredError as error:
        raise InputError(str(error)) from error


def _counted(number: int) -> str:
    return f"{number} tensor{'s' if number > 1 else ''}"


def _tensors(path: Path) -> Iterator[tuple[str, Place]]:
    try:
        identity = identity_of(path)
        header, start = _header(path, identity[1])
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        try:
            first, last = (int(number) for number in entry["data_offsets"])
            shape, code = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"{path}: is no safetensors file: of {name} it does not say type, shape and place") from error
        if code not in DTYPES:
            raise InputError(f"{path}: {name} is {code}, a type that torch has not")
        place = Place(path, start + first, DTYPES[code], shape, identity)
        if first < 0 or min(shape, default=0) < 0 or last - first != place.nbytes:
            raise InputError(f"{path}: {name} is {code} {list(shape)}, {place.nbytes} bytes, and has {last - first}", _AGAIN)
        if start + last > identity[1]:
            raise InputError(f"{path}: is cut off: {name} ends at byte {start + last}, and the file has {identity[1]}", _AGAIN)
        yield name, place


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin. OSError from the file system."""
    with path.open("rb") as file:
        length = int(struct.unpack("<Q", file.read(8))[0]) if size >= 8 else 0
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise InputError(f"{path}: is no whole safetensors file: a header of {length} bytes in a file of {size}", _AGAIN)
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no safetensors file: its header is no JSON", _AGAIN) from error
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise InputError(f"{path}: is no safetensors file: its header is no table of tensors", _AGAIN)
    return header, 8 + length
