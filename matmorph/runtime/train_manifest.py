"""`train.json` of a training folder, read."""

from __future__ import annotations

import os
from pathlib import Path

from matmorph.runtime.errors import ArtifactError
from matmorph.runtime.format.training import TRAIN_MANIFEST, TrainManifest
from matmorph.runtime.manifest import read_json


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
