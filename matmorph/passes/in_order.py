"""A stage built in the order of the data (`calibration: {order: sequential}`): each matmul behind what was rewritten in front of it.

Two streams of the calibration batches go through the graph side by side: of the model as the stage found it, and of what it is by now. The
matmuls that read one value make a step (query, key and value; then the output; gate and up; down), and so does a block that is pruned as a
whole, or a weight with several applications. At each step both streams stand in front of its first matmul; what it reads is measured in
both (`statistics.crossing`), its fragments are built for the target that follows from that, and their nodes run in the second stream from
there on. The graph itself stays as it was: all fragments go into it by the stage's one splice, as in parallel order.

What is rolled back or refused is so before the next step is measured. A limit that is to fail is judged at the end, when the worst is
known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matmorph.ir.core import Graph, Node, Value
from matmorph.ir.site import Reject, Site
from matmorph.passes.budget.pays import refuse_slow
from matmorph.passes.methods.protocol import Methods, SiteStats
from matmorph.passes.rewriting.block_pass import BlockJob, Divided, PruningSoFar, block_builder, block_needs, build_block
from matmorph.passes.rewriting.rewrite import Outcome, Workshop, appraise, build_with, refuse_impossible
from matmorph.passes.rewriting.sample import refuse_undetermined
from matmorph.passes.rewriting.tolerance import hold
from matmorph.passes.statistics.calibrate import Batches, entered
from matmorph.passes.statistics.crossing import measure
from matmorph.passes.statistics.kept import LIMIT
from matmorph.passes.statistics.rows import sources
from matmorph.passes.statistics.sensitivity import Sensitivity, with_moments
from matmorph.passes.statistics.stream import Stream
from matmorph.passes.work.hands import Hands
from matmorph.progress import StepProgress, tell
from matmorph.specs.schema import Calibration, Export, Rule, Tolerance

Claims = tuple[tuple[Site, Rule], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is built, and with what. `stats`: statistics in parallel order of the sites that need some; `felt`: see `Sensitivity`."""

    graph: Graph
    divided: Divided
    methods: Methods
    batches: Iterable[Any]
    calibration: Calibration
    tolerance: Tolerance | None
    export: Export
    seed: int
    stats: Mapping[Site, SiteStats]
    felt: Sensitivity | None
    progress: StepProgress
    limit: int = LIMIT
    hands: Hands | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Matmuls that are measured and built together. `start`: the node that none of them comes before; `stop`: one behind which nothing of
    what they read is computed. `reads`: the sites whose statistics are needed."""

    start: int
    stop: int
    claims: Claims = ()
    job: BlockJob | None = None
    reads: tuple[Site, ...] = ()

    @property
    def name(self) -> str:
        """Of its first matmul, or its block."""
        return self.claims[0][0].path if self.job is None else self.job.block.name


@dataclass(frozen=True, slots=True, eq=False)
class BuiltInOrder:
    """As `build` and `build_blocks` give it, and the statistics that each site was built with, without their matrices. `notes`: of sites
    that were rolled back on the way."""

    outcomes: tuple[Outcome, ...]
    pruning: PruningSoFar
    stats: Mapping[Site, SiteStats]
    notes: tuple[str, ...]


def built_in_order(task: Task, pruning: PruningSoFar) -> BuiltInOrder:
    """Raises what `build`, `build_blocks` and `calibrate` raise."""
    divided = task.divided
    refuse_impossible(divided.claims, task.methods)
    shop, builder = Workshop.over(task.graph, task.methods, task.seed, task.hands), block_builder(task.graph)
    impossible = {site for site, rule in divided.claims if isinstance(appraise(site, rule, task.methods), Reject)}
    working = [claim for claim in divided.claims if claim[0] not in impossible]
    refused = build_with(shop, [claim for claim in divided.claims if claim[0] in impossible])
    steps = steps_of(task.graph, working, divided.jobs, task.methods)
    pair = _Pair.of(task, steps)
    pruning = pruning.seeing(divided.blocks)
    found: list[Outcome] = [*divided.refused, *refused]
    notes: list[str] = []
    known: dict[Site, SiteStats] = {}
    for number, step in enumerate(steps):
        pair = pair.moved(step.start)
        stats = _stats(task, step, pair)
        if step.job is None:
            built: Sequence[Outcome] = refuse_slow(build_with(shop, step.claims, stats), task.export, task.methods)
        else:
            built, pruning = build_block(builder, step.job, stats, pruning, task.methods)
        if task.tolerance is not None and task.tolerance.on_exceed == "roll_back":
            built, rolled_back = hold(built, task.tolerance)
            notes += rolled_back
        pair = pair.changed(built)
        found += built
        known |= {site: _without_matrices(each) for site, each in stats.items()}
        tell(task.progress, step.name, number + 1, len(steps))
    place = {site: index for index, (site, _) in enumerate(divided.claims)}
    ordered = sorted(found, key=lambda outcome: place.get(outcome.site, len(place)))
    return BuiltInOrder(tuple(ordered), pruning, known, tuple(notes))


def steps_of(graph: Graph, claims: Sequence[tuple[Site, Rule]], jobs: Iterable[BlockJob], methods: Methods) -> list[Step]:
    """In the order of their first nodes."""
    order = {node: index for index, node in enumerate(graph.nodes)}

    def spanning(sites: Iterable[Site], tables: Iterable[Site] = ()) -> tuple[int, int]:
        """The first node, look-ups in `tables` among them, and the last matmul."""
        reads = [order[one.node] for site in sites for one in site.applications if one.node in order]
        lookups = [order[node] for site in tables for node in site.gathers if node in order]
        first = min((*reads, *lookups), default=0)
        return first, max(reads, default=first)

    together: dict[Any, list[tuple[Site, Rule]]] = {}
    for site, rule in claims:
        alone = len(site.applications) != 1 or _is_table(site, rule)
        together.setdefault(site if alone else sources(graph, site), []).append((site, rule))
    steps = []
    for group in together.values():
        sites, tables = [site for site, _ in group], [site for site, rule in group if _is_table(site, rule)]
        steps.append(Step(*spanning(sites, tables), tuple(group), None, tuple(site for site in sites if site.applications)))
    steps += [Step(*spanning(job.block.sites), (), job, tuple(block_needs([job], methods))) for job in jobs]
    return sorted(steps, key=lambda step: (step.start, step.stop))


def _is_table(site: Site, rule: Rule) -> bool:
    """Whether what takes the place of the weight is looked up in too."""
    return bool(site.gathers) and not rule.untie


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """The original's batches, and the stream of what it has become: None as long as that is the same."""

    before: Batches
    now: Stream | None = None

    @classmethod
    def of(cls, task: Task, steps: Sequence[Step]) -> _Pair:
        sites = dict.fromkeys(site for step in steps for site in step.reads)
        watched: dict[Node, set[Value]] = {node: set(node.inputs()) for step in steps for site, _ in step.claims for node in site.gathers}
        for site in sites:
            for one, application in zip(sources(task.graph, site), site.applications, strict=True):
                watched.setdefault(application.node, set()).update(one.values)
        return cls(entered(task.graph, watched, task.batches, task.calibration.samples, task.limit))

    def moved(self, start: int) -> _Pair:
        for stream in (self.before.stream, self.now):
            if stream is not None and stream.at < start:
                stream.advance(start)
        return self

    def changed(self, outcomes: Sequence[Outcome]) -> _Pair:
        """With what was built."""
        nodes = {node: new for one in outcomes if one.reject is None for node, new in (one.nodes or {}).items()}
        patches = [one.patch for one in outcomes if one.reject is None and one.patch is not None]
        if not nodes and not patches:
            return self
        now = self.before.stream.fork() if self.now is None else self.now
        now.exchange(nodes, {const: load for patch in patches for const, load in patch.in_full_width().items()})
        return replace(self, now=now)


def _stats(task: Task, step: Step, pair: _Pair) -> Mapping[Site, SiteStats]:
    """What the step's methods are given."""
    weighted = task.calibration.token_weights == "norm"
    aiming = [site for site, rule in step.claims if _aims(site, rule, task.methods)]
    aiming += [step.job.block.consumer] if step.job is not None and step.job.block.consumer in step.reads else []
    found = measure(task.graph, step.reads, aiming, pair.before, pair.now, step.stop, weighted)
    judged = (*step.claims, *(() if step.job is None else ((step.job.block.consumer, step.job.rule),)))
    refuse_undetermined(task.tolerance, judged, task.methods, found)
    known = {site: _joined(task.stats.get(site), stats) for site, stats in found.items()}
    return with_moments(known, task.felt)


def _aims(site: Site, rule: Rule, methods: Methods) -> bool:
    """Whether something takes the place of the weight, in its matmuls alone."""
    kinds = {methods[use.method].kind for use in rule.rewrite}
    return "replace" in kinds and not _is_table(site, rule)


def _joined(parallel: SiteStats | None, now: SiteStats) -> SiteStats:
    """With gradients, which are those of the original."""
    if parallel is None:
        return now
    return replace(now, gradients=parallel.gradients, input_taylor=parallel.input_taylor, output_taylor=parallel.output_taylor)


def _without_matrices(stats: SiteStats) -> SiteStats:
    nothing = stats.second_moment.new_zeros(0)
    return SiteStats(nothing, stats.rows, held_rows=stats.held_rows, massive=stats.massive, weighted=stats.weighted)
