"""What a checkpoint says beside its vectors, as records: the settings of a Trainer, its counts, its loss scale, its place within `fit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matmorph.runtime.errors import CheckpointError
from matmorph.runtime.feeds import Array
from matmorph.runtime.fitting import RunPosition
from matmorph.runtime.format.plain import ManifestError, from_plain
from matmorph.runtime.format.training import THETA, TrainManifest
from matmorph.runtime.scaling import LossScale

OPTIONAL = ("mask", "segment_lr", "segment_decay")
"""Vectors that a checkpoint holds where they were given."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the Trainer, as it was asked for."""

    lr: float
    weight_decay: float
    clip: float | None
    max_skips: int
    seed: int
    configuration: Mapping[str, Mapping[str, str]] | None


@dataclass(frozen=True, slots=True)
class Counts:
    """Updates made, updates skipped in a row, epochs done."""

    step: int
    skips: int
    epochs: int


@dataclass(frozen=True, slots=True)
class State:
    """`optimizer`: its update rule, which must be that of the folder."""

    fingerprint: str
    trainable_fingerprint: str
    optimizer: Mapping[str, Any]
    settings: Settings
    counts: Counts
    loss_scale: LossScale
    position: RunPosition | None


def read_state(path: Path, about: Mapping[str, Any]) -> State:
    """The state in a checkpoint. Raises CheckpointError for a file that has none, and for one that is damaged, naming the key."""
    missing = {"settings", "counts", "loss_scale", "position"} - set(about)
    if missing:
        raise CheckpointError(f"{path}: holds parameters, but no state to resume from ({', '.join(sorted(missing))} missing)")
    try:
        return from_plain(State, dict(about))
    except ManifestError as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_vectors(path: Path, tensors: Mapping[str, Array], manifest: TrainManifest) -> None:
    """Raises CheckpointError where the vectors are not theta and the optimizer's states, each with a number per trainable scalar."""
    wanted = {THETA, *manifest.states}
    found = set(tensors) - set(OPTIONAL)
    if found != wanted:
        raise CheckpointError(f"{path}: does not hold the state of this optimizer: differs in {', '.join(sorted(found ^ wanted))}")
    for name in sorted(wanted):
        if tensors[name].shape != (manifest.length,) or tensors[name].dtype.kind != "f":
            raise CheckpointError(
                f"{path}: {name} is {tensors[name].dtype}{list(tensors[name].shape)}, this folder trains {manifest.length}"
            )
