"""Proof of what a mask allows: that a token sees itself and the tokens before it which are no pads, of these all, or the last `window`.

The mask is computed at many sizes and for masks of every kind, and compared as a whole. What it changes with a length is said by a number
that stands in the part of the graph: those are the windows that it may have, and lengths around each of them are among the sizes. What a
pad sees does not matter, since nothing sees a pad.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from matmorph.ir.core import Arg, Value
from matmorph.passes.attention.cone import Cone, Parts
from matmorph.passes.attention.setting import Setting, masks_of

_SMALL = ((1, 1, 0), (2, 5, 0), (3, 4, 6), (2, 1, 9), (1, 3, 8))
"""Rows, new tokens, past."""
_LARGEST = 2**20
"""Beyond it no window is looked for."""


def proved_window(parts: Parts, mask: Value, setting: Setting, longest: int | None) -> int | str:
    """The window, 0 where there is none, or why this is not proved. `longest`: tokens that the model has positions for."""
    cone = parts.cone(mask)
    if cone is None or any(leaf is not setting.mask for leaf in cone.leaves):
        return "its mask reads something other than the mask of tokens and sizes"
    numbers = sorted(set(_numbers(cone)))
    sizes = [*_SMALL, *_around(numbers), *([(1, 1, longest - 1)] if longest else [])]
    windows = [0, *dict.fromkeys(number + by for number in numbers for by in (0, 1, -1) if number + by > 0)]
    for size in sizes:
        for tokens in masks_of(setting, size[0], size[1] + size[2]):
            seen = visible(cone({setting.mask: tokens}, setting.sizes(*size)))
            windows = [window for window in windows if seen is not None and _agrees(seen, tokens, size, window)]
        if not windows:
            return "its mask is not that of a causal decoder, with or without a window"
    return windows[0]


def visible(mask: Tensor) -> Tensor | None:
    """Where a mask allows a look: bool as it is; of numbers that are added, 0. None where it adds something else."""
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    forbidden = mask <= torch.finfo(mask.dtype).min / 2
    return allowed if bool((allowed | forbidden).all()) else None


def expected(tokens: Tensor, length: int, window: int) -> Tensor:
    """bool [batch, 1, length, total]: what the last `length` tokens see, by the definition."""
    total = tokens.shape[1]
    columns = torch.arange(total)
    rows = torch.arange(total - length, total)[:, None]
    causal = columns <= rows
    near = columns > rows - window if window else torch.ones_like(causal)
    return (causal & near)[None, None] & (tokens != 0)[:, None, None, :]


def _agrees(seen: Tensor, tokens: Tensor, size: tuple[int, int, int], window: int) -> bool:
    wanted = expected(tokens, size[1], window)
    real = (tokens != 0)[:, -size[1] :]
    return bool((seen.expand(size[0], -1, size[1], tokens.shape[1]) == wanted).all(-1).all(1)[real].all())


def _around(numbers: list[int]) -> Iterator[tuple[int, int, int]]:
    for number in numbers:
        yield from ((1, 2, number + by) for by in (-2, -1, 0, 1, 2))
        yield (2, 1, 2 * number + 3)
        if number <= 64:
            yield (2, number + 3, 0)


def _numbers(cone: Cone) -> Iterator[int]:
    """Integers of the part that a length may be compared with."""
    for node in cone.nodes:
        yield from (abs(number) for number in _literals((node.args, tuple(node.attrs.values()))) if 2 <= abs(number) <= _LARGEST)
    for const in cone.consts:
        if const.numel == 1 and not const.tensor.torch_dtype.is_floating_point:
            yield from (abs(number) for number in [int(const.load())] if 2 <= abs(number) <= _LARGEST)


def _literals(arg: Arg) -> Iterator[int]:
    if isinstance(arg, tuple | list):
        for item in arg:
            yield from _literals(item)
    elif isinstance(arg, int) and not isinstance(arg, bool):
        yield arg
