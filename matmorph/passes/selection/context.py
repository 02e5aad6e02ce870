"""What conditions may ask of a graph and its sites: the `SelectionContext` of specs, over passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from matmorph.errors import RewriteError
from matmorph.ir.site import Site
from matmorph.passes.selection.survey import Survey
from matmorph.specs.conditions.base import Measure
from matmorph.specs.pattern import Pattern
from matmorph.specs.pattern_match import Occurrence, find, operator_counts


@dataclass(frozen=True, slots=True)
class GraphContext:
    """See `SelectionContext`."""

    layers: Callable[[Site], int]
    occurrences: Callable[[Pattern], tuple[Occurrence, ...]]
    operator_counts: Callable[[Pattern], Mapping[str, int]]
    measured: Callable[[Measure, Site], float | None]
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
        measured=cache(measured),
        block=lambda site: kinds().get(site),
    )


def measured(measure: Measure, site: Site) -> float | None:
    """A number of `site.weight()`, measured one matrix at a time, in float64; of an expert stack, the largest over its matrices. None for
    a weight on the meta device, which has no numbers. RewriteError: NaN or Inf in the weight."""
    weight = site.weight().detach()
    if weight.is_meta:
        return None
    numbers = []
    for matrix in weight.unbind(0) if weight.dim() == 3 else (weight,):
        exact = matrix.to(torch.float64)
        if not bool(torch.isfinite(exact).all()):
            raise RewriteError(f"{site.path}: the weight has NaN or Inf")
        numbers.append(measure(exact))
    return max(numbers)
