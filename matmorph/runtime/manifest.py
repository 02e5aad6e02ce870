"""`manifest.json` of an artefact folder, read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from matmorph.runtime.errors import ArtifactError
from matmorph.runtime.format.artifact import MANIFEST, MODEL, Manifest
from matmorph.runtime.format.plain import ManifestError

T = TypeVar("T")


def artifact_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path. Raises ArtifactError where there is none, or nothing in it looks like an artefact."""
    path = Path(folder)
    if not path.exists():
        raise ArtifactError(f"{path}: no such folder")
    if not path.is_dir():
        raise ArtifactError(f"{path}: not a folder")
    if not (path / MANIFEST).is_file() and not (path / MODEL).is_file():
        raise ArtifactError(f"{path}: not an artefact folder (neither {MANIFEST} nor {MODEL} is in it)")
    return path


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads `folder/manifest.json`. Raises ArtifactError with the file's path and what is wrong in it."""
    path = artifact_folder(folder) / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{path}: missing")
    return read_json(path, Manifest.from_dict)


def read_json(path: Path, read: Callable[[Any], T]) -> T:
    """What `read` makes of the data. Raises ArtifactError, with the path, for an unreadable file and for a ManifestError of `read`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error
    try:
        return read(data)
    except ManifestError as error:
        raise ArtifactError(f"{path}: {error}") from error
