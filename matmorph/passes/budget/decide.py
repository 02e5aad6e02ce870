"""A stage with open rules becomes one without: offers of sites and blocks, their errors, the exact choice under the stage's budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matmorph.ir.core import Graph
from matmorph.ir.site import Cost, Site
from matmorph.ir.training.losses import LABELS
from matmorph.passes.budget.account import Account, Decision, account, decide, plan_notes, refuse_unreachable
from matmorph.passes.budget.offers import Offer, Option, kept, label, measured, offer, scale_of, settled, sizes_of, summed, within
from matmorph.passes.methods.protocol import BlockMethod, Methods, SiteStats, block_method
from matmorph.passes.rewriting.block_pass import BlockJob, Divided, refuse_without_data
from matmorph.passes.selection.select import Selection
from matmorph.passes.sizes import exported_sizes
from matmorph.passes.statistics.loss_gradients import dropped, label_names
from matmorph.passes.statistics.sensitivity import Sensitivity
from matmorph.passes.statistics.taylor import reads_labels
from matmorph.passes.statistics.weight_gradients import asks_for_gradients
from matmorph.passes.work.hands import Hands
from matmorph.progress import Progress, Step, tell
from matmorph.specs.schema import Export, Spec, Stage


@dataclass(frozen=True, slots=True, eq=False)
class OpenStage:
    """A stage with open rules: the graph it works on, the model that percentages are of, what is selected, and parameters that earlier
    stages have put into codes."""

    graph: Graph
    source: Graph
    stage: Stage
    selection: Selection
    divided: Divided
    coded: int = 0

    def account(self, methods: Methods, export: Export) -> Account:
        pruned: dict[Site, Cost] = {}
        for job in self.divided.jobs:
            method = block_method(methods, job.use.method)
            if not job.rule.is_open and method.check(job.block, job.use.spec) is None:
                [choice, *_] = method.choices(job.block, job.use.spec)
                pruned.update(method.costs(job.block, job.use.spec, choice))
        return account(self.graph, self.source, self.stage, self.selection, methods, export, pruned, self.coded)

    def offers(self, methods: Methods, export: Export) -> tuple[Offer, ...]:
        """What every open site and block has to offer, from shapes alone; blocks come last."""
        dense = exported_sizes(self.graph, export.precision)
        sites = [offer(site, rule, methods, dense, export) for site, rule in self.divided.claims if rule.is_open]
        return (*sites, *(_of_block(job, block_method(methods, job.use.method), dense, export) for job in self.open_jobs))

    @property
    def open_jobs(self) -> list[BlockJob]:
        return [job for job in self.divided.jobs if job.rule.is_open]


def is_open(divided: Divided) -> bool:
    return any(rule.is_open for _, rule in divided.claims) or any(job.rule.is_open for job in divided.jobs)


def closed_part(divided: Divided) -> Divided:
    """What is no question of the budget."""
    claims = tuple((site, rule) for site, rule in divided.claims if not rule.is_open)
    return replace(divided, claims=claims, jobs=tuple(job for job in divided.jobs if not job.rule.is_open))


def planned_notes(job: OpenStage, methods: Methods, export: Export) -> tuple[str, ...]:
    return plan_notes(job.account(methods, export), job.offers(methods, export))


def decision(
    job: OpenStage,
    spec: Spec,
    methods: Methods,
    stats: Mapping[Site, SiteStats],
    felt: Sensitivity | None,
    progress: Progress,
    hands: Hands | None = None,
) -> Decision:
    """One concrete choice for every open site and block. Raises SpecError for a budget that cannot be met, and without data."""
    held, offers = job.account(methods, spec.export), job.offers(methods, spec.export)
    refuse_unreachable(held, offers)
    found = appraised(job, offers, methods, stats, progress, hands)
    return decide(found, held, job.selection, stats, [scale_of(one, stats.get(one.site), felt) for one in found])


def appraised(
    job: OpenStage,
    offers: Sequence[Offer],
    methods: Methods,
    stats: Mapping[Site, SiteStats],
    progress: Progress,
    hands: Hands | None = None,
) -> tuple[Offer, ...]:
    """The offers with the errors of their options."""
    jobs = job.open_jobs
    found: list[Offer] = []
    step = Step(progress, "decomposing")
    for one in measured(offers[: len(offers) - len(jobs)], methods, stats, job.stage.tolerance, hands):
        found.append(one)
        tell(step, one.site.path, len(found), len(offers))
    for block_job, one in zip(jobs, offers[len(offers) - len(jobs) :], strict=True):
        refuse_without_data(block_job, methods, stats)
        found.append(within(_block_errors(block_job, block_method(methods, block_job.use.method), one, stats), job.stage.tolerance))
        tell(step, one.site.path, len(found), len(offers))
    return tuple(found)


def without_labels(batches: Iterable[Any] | None, spec: Spec, graph: Graph, methods: Methods) -> Iterable[Any] | None:
    """What the model itself reads: the batches without labels, so that one set of labelled data serves every spec."""
    uses = [use for stage in spec.stages for rule in stage.rules for uses in rule.alternatives for use in uses]
    asked = any(stage.calibration.sensitivity == "fisher" for stage in spec.stages)
    asked = asked or reads_labels(uses, methods) or asks_for_gradients(uses, methods)
    if batches is None:
        return None
    if asked and spec.train is not None:
        return dropped(batches, label_names(graph, spec.train))
    return dropped(batches, {LABELS} - {entry.name for entry in graph.signature.inputs})


# blocks


def _of_block(job: BlockJob, method: BlockMethod, dense: Mapping[Any, int], export: Export) -> Offer:
    """The widths of one block; its sites take them together."""
    block, spec = job.block, job.use.spec
    whole = kept([sizes_of(site, None, dense, export.precision) for site in block.sites])
    reject = method.check(block, spec)
    if reject is not None:
        return Offer(block.consumer, job.rule, (whole,), (reject.reason,), block.sites)
    options = [whole]
    for choice in method.choices(block, spec):
        uses = (settled(job.use, choice),)
        costs = method.costs(block, spec, choice)
        sizes = summed([sizes_of(site, costs.get(site), dense, export.precision) for site in block.sites])
        options.append(Option(label(0, uses), uses, sizes, (0, choice)))
    return Offer(block.consumer, job.rule, tuple(options), (), block.sites)


def _block_errors(job: BlockJob, method: BlockMethod, one: Offer, stats: Mapping[Site, SiteStats]) -> Offer:
    choices = [option.source[1] for option in one.options if option.source is not None]
    errors = iter(method.errors(job.block, job.use.spec, choices, stats)) if choices else iter(())
    return replace(one, options=tuple(option if option.source is None else replace(option, error=next(errors)) for option in one.options))
