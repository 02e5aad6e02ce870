"""`train.json` of a training folder, read, and the folder with it."""

from __future__ import annotations

import os
from pathlib import Path

from matmorph.runtime.errors import ArtifactError
from matmorph.runtime.format.artifact import MANIFEST
from matmorph.runtime.format.folder import StoredFolder
from matmorph.runtime.format.training import TRAIN_MANIFEST, TrainManifest
from matmorph.runtime.manifest import open_folder, read_json, stored_errors


def read_train_manifest(folder: str | os.PathLike[str]) -> TrainManifest:
    """Reads `folder/train.json`. Raises ArtifactError with the file's path and what is wrong in it."""
    path = Path(folder)
    if not path.is_dir():
        raise ArtifactError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    if not (path / TRAIN_MANIFEST).is_file():
        raise ArtifactError(
            f"{path}: holds no training graphs ({TRAIN_MANIFEST} is missing); export_training or `compile --train` writes them"
        )
    return read_json(path / TRAIN_MANIFEST, TrainManifest.from_dict)


def open_training(folder: str | os.PathLike[str], verify: bool = True) -> tuple[TrainManifest, StoredFolder]:
    """(train.json, the folder whose files of training are held against it). train.json itself is held against manifest.json, where the
    folder has one. Raises ArtifactError."""
    manifest = read_train_manifest(folder)
    path = Path(folder)
    if verify and (path / MANIFEST).is_file():
        with stored_errors():
            open_folder(path)[1].checked(TRAIN_MANIFEST)
    return manifest, StoredFolder(path, manifest.files, TRAIN_MANIFEST, verify)
