"""How much the model behind a site feels an error of its output: `calibration.sensitivity`.

With g the gradient of a scalar at one row of a site's output, an error E of the weight moves the scalar by sum of g^T E x over the rows, to
first order. Taking gradients and inputs as independent (the Kronecker-factored Fisher of K-FAC, arXiv 1503.05671), the mean square of that
is tr(G E H E^T), with G the sum of g g^T over the rows and H the mean of x x^T. The scalars are

fisher: the loss, with labels. For a log-likelihood half of the mean square is the expected change to second order: the Fisher information
stands for the Hessian (Kunstner et al., arXiv 1905.12558, on when it does). G is that of one sample.

output, kl: random ones, so that the mean square is the change of an output of the model itself (`probes`). They need no labels.

G of all sites together are in one unit, which makes errors of different sites comparable: what the budget adds up. Whitened methods fit
their factors to the same measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import InputError, SpecError
from matmorph.ir.core import Graph, Value
from matmorph.ir.site import Site
from matmorph.passes.linalg.svd import power_of_two
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.rewriting.row_view import RowStep, row_view, undo
from matmorph.passes.statistics.backward import PASS_BYTES, Backward
from matmorph.passes.statistics.calibrate import bound_batch, cut_batch
from matmorph.passes.statistics.loss_gradients import loss_gradients
from matmorph.passes.statistics.moment_store import MomentStore
from matmorph.passes.statistics.probes import Probe, probe_of
from matmorph.passes.statistics.stream import of_batch
from matmorph.passes.statistics.token_mask import TokenMask, of_rows, token_mask
from matmorph.progress import StepProgress
from matmorph.specs.schema import Calibration, Spec, Train

WIDEST = 1 << 14
"""Output features of a site, above which only the trace of G is kept: an output head's G would be larger than its weight."""
ENOUGH = 6
"""Rows of the output per feature of the widest moment, behind which no more samples are read: a pass back is the dearest of all."""
_ROWS = 1 << 13
"""Rows that are read in any case."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """`moments`: G [out, out] of sites with matmuls. `slopes`: tr(G) / (features of the output) of all sites: what a squared error of one
    entry of an output counts where its direction is not known. `lookups`: the same of rows that are looked up in a site's table."""

    moments: Mapping[Site, Tensor]
    slopes: Mapping[Site, float]
    lookups: Mapping[Site, float]


def sensitivity(
    graph: Graph, calibration: Calibration, spec: Spec, sites: Sequence[Site], batches: Iterable[Any] | None, progress: StepProgress | None
) -> Sensitivity | None:
    """What the spec asks for; None where it asks for nothing.

    Raises SpecError without data, for an output that the model does not have or that holds no classes and, under fisher, for batches
    without labels; InputError for gradients that are NaN or infinite.
    """
    if calibration.sensitivity == "none" or not sites:
        return None
    if batches is None:
        raise SpecError(f"{calibration.sensitivity} needs calibration data and none was given", keypath="calibration.sensitivity")
    if calibration.sensitivity != "fisher":
        probe = probe_of(graph, calibration)
        return of_output(graph, sites, batches, calibration.samples, probe, spec.seed, progress)
    if spec.train is None:
        raise SpecError("fisher is made of gradients of a loss, and the spec has none", keypath="calibration.sensitivity")
    return fisher(graph, sites, batches, calibration.samples, spec.train, progress)


def with_moments(stats: Mapping[Site, SiteStats], found: Sensitivity | None) -> Mapping[Site, SiteStats]:
    """The statistics with what methods read of it."""
    return stats if found is None else _WithMoments(stats, found.moments)


@dataclass(frozen=True, slots=True, eq=False)
class _WithMoments(Mapping[Site, SiteStats]):
    """Moments are read when their site is asked for: together they may be larger than the model."""

    stats: Mapping[Site, SiteStats]
    moments: Mapping[Site, Tensor]

    def __getitem__(self, site: Site) -> SiteStats:
        found = self.stats[site]
        return replace(found, output_moment=self.moments[site]) if site in self.moments else found

    def __iter__(self) -> Iterator[Site]:
        return iter(self.stats)

    def __len__(self) -> int:
        return len(self.stats)


def fisher(
    graph: Graph,
    sites: Sequence[Site],
    batches: Iterable[Any],
    samples: int,
    train: Train,
    progress: StepProgress | None = None,
    *,
    limit: int = PASS_BYTES,
) -> Sensitivity:
    """From at most `samples` samples of batches that are mappings with the labels beside the inputs."""
    sums = _Sums(sites)
    count = loss_gradients(graph, sums.values, batches, samples, train, _unlabelled, sums.take, progress, limit=limit)
    return sums.over(count)


def of_output(
    graph: Graph,
    sites: Sequence[Site],
    batches: Iterable[Any],
    samples: int,
    probe: Probe,
    seed: int,
    progress: StepProgress | None = None,
    *,
    limit: int = PASS_BYTES,
) -> Sensitivity:
    """From at most `samples` samples of batches like the model's inputs, and no more once there are rows enough. `limit`: see
    `Backward`."""
    sums, mask, value = _Sums(sites), token_mask(graph), probe.output
    generator = torch.Generator().manual_seed(seed)
    backward = Backward.of(graph.nodes, sums.values, (value,) if mask is None else (value, mask.value), limit)
    size, rows, done = 0.0, 0, 0

    def seeds(held: Mapping[Value, Any]) -> Mapping[Value, Tensor]:
        nonlocal size, rows
        z = held[value].detach()
        kept = _kept(z, value, held, mask)
        gradient, units = probe.draw(z, kept, generator)
        size += units
        rows += z[..., :1].numel() if kept is None else int(kept.sum())
        return {value: gradient}

    for number, batch in enumerate(batches):
        tensors, count = cut_batch(graph, bound_batch(graph, batch, number), samples - done)
        with of_batch(number):
            backward.run_parts(graph, dict(zip(graph.inputs, tensors, strict=True)), seeds, sums.take)
        done += count
        if progress is not None:
            progress(done, None)
        if done >= samples or rows >= max(_ROWS, ENOUGH * sums.widest):
            break
    return sums.over(size)


def _kept(z: Tensor, value: Value, known: Mapping[Value, Any], mask: TokenMask | None) -> Tensor | None:
    """Which rows of an output count [..]; None where all do."""
    if mask is None or value.tensor.shape[: len(mask.axes)] != mask.axes or z.dim() < 2:
        return None
    leading = z.shape[: len(mask.axes)]
    found = (of_rows(known[mask.value], prod(leading)) != 0).reshape(*leading, *(1,) * (z.dim() - 1 - len(leading)))
    return found.expand(z.shape[:-1])


class _Sums:
    """Running sums of g g^T and of |g|^2 per site, over rows, applications and lookups."""

    def __init__(self, sites: Sequence[Site]) -> None:
        wide = {site: site.out_features for site in sites if site.applications and site.out_features <= WIDEST}
        self._moments = MomentStore(wide)
        self.widest = max(wide.values(), default=0)
        self._squares, self._lookups = dict.fromkeys(sites, 0.0), dict.fromkeys(sites, 0.0)
        self._readers: dict[Value, list[tuple[Site, tuple[RowStep, ...] | None]]] = {}
        for site in sites:
            for value, leave in _outputs(site):
                self._readers.setdefault(value, []).append((site, leave))

    @property
    def values(self) -> list[Value]:
        return list(self._readers)

    def take(self, value: Value, _: Tensor, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        for site, leave in self._readers[value]:
            laid_out = gradient if leave is None else undo(leave, gradient)
            rows = laid_out.reshape(-1, laid_out.shape[-1])
            rows = rows if power_of_two(rows) == 1 else rows.double()  # squares of float32 would leave its range
            sums = self._lookups if leave is None else self._squares
            sums[site] += _square(rows) / rows.shape[-1]
            if site in self._moments and leave is not None:
                self._moments.add(site, (rows.T @ rows).cpu())

    def over(self, size: float) -> Sensitivity:
        """The sums over `size`, zeros where that is 0. InputError for what is not finite."""
        share = 1 / size if size > 0 else 0.0
        for site, total in chain(self._squares.items(), self._lookups.items()):
            if not isfinite(total) or not isfinite(size):
                raise InputError(f"the calibration data makes gradients of NaN or infinity at {site.path}")
        self._moments.scale(share)
        slopes, lookups = ({site: total * share for site, total in sums.items()} for sums in (self._squares, self._lookups))
        return Sensitivity(self._moments, slopes, lookups)


def _square(rows: Tensor) -> float:
    """|rows|^2 in float64; of a wide head a few rows at a time."""
    parts = torch.split(rows, max(WIDEST * 128 // max(rows.shape[-1], 1), 1))
    return sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts)


def _outputs(site: Site) -> Iterator[tuple[Value, tuple[RowStep, ...] | None]]:
    """What the site puts out, and how its rows [.., out] were rearranged for that; None for rows that are looked up."""
    yield from ((application.output, row_view(site, application).leave) for application in site.applications)
    yield from ((node.outputs[0], None) for node in site.gathers)


def _unlabelled(what: str, hint: str) -> SpecError:
    return SpecError(f"fisher needs labels, and {what}", keypath="calibration.sensitivity", details=[hint])
