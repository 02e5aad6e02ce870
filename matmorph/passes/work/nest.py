"""What a task is given and gives, apart from its tensors: nests of frozen dataclasses, tuples, lists, dicts, enums and plain values.

A nest is written as a skeleton of plain JSON and a list of tensors, and read back to the bit: numbers as they are, tensors in the same type
and shape. Only dataclasses and enums of named packages are read; nothing is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib import import_module
from typing import Any

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

_ALIGNED = 64
"""Bytes: where torch puts a tensor. A kernel may sum in another order where one lies elsewhere."""
_PLAIN = (bool, int, str, type(None))


class NotANestError(TypeError):
    """A value that has no written form."""


class DamagedError(ValueError):
    """Bytes that are no written nest."""


def laid_out(value: Any) -> Any:
    """The same nest, its tensors each in memory of their own as torch lays them out, so that what is computed of them does not depend on
    where they came from. What is no nest stays as it is."""
    if isinstance(value, Tensor):
        plain = value.device.type == "cpu" and value.layout == torch.strided
        return value if not plain or _is_laid_out(value) else value.clone(memory_format=torch.contiguous_format)
    return _mapped(value, laid_out)


def _is_laid_out(tensor: Tensor) -> bool:
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return alone and tensor.is_contiguous() and tensor.data_ptr() % _ALIGNED == 0


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple | list) and not hasattr(value, "_fields") and type(value) in (tuple, list):
        return type(value)(map(change, value))
    if type(value) is dict:
        return {key: change(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        items = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        changed = {name: change(item) for name, item in items.items()}
        same = all(changed[name] is item for name, item in items.items())
        return value if same else _filled(type(value), changed)
    return value


def _filled(kind: type, values: Mapping[str, Any]) -> Any:
    """Without what its constructor would make of them: they are as one left them."""
    made: Any = object.__new__(kind)
    for name, item in values.items():
        object.__setattr__(made, name, item)
    return made


def taken_apart(value: Any, compared: bool = False) -> tuple[Any, list[Tensor]]:
    """The skeleton and the tensors in order. `compared`: without fields that make no two values differ, as places in a file. Raises
    NotANestError."""
    tensors: list[Tensor] = []

    def skeleton(item: Any) -> Any:
        if isinstance(item, Tensor):
            tensors.append(item.detach())
            return {"tensor": len(tensors) - 1}
        if isinstance(item, float):
            return {"float": item.hex()}
        if isinstance(item, torch.dtype):
            return {"dtype": str(item).removeprefix("torch.")}
        if isinstance(item, Enum):
            return {"enum": _name(type(item)), "name": item.name}
        if isinstance(item, _PLAIN):
            return item
        if isinstance(item, tuple | list):
            return {"list" if isinstance(item, list) else "tuple": [skeleton(one) for one in item]}
        if isinstance(item, dict):
            return {"dict": [[skeleton(key), skeleton(one)] for key, one in item.items()]}
        if is_dataclass(item) and not isinstance(item, type):
            named = {entry.name: getattr(item, entry.name) for entry in fields(item) if entry.compare or not compared}
            return {"data": _name(type(item)), "fields": {name: skeleton(one) for name, one in named.items()}}
        raise NotANestError(f"a {type(item).__name__}")

    return skeleton(value), tensors


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def put_together(skeleton: Any, tensors: Sequence[Tensor], packages: Collection[str] = ("matmorph",)) -> Any:
    """The value. `packages`: top-level packages whose dataclasses and enums are made. Raises DamagedError."""

    def made(item: Any) -> Any:
        if isinstance(item, _PLAIN):
            return item
        kind, content = next(iter(item.items()))
        return _READERS[kind](content, item, made, tensors, packages)

    try:
        return made(skeleton)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, ImportError, StopIteration, RecursionError) as error:
        raise DamagedError(f"no written value: {type(error).__name__} {error}") from error


def _class(name: str, packages: Collection[str]) -> Any:
    module, _, path = name.partition(":")
    if module.partition(".")[0] not in packages:
        raise ValueError(f"{name} is of no package that methods come from")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _data(name: str, item: Any, made: Callable[[Any], Any], _: Any, packages: Collection[str]) -> Any:
    kind = _class(name, packages)
    if not is_dataclass(kind) or {entry.name for entry in fields(kind)} != set(item["fields"]):
        raise ValueError(f"{name} has other fields")
    return _filled(kind, {key: made(one) for key, one in item["fields"].items()})  # type: ignore[arg-type]  # a class


def _enum(name: str, item: Any, packages: Collection[str]) -> Enum:
    kind = _class(name, packages)
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise ValueError(f"{name} is no enum")
    return kind[item["name"]]


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no type of numbers")
    return found


_READERS: Mapping[str, Callable[[Any, Any, Callable[[Any], Any], Sequence[Tensor], Collection[str]], Any]] = {
    "tensor": lambda content, item, made, tensors, packages: tensors[content],
    "float": lambda content, item, made, tensors, packages: float.fromhex(content),
    "dtype": lambda content, item, made, tensors, packages: _dtype(content),
    "enum": lambda content, item, made, tensors, packages: _enum(content, item, packages),
    "list": lambda content, item, made, tensors, packages: [made(one) for one in content],
    "tuple": lambda content, item, made, tensors, packages: tuple(made(one) for one in content),
    "dict": lambda content, item, made, tensors, packages: {made(key): made(one) for key, one in content},
    "data": _data,
}

_SKELETON = "nest"


def written(value: Any, about: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of a nest. `about`: further words of its header. Raises NotANestError."""
    skeleton, tensors = taken_apart(value)
    named = {str(number): tensor.cpu().contiguous().clone() for number, tensor in enumerate(tensors)}
    return write_tensors(named, {**(about or {}), _SKELETON: json.dumps(skeleton)})


def about(data: bytes) -> Mapping[str, str]:
    """The words of the header. Raises DamagedError."""
    try:
        size = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + size])["__metadata__"]
        return {str(key): str(word) for key, word in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedError("its header is none") from error


def read(data: bytes, packages: Collection[str] = ("matmorph",)) -> Any:
    """What `written` wrote. Raises DamagedError."""
    try:
        found = read_tensors(data)
        skeleton = json.loads(about(data)[_SKELETON])
    except DamagedError:
        raise
    except Exception as error:  # whatever the reader of another package says of bytes that are none of its own
        raise DamagedError(str(error)) from error
    return put_together(skeleton, [found[str(number)].clone() for number in range(len(found))] if found else [], packages)
