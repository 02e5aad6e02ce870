"""What lies beside the weights of a Hugging Face folder and travels with the model, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

from matmorph.errors import InputError
from matmorph.runtime.format.companions import COMPANIONS, CONFIG, GENERATION, companion_table
from matmorph.runtime.format.reading import StoredError, inside, read_bytes

LARGEST = 1 << 26
"""Bytes of one file: the largest tokenizer.json in use has half of it. A file lies in memory until it is written."""


def read_companions(folder: Path) -> dict[str, bytes]:
    """The files of the folder that `COMPANIONS` names, by name.

    Raises InputError for a folder without config.json, and for a file that leads out of the folder, is larger than LARGEST, or is none, and
    for a configuration that is no JSON table.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: not a Hugging Face model folder: it has no {CONFIG}")
    try:
        found = {name: read_bytes(inside(folder, name), LARGEST) for name in COMPANIONS if os.path.lexists(folder / name)}
        for name in (CONFIG, GENERATION):  # those that are read too: a fault is met before hours of work
            if name in found:
                companion_table(found[name], folder / name)
    except StoredError as error:
        raise InputError(str(error)) from error
    return found
