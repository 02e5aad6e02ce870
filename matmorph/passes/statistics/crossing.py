"""What a matmul reads in the original model and in the one that is rewritten in front of it, row by row beside each other.

Both streams stand at the same node of the graph, and the batches are looked at one by one. Where nothing in front was rewritten yet, and
for a stack of experts (whose rows may have gone to other experts), there is one moment of what the matmul reads now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import inf

import torch
from torch import Tensor

from matmorph.errors import InputError
from matmorph.ir.core import Graph
from matmorph.ir.site import Site
from matmorph.passes.linalg.massive import Norms
from matmorph.passes.linalg.target import CrossMoments, Directions, target
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.statistics.calibrate import SPILL_ABOVE, Batches, Sums, accumulator, add_rows, inverse, new_sums, release, stats_of
from matmorph.passes.statistics.rows import PARTS, Held, Source, groups, sources
from matmorph.passes.statistics.stream import Read, Stream

_STACK = "a stack of experts is fitted to what it reads now, with its own weights as the target: rows may go to other experts than before"


@dataclass(slots=True, eq=False)
class _Pair:
    """Running sums over rows x of the original and y of the rewritten model: x x^T, x y^T, y y^T."""

    original: Tensor
    cross: Tensor
    rewritten: Tensor
    rows: int = 0
    weights: float = 0.0

    @classmethod
    def of(cls, size: int, spill: bool) -> _Pair:
        original, cross, rewritten = (accumulator((size, size), spill) for _ in range(3))
        return cls(original, cross, rewritten)

    def add(self, x: Tensor, y: Tensor, weights: float) -> None:
        for moment, product in ((self.original, x.T @ x), (self.cross, x.T @ y), (self.rewritten, y.T @ y)):
            moment += product.to(moment)
            release(moment)
        self.rows += len(x)
        self.weights += weights

    def moments(self, path: str, weighted: bool) -> CrossMoments | None:
        """None without a row. InputError where one of them is not finite."""
        if not self.rows:
            return None
        found = (self.original, self.cross, self.rewritten)
        if not all(bool(torch.isfinite(moment.diagonal()).all()) for moment in found):
            raise InputError(f"the calibration data makes NaN or infinity at the input of {path}")
        if weighted and self.weights:
            for moment in found:
                moment *= self.rows / self.weights
            self.weights = self.rows
        return CrossMoments(*found, self.rows)


@dataclass(slots=True, eq=False)
class _Sides:
    """The rows fitted to, and those held out."""

    fitted: _Pair
    held: _Pair
    norms: Norms = field(default_factory=Norms)

    def add(self, one: Source, before: Read, now: Read, held: Held, weighted: bool) -> None:
        for out, pick in PARTS[held]:
            for (_, x), (_, y) in zip(groups(one, before, pick), groups(one, now, pick), strict=True):
                squares = x.square().sum(1)
                self.norms.add(squares)
                weights = inverse(squares) if weighted else torch.ones_like(squares)
                root = weights.sqrt().unsqueeze(1)
                x, y = (x * root, y.to(x) * root) if weighted else (x, y.to(x))
                (self.held if out else self.fitted).add(x, y, float(weights.sum(dtype=torch.float64)))


def measure(
    graph: Graph, sites: Iterable[Site], aiming: Iterable[Site], batches: Batches, now: Stream | None, stop: int, weighted: bool
) -> dict[Site, SiteStats]:
    """Statistics of sites whose inputs exist at node `stop` or before. `aiming`: those that get a target. `batches`: of the original,
    `now`: of the rewritten model, both at one node at which all that is missing can still be computed; None where both are the same."""
    keys = {site: sources(graph, site) for site in sites}
    sides: dict[tuple[Source, ...], _Sides] = {}
    alone: dict[tuple[Source, ...], Sums] = {}
    size = sum(8 * 6 * site.in_features**2 * (site.batch or 1) for site in {key: site for site, key in keys.items()}.values())
    for site, key in keys.items():
        if now is None or site.batch is not None:
            alone.setdefault(key, new_sums(site, size > SPILL_ABOVE, True))
        else:
            fitted, held = (_Pair.of(site.in_features, size > SPILL_ABOVE) for _ in range(2))
            sides.setdefault(key, _Sides(fitted, held))
    wanted = {value for key in keys.values() for one in key for value in one.values}
    before = batches.stream.looking(stop, wanted)
    after = before if now is None else now.looking(stop, wanted)
    for number in range(len(batches.counts)):
        first = before(number)
        second = first if now is None else after(number)
        for key, both in sides.items():
            for one in key:
                both.add(one, first, second, batches.held(number), weighted)
        for key, sums in alone.items():
            for one in key:
                add_rows([sums], one, second, batches.held(number), weighted)
    found = {site: stats_of(site, alone[key], weighted, _STACK if now is not None else None) for site, key in keys.items() if key in alone}
    return found | _aimed({site: sides[key] for site, key in keys.items() if key in sides}, set(aiming), weighted)


def _aimed(sites: Mapping[Site, _Sides], aiming: set[Site], weighted: bool) -> dict[Site, SiteStats]:
    directions: dict[_Sides, Directions] = {}
    found: dict[Site, SiteStats] = {}
    for site, sides in sites.items():
        fitted, held = (pair.moments(site.path, weighted) for pair in (sides.fitted, sides.held))
        if fitted is None:
            raise InputError(f"no row of the calibration data reaches {site.path}")
        stats = SiteStats(
            fitted.rewritten,
            fitted.rows,
            held_out=None if held is None else held.rewritten,
            held_rows=0 if held is None else held.rows,
            massive=sides.norms.massive(),
            weighted=weighted,
            across=fitted,
            held_across=held,
        )
        if site in aiming:
            if sides not in directions:
                directions[sides] = Directions.of(fitted, held)
            stats = _with_target(site, stats, directions[sides])
        found[site] = stats
    return found


def _with_target(site: Site, stats: SiteStats, directions: Directions) -> SiteStats:
    w = site.weight().detach()
    w = w if w.dtype == torch.float64 else w.float()
    found = target(w, directions)
    weight = found.weight.to(w.dtype)
    plain, own = (stats.output_error(w, matrix) for matrix in (w, weight))
    if found.strength == inf:
        note = f"target: the weight itself, no fit to the rewritten inputs is better on rows held out; output error {plain:.3g}"
    else:
        note = (
            f"target: least squares on the rewritten inputs, drawn to the weight by {found.strength:.2g} of their mean square; output "
            f"error {own:.3g}, of the weight itself {plain:.3g}"
        )
    return replace(stats, target=weight, notes=(note,))
