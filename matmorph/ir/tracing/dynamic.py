"""Named dynamic axes: what the caller writes ({"input_ids": {0: "batch", 1: "seq"}}), what torch.export takes, and what it asks back.

An axis is a name, `{name: seq, min: 2, max: 512}`, arithmetic over other axes ("past + seq"), or what torch.export takes: a `Dim` (its name
and limits count), `Dim.DYNAMIC` or `Dim.AUTO` (a first trace says which of them are fixed or equal; the rest are named after their input,
"x_0"), `Dim.STATIC`, a size or None (fixed). Equal names are one shared Dim. With `min: 0` an axis may be empty.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch.export import Dim as ExportDim
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from matmorph.errors import InputError, TraceError, did_you_mean
from matmorph.ir.core import Range
from matmorph.ir.types import Dim, dim_symbols, format_dim, parse_dim, symbol

NamedAxes = Mapping[int, str]
_HINT = type(ExportDim.AUTO)  # what Dim.AUTO, Dim.DYNAMIC and Dim.STATIC are; torch has no public name for it


@dataclass(frozen=True, slots=True)
class DynamicAxes:
    """`shapes`: names by axis in the structure of (args, kwargs), None = all static; `ranges`: limits per name; `hints`: for names that the
    caller has not given, whether the axis must be dynamic (Dim.DYNAMIC); `derived`: axes that are arithmetic over others, by its text."""

    shapes: Any
    ranges: Mapping[str, Range]
    hints: Mapping[str, bool] = field(default_factory=dict)
    derived: Mapping[str, Dim] = field(default_factory=dict)

    @property
    def empty(self) -> frozenset[str]:
        """Names of axes that may be of size 0."""
        return frozenset(name for name, limits in self.ranges.items() if limits.low == 0)

    def symbol(self, label: str) -> Dim:
        """What an axis is in the IR."""
        return self.derived.get(label, symbol(label))

    def for_export(self, signature: inspect.Signature) -> Any:
        """What torch.export takes for a `forward` of this signature: one shared `torch.export.Dim` per name, arguments by their names."""
        if self.shapes is None:
            return None
        dims: dict[str, Any] = {name: ExportDim(name, min=r.low, max=r.high) for name, r in self.ranges.items() if name not in self.hints}
        dims |= {name: ExportDim.AUTO(min=self.ranges[name].low, max=self.ranges[name].high) for name in self.hints}
        dims |= {text: self._derived(dim, dims) for text, dim in self.derived.items()}
        args, kwargs = self.shapes
        both = tuple(_for_export(entry, dims) for entry in args), {name: _for_export(entry, dims) for name, entry in kwargs.items()}
        return signature.bind(*both[0], **both[1]).arguments

    def _derived(self, dim: Dim, dims: Mapping[str, Any]) -> Any:
        """`2*batch + 1` as torch has it; what depends on several axes, which torch has not, as an axis of its own (decision T12)."""
        names = sorted(dim_symbols([dim]))
        polynomial = sympy.Poly(dim, *map(symbol, names)) if sympy.sympify(dim).is_polynomial() else None
        if len(names) == 1 and polynomial is not None and polynomial.degree() == 1 and polynomial.coeff_monomial(symbol(names[0])) > 0:
            factor, more = int(polynomial.coeff_monomial(symbol(names[0]))), int(polynomial.coeff_monomial(1))
            multiple = factor * dims[names[0]] if factor > 1 else dims[names[0]]
            return multiple + more if more else multiple
        least = sympy.sympify(dim).subs({symbol(name): self.ranges[name].low for name in names})
        return ExportDim(re.sub(r"\W+", "_", f"axis {dim}"), min=int(least))

    def leaves(self, examples: Any) -> Iterator[tuple[str, torch.Tensor, NamedAxes]]:
        """(name, example, names by axis) of every tensor of the examples, (args, kwargs), that has a named axis."""
        for path, tensor in tree_flatten_with_path(examples)[0]:
            axes = self.shapes
            for key in path:
                axes = axes[entry_key(key)] if axes is not None and not _is_axes(axes) else axes
            if isinstance(tensor, torch.Tensor) and axes:
                yield ".".join(str(entry_key(key)) for key in path[1:]), tensor, axes

    def may_be_fixed(self, label: str) -> bool:
        """Whether the caller left it to the trace if the axis is dynamic at all."""
        return not self.hints.get(label, True)

    def settled(self, sizes: Mapping[str, int | str]) -> DynamicAxes:
        """Without hints. sizes: of every name its fixed size, or what stands for it in a trace: a fixed axis loses its name, and axes of
        one size share one, the caller's where there is one. TraceError for an axis that must be dynamic and is not."""
        shared: dict[str, str] = {}
        for label in sorted(sizes, key=lambda label: label in self.hints):
            size = sizes[label]
            if isinstance(size, str):
                shared.setdefault(size, label)
            elif not self.may_be_fixed(label):
                raise TraceError(
                    f"the model works only with {label} = {size}: it fixes that axis",
                    ["leave it out of dynamic_shapes, or change the model to accept any size"],
                )
        names = {label: shared[size] if isinstance(size, str) else None for label, size in sizes.items()}
        reader = _Reader()
        for label, name in names.items():
            if name is not None and name not in self.derived:
                reader.named(name, self.ranges[label])

        def renamed(leaf: Any) -> Any:
            return {axis: name for axis, label in leaf.items() if (name := names[label]) is not None} if leaf else leaf

        args, kwargs = self.shapes
        shapes = [tree_map(renamed, entry, is_leaf=_is_axes) for entry in (*args, *kwargs.values())]
        return DynamicAxes(
            (tuple(shapes[: len(args)]), dict(zip(kwargs, shapes[len(args) :], strict=True))), reader.ranges, derived=self.derived
        )

    def within(self, ranges: Mapping[str, Range]) -> Mapping[str, Range]:
        """`ranges` with the limits of the same names here as well."""
        both = {name: (known, self.ranges.get(name, known)) for name, known in ranges.items()}
        highs = {name: [one.high for one in pair if one.high is not None] for name, pair in both.items()}
        return {name: Range(max(one.low for one in pair), min(highs[name], default=None)) for name, pair in both.items()}

    def narrowed(self, found: Mapping[str, Range]) -> DynamicAxes:
        return replace(self, ranges={**self.ranges, **found})


def _is_axes(leaf: Any) -> bool:
    return leaf is None or (isinstance(leaf, Mapping) and all(isinstance(key, int) for key in leaf))


def _for_export(entry: Any, dims: Mapping[str, Any]) -> Any:
    return tree_map(lambda leaf: {axis: dims[name] for axis, name in leaf.items()} if leaf else None, entry, is_leaf=_is_axes)


def read_dynamic_shapes(args: Sequence[Any], kwargs: Mapping[str, Any], given: Any, names: Sequence[str]) -> DynamicAxes:
    """Checks `dynamic_shapes` against the example inputs.

    names: of all inputs in the order of the call, the positional ones first. given: a dict by these names, or a tuple with one entry for
    each. Raises InputError for unknown inputs (nearest name), axes that do not exist, one name on axes of different size, a dynamic axis
    whose example has size 1 (torch.export would silently fix it), and arithmetic over what is no axis or that the example does not follow.
    """
    if given is None:
        return DynamicAxes(None, {})
    positional, keywords = _paired(args, kwargs, given, names)
    reader = _Reader()
    shapes = (
        tuple(
            reader.entry(arg, axes, name if isinstance(given, Mapping) else f"input {i}", name)
            for i, (arg, axes, name) in enumerate(zip(args, positional, names, strict=False))
        ),
        {name: reader.entry(kwargs[name], keywords.get(name), name, name) for name in kwargs},
    )
    _check_derived(reader)
    found = DynamicAxes(shapes, reader.ranges, reader.hints, reader.derived)
    _check_sizes((tuple(args), kwargs), found)
    return found


def _paired(args: Sequence[Any], kwargs: Mapping[str, Any], given: Any, names: Sequence[str]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """`given` as one entry per positional input and one per keyword input."""
    if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(given)):
        raise InputError(
            "dynamic_shapes holds tensors, where names of axes belong",
            ["keyword arguments beside positional ones are given by name: kwargs={...}"],
        )
    if isinstance(given, Mapping) and (kwargs or all(isinstance(key, str) for key in given)):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise InputError(
                f"dynamic_shapes names {unknown[0]}, which is no example input ({', '.join(names)}){did_you_mean(str(unknown[0]), names)}"
            )
        return [given.get(name) for name in names[: len(args)]], given
    if isinstance(given, tuple | list) and len(given) == len(names):
        return given[: len(args)], dict(zip(names[len(args) :], given[len(args) :], strict=True))
    if kwargs and not args:
        raise InputError("dynamic_shapes must be a dict of dicts, because the example inputs are a dict")
    if args and kwargs:
        raise InputError(f"dynamic_shapes must be a dict by input ({', '.join(names)}), or a tuple of {len(names)}, one for each of them")
    raise InputError(f"dynamic_shapes must be a tuple of {len(args)} dicts, because the example inputs are a tuple of {len(args)}")


@dataclass(slots=True)
class _Reader:
    """Reads the entries of inputs one after another; limits of one name add up."""

    ranges: dict[str, Range] = field(default_factory=dict)
    hints: dict[str, bool] = field(default_factory=dict)
    derived: dict[str, Dim] = field(default_factory=dict)

    def entry(self, example: Any, axes: Any, shown: str, name: str) -> Any:
        """`shown` is what messages call the input, `name` what an axis without a name is called after."""
        if axes is None:
            return tree_map(lambda _: None, example)
        if isinstance(example, torch.Tensor):
            return self.axes(example, axes, shown, name)
        if isinstance(example, tuple | list) and isinstance(axes, tuple | list) and len(example) == len(axes):
            both = enumerate(zip(example, axes, strict=True))
            return type(example)(self.entry(e, a, f"{shown}[{i}]", f"{name}_{i}") for i, (e, a) in both)
        if isinstance(example, Mapping) and isinstance(axes, Mapping):
            return {key: self.entry(value, axes.get(key), f"{shown}.{key}", f"{name}_{key}") for key, value in example.items()}
        raise InputError(f"dynamic_shapes of {shown} do not fit its example, a {type(example).__name__}")

    def axes(self, example: torch.Tensor, axes: Any, shown: str, name: str) -> NamedAxes:
        found: dict[int, str] = {}
        for axis, entry in _by_axis(example, axes, shown):
            if not isinstance(axis, int) or not 0 <= axis < example.dim():
                raise InputError(
                    f"dynamic_shapes of {shown} names axis {axis}, but its example has {example.dim()} axes (0 to {example.dim() - 1})"
                )
            if _is_fixed(entry, example, shown, axis):
                continue
            if isinstance(entry, _HINT):
                label = re.sub(r"\W", "_", f"{name}_{axis}")
                if label in self.ranges:
                    raise InputError(f"axis {axis} of {shown} would be called {label}, as another axis is: give one of them another name")
                self.hints[label] = entry.type == ExportDim.DYNAMIC.type
                self.ranges[label] = Range(max(entry.min or 1, 1), entry.max)
            elif (dim := _arithmetic(entry)) is not None:
                label = format_dim(dim)
                self.derived[label] = dim
            else:
                label = self.named(*_label(entry, shown, axis))
            found[axis] = label
        return found

    def named(self, label: str, limits: Range) -> str:
        if label in self.hints:
            raise InputError(f"{label} is what an axis without a name is called: take another name")
        known = self.ranges.setdefault(label, limits)
        high = min((h for h in (known.high, limits.high) if h is not None), default=None)
        low = max(known.low, limits.low)
        if high is not None and low > high:
            raise InputError(f"no size of {label} is within all of its limits: at least {low} and at most {high}")
        self.ranges[label] = Range(low, high)
        return label


def _by_axis(example: torch.Tensor, axes: Any, shown: str) -> Iterable[tuple[Any, Any]]:
    """(axis, entry) of one tensor: a dict by axis, or a list with an entry for every axis."""
    if isinstance(axes, Mapping):
        return axes.items()
    if not isinstance(axes, tuple | list):
        raise InputError(f'dynamic_shapes of {shown} must be a dict such as {{0: "batch", 1: "seq"}}, got {axes!r}')
    if len(axes) != example.dim():
        raise InputError(f"dynamic_shapes of {shown} lists {len(axes)} axes, but its example has {example.dim()}")
    return enumerate(axes)


def _is_fixed(entry: Any, example: torch.Tensor, shown: str, axis: int) -> bool:
    """None, Dim.STATIC, or the size that the example has."""
    if isinstance(entry, int) and not isinstance(entry, bool) and entry != example.shape[axis]:
        raise InputError(f"axis {axis} of {shown} is given as {entry}, but its example has {example.shape[axis]} there")
    fixed = isinstance(entry, _HINT) and entry.type == ExportDim.STATIC.type
    return entry is None or fixed or (isinstance(entry, int) and not isinstance(entry, bool))


def _label(entry: Any, name: str, axis: int) -> tuple[str, Range]:
    if isinstance(entry, ExportDim):
        return _of_dim(entry, name, axis)
    fields = {"name": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    label = fields.pop("name", None)
    if not isinstance(label, str) or not label.isidentifier():
        raise InputError(f'axis {axis} of {name} needs a name such as "batch" or {{"name": "seq", "max": 512}}, got {entry!r}')
    low, high = fields.pop("min", 1), fields.pop("max", None)
    if fields or not isinstance(low, int) or low < 0 or not (high is None or (isinstance(high, int) and high > max(low, 1))):
        raise InputError(f"axis {axis} of {name}: a dynamic axis takes name, min and max (0 <= min < max), got {entry!r}")
    return label, Range(low, high)


def _arithmetic(entry: Any) -> Dim | None:
    """What a text such as "past + seq", or torch's `2 * batch`, says; None for a name, and for what is no arithmetic over names."""
    entry = entry.__name__ if isinstance(entry, ExportDim) and type(entry) is not ExportDim else entry
    if not isinstance(entry, str) or entry.isidentifier():
        return None
    try:
        dim = parse_dim(entry)
    except ValueError:
        return None
    return dim if dim_symbols([dim]) else None


def _check_derived(reader: _Reader) -> None:
    """InputError for arithmetic over what is no axis by that name."""
    for text, dim in reader.derived.items():
        unknown = sorted(dim_symbols([dim]) - (reader.ranges.keys() - reader.hints.keys()))
        if unknown:
            raise InputError(
                f"axis {text}: no axis is named {unknown[0]}{did_you_mean(unknown[0], reader.ranges)}",
                [f"the named axes are {', '.join(sorted(reader.ranges.keys() - reader.hints.keys())) or 'none'}"],
            )


def _of_dim(entry: ExportDim, name: str, axis: int) -> tuple[str, Range]:
    high = entry.max if isinstance(entry.max, int) else None  # else torch's infinity
    if high is not None and high <= max(entry.min, 1):
        raise InputError(f"axis {axis} of {name}: a dynamic axis has more than one size (1 <= min < max), got {entry!r}")
    return entry.__name__, Range(max(entry.min, 1), high)


def _check_sizes(examples: Any, found: DynamicAxes) -> None:
    """One size per name, and none of size 1."""
    sizes: dict[str, tuple[int, str]] = {}
    for place, tensor, axes in found.leaves(examples):
        for axis, label in axes.items():
            if found.may_be_fixed(label):
                continue
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
    known = {symbol(name): size for name, (size, _) in sizes.items()}
    for text, dim in found.derived.items():
        size, place = sizes[text]
        wanted = sympy.sympify(dim).subs(known)
        if wanted != size:
            raise InputError(f"the example has size {size} at {place}, where {text} is {wanted}")


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
