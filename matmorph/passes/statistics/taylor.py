"""Taylor scores: how much a loss feels that a feature is set to zero, to first order (Molchanov et al., arXiv 1611.06440).

A feature x_j of one row that becomes zero changes the loss by -x_j dL/dx_j. Its score is the sum of |x_j dL/dx_j| over all rows of the
calibration data, L being the loss summed over the samples. Rows that the loss does not depend on (padding) have no gradient and count
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import InputError, SpecError
from matmorph.ir.core import Graph, Value
from matmorph.ir.site import Site, Statistic
from matmorph.passes.methods.protocol import Methods, SiteStats, block_method
from matmorph.passes.rewriting.block_pass import BlockJob
from matmorph.passes.statistics.loss_gradients import loss_gradients
from matmorph.progress import StepProgress
from matmorph.specs.schema import MethodUse, Train

_HINT = "for instance: train: {loss: cross_entropy}"


def reads_labels(uses: Iterable[MethodUse], methods: Methods) -> bool:
    """Whether any of these methods needs gradients of the loss."""
    return any(Statistic.TAYLOR in methods[use.method].needs(use.spec) for use in uses)


def taylor(
    graph: Graph,
    sites: Sequence[Site],
    batches: Iterable[Any],
    samples: int,
    train: Train,
    use: MethodUse,
    progress: StepProgress | None = None,
) -> dict[Site, tuple[Tensor, Tensor]]:
    """(scores of the input features [in], of the output features [out]) of each site, float64, summed over its applications.

    `use`: the method that asks, for errors. Raises SpecError where a batch has no labels, InputError as `calibrate` and where the loss does
    not depend on a site on this data.
    """
    owners: dict[Value, list[Tensor]] = {}
    found = {}
    for site in sites:
        found[site] = (torch.zeros(site.in_features, dtype=torch.float64), torch.zeros(site.out_features, dtype=torch.float64))
        for application in site.applications:
            for value, scores in zip((application.x, application.output), found[site], strict=True):
                owners.setdefault(value, []).append(scores)

    def unlabelled(what: str, hint: str) -> SpecError:
        return SpecError(f"{use.method} with score taylor needs labels, and {what}", at=use.at, details=[hint])

    def take(value: Value, x: Tensor, gradient: Tensor | None) -> None:
        if gradient is not None:
            rows = (x.double() * gradient.double()).abs().reshape(-1, x.shape[-1]).sum(0).cpu()
            for scores in owners[value]:
                scores += rows

    loss_gradients(graph, list(owners), batches, samples, train, unlabelled, take, progress)
    for site, pair in found.items():
        _refuse_nothing(site, *pair)
    return found


def _refuse_nothing(site: Site, *scores: Tensor) -> None:
    for each in scores:
        if not bool(torch.isfinite(each).all()):
            raise InputError(f"the calibration data makes gradients of NaN or infinity at {site.path}")
        if not bool(each.any()):
            raise InputError(f"the loss does not depend on {site.path} on the calibration data: score taylor has nothing to go by")


def with_taylor(
    graph: Graph,
    jobs: Sequence[BlockJob],
    methods: Methods,
    stats: Mapping[Site, SiteStats],
    batches: Iterable[Any] | None,
    samples: int,
    train: Train | None,
    progress: StepProgress | None = None,
) -> Mapping[Site, SiteStats]:
    """`stats` with the Taylor scores of the blocks whose methods ask for them."""
    asking = [job for job in jobs if reads_labels([job.use], methods)]
    if not asking or batches is None or train is None:
        return stats
    sites: dict[Site, None] = {}
    for job in asking:
        pruning = block_method(methods, job.use.method)
        if pruning.check(job.block, job.use.spec) is None:
            sites.update(dict.fromkeys(pruning.reads(job.block, job.use.spec)))
    found = taylor(graph, list(sites), batches, samples, train, asking[0].use, progress) if sites else {}
    return {**stats, **{site: replace(stats[site], input_taylor=pair[0], output_taylor=pair[1]) for site, pair in found.items()}}


def refuse_without_loss(jobs: Iterable[BlockJob], methods: Methods, train: Train | None) -> None:
    """SpecError at the method that needs gradients of a loss where the spec has none."""
    job = next((job for job in jobs if reads_labels([job.use], methods)), None) if train is None else None
    if job is not None:
        raise SpecError(
            f"rule {job.rule.name}: score taylor is made of gradients of a loss, and the spec has none", at=job.use.at, details=[_HINT]
        )
