"""A model on the meta device and the folder that has its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from matmorph.errors import InputError, did_you_mean
from matmorph.ir.tracing.unwrap import unwrapped
from matmorph.models.by_reference import Weights
from matmorph.models.hf_folder import open_pretrained
from matmorph.models.shards import INDEX, SINGLE, stored_tensors

WeightSource: TypeAlias = Weights | str | os.PathLike[str]
"""What `open_folder` gave, or a folder with safetensors files."""

_SHOWN = 5


def with_weights(model: Any, source: WeightSource) -> tuple[nn.Module, Weights]:
    """The module to trace, and where each of its weights lies.

    Of a model of transformers it is a twin that transformers loads from the folder: it knows how its names are spelt there, and what of a
    model lies in no file (the frequencies of a rotation). Another module's tensors are looked up by their names.

    Raises InputError for a model that has weights already, and for a folder that lacks some, has them in another shape or type, or is no
    whole one.
    """
    module, _ = unwrapped(model)
    if not isinstance(module, nn.Module):
        raise InputError(f"weights= is for a torch.nn.Module on the meta device, and this is a {type(module).__name__}")
    if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise InputError(
            f"weights= is for a model on the meta device, and {type(module).__name__} has weights of its own",
            ["leave weights= out, or make the model under `with torch.device('meta'):`"],
        )
    if isinstance(source, Weights):
        return module, source
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__):
        twin, weights = open_pretrained(folder, type(module), module.config)
        if weights is None:
            raise InputError(f"{folder}: its weights do not lie in safetensors files as they are", _SAFETENSORS)
        return twin, weights
    return module, named_weights(module, folder)


_SAFETENSORS = [f"a folder with {SINGLE}, or {INDEX} and its shards, is wanted"]


def named_weights(module: nn.Module, folder: Path) -> Weights:
    """Of a module whose tensors lie in the folder under their own names. InputError as `with_weights`."""
    stored = stored_tensors(folder)
    if stored is None:
        raise InputError(f"{folder}: has no safetensors files", _SAFETENSORS)
    places, missing, unlike = {}, [], []
    for names, tensor in _by_tensor(module):
        if not tensor.is_meta:
            continue
        name = next((name for name in names if name in stored), None)
        if name is None:
            missing.append(f"{names[0]}{did_you_mean(names[0], stored)}")
            continue
        place = stored[name]
        if place.shape != tuple(tensor.shape) or place.dtype != tensor.dtype:
            there, here = (f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in (place, tensor))
            unlike.append(f"{name}: {there} in {place.path.name}, {here} in the model")
        places.update(dict.fromkeys(names, place))
    for found, what in ((missing, "lacks"), (unlike, "has in another shape or type")):
        if found:
            more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
            raise InputError(f"{folder}: {what} {_counted(len(found))} of {type(module).__name__}", [*found[:_SHOWN], *more])
    return Weights(folder, places)


def _counted(number: int) -> str:
    return f"{number} weight{'s' if number > 1 else ''}"


def _by_tensor(module: nn.Module) -> list[tuple[list[str], Any]]:
    """Each parameter and buffer with all its names."""
    found: dict[int, tuple[list[str], Any]] = {}
    for name, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())
