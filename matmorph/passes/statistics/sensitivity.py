"""How much the model behind a site feels an error of its output: `calibration.sensitivity`.

With g the gradient of a scalar at one row of a site's output, an error E of the weight moves the scalar by sum of g^T E x over the rows, to
first order. Taking gradients and inputs as independent (the Kronecker-factored Fisher of K-FAC, arXiv 1503.05671), the mean square of that
for one sample is tr(G E H E^T), with G the sum of g g^T over the rows of a sample and H the mean of x x^T. Two scalars are offered:

fisher: the loss, with labels. For a log-likelihood half of the mean square is the expected change to second order: the Fisher information
stands for the Hessian (Kunstner et al., arXiv 1905.12558, on when it does).

output: v . z / |z| for an output z of the model and v of independent standard normal entries, one draw per batch, so that the mean square
is the expected |dz|^2 / |z|^2: the relative change of what the model answers. It needs no labels.

G of all sites together are in one unit, which makes errors of different sites comparable: what the budget adds up. Whitened methods fit
their factors to the same measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import InputError, SpecError, did_you_mean
from matmorph.ir.core import Graph, Value
from matmorph.ir.site import Site
from matmorph.ir.training.losses import tensor_outputs
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.rewriting.row_view import RowStep, row_view, undo
from matmorph.passes.statistics.calibrate import SPILL_ABOVE, accumulator, bound_batch, cut_batch
from matmorph.passes.statistics.loss_gradients import Slopes, differentiated, loss_gradients
from matmorph.passes.statistics.token_mask import TokenMask, of_rows, token_mask
from matmorph.progress import StepProgress
from matmorph.specs.schema import Calibration, Spec, Train

WIDEST = 1 << 14
"""Output features of a site, above which only the trace of G is kept: an output head's G would be larger than its weight."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """`moments`: G [out, out] of sites with matmuls. `slopes`: tr(G) / (features of the output) of all sites, lookups included: what a
    squared error of one entry counts where its direction is not known."""

    moments: Mapping[Site, Tensor]
    slopes: Mapping[Site, float]


def sensitivity(
    graph: Graph, calibration: Calibration, spec: Spec, sites: Sequence[Site], batches: Iterable[Any] | None, progress: StepProgress | None
) -> Sensitivity | None:
    """What the spec asks for; None where it asks for nothing.

    Raises SpecError without data, for an output that the model does not have and, under fisher, for batches without labels; InputError for
    gradients that are NaN or infinite.
    """
    if calibration.sensitivity == "none" or not sites:
        return None
    if batches is None:
        raise SpecError(f"{calibration.sensitivity} needs calibration data and none was given", keypath="calibration.sensitivity")
    if calibration.sensitivity == "output":
        return of_output(graph, sites, batches, calibration.samples, output_of(graph, calibration.output)[1], spec.seed, progress)
    if spec.train is None:
        raise SpecError("fisher is made of gradients of a loss, and the spec has none", keypath="calibration.sensitivity")
    return fisher(graph, sites, batches, calibration.samples, spec.train, progress)


def with_moments(stats: Mapping[Site, SiteStats], found: Sensitivity | None) -> Mapping[Site, SiteStats]:
    """The statistics with what methods read of it."""
    moments: Mapping[Site, Tensor] = {} if found is None else found.moments
    return {site: replace(each, output_moment=moments[site]) if site in moments else each for site, each in stats.items()}


def fisher(
    graph: Graph, sites: Sequence[Site], batches: Iterable[Any], samples: int, train: Train, progress: StepProgress | None = None
) -> Sensitivity:
    """From at most `samples` samples of batches that are mappings with the labels beside the inputs."""
    sums = _Sums(sites)
    for batch in loss_gradients(graph, sums.values, batches, samples, train, _unlabelled, progress):
        sums.add(batch, 1.0)
    return sums.means()


def of_output(
    graph: Graph,
    sites: Sequence[Site],
    batches: Iterable[Any],
    samples: int,
    output: Value,
    seed: int,
    progress: StepProgress | None = None,
) -> Sensitivity:
    """From at most `samples` samples of batches like the model's inputs."""
    sums = _Sums(sites)
    generator = torch.Generator().manual_seed(seed)
    mask = token_mask(graph)
    for number, batch in enumerate(batches):
        tensors, count = cut_batch(graph, bound_batch(graph, batch, number), samples - sums.samples)
        known: dict[Value, Any] = dict(zip(graph.inputs, tensors, strict=True))

        def total(held: Mapping[Value, Any]) -> Tensor:
            return _probe(held[output], output, held, mask, generator)

        sums.add(Slopes(differentiated(graph.nodes, known, sums.values, total), count), count)
        if progress is not None:
            progress(sums.samples, None)
        if sums.samples >= samples:
            break
    return sums.means()


def _probe(z: Tensor, value: Value, known: Mapping[Value, Any], mask: TokenMask | None, generator: torch.Generator) -> Tensor:
    """v . z / |z| over the rows that count."""
    v = torch.randn(z.shape, generator=generator, dtype=torch.float32).to(z)
    if mask is not None and value.tensor.shape[: len(mask.axes)] == mask.axes:
        leading = z.shape[: len(mask.axes)]
        kept = (of_rows(known[mask.value], prod(leading)) != 0).reshape(*leading, *(1,) * (z.dim() - len(leading)))
        z = torch.where(kept, z, 0.0)
    size = torch.linalg.vector_norm(z.detach()).clamp_min(torch.finfo(z.dtype).tiny)
    found: Tensor = (v * z).sum() / size
    return found


def output_of(graph: Graph, name: str | None) -> tuple[str, Value]:
    """The floating-point output of that name, the first where none is given. SpecError where there is none."""
    found = {key: value for key, value in tensor_outputs(graph).items() if value.tensor.torch_dtype.is_floating_point}
    if name is None and found:
        return next(iter(found.items()))
    if name is not None and name in found:
        return name, found[name]
    problem = "no output of floating-point numbers" if name is None else f"no output of floating-point numbers called {name}"
    hint = did_you_mean(name or "", list(found)) or (f"; it has {', '.join(found)}" if found else "")
    raise SpecError(f"the model has {problem}{hint}", keypath="calibration.output")


class _Sums:
    """Running sums of g g^T and of |g|^2 per site, over rows, applications and lookups."""

    def __init__(self, sites: Sequence[Site]) -> None:
        wide = {site: site.out_features for site in sites if site.applications and site.out_features <= WIDEST}
        spill = sum(8 * width**2 for width in wide.values()) > SPILL_ABOVE
        self._moments = {site: accumulator((width, width), spill) for site, width in wide.items()}
        self._squares = dict.fromkeys(sites, 0.0)
        self._readers: dict[Value, list[tuple[Site, tuple[RowStep, ...]]]] = {}
        for site in sites:
            for value, leave in _outputs(site):
                self._readers.setdefault(value, []).append((site, leave))
        self.samples = 0

    @property
    def values(self) -> list[Value]:
        return list(self._readers)

    def add(self, batch: Slopes, weight: float) -> None:
        for value, (_, gradient) in batch.values.items():
            if gradient is None:
                continue
            for site, leave in self._readers[value]:
                laid_out = undo(leave, gradient)
                rows = laid_out.reshape(-1, laid_out.shape[-1])
                self._squares[site] += weight * float(rows.double().square().sum()) / rows.shape[-1]
                if site in self._moments and rows.shape[-1] == site.out_features:
                    self._moments[site] += weight * (rows.T @ rows).double().cpu()
        self.samples += batch.samples

    def means(self) -> Sensitivity:
        """Per sample. InputError for what is not finite."""
        count = max(self.samples, 1)
        for site, total in self._squares.items():
            if not isfinite(total):
                raise InputError(f"the calibration data makes gradients of NaN or infinity at {site.path}")
        moments = {site: total.div_(count) for site, total in self._moments.items()}
        return Sensitivity(moments, {site: total / count for site, total in self._squares.items()})


def _outputs(site: Site) -> Iterator[tuple[Value, tuple[RowStep, ...]]]:
    """What the site puts out, and how its rows [.., out] were rearranged for that."""
    yield from ((application.output, row_view(site, application).leave) for application in site.applications)
    yield from ((node.outputs[0], ()) for node in site.gathers)


def _unlabelled(what: str, hint: str) -> SpecError:
    return SpecError(f"fisher needs labels, and {what}", keypath="calibration.sensitivity", details=[hint])
