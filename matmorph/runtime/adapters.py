"""Adapters of a session: `.onnx_adapter` files (ONNX Runtime's AdapterFormat) written, checked against the model, and switched.

A model that was exported with `export.adapters: inputs` lists its adapter inputs in manifest.json: pairs `down` [in, rank] and `up`
[rank, out] (experts: [experts, in, rank] ...) whose rank is free, each pair its own. One session serves any number of adapters; without one
it computes the base. ONNX Runtime ignores adapters in runs with IO binding, so `Session` does not bind.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from matmorph.runtime.disk.files import whole_file
from matmorph.runtime.errors import AdapterError, ArtifactError, first_line, nearest
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.adapters import ADAPTER_FORMAT, Slot, Slots
from matmorph.runtime.format.plain import ManifestError


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """A checked adapter, ready to run. `ranks` by site and method ("encoder.0.query lora"). `handle`: for runs with options; `values`: by
    input, for runs that bind their inputs, in which ONNX Runtime looks at no options."""

    path: Path
    ranks: Mapping[str, int]
    model_version: int
    handle: Any = field(repr=False)
    values: Mapping[str, Any] = field(repr=False)


def read_slots(data: Mapping[str, Any] | None, where: str) -> Slots:
    """`adapters` of a manifest. AdapterError where it has none, ArtifactError where it cannot be read."""
    if data is None:
        raise AdapterError(f"{where} takes no adapters: it was not exported with export.adapters: inputs")
    try:
        return Slots.from_dict(data)
    except ManifestError as error:
        raise ArtifactError(f"{where}: its adapters cannot be read: {error}") from error


def save_adapter(path: str | os.PathLike[str], arrays: Mapping[str, Array], slots: Slots, replace: bool = True) -> None:
    """Writes an adapter, whole or not at all. `arrays`: by input name, the scale folded into `up`; pairs that are left out keep their
    default. `replace` False: what has come to that name stays.

    AdapterError for names and shapes that do not fit, and a place that cannot be written."""
    target = Path(path)
    _ranks(target, {name: (array.dtype, array.shape) for name, array in arrays.items()}, slots, any_float=True)
    dtypes = {name: slot.dtype for slot in slots.slots for name in (slot.down, slot.up)}
    cast = {name: np.ascontiguousarray(array, np.dtype(dtypes[name])) for name, array in arrays.items()}
    bad = [name for name, array in cast.items() if not np.isfinite(array).all()]
    if bad:
        raise AdapterError(f"{target}: {bad[0]} has NaN or infinity in {dtypes[bad[0]]}")
    out = onnxruntime.AdapterFormat()
    out.set_adapter_version(ADAPTER_FORMAT)
    out.set_model_version(slots.model_version)
    out.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(cast[name]) for name in sorted(cast)})
    try:
        with whole_file(target, replace) as partial:
            out.export_adapter(str(partial))
    except FileExistsError as error:
        raise AdapterError(f"{target} came to be while this ran and is not replaced") from error
    except (OSError, RuntimeError) as error:
        raise AdapterError(f"{target} cannot be written: {first_line(error)}") from error


def load_adapter(path: str | os.PathLike[str], slots: Slots) -> LoadedAdapter:
    """An adapter for this model. AdapterError for a file that is none, that was made for another base, or whose inputs do not fit."""
    file = Path(path)
    arrays, version = read_adapter(file)
    if version != slots.model_version:
        theirs, ours = _shown(version), _shown(slots.model_version)
        raise AdapterError(f"{file}: made for another base (its fingerprint begins with {theirs}, this model's with {ours})")
    ranks = _ranks(file, {name: (array.dtype, array.shape) for name, array in arrays.items()}, slots)
    handle = onnxruntime.LoraAdapter()
    try:
        handle.Load(str(file))
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
        raise AdapterError(f"{file}: not an .onnx_adapter file: {first_line(error)}") from error
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    return LoadedAdapter(file, ranks, version, handle, values)


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Array], int]:
    """(arrays by input name, model version) of a file. AdapterError for one that is no adapter."""
    file = Path(path)
    if not file.is_file():
        raise AdapterError(f"{file}: {'not a file' if file.exists() else 'no such file'}")
    try:
        found = onnxruntime.AdapterFormat.read_adapter(str(file))
        arrays = {name: np.array(value.numpy()) for name, value in found.get_parameters().items()}
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
        raise AdapterError(f"{file}: not an .onnx_adapter file") from error
    if found.get_adapter_version() != ADAPTER_FORMAT:
        raise AdapterError(f"{file}: not written by matmorph, or by another version of it (adapter version {found.get_adapter_version()})")
    return arrays, int(found.get_model_version())


def _ranks(file: Path, found: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], slots: Slots, any_float: bool = False) -> dict[str, int]:
    """Rank by pair, of arrays that fit. AdapterError names the first that does not."""
    known = {name: slot for slot in slots.slots for name in (slot.down, slot.up)}
    for name in found:
        if name not in known:
            raise AdapterError(f"{file}: the model has no adapter input {name}{nearest(name, known)}")
    if not found:
        raise AdapterError(f"{file}: holds no adapter")
    ranks: dict[str, int] = {}
    for slot in slots.slots:
        given = [name for name in (slot.down, slot.up) if name in found]
        if not given:
            continue
        if len(given) == 1:
            raise AdapterError(f"{file}: has {given[0]} without its other factor")
        ranks[f"{slot.site} {slot.method}"] = _rank(file, slot, found, any_float)
    return ranks


def _rank(file: Path, slot: Slot, found: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], any_float: bool) -> int:
    down, up = found[slot.down][1], found[slot.up][1]
    rank = down[-1] if down else -1
    if (down, up) != slot.shapes(rank):
        wanted = " and ".join(f"[{', '.join(map(str, shape))}]" for shape in slot.shapes("rank"))
        raise AdapterError(f"{file}: {slot.down} and {slot.up} are {list(down)} and {list(up)}, the model takes {wanted}")
    for name in (slot.down, slot.up):
        dtype = found[name][0]
        if dtype.kind != "f" or (not any_float and dtype != np.dtype(slot.dtype)):
            raise AdapterError(f"{file}: {name} is {dtype}, the model takes {slot.dtype}")
    return rank


def _shown(version: int) -> str:
    """The beginning of a fingerprint that a model version stands for."""
    return f"{version << 1:08x}"[:7]
