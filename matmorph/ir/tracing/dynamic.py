"""Named dynamic axes: what the caller writes ({"input_ids": {0: "batch", 1: "seq"}}), what torch.export takes, and what it asks back.

An axis is a name, or `{name: seq, min: 2, max: 512}`; equal names are one shared Dim.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import Dim as ExportDim
from torch.utils._pytree import tree_flatten_with_path, tree_map

from matmorph.errors import InputError, did_you_mean
from matmorph.ir.core import Range

Axes = Mapping[int, str]


@dataclass(frozen=True, slots=True)
class DynamicAxes:
    """`shapes`: the pytree torch.export takes, with axis names in place of Dims; `ranges`: limits per name."""

    shapes: Any
    ranges: Mapping[str, Range]

    def for_export(self) -> Any:
        """`shapes` with one shared `torch.export.Dim` per name."""
        dims = {name: ExportDim(name, min=r.low, max=r.high) for name, r in self.ranges.items()}
        return tree_map(lambda leaf: _dims(leaf, dims), self.shapes, is_leaf=_is_axes)

    def leaves(self, examples: Any) -> Iterator[tuple[str, torch.Tensor, Axes]]:
        """(name, example, names by axis) of every tensor of the examples that has a named axis."""
        for path, tensor in tree_flatten_with_path(examples)[0]:
            axes = self.shapes
            for key in path:
                axes = axes[entry_key(key)] if axes is not None and not _is_axes(axes) else axes
            if isinstance(tensor, torch.Tensor) and axes:
                yield ".".join(str(entry_key(key)) for key in path), tensor, axes

    def within(self, ranges: Mapping[str, Range]) -> Mapping[str, Range]:
        """`ranges` with the limits of the same names here as well."""
        both = {name: (known, self.ranges.get(name, known)) for name, known in ranges.items()}
        highs = {name: [one.high for one in pair if one.high is not None] for name, pair in both.items()}
        return {name: Range(max(one.low for one in pair), min(highs[name], default=None)) for name, pair in both.items()}

    def narrowed(self, found: Mapping[str, Range]) -> DynamicAxes:
        return replace(self, ranges={**self.ranges, **found})


def _is_axes(leaf: Any) -> bool:
    return leaf is None or (isinstance(leaf, Mapping) and all(isinstance(key, int) for key in leaf))


def _dims(leaf: Any, dims: Mapping[str, Any]) -> Any:
    return {axis: dims[name] for axis, name in leaf.items()} if leaf else None


def read_dynamic_shapes(args: Sequence[Any], kwargs: Mapping[str, Any], given: Any) -> DynamicAxes:
    """Checks `dynamic_shapes` against the example inputs.

    Raises InputError for unknown inputs (nearest name), axes that do not exist, one name on axes of different size, and a dynamic axis
    whose example has size 1 (torch.export would silently fix it).
    """
    ranges: dict[str, Range] = {}
    if given is None:
        return DynamicAxes(None, ranges)
    shapes: Any
    if kwargs:
        if not isinstance(given, Mapping):
            raise InputError("dynamic_shapes must be a dict of dicts, because the example inputs are a dict")
        unknown = [name for name in given if name not in kwargs]
        if unknown:
            names = ", ".join(kwargs)
            raise InputError(
                f"dynamic_shapes names {unknown[0]}, which is no example input ({names}){did_you_mean(str(unknown[0]), kwargs)}"
            )
        shapes = {name: _entry(kwargs[name], given.get(name), name, ranges) for name in kwargs}
    else:
        if isinstance(given, Mapping) or not isinstance(given, Sequence) or len(given) != len(args):
            raise InputError(f"dynamic_shapes must be a tuple of {len(args)} dicts, because the example inputs are a tuple of {len(args)}")
        shapes = tuple(_entry(arg, axes, f"input {i}", ranges) for i, (arg, axes) in enumerate(zip(args, given, strict=True)))
    _check_sizes((args, kwargs), shapes)
    return DynamicAxes(shapes, ranges)


def _entry(example: Any, axes: Any, name: str, ranges: dict[str, Range]) -> Any:
    if axes is None:
        return tree_map(lambda _: None, example)
    if isinstance(example, torch.Tensor):
        return _axes(example, axes, name, ranges)
    if isinstance(example, tuple | list) and isinstance(axes, tuple | list) and len(example) == len(axes):
        return type(example)(_entry(e, a, f"{name}[{i}]", ranges) for i, (e, a) in enumerate(zip(example, axes, strict=True)))
    if isinstance(example, Mapping) and isinstance(axes, Mapping):
        return {key: _entry(value, axes.get(key), f"{name}.{key}", ranges) for key, value in example.items()}
    raise InputError(f"dynamic_shapes of {name} do not fit its example, a {type(example).__name__}")


def _axes(example: torch.Tensor, axes: Any, name: str, ranges: dict[str, Range]) -> Axes:
    if not isinstance(axes, Mapping):
        raise InputError(f'dynamic_shapes of {name} must be a dict such as {{0: "batch", 1: "seq"}}, got {axes!r}')
    found: dict[int, str] = {}
    for axis, entry in axes.items():
        if not isinstance(axis, int) or not 0 <= axis < example.dim():
            raise InputError(
                f"dynamic_shapes of {name} names axis {axis}, but its example has {example.dim()} axes (0 to {example.dim() - 1})"
            )
        label, limits = _label(entry, name, axis)
        known = ranges.setdefault(label, limits)
        high = min((h for h in (known.high, limits.high) if h is not None), default=None)
        ranges[label] = Range(max(known.low, limits.low), high)
        found[axis] = label
    return found


def _label(entry: Any, name: str, axis: int) -> tuple[str, Range]:
    fields = {"name": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    label = fields.pop("name", None)
    if not isinstance(label, str) or not label.isidentifier():
        raise InputError(f'axis {axis} of {name} needs a name such as "batch" or {{"name": "seq", "max": 512}}, got {entry!r}')
    low, high = fields.pop("min", 1), fields.pop("max", None)
    if fields or not isinstance(low, int) or not (high is None or (isinstance(high, int) and high > max(low, 1))):
        raise InputError(f"axis {axis} of {name}: a dynamic axis takes name, min and max (1 <= min < max), got {entry!r}")
    return label, Range(max(low, 1), high)


def _check_sizes(examples: Any, shapes: Any) -> None:
    """One size per name, and none of size 1."""
    sizes: dict[str, tuple[int, str]] = {}
    args, kwargs = examples
    for place, tensor, axes in DynamicAxes(shapes, {}).leaves(kwargs or tuple(args)):
        for axis, label in axes.items():
            size, first = sizes.setdefault(label, (tensor.shape[axis], f"axis {axis} of {place}"))
            if size != tensor.shape[axis]:
                raise InputError(
                    f"the example inputs disagree on {label}: {size} at {first}, {tensor.shape[axis]} at axis {axis} of {place}"
                )
            if size < 2:
                raise InputError(
                    f"the example has size {size} on the dynamic axis {label} ({first}); give an example of size 2 or more",
                    ["a trace at size 1 would be fixed to size 1; the compiled model does accept size 1"],
                )


def entry_key(key: Any) -> Any:
    """What a step of a pytree path indexes with: a mapping's key, a position, or an attribute's name."""
    return next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name))


_SUGGESTION = re.compile(r"^\s*(\w+) = Dim\('(\w+)'(?:, min=(\d+))?(?:, max=(\d+))?\)", re.MULTILINE)
_FIXED = re.compile(r"^\s*(\w+) = (\d+)\s*$", re.MULTILINE)
_MULTIPLE = re.compile(r"^\s*(\w+) = (\d+)\*\w+\s*$", re.MULTILINE)
_EQUAL = re.compile(r"^\s*(\w+) = ([A-Za-z_]\w*)\s*$", re.MULTILINE)


def suggested_ranges(message: str, axes: DynamicAxes) -> Mapping[str, Range]:
    """Ranges that the model itself demands, read from torch.export's "Suggested fixes"; empty where it demands no mere range."""
    fixes = message.partition("Suggested fixes:")[2]
    if any(name in axes.ranges for name, _ in (*_FIXED.findall(fixes), *_EQUAL.findall(fixes), *_MULTIPLE.findall(fixes))):
        return {}
    found: dict[str, Range] = {}
    for name, _, low, high in _SUGGESTION.findall(fixes):
        if name not in axes.ranges:
            continue
        known = axes.ranges[name]
        limits = [int(high)] if high else []
        limits += [known.high] if known.high is not None else []
        found[name] = Range(max(known.low, int(low or 1)), min(limits, default=None))
    return found


def demands(message: str, axes: DynamicAxes) -> tuple[str, ...]:
    """Plain lines for what no range can satisfy: an axis that the model fixes or needs as a multiple, axes that it wants equal."""
    fixes = message.partition("Suggested fixes:")[2]
    fixed = [
        f"the model works only with {name} = {size}: leave that axis out of dynamic_shapes"
        for name, size in _FIXED.findall(fixes)
        if name in axes.ranges
    ]
    equal = [
        f"the model needs {a} = {b}: give both axes one name" for a, b in _EQUAL.findall(fixes) if a in axes.ranges and b in axes.ranges
    ]
    multiple = [f"the model needs {name} to be a multiple of {k}: leave that axis static, or pad" for name, k in _MULTIPLE.findall(fixes)]
    return (*fixed, *equal, *multiple)
