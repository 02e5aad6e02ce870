"""What conditions may ask of a graph and its sites: the `SelectionContext` of specs, over passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from matmorph.errors import RewriteError
from matmorph.ir.site import Site
from matmorph.passes.selection.survey import Survey
from matmorph.specs.pattern import Pattern
from matmorph.specs.pattern_match import Occurrence, find, operator_counts

Numbers = TypeVar("Numbers", bound=tuple[float, ...])


@dataclass(frozen=True, slots=True)
class GraphContext:
    """See `SelectionContext`."""

    layers: Callable[[Site], int]
    occurrences: Callable[[Pattern], tuple[Occurrence, ...]]
    operator_counts: Callable[[Pattern], Mapping[str, int]]
    spectra: Callable[[Site], tuple[tuple[float, ...], ...] | None]
    magnitudes: Callable[[Site], tuple[tuple[float, float], ...] | None]
    block: Callable[[Site], str | None]


def context_of(survey: Survey) -> GraphContext:
    """The context of a survey; a pattern is searched, blocks are found and a weight is measured at most once, and only when asked."""

    @cache
    def occurrences(pattern: Pattern) -> tuple[Occurrence, ...]:
        return find(pattern, survey.graph, survey.sites)

    @cache
    def kinds() -> Mapping[Site, str]:
        return {site: block.kind for block in survey.blocks for site in block.sites}

    return GraphContext(
        layers=lambda site: survey.layers.get(site.container, 0),
        occurrences=occurrences,
        operator_counts=lambda pattern: operator_counts(pattern, survey.graph, survey.sites),
        spectra=cache(spectra),
        magnitudes=cache(magnitudes),
        block=lambda site: kinds().get(site),
    )


def spectra(site: Site) -> tuple[tuple[float, ...], ...] | None:
    """The singular values of `site.weight()`, of each matrix of an expert stack, in float64; None on the meta device, which has
    no numbers. RewriteError: NaN or Inf in the weight."""
    return _each(site, _singular_values)


def magnitudes(site: Site) -> tuple[tuple[float, float], ...] | None:
    """The largest |w| and the root mean square of each matrix; otherwise as `spectra`."""
    return _each(site, lambda w: (float(w.abs().max()), float(w.square().mean().sqrt())))


def _singular_values(w: torch.Tensor) -> tuple[float, ...]:
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    return tuple(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().tolist())


def _each(site: Site, measure: Callable[[torch.Tensor], Numbers]) -> tuple[Numbers, ...] | None:
    """Of one finite matrix at a time."""
    weight = site.weight().detach()
    if weight.is_meta:
        return None
    found: list[Numbers] = []
    for matrix in weight.unbind(0) if weight.dim() == 3 else (weight,):
        exact = matrix.to(torch.float64)
        if not bool(torch.isfinite(exact).all()):
            raise RewriteError(f"{site.path}: the weight has NaN or Inf")
        found.append(measure(exact))
    return tuple(found)
