"""Values of a training folder as flat vectors: the starting point, masks, factors of segments, and back to named tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from matmorph.runtime.checkpoint import read_tensors
from matmorph.runtime.errors import ArtifactError, InputMismatch, first_line, nearest
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.folder import StoredFolder
from matmorph.runtime.format.training import THETA, TRAIN_MANIFEST, TrainManifest
from matmorph.runtime.manifest import stored_errors

Mask = Mapping[str, Array] | Array
"""1 trains, 0 does not: a flat vector [n], or arrays by parameter name (of its shape, or one number); what is not named trains."""
SegmentFactors = Mapping[str, float] | Array
"""One factor per segment: an array [segments], or numbers by segment name; what is not named has 1."""


def initial_theta(stored: StoredFolder, manifest: TrainManifest) -> Array:
    """The flat vector as training starts, float32 [n]. Raises ArtifactError for a file that does not hold it."""
    with stored_errors():
        path = stored.checked(manifest.initial)
    try:
        tensors = safetensors.numpy.load_file(path)
    except Exception as error:  # of a header that is damaged, or a type that numpy lacks
        raise ArtifactError(f"{path}: cannot be read: {first_line(error)}") from error
    wrong = sorted({one.name for one in manifest.parameters} ^ set(tensors))
    if wrong:
        raise ArtifactError(f"{path}: does not hold the trainable parameters of {TRAIN_MANIFEST}; differs in {', '.join(wrong[:5])}")
    for one in manifest.parameters:
        tensor = tensors[one.name]
        if tensor.shape != one.shape or tensor.dtype != np.float32:
            expected = f"float32{list(one.shape)}"
            raise ArtifactError(f"{path}: {one.name} is {tensor.dtype}{list(tensor.shape)}, {TRAIN_MANIFEST} says {expected}")
    return np.concatenate([tensors[one.name].reshape(-1) for one in manifest.parameters])  # they lie one after the other


def put_in(manifest: TrainManifest, theta: Array, source: Mapping[str, Array] | str | os.PathLike[str]) -> Array:
    """theta with values in it: by name, or of a file of `Trainer.save_parameters` or `Trainer.save`.

    Raises InputMismatch for a parameter that is not there, another shape, NaN and infinity; CheckpointError for a file that cannot be read.
    """
    values = source if isinstance(source, Mapping) else _from_file(manifest, Path(source))
    _check_names("values", list(values), [one.name for one in manifest.parameters], "trainable parameter")
    found = np.array(theta)
    for one in manifest.parameters:
        if one.name in values:
            array = np.asarray(values[one.name], np.float32)
            if array.shape != one.shape:
                raise InputMismatch(f"values: {one.name} has shape {one.shape}, these have {array.shape}")
            if not np.isfinite(array).all():
                raise InputMismatch(f"values: {one.name} has NaN or infinity")
            found[one.offset : one.offset + one.size] = array.reshape(-1)
    return found


def _from_file(manifest: TrainManifest, path: Path) -> Mapping[str, Array]:
    return belonging(manifest, path, *read_tensors(path))


def belonging(manifest: TrainManifest, path: Path, tensors: Mapping[str, Array], about: Mapping[str, Any]) -> Mapping[str, Array]:
    """By parameter name, what `read_tensors` found in a file of values or a checkpoint. Raises InputMismatch for those of another model."""
    for key, what in (("fingerprint", "trained on another base"), ("trainable_fingerprint", "of other parameters")):
        here = getattr(manifest, key)
        if about.get(key) not in (None, here):
            raise InputMismatch(f"{path}: {what} (its {key} is {str(about[key])[:12]}, this folder's {here[:12]})")
    if THETA not in tensors:
        return tensors
    if tensors[THETA].shape != (manifest.length,):
        raise InputMismatch(f"{path}: holds {tensors['theta'].size} trained numbers, this folder trains {manifest.length}")
    return named(manifest, tensors[THETA])


def named(manifest: TrainManifest, vector: Array) -> dict[str, Array]:
    """Copies of the vector's pieces, by parameter name and in its shape."""
    return {one.name: vector[one.offset : one.offset + one.size].reshape(one.shape).copy() for one in manifest.parameters}


def flat_mask(manifest: TrainManifest, mask: Mask) -> Array:
    """float32 [n] of 0 and 1. Raises InputMismatch for a parameter that is not there, another shape, another value, and all 0."""
    flat = np.ones(manifest.length, np.float32)
    if isinstance(mask, Mapping):
        _check_names("mask", list(mask), [one.name for one in manifest.parameters], "trainable parameter")
        for one in manifest.parameters:
            if one.name in mask:
                values = np.asarray(mask[one.name], np.float32)
                if values.shape not in ((), one.shape):
                    raise InputMismatch(f"mask: {one.name} has shape {one.shape}, its mask has {values.shape}")
                flat[one.offset : one.offset + one.size] = values.reshape(-1)
    elif np.shape(mask) == (manifest.length,):
        flat[:] = mask
    else:
        raise InputMismatch(
            f"mask: expected a vector of {manifest.length} numbers, or arrays by parameter name; got shape {np.shape(mask)}"
        )
    if not np.isin(flat, (0, 1)).all():
        raise InputMismatch("mask: holds something other than 0 and 1")
    if not flat.any():
        raise InputMismatch("mask: is 0 everywhere, so nothing would train")
    return flat


def flat_factors(manifest: TrainManifest, what: str, factors: SegmentFactors) -> Array:
    """float32 [segments]. Raises InputMismatch for a segment that is not there, another count, and a factor that is no number >= 0."""
    names = [segment.name for segment in manifest.segments]
    if isinstance(factors, Mapping):
        _check_names(what, list(factors), names, "segment")
        flat = np.asarray([factors.get(name, 1.0) for name in names], np.float32)
    else:
        flat = np.asarray(factors, np.float32)
    if flat.shape != (len(names),):
        raise InputMismatch(f"{what}: expected {len(names)} factors, one per segment, got shape {flat.shape}")
    if not (np.isfinite(flat) & (flat >= 0)).all():
        raise InputMismatch(f"{what}: a factor must be a finite number of at least 0, got {flat[~(np.isfinite(flat) & (flat >= 0))][0]}")
    return flat


def _check_names(what: str, given: list[str], known: list[str], kind: str) -> None:
    for name in given:
        if name not in known:
            raise InputMismatch(f"{what}: no {kind} is called {name!r}{nearest(name, known)}")
