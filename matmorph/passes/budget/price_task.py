"""The price of what one site offers: the errors of all its options, which need nothing of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from matmorph.ir.site import Choice, Site
from matmorph.passes.linalg.whiten import size_on_outputs, weighted
from matmorph.passes.methods.protocol import Error, Methods, SiteStats, site_method
from matmorph.passes.methods.weights import readable, weighting_of
from matmorph.passes.work.task import described, with_weight
from matmorph.specs.schema import MethodUse


@dataclass(frozen=True, slots=True)
class Energies:
    """Mean squared norms of a site's output for one row: as it is, and as it is felt (None without the gradients' moment)."""

    output: float
    felt: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """`errors`: number of the alternative, choice, and its error."""

    errors: tuple[tuple[int, Choice, Error], ...]
    energies: Energies | None


@dataclass(frozen=True, slots=True, eq=False)
class PriceTask:
    """`site`: bare. `alternatives`: those that have choices, with their numbers. `felt`: whether energies are asked for."""

    kind: ClassVar[str] = "price"
    site: Site
    alternatives: tuple[tuple[int, MethodUse, tuple[Choice, ...]], ...]
    stats: SiteStats | None
    weight: Tensor
    felt: bool

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def uses(self) -> tuple[MethodUse, ...]:
        return tuple(use for _, use, _ in self.alternatives)

    def identity(self) -> Any:
        asked = tuple((number, use.method, use.spec, choices) for number, use, choices in self.alternatives)
        stats = None if self.stats is None else replace(self.stats, shared=None)
        return (self.kind, described(self.site), asked, stats, self.weight, self.felt)

    def run(self, methods: Methods) -> Prices:
        """One call of `errors`, so one decomposition, per alternative; what alternatives have in common is found once."""
        site = with_weight(self.site, self.weight)
        stats = None if self.stats is None else replace(self.stats, shared={})
        errors = tuple(
            (number, choice, error)
            for number, use, choices in self.alternatives
            for choice, error in zip(choices, _errors(methods, site, use, choices, stats), strict=True)
        )
        return Prices(errors, energies_of(site, stats) if self.felt else None)


def _errors(methods: Methods, site: Site, use: MethodUse, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
    return site_method(methods, use.method).errors(site, use.spec, choices, stats)


def energy(site: Site, stats: SiteStats | None, weighting: Tensor | None = None) -> float:
    """Mean squared norm of the site's output for one row, its bias left out; without statistics |W|^2, and for a table that of one row.
    With a `weighting` C that of C^T times the output."""
    w = readable(site, site.weight())
    if stats is None:
        return square(w) / (site.out_features if site.form == "embedding" else 1)
    rows = max(float(torch.as_tensor(stats.rows).sum()), 1.0)
    return size_on_outputs(weighted(w, weighting), stats.second_moment) ** 2 / rows


def square(w: Tensor) -> float:
    """|W|^2."""
    return float(torch.linalg.vector_norm(w, dtype=torch.float64)) ** 2


def energies_of(site: Site, stats: SiteStats | None) -> Energies:
    weighting = weighting_of(site, stats)
    return Energies(energy(site, stats), None if weighting is None else energy(site, stats, weighting))
