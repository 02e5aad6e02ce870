"""How much a loss feels an error at the output of a site: `calibration.sensitivity: fisher`.

With g = d(loss of a sample) / d(one row of the site's output), an error d of that row changes the loss by g.d to first order and, where the
loss is a log-likelihood, by E[(g.d)^2] / 2 in expectation to second order (the Fisher information stands for the Hessian; Kunstner et al.,
arXiv 1905.12558, on when it does). Taking the directions of g and d as independent, E[(g.d)^2] = |g|^2 E|d|^2 / out. So the weight of a
site is the sum of |g|^2 / out over the rows of a sample, for squared errors of one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from matmorph.errors import SpecError
from matmorph.ir.core import Graph, Value
from matmorph.ir.site import Site
from matmorph.passes.calibrate import Progress
from matmorph.passes.loss_gradients import loss_gradients
from matmorph.specs.schema import Train


def fisher(
    graph: Graph, sites: Sequence[Site], batches: Iterable[Any], samples: int, train: Train, progress: Progress | None = None
) -> dict[Site, float]:
    """The weight of each site, from at most `samples` samples of batches that are mappings with the labels beside the inputs.

    Raises SpecError where a batch has no labels, InputError as `calibrate`.
    """
    owners = {value: site for site in sites for value in _outputs(site)}
    sums = dict.fromkeys(sites, 0.0)
    done = 0
    for batch in loss_gradients(graph, list(owners), batches, samples, train, _unlabelled, progress):
        for value, (_, gradient) in batch.values.items():
            sums[owners[value]] += 0.0 if gradient is None else float(gradient.double().square().sum())
        done += batch.samples
    return {site: total / (site.out_features * max(done, 1)) for site, total in sums.items()}


def _outputs(site: Site) -> Iterator[Value]:
    yield from (application.output for application in site.applications)
    yield from (node.outputs[0] for node in site.gathers)


def _unlabelled(what: str, hint: str) -> SpecError:
    return SpecError(f"fisher needs labels, and {what}", keypath="calibration.sensitivity", details=[hint])
