"""A checkpoint: one .safetensors file with the flat vectors, and JSON in its metadata for everything else. Whole or not there.

A file is written under another name beside its own, flushed to the disk, and takes its name last: a process that is killed, or a disk
that is full, leaves the older file as it was.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from matmorph.runtime.disk.files import is_full, whole_file
from matmorph.runtime.disk.locks import Held, held
from matmorph.runtime.errors import CheckpointError, first_line
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.plain import typed
from matmorph.runtime.format.reading import StoredError, parse_json

CHECKPOINT_FORMAT = 1
"""Version of a checkpoint, which only this module writes and reads."""

_KEY = "matmorph"  # of the metadata


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Array], about: Mapping[str, Any], replace: bool = True) -> None:
    """Writes the file, whole or not at all; `about` must be plain data. `replace` False: what has come to that name stays.

    Raises CheckpointError where it cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; a checkpoint is one file")
    metadata = {_KEY: json.dumps({"format": CHECKPOINT_FORMAT, **about}, allow_nan=False)}
    older = target.exists()
    try:
        with whole_file(target, replace) as partial:
            safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, partial, metadata)
    except FileExistsError as error:
        raise CheckpointError(f"{target} came to be while this ran and is not replaced") from error
    except (OSError, safetensors.SafetensorError) as error:
        kept = "; the older file is as it was" if older else "; nothing was left behind"
        raise CheckpointError(f"{target} cannot be written: {_reason(error)}{kept}") from error


@contextmanager
def only_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Nobody else who asks writes to this path meanwhile. Raises CheckpointError where another process does."""
    target = Path(path)
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(target))
        except Held as error:
            raise CheckpointError(f"{target}: {error.who} is writing to this file; give each run a file of its own") from error
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {_reason(error)}") from error
        yield


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors and what `write_tensors` was told about them. Raises CheckpointError for a file that this module did not write."""
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: {'not a file' if file.exists() else 'no such file'}")
    try:
        with safetensors.safe_open(file, framework="np") as archive:
            metadata = archive.metadata() or {}
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 - it cannot be iterated
    except Exception as error:  # of a header that is damaged, or a type that numpy lacks
        raise CheckpointError(f"{file}: cannot be read: {first_line(error)}") from error
    if _KEY not in metadata:
        raise CheckpointError(f"{file}: not a checkpoint of matmorph (its metadata has no {_KEY!r})")
    try:
        about = parse_json(metadata[_KEY], file, lambda data: typed(data, dict, _KEY))
    except StoredError as error:
        raise CheckpointError(str(error)) from error
    if about.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{file}: this matmorph reads checkpoints of format {CHECKPOINT_FORMAT}, the file has another")
    return tensors, about


def _reason(error: Exception) -> str:
    """safetensors reports the system's errors as text: "... (os error 28)"."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    text = os.strerror(number) if number else str(error)
    return f"the disk is full ({text})" if is_full(number) else text
