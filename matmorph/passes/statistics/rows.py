"""What of a batch is rows of a matmul: which value, how it is laid out as rows, which rows count, and which of them are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from matmorph.ir.core import Graph, Value
from matmorph.ir.site import Application, Site
from matmorph.ir.types import as_dim
from matmorph.passes.linalg.svd import power_of_two
from matmorph.passes.rewriting.row_view import RowStep, apply, row_view
from matmorph.passes.statistics.token_mask import of_rows, token_mask

HELD_OUT_EVERY = 5
"""One in so many batches, or rows, is kept from what is fitted."""

Held: TypeAlias = Literal["none", "all", "some"]
"""What of a batch is held out: every fifth of its samples where there are too few batches."""
Pick: TypeAlias = Callable[[Tensor], Tensor]
"""Picks along the first axis."""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one application: a value, how it is read as rows, which matrix each row goes to, and which rows count."""

    x: Value
    enter: tuple[RowStep, ...]
    select: Value | None
    experts: int | None
    mask: Value | None

    @property
    def values(self) -> tuple[Value, ...]:
        return tuple(value for value in (self.x, self.select, self.mask) if value is not None)


def sources(graph: Graph, site: Site) -> tuple[Source, ...]:
    """One per application."""
    return tuple(source(graph, site, application) for application in site.applications)


def source(graph: Graph, site: Site, application: Application) -> Source:
    view = row_view(site, application)
    return Source(application.x, view.enter, application.select, site.batch, _mask(graph, site, application))


def _mask(graph: Graph, site: Site, application: Application) -> Value | None:
    """The attention mask, where its axes are those in front of the features of x, apart or flattened into one."""
    mask = token_mask(graph)
    if mask is None or site.form == "conv1x1" or site.batch is not None:
        return None
    leading = application.x.tensor.shape[:-1]
    return mask.value if leading in (mask.axes, (as_dim(prod(mask.axes)),)) else None


def groups(one: Source, read: Callable[[Value], Any], pick: Pick) -> Iterator[tuple[int | None, Tensor]]:
    """(which matrix of a stack, its rows [n, in]) of one batch, float32 or better; None for what is no stack, and for
    rows that all matrices of one read."""
    rows = apply(one.enter, read(one.x).detach())
    rows = rows if rows.dtype == torch.float64 else rows.float()
    rows = rows if power_of_two(rows) == 1 else rows.double()  # squares of float32 would leave its range
    if one.experts is None:
        yield None, _plain(rows, None if one.mask is None else of_rows(read(one.mask), prod(rows.shape[:-1])), pick)
    elif one.select is None:
        stacked = _all_experts(rows, pick)
        yield from [(None, stacked[0])] if len(stacked) == 1 else enumerate(stacked)
    else:
        yield from _picked_experts(rows, read(one.select), pick)


def _plain(rows: Tensor, mask: Tensor | None, pick: Pick) -> Tensor:
    """Picked along the first axis, the samples, where it is long enough; else row by row."""
    total = prod(rows.shape[:-1])
    samples = len(rows) if rows.dim() > 1 and len(rows) >= HELD_OUT_EVERY else total
    sides = samples, total // max(samples, 1)
    flat = pick(rows.reshape(*sides, rows.shape[-1]))
    return flat.flatten(0, 1) if mask is None else flat[pick(mask.reshape(sides)) != 0]


def _all_experts(rows: Tensor, pick: Pick) -> Tensor:
    """Every expert has rows of its own [.., E, rows, in], or all read the same (no such axis, or one of size 1). [E or 1, n, in]."""
    stacked = rows.unsqueeze(0) if rows.dim() == 2 else rows.movedim(-3, 0)
    return pick(stacked.reshape(len(stacked), -1, rows.shape[-1]).transpose(0, 1)).transpose(0, 1)


def _picked_experts(rows: Tensor, picked: Tensor, pick: Pick) -> Iterator[tuple[int, Tensor]]:
    """Row group k [n, in] goes to expert `picked[k]`."""
    grouped = rows.reshape(len(picked), -1, rows.shape[-1])
    for expert in sorted(set(picked.tolist())):
        yield expert, pick(grouped[picked == expert].reshape(-1, rows.shape[-1]))


def held_of(number: int, enough: bool) -> Held:
    """What of batch `number`, from 0, is held out. `enough`: whether there are batches enough to hold out whole ones."""
    return "some" if not enough else "all" if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "none"


def _every(rows: Tensor) -> Tensor:
    return rows


def _fifth(rows: Tensor) -> Tensor:
    return rows[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]


def _others(rows: Tensor) -> Tensor:
    return rows[torch.arange(len(rows), device=rows.device) % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]


PARTS: Mapping[Held, Sequence[tuple[bool, Pick]]] = {
    "none": [(False, _every)],
    "all": [(True, _every)],
    "some": [(False, _others), (True, _fifth)],
}
"""(whether it is held out, which rows) of the parts that a batch goes into."""
