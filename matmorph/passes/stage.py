"""One stage of a run, step by step: selected -> measured -> decided -> built; a plan goes from the first to what would be built.

Each step is a value that holds the one before it, made by the function of its name; nothing is changed on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from matmorph.errors import MatmorphError, SpecError
from matmorph.ir.adapter import Adapter
from matmorph.ir.core import Graph
from matmorph.ir.site import Reject, Site, Statistic
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.verify import verify
from matmorph.passes.budget.account import Decision, verdict
from matmorph.passes.budget.decide import OpenStage, closed_part, decision, is_open, planned_notes
from matmorph.passes.budget.pays import refuse_slow
from matmorph.passes.in_order import Task, built_in_order
from matmorph.passes.kernel_costs import kernel_summary
from matmorph.passes.methods.protocol import Methods, SiteStats, site_method
from matmorph.passes.reporting import site_rows
from matmorph.passes.rewriting.block_pass import (
    Divided,
    PruningSoFar,
    block_needs,
    build_blocks,
    divide,
    fitted_by_blocks,
    narrowed,
    plan_blocks,
    shots_of,
)
from matmorph.passes.rewriting.equalise import equalise, find_groups, refuse_open, remarked, wishes
from matmorph.passes.rewriting.rewrite import Outcome, appraise, build, needed_statistics, refuse_impossible, splice, total_cost
from matmorph.passes.rewriting.sample import massive_summary, refuse_undetermined, rule_fits, sample_summary
from matmorph.passes.rewriting.tolerance import hold, refuse_rejects
from matmorph.passes.selection.select import Selection, select
from matmorph.passes.selection.survey import Survey
from matmorph.passes.statistics.calibrate import calibrate
from matmorph.passes.statistics.remembered import Gathered, remembered
from matmorph.passes.statistics.sensitivity import Sensitivity, sensitivity, with_moments
from matmorph.passes.statistics.taylor import reads_labels, refuse_without_loss, with_taylor
from matmorph.passes.statistics.weight_gradients import asks_for_gradients, refuse_without_train, with_gradients
from matmorph.passes.work.folder import WorkFolder
from matmorph.passes.work.hands import Hands
from matmorph.progress import Progress, Step, silent
from matmorph.report.model import SiteRow
from matmorph.specs.schema import AnyOf, Export, MethodUse, Rule, Spec, Stage

SECOND_MOMENT, HELD_OUT = frozenset({Statistic.INPUT_SECOND_MOMENT}), frozenset({Statistic.HELD_OUT_MOMENT})
_GIVE_DATA = ["pass calibration=... to compile, or --calibration FILE on the command line"]
_ORDER = (
    "calibrated in sequence: each matmul was fitted behind what was rewritten before it; output errors are against the outputs of the "
    "model as this stage found it"
)
_EXPORT_FIELDS = ("tokens", "target")
AnyValue = TypeVar("AnyValue")


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What all stages of a run share. `source`: the model as traced. `batches`: the calibration data as it was given, which has labels
    where a method needs them; `inputs`: the same without. Both are None where there is none, as in a plan. `hands`: who does what needs
    nothing of a graph, None = this process. `work`: where what is finished is kept."""

    source: Graph
    spec: Spec
    methods: Methods
    batches: Iterable[Any] | None = None
    inputs: Iterable[Any] | None = None
    seed: int = 0
    progress: Progress = silent
    hands: Hands | None = None
    work: WorkFolder | None = None

    def step(self, what: str) -> Step:
        return Step(self.progress, what)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Of the spec, as they hold for its export."""
        return tuple(_for_export(stage, self.spec.export) for stage in self.spec.stages)

    @property
    def shots(self) -> tuple[Stage, ...]:
        """The stages, each as often as its block methods want it."""
        return tuple(shot for stage in self.stages for shot in shots_of(stage, self.methods))


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """Who owns which site of a stage, and what of that is a matter of blocks."""

    stage: Stage
    survey: Survey
    selection: Selection
    divided: Divided


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """`stats` of the sites that a method or the report needs them of ({} without data); `felt`: what the model feels of errors there.
    `remarks`: by path, what is to be said of scales that a site asked for."""

    selected: Selected
    stats: Mapping[Site, SiteStats]
    felt: Sensitivity | None
    remarks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Decided:
    """No rule is open any more but those of sites that no method takes. `decision`: of the budget, None where nothing was open."""

    measured: Measured
    selection: Selection
    divided: Divided
    decision: Decision | None


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """What came of a stage: an outcome per site that a rule rewrites, and the graph behind it. Of a plan it is what would come, and `graph`
    the one that it looked at."""

    graph: Graph
    outcomes: tuple[Outcome, ...]
    rows: tuple[SiteRow, ...]
    notes: tuple[str, ...]
    pruning: PruningSoFar
    decision: Decision | None = None

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """What of the stage trains to be exchanged and merged."""
        return tuple(adapter for outcome in self.outcomes if outcome.reject is None for adapter in outcome.adapters)

    @property
    def replaced(self) -> frozenset[Site]:
        """Sites that another form stands for now; a pruned one is only narrower."""
        return frozenset(outcome.site for outcome in self.outcomes if outcome.reject is None and outcome.block is None)


def selected(stage: Stage, survey: Survey, run: Run) -> Selected:
    """From shapes alone, except where a condition asks for a statistic of a weight. SpecError: dead rules, `expect`, rules that share a
    block, settings that fit no site."""
    selection = select(stage, survey)
    return Selected(stage, survey, selection, _divided(survey, selection, run.methods))


def measured(one: Selected, run: Run) -> Measured:
    """SpecError where a method needs data, a loss or labels and there is none; InputError for data that is none."""
    graph, claims, calibration = one.survey.graph, one.divided.claims, one.stage.calibration
    if calibration.order == "sequential" and run.inputs is None:
        raise SpecError("sequential needs calibration data and none was given", keypath="calibration.order", details=_GIVE_DATA)
    refuse_without_train(claims, run.methods, run.spec.train)
    kept = None if run.work is None or _reads_on(one, run) else run.work
    if kept is None or run.batches is None:
        found = _gathered(one, run)
    else:
        asked, samples = _asked(one, run), calibration.samples
        found = remembered(kept, graph, run.batches, samples, asked, one.survey.sites, lambda: _gathered(one, run))
        _refuse_undetermined(one, run, found.stats)
    return Measured(one, with_moments(found.stats, found.felt), found.felt)


def _reads_on(one: Selected, run: Run) -> bool:
    """Whether a method reads batches beyond the samples."""
    return any(asks_for_gradients([use for uses in rule.alternatives for use in uses], run.methods) for _, rule in one.divided.claims)


def _asked(one: Selected, run: Run) -> Any:
    """What the statistics depend on, graph and batches apart."""
    needs = tuple((site.path, tuple(sorted(word.value for word in wanted))) for site, wanted in _needs(one, run))
    jobs = tuple((job.block.consumer.path, job.use.method, job.use.spec) for job in one.divided.jobs)
    felt = tuple(site.path for site, rule in one.divided.claims if rule.is_open)
    before = tuple(sorted(site.path for site in _before(one, run)))
    return (one.stage.calibration, needs, jobs, felt, before, run.spec.seed, run.spec.train)


def _gathered(one: Selected, run: Run) -> Gathered:
    graph, claims, step, calibration = one.survey.graph, one.divided.claims, run.step("differentiating"), one.stage.calibration
    stats = _statistics(one, run)
    stats = with_gradients(graph, claims, run.methods, stats, run.batches, run.spec.train, step)
    # with tables, which have no statistics, and with sites that get theirs only when they are built
    sites = list(dict.fromkeys((*stats, *(site for site, _ in _needs(one, run)), *(site for site, rule in claims if rule.is_open))))
    read = run.batches if calibration.sensitivity == "fisher" else run.inputs
    return Gathered(stats, sensitivity(graph, calibration, run.spec, sites, read, step))


def equalised(one: Measured, run: Run) -> Measured:
    """The same on a graph whose weights have the scales that rules ask for; itself where none does. SpecError for codes that a budget
    decides."""
    before = one.selected
    refuse_open(before.stage.rules, run.methods)
    claims = before.divided.claims
    if not wishes(claims, run.methods):
        return one
    found = equalise(before.survey.graph, before.survey.sites, claims, one.stats, run.methods, run.step("equalising"))
    if found.graph is before.survey.graph:
        return replace(one, remarks=found.notes)
    now = {site.path: site for site in find_sites(found.graph)}
    survey = replace(before.survey, graph=found.graph, sites=tuple(now[site.path] for site in before.survey.sites))
    selection = replace(before.selection, claims=tuple(replace(claim, site=now[claim.site.path]) for claim in before.selection.claims))
    after = Selected(before.stage, survey, selection, _divided(survey, selection, run.methods))
    felt = (
        None
        if one.felt is None
        else replace(
            one.felt, moments=_moved(one.felt.moments, now), slopes=_moved(one.felt.slopes, now), lookups=_moved(one.felt.lookups, now)
        )
    )
    return Measured(after, _moved(found.stats, now), felt, found.notes)


def _moved(by_site: Mapping[Site, AnyValue], now: Mapping[str, Site]) -> dict[Site, AnyValue]:
    return {now[site.path]: value for site, value in by_site.items()}


def decided(one: Measured, coded: int, run: Run) -> Decided:
    """`coded`: parameters that earlier stages have put into codes. SpecError for a budget that cannot be met."""
    before = one.selected
    if not is_open(before.divided):
        return Decided(one, before.selection, before.divided, None)
    job = _open(before, coded, run)
    found = decision(job, run.spec, run.methods, one.stats, one.felt, run.progress, run.hands)
    return Decided(one, found.selection, closed_part(_divided(before.survey, found.selection, run.methods)), found)


def built(one: Decided, pruning: PruningSoFar, run: Run) -> Built:
    """All fragments and patches, and ONE splice. SpecError: rejects under `strict`; CheckError: a tolerance; VerifyError: our bug."""
    stage, graph, stats, export = one.measured.selected.stage, one.measured.selected.survey.graph, one.measured.stats, run.spec.export
    refused = one.decision.refused if one.decision is not None else ()
    if stage.calibration.order == "sequential" and run.inputs is not None:
        in_order = built_in_order(_task(one, run), pruning)
        outcomes = (*remarked(in_order.outcomes, one.measured.remarks), *refused)
        pruning, stats = in_order.pruning, in_order.stats
        before: tuple[str, ...] = (*in_order.notes, _ORDER)
    else:
        outcomes = build(graph, one.divided.claims, run.methods, stats, seed=run.seed, progress=run.step("rewriting"), hands=run.hands)
        outcomes = (*refuse_slow(remarked(outcomes, one.measured.remarks), export, run.methods), *refused)
        blocks, pruning = build_blocks(graph, one.divided, stats, pruning, run.methods)
        outcomes, before = (*outcomes, *blocks), ()
    refuse_rejects(outcomes, run.spec.strict)
    outcomes, rolled_back = hold(outcomes, stage.tolerance)
    after = _checked(narrowed(splice(graph, outcomes), outcomes))
    rows = site_rows(one.selection.claims, {outcome.site: outcome for outcome in outcomes}, graph, export)
    notes = (*one.selection.notes, *(one.decision.notes if one.decision is not None else ()), *before, *rolled_back)
    notes = (*notes, *sample_summary(outcomes), *massive_summary(stats), *kernel_summary(outcomes, export))
    notes = (*notes, *(verdict(one.decision, rows) if one.decision is not None else ()))
    return Built(after, outcomes, rows, notes, pruning.keeping(outcomes, run.methods), one.decision)


def planned(one: Selected, pruning: PruningSoFar, run: Run) -> Built:
    """What would be built, from shapes alone; what the budget decides stays open."""
    graph, export = one.survey.graph, run.spec.export
    notes = planned_notes(_open(one, 0, run), run.methods, export) if is_open(one.divided) else ()
    divided = closed_part(one.divided)
    blocks, pruning = plan_blocks(graph, divided, pruning, run.methods, export.precision)
    refuse_open(one.stage.rules, run.methods)
    _, refused = find_groups(graph, one.survey.sites, divided.claims, run.methods)
    outcomes = (*refuse_slow(remarked(_appraised(divided.claims, run.methods), refused), export, run.methods), *blocks)
    refuse_rejects(outcomes, run.spec.strict)
    notes = (*notes, *one.selection.notes, *kernel_summary(outcomes, export))
    rows = site_rows(one.selection.claims, {outcome.site: outcome for outcome in outcomes}, graph, export)
    return Built(graph, outcomes, rows, notes, pruning)


# what is selected


def _for_export(stage: Stage, export: Export) -> Stage:
    """The stage's rules as they hold for this export: methods that plan for numbers of rows and devices are told which."""
    rules = (replace(rule, rewrite=_uses_for_export(rule.rewrite, export)) for rule in stage.rules)
    return replace(stage, rules=tuple(rules))


def _uses_for_export(uses: tuple[MethodUse, ...], export: Export) -> tuple[MethodUse, ...]:
    return tuple(_use_for_export(use, export) for use in uses)


def _use_for_export(use: MethodUse, export: Export) -> MethodUse:
    if isinstance(use.spec, AnyOf):
        return replace(use, spec=AnyOf(tuple(_uses_for_export(uses, export) for uses in use.spec.alternatives)))
    names = {entry.name for entry in fields(use.spec)} if is_dataclass(use.spec) else set()
    open_ = {name: getattr(export, name) for name in _EXPORT_FIELDS if name in names and getattr(use.spec, name) is None}
    return replace(use, spec=replace(use.spec, **open_)) if open_ else use


def _divided(survey: Survey, selection: Selection, methods: Methods) -> Divided:
    return divide(survey, {claim.site: claim.rule for claim in selection.claims}, methods)


# what is measured


def _statistics(one: Selected, run: Run) -> Mapping[Site, SiteStats]:
    """Second moments of all sites that will be rewritten, and gradients where a block's method asks for them. In sequential order only of
    those that something is decided or differentiated for before; the others are measured when they are built."""
    graph, divided, methods, calibration = one.survey.graph, one.divided, run.methods, one.stage.calibration
    refuse_without_loss(divided.jobs, methods, run.spec.train)
    if run.inputs is None:
        _refuse_without_data(_working(one, run), methods)
        return {}
    needs, samples, weights = _needs(one, run), calibration.samples, calibration.token_weights
    if calibration.order == "sequential":
        before = _before(one, run)
        needs = [(site, wanted) for site, wanted in needs if site in before]
    stats = calibrate(graph, needs, run.inputs, samples, run.step("calibrating"), token_weights=weights)
    _refuse_undetermined(one, run, stats)
    return with_taylor(graph, divided.jobs, methods, stats, run.batches, samples, run.spec.train, run.step("differentiating"))


def _refuse_undetermined(one: Selected, run: Run, stats: Mapping[Site, SiteStats]) -> None:
    divided, methods = one.divided, run.methods
    judged = (*_working(one, run), *((job.block.consumer, job.rule) for job in divided.jobs if job.block.consumer in stats))
    refuse_undetermined(one.stage.tolerance, judged, methods, stats)


def _needs(one: Selected, run: Run) -> list[tuple[Site, frozenset[Statistic]]]:
    """What is gathered of each site; nothing without data."""
    divided, methods = one.divided, run.methods
    working = _working(one, run) if run.inputs is not None else []
    jobs = divided.jobs if run.inputs is not None else ()
    fitted = {site for site, rule in working if rule_fits(rule, methods)} | fitted_by_blocks(jobs, methods)
    sites = (*(site for site, _ in working), *block_needs(jobs, methods))
    return [(site, SECOND_MOMENT | HELD_OUT if site in fitted else SECOND_MOMENT) for site in sites if site.applications]


def _before(one: Selected, run: Run) -> set[Site]:
    """Sites whose statistics something reads before anything is built."""
    claims, jobs, methods = one.divided.claims, one.divided.jobs, run.methods
    reading = [job for job in jobs if job.rule.is_open or reads_labels([job.use], methods)]
    graded = {site for site, rule in claims if asks_for_gradients([use for uses in rule.alternatives for use in uses], methods)}
    return {site for site, rule in claims if rule.is_open} | graded | set(block_needs(reading, methods))


def _task(one: Decided, run: Run) -> Task:
    before = one.measured.selected
    return Task(
        graph=before.survey.graph,
        divided=one.divided,
        methods=run.methods,
        batches=run.inputs or (),
        calibration=before.stage.calibration,
        tolerance=before.stage.tolerance,
        export=run.spec.export,
        seed=run.seed,
        stats=one.measured.stats,
        felt=one.measured.felt,
        progress=run.step("rewriting"),
        hands=run.hands,
    )


def _working(one: Selected, run: Run) -> list[tuple[Site, Rule]]:
    """Claims of which something may become."""
    return [(site, rule) for site, rule in one.divided.claims if _works(site, rule, run.methods)]


def _works(site: Site, rule: Rule, methods: Methods) -> bool:
    """Whether anything may become of the site."""
    if not rule.is_open:
        return not isinstance(appraise(site, rule, methods), Reject)
    return site.blocked is None and any(
        uses and site_method(methods, uses[0].method).check(site, uses[0].spec) is None for uses in rule.alternatives
    )


def _refuse_without_data(claims: Sequence[tuple[Site, Rule]], methods: Methods) -> None:
    for site, rule in claims:
        for use in (use for uses in rule.alternatives for use in uses):
            wanted = needed_statistics(site_method(methods, use.method), use.spec, site)
            if wanted:
                statistics = ", ".join(sorted(statistic.value for statistic in wanted))
                raise SpecError(
                    f"rule {rule.name}: {use.method} needs calibration data ({statistics}) and none was given",
                    at=use.at,
                    details=_GIVE_DATA,
                )


# what is decided and built


def _open(one: Selected, coded: int, run: Run) -> OpenStage:
    return OpenStage(one.survey.graph, run.source, one.stage, one.selection, one.divided, coded)


def _appraised(claims: Sequence[tuple[Site, Rule]], methods: Methods) -> list[Outcome]:
    refuse_impossible(claims, methods)
    found = []
    for site, rule in claims:
        parts = appraise(site, rule, methods)
        if isinstance(parts, Reject):
            found.append(Outcome(site, rule, parts))
        else:
            found.append(Outcome(site, rule, None, parts, cost=total_cost(site, parts)))
    return found


def _checked(graph: Graph) -> Graph:
    """Laws of the IR, after every splice."""
    try:
        verify(graph)
    except MatmorphError as error:
        error.add_note("after the rewrite pass")
        raise
    return graph
