"""How much each unit of a block matters, and which stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from matmorph.errors import RewriteError
from matmorph.ir.site import Site
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.methods.weights import readable
from matmorph.passes.pruning.axes import HEADS, QK, WIDTH, AxisProduct, Concat, Counts, KeptUnits, V, size_of, totals, units_of
from matmorph.passes.pruning.find_blocks import Block

Scores: TypeAlias = Mapping[str, Tensor]
"""By unit: float64 [n], or [heads, n] where each key/value head keeps its own."""

_PEAK = 10.0
"""TransAct's weight of a head's largest dimension: its score is mean_j s_j + (10 / d) max_j s_j."""


def block_scores(block: Block, score: str, units: tuple[str, ...], stats: Mapping[Site, SiteStats]) -> Scores:
    """Scores of the given units: `activation` (L2 norm over the calibration tokens), `weight` (norm of the rows and columns), or `taylor`
    (sum over the tokens of |gradient x activation|, see `passes.statistics.taylor`)."""
    energy, root = _ENERGIES[score](block, stats), _root(score)
    found: dict[str, Tensor] = {}
    for unit in units:
        if unit == WIDTH:
            found[unit] = root(energy)
        elif unit == HEADS:
            found[unit] = _head_scores(block.axis, root(energy))
        elif unit == V:
            found[unit] = root(_per_head(block, V, block.axis, energy))
        else:
            found[unit] = _pair_scores(block, score, stats)
    return found


def kept_units(block: Block, scores: Scores, counts: Counts) -> KeptUnits:
    """The units with the largest scores, as ascending indices; of equal ones the first."""
    return {unit: _largest(scores[unit], count) for unit, count in counts.items()}


def _largest(scores: Tensor, count: int) -> Tensor:
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.sort(order, dim=-1).values


def _root(score: str) -> Callable[[Tensor], Tensor]:
    """From what is summed over features to a score: effects on the loss add up as they are, norms as squares."""
    return torch.clone if score == "taylor" else torch.sqrt


def _input_energy(block: Block, stats: Mapping[Site, SiteStats]) -> Tensor:
    """Sum over the calibration tokens of x_j^2 at the consumer's input."""
    return _stats(block.consumer, stats).second_moment.diagonal().double().cpu().clamp_min(0)


def _stats(site: Site, stats: Mapping[Site, SiteStats]) -> SiteStats:
    found = stats.get(site)
    if found is None:
        raise RewriteError(f"{site.path}: transact needs calibration data")
    return found


def _input_taylor(block: Block, stats: Mapping[Site, SiteStats]) -> Tensor:
    return _taylor(block.consumer, _stats(block.consumer, stats).input_taylor)


def _taylor(site: Site, found: Tensor | None) -> Tensor:
    if found is None:
        raise RewriteError(f"{site.path}: score taylor needs gradients of a loss")
    return found


def _weight_energy(block: Block, stats: Mapping[Site, SiteStats]) -> Tensor:
    """(norm of the consumer's column times norm of the producers' rows)^2 of every feature: of v in attention, of all in an MLP."""
    columns = readable(block.consumer, block.consumer.weight()).double().square().sum(0).cpu()
    rows = torch.zeros_like(columns)
    for site, part, axis, start in _parts(block):
        if part in ("q", "k"):
            continue
        w = readable(site, site.weight())[start : start + int(size_of(axis))].double().cpu()
        rows += _repeated(axis, block.axis, w.square().sum(1))
    return columns * rows


def _parts(block: Block) -> Iterator[tuple[Site, str, AxisProduct, int]]:
    """(site, q, k, v or "", axis, first row) of what each producer gives."""
    for producer in block.producers:
        axes = producer.axis.parts if isinstance(producer.axis, Concat) else (producer.axis,)
        names = producer.site.role.rpartition(".")[2] if block.kind == "attention" else " " * len(axes)
        start = 0
        for name, axis in zip(names, axes, strict=True):
            yield producer.site, name.strip(), axis, start
            start += int(size_of(axis))


def _repeated(axis: AxisProduct, whole: AxisProduct, values: Tensor) -> Tensor:
    """One number per position of v's rows, repeated for every query head that reads them."""
    if axis == whole:
        return values
    groups = whole[0].unit == HEADS
    head = int(whole[-1].size)
    table = values.reshape(-1, 1, head) if groups else values.reshape(1, -1, head)
    return table.expand(-1, int(size_of(whole)) // len(values), head).reshape(-1)


def _head_scores(axis: AxisProduct, scores: Tensor) -> Tensor:
    """[groups]: of all query heads of a group together."""
    dim = int(axis[-1].size)
    heads = scores.reshape(-1, dim)
    each = heads.mean(1) + _PEAK / dim * heads.amax(1)
    groups = int(next(atom.size for atom in axis if atom.unit == HEADS))
    return each.reshape(groups, -1).sum(1)


def _per_head(block: Block, unit: str, axis: AxisProduct, energy: Tensor) -> Tensor:
    """Energies of a unit [heads, n], or [n] where all heads must keep the same."""
    own = HEADS in units_of(axis) and not block.shared(unit)
    return totals(axis, energy, HEADS, unit) if own else totals(axis, energy, unit)


def _pair_scores(block: Block, score: str, stats: Mapping[Site, SiteStats]) -> Tensor:
    """Of dimensions (rotary pairs) of q and k: |q_p| |k_p|, what they can put into the attention's scores. Rotation keeps the norm of a
    pair. Under `taylor` the geometric mean of both sides' effects on the loss, of which there is one: q_p k_p goes.

    Under `activation` the norms are those on the calibration data, without the part that q's bias shares with the mean of its input, and
    without k's bias, which moves all scores of a query alike.
    """
    sides: dict[str, Tensor] = {}
    for site, part, axis, start in _parts(block):
        if part not in ("q", "k"):
            continue
        rows = slice(start, start + int(size_of(axis)))
        own = _per_head(block, QK, axis, _OUTPUTS[score](site, part, rows, stats))
        sides[part] = sides.get(part, torch.zeros_like(own)) + own
    return (sides["q"] * sides["k"]).sqrt()


def _output_weight(site: Site, part: str, rows: slice, stats: Mapping[Site, SiteStats]) -> Tensor:
    return _rows(site, rows).square().sum(1)


def _output_energy(site: Site, part: str, rows: slice, stats: Mapping[Site, SiteStats]) -> Tensor:
    w, found = _rows(site, rows), _stats(site, stats)
    energy = ((w @ found.second_moment.double().cpu()) * w).sum(1).clamp_min(0)
    if part == "q" and site.bias is not None:
        energy = energy + int(found.rows) * site.bias.load().detach().reshape(-1)[rows].double().cpu().square()
    return energy


def _output_taylor(site: Site, part: str, rows: slice, stats: Mapping[Site, SiteStats]) -> Tensor:
    return _taylor(site, _stats(site, stats).output_taylor)[rows]


def _rows(site: Site, rows: slice) -> Tensor:
    return readable(site, site.weight())[rows].double().cpu()


_ENERGIES: Mapping[str, Callable[[Block, Mapping[Site, SiteStats]], Tensor]] = {
    "activation": _input_energy,
    "weight": _weight_energy,
    "taylor": _input_taylor,
}
"""By score: of every feature of the consumer's input, what is summed over the features of a unit."""
_OUTPUTS: Mapping[str, Callable[[Site, str, slice, Mapping[Site, SiteStats]], Tensor]] = {
    "activation": _output_energy,
    "weight": _output_weight,
    "taylor": _output_taylor,
}
"""The same of rows of what gives q or k: (site, q or k, rows, stats)."""
