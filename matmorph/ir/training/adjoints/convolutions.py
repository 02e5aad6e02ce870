"""Adjoints of convolutions, by convolutions again.

dX is the transposed convolution of dY with the same weight. dW of an ungrouped one is the convolution of X with dY over the batch, stride
and dilation exchanged; where kernels tile the input (patch embeddings) it is one matrix product, and where there are groups, one per offset
of the kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matmorph.errors import ExportError
from matmorph.ir.core import Node, Value
from matmorph.ir.training.adjoints.tape import AdjointRule, Cotangents, Tape, TapeStep, argument
from matmorph.ir.training.adjoints.traced import traced
from matmorph.ir.types import Dim


@dataclass(frozen=True, slots=True)
class _Geometry:
    """One entry per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def rank(self) -> int:
        return len(self.stride)


def _convolution(t: Tape, node: Node) -> TapeStep:
    """y [n, o, ...] of x [n, i, ...] and weight [o, i / groups, kernel]."""
    x, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    shape = _geometry(node, weight)
    spatial = list(range(2, 2 + shape.rank))

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is None:
            return
        if t.wants(bias):
            t.give(bias, t.b("aten.sum.dim_IntList", dy, [0, *spatial]))
        if t.wants(x):
            t.give(x, _input_gradient(t, dy, x, weight, shape))
        if t.wants(weight):
            t.give(weight, _weight_gradient(t, dy, x, weight, shape))

    return TapeStep(t.keep(node), pull)


def _geometry(node: Node, weight: Value) -> _Geometry:
    rank = len(weight.tensor.shape) - 2
    if node.op == "aten.convolution.default":
        _, _, _, stride, padding, dilation, transposed, _, groups = node.args[:9]
        if transposed:
            raise ExportError("a transposed convolution cannot be differentiated", [f"in {node.origin.path}"])
    else:
        named = enumerate((("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)), 3)
        stride, padding, dilation, groups = (argument(node, at, name, default) for at, (name, default) in named)
    stride, dilation = _each(stride, rank), _each(dilation, rank)
    if isinstance(padding, str):
        padding = _padding_of(padding, weight.tensor.shape[2:], dilation, node)
    return _Geometry(stride, _each(padding, rank), dilation, int(groups))


def _each(numbers: Any, rank: int) -> tuple[int, ...]:
    listed = tuple(numbers) if isinstance(numbers, tuple | list) else (numbers,)
    return listed * rank if len(listed) == 1 else listed


def _padding_of(word: str, kernel: Sequence[Dim], dilation: Sequence[int], node: Node) -> tuple[int, ...]:
    wide = [d * (int(k) - 1) if word == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    if any(size % 2 for size in wide):
        raise ExportError("a convolution with uneven padding cannot be differentiated", [f"in {node.origin.path}"])
    return tuple(size // 2 for size in wide)


def _input_gradient(t: Tape, dy: Value, x: Value, weight: Value, shape: _Geometry) -> Value:
    """Transposed; rows and columns of x that no kernel reached get 0, through the output padding."""
    sizes = zip(x.tensor.shape[2:], dy.tensor.shape[2:], weight.tensor.shape[2:], strict=True)
    rest = [
        _number(have - ((out - 1) * s - 2 * p + d * (int(k) - 1) + 1))
        for (have, out, k), s, p, d in zip(sizes, shape.stride, shape.padding, shape.dilation, strict=True)
    ]
    return t.b("aten.convolution.default", dy, weight, None, shape.stride, shape.padding, shape.dilation, True, tuple(rest), shape.groups)


def _number(rest: Any) -> int:
    if isinstance(rest, int) or getattr(rest, "is_Integer", False):
        return int(rest)
    raise ExportError("a strided convolution over an axis of unknown size cannot be differentiated", ["fix its height and width"])


def _weight_gradient(t: Tape, dy: Value, x: Value, weight: Value, shape: _Geometry) -> Value:
    kernel = tuple(int(k) for k in weight.tensor.shape[2:])
    if shape.groups > 1:
        return _by_offsets(t, dy, x, weight, shape)
    if shape.stride == kernel and not any(shape.padding) and set(shape.dilation) == {1}:
        return _by_patches(t, dy, x, weight, kernel)
    swapped = [t.b("aten.transpose.int", value, 0, 1) for value in (x, dy)]
    found = t.b("aten.convolution.default", *swapped, None, shape.dilation, shape.padding, shape.stride, False, (0,) * shape.rank, 1)
    for axis, k in enumerate(kernel, 2):
        if found.tensor.shape[axis] != k:
            found = t.b("aten.slice.Tensor", found, axis, 0, k)
    return t.b("aten.transpose.int", found, 0, 1)


def _by_patches(t: Tape, dy: Value, x: Value, weight: Value, kernel: Sequence[int]) -> Value:
    """The patches as rows [n * places, i * kernel], times dY [n * places, o]."""
    rank = len(kernel)
    for axis, (k, places) in enumerate(zip(kernel, t.axes(dy)[2:], strict=True), 2):
        whole = x.tensor.shape[axis]
        if not (isinstance(whole, int) and whole % k == 0):  # what the last kernel did not reach
            end = places * k if isinstance(places, int) else t.b("operator.mul", places, k)
            x = t.b("aten.slice.Tensor", x, axis, 0, end)
    channels = int(x.tensor.shape[1])
    split = [part for places, k in zip(t.axes(dy)[2:], kernel, strict=True) for part in (places, k)]
    cut = t.b("aten.reshape.default", x, [t.axes(x)[0], channels, *split])
    order = [0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2)]
    patches = t.b("aten.reshape.default", t.b("aten.permute.default", cut, order), [-1, channels * math.prod(kernel)])
    rows = t.b("aten.permute.default", dy, [1, 0, *range(2, 2 + rank)])
    rows = t.b("aten.reshape.default", rows, [int(weight.tensor.shape[0]), -1])
    return t.b("aten.reshape.default", t.b("aten.mm.default", rows, patches), [int(d) for d in weight.tensor.shape])


def _by_offsets(t: Tape, dy: Value, x: Value, weight: Value, shape: _Geometry) -> Value:
    """For each offset in the kernel a product, group by group, of dY with what that offset saw of x."""
    rank, groups = shape.rank, shape.groups
    out, inside, *kernel = (int(d) for d in weight.tensor.shape)
    padded = _padded(t, x, shape.padding)
    places = t.axes(dy)[2:]
    batch = t.axes(dy)[0]
    left = _by_group(t, dy, batch, groups, out // groups, rank)
    parts = []
    for offset in itertools.product(*map(range, kernel)):
        seen = padded
        for axis, (at, s, d, size) in enumerate(zip(offset, shape.stride, shape.dilation, places, strict=True), 2):
            reach = (size - 1) * s + 1 if isinstance(size, int) else _reach(t, size, s)
            start = at * d
            end = reach + start if isinstance(reach, int) else t.b("operator.add", reach, start)
            seen = t.b("aten.slice.Tensor", seen, axis, start, end, s)
        right = t.b("aten.transpose.int", _by_group(t, seen, batch, groups, inside, rank), 1, 2)
        parts.append(t.b("aten.bmm.default", left, right))
    return t.b("aten.reshape.default", t.b("aten.stack.default", parts, -1), [out, inside, *kernel])


def _padded(t: Tape, x: Value, padding: Sequence[int]) -> Value:
    """Zeros around x: what a slice takes off, its adjoint puts back (torch's padding operator does not take symbolic sizes)."""
    for axis, p in enumerate(padding, 2):
        if p:
            sizes = t.axes(x)
            whole = sizes[axis]
            sizes[axis] = whole + 2 * p if isinstance(whole, int) else t.b("operator.add", whole, 2 * p)
            end = whole + p if isinstance(whole, int) else t.b("operator.add", whole, p)
            x = t.b("aten.slice_backward.default", x, sizes, axis, p, end, 1)
    return x


def _reach(t: Tape, size: Value, stride: int) -> Value:
    return t.b("operator.add", t.b("operator.mul", size, stride), 1 - stride)


def _by_group(t: Tape, value: Value, batch: Any, groups: int, channels: int, rank: int) -> Value:
    """[n, groups * channels, ...] as [groups, channels, n * places]."""
    split = t.b("aten.reshape.default", value, [batch, groups, channels, -1])
    turned = t.b("aten.permute.default", split, [1, 2, 0, 3])
    return t.b("aten.reshape.default", turned, [groups, channels, -1])


def _average_pool(t: Tape, node: Node) -> TapeStep:
    """A convolution of every channel with a constant kernel, where each window is whole; other windows ask torch."""
    x, kernel = node.args[:2]
    window = _each(kernel, 2)
    stride = _each(argument(node, 2, "stride", ()) or window, 2)
    padding, ceil, padded, divisor = (argument(node, at, name, default) for at, name, default in _POOLING)
    if ceil or divisor or (not padded and any(_each(padding, 2))):
        return traced(t, node)
    channels = int(x.tensor.shape[-3])
    shape = _Geometry(stride, _each(padding, 2), (1, 1), channels)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is not None:
            dtype = x.tensor.torch_dtype
            part = t.b("aten.full.default", [channels, 1, *window], 1.0 / math.prod(window), dtype=dtype, device=t.device)
            t.give(x, _input_gradient(t, dy, x, part, shape))

    return TapeStep(t.keep(node), pull)


_POOLING = ((3, "padding", 0), (4, "ceil_mode", False), (5, "count_include_pad", True), (6, "divisor_override", None))

_NAMES = ("conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding", "conv3d.padding", "convolution.default")

CONVOLUTIONS: Mapping[str, AdjointRule] = {
    **{f"aten.{name}": _convolution for name in _NAMES},
    "aten.avg_pool2d.default": _average_pool,
}
