"""`manifest.json` of an artefact folder, read, and the folder with it: whoever reads a file of one asks here for its path."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from matmorph.runtime.disk.naming import OLD, passing_names
from matmorph.runtime.errors import ArtifactError
from matmorph.runtime.format import reading
from matmorph.runtime.format.artifact import DATA, MANIFEST, MODEL, Manifest
from matmorph.runtime.format.folder import StoredFolder

T = TypeVar("T")


def artifact_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path. Raises ArtifactError where there is none, or nothing in it looks like an artefact."""
    path = Path(folder)
    if not path.exists():
        aside = next((str(old) for old in passing_names(path.absolute(), OLD)), None)
        kept = f"; a run that was killed while it replaced it left the older one at {aside}" if aside else ""
        raise ArtifactError(f"{path}: no such folder{kept}")
    if not path.is_dir():
        raise ArtifactError(f"{path}: not a folder")
    if not (path / MANIFEST).is_file() and not (path / MODEL).is_file():
        raise ArtifactError(f"{path}: not an artefact folder (neither {MANIFEST} nor {MODEL} is in it)")
    return path


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads `folder/manifest.json`. Raises ArtifactError with the file's path and what is wrong in it."""
    path = artifact_folder(folder) / MANIFEST
    with stored_errors():
        reading.inside(path.parent, MANIFEST)
    return read_json(path, Manifest.from_dict)


def open_folder(folder: str | os.PathLike[str], verify: bool = True) -> tuple[Manifest, StoredFolder]:
    """(the manifest, the folder whose files are held against it). Raises ArtifactError."""
    manifest = read_manifest(folder)
    return manifest, StoredFolder(Path(folder), manifest.files, MANIFEST, verify)


def checked_model(stored: StoredFolder, name: str = MODEL) -> Path:
    """The path of a model, which is as it was written, and so is its data file. Raises ArtifactError."""
    with stored_errors():
        path = stored.checked(name)
        if DATA in stored.files:
            stored.checked(DATA)
    return path


def checked_file(folder: str | os.PathLike[str], name: str) -> Path:
    """The path of one file of a folder, which is as the manifest says. Raises ArtifactError."""
    with stored_errors():
        return open_folder(folder)[1].checked(name)


def read_json(path: Path, read: Callable[[Any], T]) -> T:
    """What `read` makes of the data. Raises ArtifactError, with the path, for an unreadable file and for a ManifestError of `read`."""
    with stored_errors():
        return reading.read_json(path, read)


@contextmanager
def stored_errors() -> Iterator[None]:
    """StoredError as ArtifactError, which users of the runtime know."""
    try:
        yield
    except reading.StoredError as error:
        raise ArtifactError(str(error)) from error
