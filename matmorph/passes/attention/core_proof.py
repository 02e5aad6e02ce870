"""Proof of what an attention computes: softmax(cap(scale q k')) v over what its mask allows, with a logit of its own (a sink) beside the
keys or without. The numbers that it may have are those that stand in the part; one set of them must give what the part gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from matmorph.ir.attention_ops import attended
from matmorph.ir.core import Arg, Const, Value
from matmorph.passes.attention.cone import Cone, Parts
from matmorph.passes.attention.core import Core
from matmorph.passes.attention.mask_proof import visible
from matmorph.passes.attention.setting import Setting, masks_of

_SIZES = ((2, 5, 0), (2, 3, 4), (1, 1, 6))
_STRENGTHS = (1.0, 6.0)
"""Of the queries: scores that a cap leaves as they are, and scores that it bends."""
_TOLERANCE = 2e-5
"""Relative to the largest result: float32 against float64, sums of some tens of numbers behind a softmax of scores up to some tens."""


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """`mask`: what says who sees whom, None where nothing does. `softcap` 0: none."""

    mask: Value | None
    scale: float
    softcap: float
    sink: Const | None


def proved_formula(parts: Parts, core: Core, setting: Setting) -> Formula | str:
    """The formula, or why it is none."""
    cut = {core.query, core.key.present, core.value.present}
    cone = parts.cone(core.result, cut)
    if cone is None or any(leaf is not setting.mask for leaf in cone.leaves):
        return "it reads something beside queries, keys, values and the mask of tokens"
    found = _masks(cone, cut, core)
    if len(found) > 1:
        return "several masks meet in it"
    mask = found[0] if found else None
    masked = parts.cone(mask) if mask is not None else None
    given = list(_cases(cone, masked, core, setting))
    if any(case is None for case in given):
        return "its mask adds other numbers than 0 and the lowest"
    sinks = [const for const in cone.consts if const.numel == core.heads[0] and const.tensor.torch_dtype.is_floating_point]
    floats = sorted({number for node in cone.nodes for number in _floats((node.args, tuple(node.attrs.values())))})
    scales = dict.fromkeys([*(number for number in floats if number > 0), core.size**-0.5, 1.0, *(1 / n for n in floats if n > 0)])
    caps = [0.0, *(number for number in floats if number > 1e-3)]
    for scale, cap, sink in product(scales, caps, [*sinks, None]):
        if all(case is not None and _fits(case, scale, cap, sink) for case in given):
            return Formula(mask, scale, cap, sink)
    return "it is not a softmax of scaled products, weighting the values"


def _masks(cone: Cone, cut: set[Value], core: Core) -> list[Value]:
    """What does not depend on the cut, has a number per pair of tokens, and meets what does depend on it."""
    dependent, found = set(cut), dict[Value, None]()
    pair = (core.length, core.key.total)
    for node in cone.nodes:
        if not dependent.isdisjoint(node.inputs()):
            dependent.update(node.outputs)
            others = (value for value in node.inputs() if value not in dependent and not isinstance(value, Const))
            found.update(dict.fromkeys(value for value in others if getattr(value.type, "shape", ())[-2:] == pair))
    return list(found)


def _cases(cone: Cone, masked: Cone | None, core: Core, setting: Setting) -> Iterator[tuple[Any, ...] | None]:
    """(query, key, value, allowed, rows that are tokens, result) at several sizes; None where the mask is none."""
    random = torch.Generator().manual_seed(0)
    (heads, few), wide = core.heads, int(core.value.past.tensor.shape[3])
    for (batch, length, before), strength in product(_SIZES, _STRENGTHS):
        sizes, total = setting.sizes(batch, length, before), before + length
        query = torch.randn(batch, heads, length, core.size, generator=random) * strength * core.size**0.5
        key = torch.randn(batch, few, total, core.size, generator=random)
        value = torch.randn(batch, few, total, wide, generator=random)
        tokens = list(masks_of(setting, batch, total))[-1]
        allowed = torch.ones(length, total, dtype=torch.bool) if masked is None else visible(masked({setting.mask: tokens}, sizes))
        if allowed is None:
            yield None
            continue
        given = {core.query: query, core.key.present: key, core.value.present: value, setting.mask: tokens}
        yield query, key, value, allowed, (tokens != 0)[:, before:], cone(given, sizes)


def _fits(case: tuple[Any, ...], scale: float, cap: float, sink: Const | None) -> bool:
    query, key, value, allowed, real, found = case
    logit = None if sink is None else sink.load().detach().reshape(-1).double()
    wanted = attended(query.double(), key.double(), value.double(), allowed, scale, cap, logit)
    error = (found.double() - wanted).abs().amax((1, 3))[real].max()
    return bool(error <= _TOLERANCE * wanted.abs().max())


def _floats(arg: Arg) -> Iterator[float]:
    if isinstance(arg, tuple | list):
        for item in arg:
            yield from _floats(item)
    elif isinstance(arg, float | int) and not isinstance(arg, bool) and arg != 0 and math.isfinite(arg) and abs(arg) < 1e6:
        yield float(arg)
