"""The order of the passes: select, calibrate, rewrite, verify, per stage; and the report of what came of it.

`plan_graph` goes the same way from shapes alone; a stage after the first is planned on the source graph, because what the first one
inserts exists only once it is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch

from matmorph.errors import InputError, MatmorphError, RewriteError, SpecError
from matmorph.ir.core import Graph
from matmorph.ir.site import Reject, Site, Statistic
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.verify import verify
from matmorph.passes.budget.account import Decided, verdict
from matmorph.passes.budget.decide import Open, closed_part, decided, is_open, planned_notes, without_labels
from matmorph.passes.budget.pays import refuse_slow
from matmorph.passes.kernel_costs import kernel_summary
from matmorph.passes.methods import Methods, SiteStats
from matmorph.passes.reporting import dense_rows, planned_totals, site_rows, totals
from matmorph.passes.rewriting.block_pass import BlockPass, Divided, block_needs, divide, narrowed, shots_of
from matmorph.passes.rewriting.rewrite import Outcome, appraise, build, refuse_impossible, splice, total_cost
from matmorph.passes.rewriting.tolerance import hold, refuse_rejects, refuse_unmeasured
from matmorph.passes.selection.select import Selection, layer_count, select
from matmorph.passes.statistics.calibrate import calibrate
from matmorph.passes.statistics.sensitivity import Sensitivity, sensitivity, with_moments
from matmorph.passes.statistics.taylor import refuse_without_loss, with_taylor
from matmorph.passes.statistics.weight_gradients import refuse_without_train, with_gradients
from matmorph.progress import Progress, silent
from matmorph.report.model import Report, SiteRow
from matmorph.specs.conditions import InsertedByCondition
from matmorph.specs.match import leaves
from matmorph.specs.schema import AnyOf, Export, MethodUse, Rule, Spec, Stage, Train

_EXPORT_FIELDS = ("tokens", "target")
SECOND_MOMENT = frozenset({Statistic.INPUT_SECOND_MOMENT})


@dataclass(frozen=True, slots=True, eq=False)
class Compilation:
    """`source` as traced, `graph` as rewritten. `decisions`: of the stages that a budget decided, in order."""

    source: Graph
    graph: Graph
    report: Report
    decisions: tuple[Decided, ...] = ()


def inspect_graph(graph: Graph, name: str, precision: str = "fp32") -> Report:
    """Every site as it is."""
    rows = dense_rows(find_sites(graph), graph, precision)
    return Report(name, "", rows, planned_totals(graph, rows, precision), graph.notes, is_plan=True)


def plan_graph(graph: Graph, spec: Spec, methods: Methods, name: str) -> Report:
    """What compile would do and what it would cost; reads no weight, except for the conditions that ask for a statistic of one.

    Raises SpecError as compile does: dead rules, `expect`, ranks that no site can have, rejects under `strict`.
    """
    sites = find_sites(graph)
    rows: dict[str, SiteRow] = {}
    left: Sequence[Site] = sites
    notes: list[str] = []
    blocks = BlockPass(methods)
    for number, stage in enumerate(_for_export(stage, spec.export) for stage in spec.stages):
        planned, later = (stage, ()) if number == 0 else _without_inserted(stage)
        notes += [f"rule {rule.name} works on what an earlier stage inserts: planned only by compiling" for rule in later]
        selection = select(planned, graph, left, layer_count(sites))
        divided = _divided(graph, left, selection, methods)
        if is_open(divided):
            notes += planned_notes(Open(graph, graph, planned, selection, divided), methods, spec.export)
        divided = closed_part(divided)
        pruned = blocks.plan(graph, divided, spec.export.precision)
        outcomes = (*refuse_slow(_planned(divided.claims, methods), spec.export), *pruned)
        refuse_rejects(outcomes, spec.strict)
        notes += selection.notes
        by_site = {outcome.site: outcome for outcome in outcomes}
        notes += kernel_summary(outcomes, spec.export)
        _enter(rows, site_rows(selection.claims, by_site, graph, spec.export))
        narrow = {outcome.site.path for outcome in pruned if outcome.reject is None}
        left = [site for site in left if rows[site.path].status != "rewritten" or site.path in narrow]
    found = tuple(rows.values())
    sums = planned_totals(graph, found, spec.export.precision, blocks.aside)
    return Report(name, spec.name, found, sums, (*graph.notes, *notes, *blocks.notes()), is_plan=True)


def _divided(graph: Graph, sites: Sequence[Site], selection: Selection, methods: Methods) -> Divided:
    return divide(graph, sites, {claim.site: claim.rule for claim in selection.claims}, methods)


def _for_export(stage: Stage, export: Export) -> Stage:
    """The stage's rules as they hold for this export: methods that plan for numbers of rows and devices are told which."""
    rules = (replace(rule, rewrite=_uses_for_export(rule.rewrite, export)) for rule in stage.rules)
    return replace(stage, rules=tuple(rules))


def _uses_for_export(uses: tuple[MethodUse, ...], export: Export) -> tuple[MethodUse, ...]:
    return tuple(_use_for_export(use, export) for use in uses)


def _use_for_export(use: MethodUse, export: Export) -> MethodUse:
    if isinstance(use.spec, AnyOf):
        return replace(use, spec=AnyOf(tuple(_uses_for_export(uses, export) for uses in use.spec.alternatives)))
    names = {field.name for field in fields(use.spec)} if is_dataclass(use.spec) else set()
    open_ = {name: getattr(export, name) for name in _EXPORT_FIELDS if name in names and getattr(use.spec, name) is None}
    return replace(use, spec=replace(use.spec, **open_)) if open_ else use


def _enter(rows: dict[str, SiteRow], found: Iterable[SiteRow]) -> None:
    """A stage's rows over those of the stages before it: a rewrite stays, else the last rule that claimed the site has its say."""
    for row in found:
        old = rows.get(row.path)
        if old is not None and old.status == row.status == "rewritten":
            rows[row.path] = _over(old, row)
        elif old is None or row.status == "rewritten" or (row.rule is not None and old.status != "rewritten"):
            rows[row.path] = row


def _over(old: SiteRow, row: SiteRow) -> SiteRow:
    """A site that was pruned, and then pruned or replaced again: what it was in the source, what it is now."""
    again = old.method == row.method
    return replace(
        row,
        shape=old.shape,
        method=row.method if again else f"{old.method}, then {row.method}",
        notes=row.notes if again else (*old.notes, *row.notes, f"errors are those of {row.method} on what {old.method} left"),
        parameters=(old.parameters[0], row.parameters[1]),
        bytes=(old.bytes[0], row.bytes[1]),
        macs=(old.macs[0], row.macs[1]),
    )


def _without_inserted(stage: Stage) -> tuple[Stage, tuple[Rule, ...]]:
    """The stage's rules on matmuls of the source, and those on inserted ones."""
    later = tuple(rule for rule in stage.rules if any(isinstance(leaf, InsertedByCondition) for leaf, _ in leaves(rule.match.root)))
    return replace(stage, rules=tuple(rule for rule in stage.rules if rule not in later)), later


def _planned(claimed: Sequence[tuple[Site, Rule]], methods: Methods) -> list[Outcome]:
    refuse_impossible(claimed, methods)
    found = []
    for site, rule in claimed:
        parts = appraise(site, rule, methods)
        if isinstance(parts, Reject):
            found.append(Outcome(site, rule, parts))
        else:
            found.append(Outcome(site, rule, None, parts, cost=total_cost(site, parts)))
    return found


def compile_graph(
    graph: Graph,
    spec: Spec,
    methods: Methods,
    name: str,
    *,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Compilation:
    """The rewritten graph and its report. With calibration data every claimed site's output error is measured.

    Raises SpecError (dead rules, `expect`, a method without the data it needs, rejects under `strict`), InputError (calibration data that
    is none), RewriteError (NaN or infinity in a weight), CheckError (tolerance) and VerifyError (our bug).
    """
    batches = _repeatable(calibration)
    if batches is None:
        for stage in spec.stages:
            refuse_unmeasured(stage.tolerance)
    _refuse_not_finite(graph)
    inputs = without_labels(batches, spec, graph, methods)
    current = graph
    blocks = BlockPass(methods)
    rows: dict[str, SiteRow] = {}
    notes = list(graph.notes)
    decisions: list[Decided] = []
    shots = [shot for stage in spec.stages for shot in shots_of(_for_export(stage, spec.export), methods)]
    for stage in shots:
        sites = find_sites(current)
        selection = select(stage, current, sites)
        divided = _divided(current, sites, selection, methods)
        refuse_without_train(divided.claims, methods, spec.train)
        stats = _statistics(current, stage, divided, methods, (inputs, batches), spec.train, progress)
        stats = with_gradients(current, divided.claims, methods, stats, batches, spec.train, partial(progress, "differentiating"))
        stats, felt = _felt(current, stage, spec, divided, stats, batches, inputs, progress)
        choice = None
        if is_open(divided):
            job = Open(current, graph, stage, selection, divided, sum(row.coded for row in rows.values()))
            choice = decided(job, spec, methods, stats, felt, progress)
            decisions.append(choice)
            selection = choice.selection
            divided = closed_part(_divided(current, sites, selection, methods))
        outcomes = build(
            current, divided.claims, methods, stats, seed=seed, progress=lambda done, total: progress("rewriting", done, total)
        )
        outcomes = (*refuse_slow(outcomes, spec.export), *(choice.refused if choice is not None else ()))
        outcomes = (*outcomes, *blocks.build(current, divided, stats))
        refuse_rejects(outcomes, spec.strict)
        outcomes, rolled_back = hold(outcomes, stage.tolerance)
        blocks.keep(outcomes)
        read, current = current, _checked(narrowed(splice(current, outcomes), outcomes))
        found = site_rows(selection.claims, {outcome.site: outcome for outcome in outcomes}, read, spec.export)
        notes += [*selection.notes, *(choice.notes if choice is not None else ()), *rolled_back, *kernel_summary(outcomes, spec.export)]
        notes += verdict(choice, found) if choice is not None else ()
        _enter(rows, found)
    own, inserted = _of_source(tuple(rows.values()), graph)
    sums = totals(graph, current, own, inserted, spec.export.precision)
    report = Report(name, spec.name, (*own, *inserted), sums, (*notes, *blocks.notes()))
    return Compilation(graph, current, report, tuple(decisions))


def _refuse_not_finite(graph: Graph) -> None:
    """RewriteError naming the first parameter with NaN or infinity, claimed or not: nothing could be checked on such a model."""
    for const in graph.used_state():
        dtype = const.tensor.torch_dtype
        if const.kind != "parameter" or not dtype.is_floating_point:
            continue
        weight = const.load()
        total = weight.sum(dtype=torch.promote_types(dtype, torch.float32))  # one pass and no copy; large values may overflow it
        bad = 0 if bool(torch.isfinite(total)) else int((~torch.isfinite(weight)).sum())
        if bad:
            raise RewriteError(f"{const.path}: {bad} of {const.numel} entries are NaN or infinite")


def _repeatable(calibration: Iterable[Any] | None) -> Iterable[Any] | None:
    """Batches that every stage can read from the start, which an iterator cannot give. InputError for what is no series of batches."""
    if calibration is None:
        return None
    if isinstance(calibration, Mapping | torch.Tensor | str) or not isinstance(calibration, Iterable):
        raise InputError(
            f"calibration must be an iterable of batches, each like the example inputs; got {type(calibration).__name__}",
            ["a single batch goes into a list: calibration=[batch]"],
        )
    return _Replayed(calibration) if isinstance(calibration, Iterator) else calibration


class _Replayed:
    """An iterator that can be read again: what was read is kept, and no more is read than is asked for."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._kept: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        yield from self._kept
        for batch in self._source:
            self._kept.append(batch)
            yield batch


def _statistics(
    graph: Graph,
    stage: Stage,
    divided: Divided,
    methods: Methods,
    data: tuple[Iterable[Any] | None, Iterable[Any] | None],
    train: Train | None,
    progress: Progress,
) -> Mapping[Site, SiteStats]:
    """Second moments of all sites that will be rewritten, and gradients where a block's method asks for them. `data`: batches without and
    with labels. SpecError where a method needs data, a loss or labels and there is none."""
    batches, labelled = data
    refuse_without_loss(divided.jobs, methods, train)
    working = [(site, rule) for site, rule in divided.claims if _works(site, rule, methods)]
    if batches is None:
        _refuse_without_data(working, methods)
        return {}
    samples = stage.calibration.samples
    sites = (*(site for site, _ in working), *block_needs(divided.jobs, methods))
    needs = [(site, SECOND_MOMENT) for site in sites if site.applications]
    stats = calibrate(graph, needs, batches, samples, partial(progress, "calibrating"))
    return with_taylor(graph, divided.jobs, methods, stats, labelled, samples, train, partial(progress, "differentiating"))


def _felt(
    graph: Graph,
    stage: Stage,
    spec: Spec,
    divided: Divided,
    stats: Mapping[Site, SiteStats],
    batches: Iterable[Any] | None,
    inputs: Iterable[Any] | None,
    progress: Progress,
) -> tuple[Mapping[Site, SiteStats], Sensitivity | None]:
    """Of the sites with statistics, and of tables that are left open; the statistics with it. `inputs`: the batches without labels."""
    open_ = [site for site, rule in divided.claims if rule.is_open]
    read = batches if stage.calibration.sensitivity == "fisher" else inputs
    sites = list(dict.fromkeys((*stats, *open_)))
    found = sensitivity(graph, stage.calibration, spec, sites, read, partial(progress, "differentiating"))
    return with_moments(stats, found), found


def _works(site: Site, rule: Rule, methods: Methods) -> bool:
    """Whether anything may become of the site."""
    if not rule.is_open:
        return not isinstance(appraise(site, rule, methods), Reject)
    return site.blocked is None and any(uses and methods[uses[0].method].check(site, uses[0].spec) is None for uses in rule.alternatives)


def _refuse_without_data(claims: Sequence[tuple[Site, Rule]], methods: Methods) -> None:
    for _, rule in claims:
        for use in (use for uses in rule.alternatives for use in uses):
            wanted = methods[use.method].needs(use.spec)
            if wanted:
                statistics = ", ".join(sorted(statistic.value for statistic in wanted))
                raise SpecError(
                    f"rule {rule.name}: {use.method} needs calibration data ({statistics}) and none was given",
                    at=use.at,
                    details=["pass calibration=... to compile, or --calibration FILE on the command line"],
                )


def _checked(graph: Graph) -> Graph:
    """Laws of the IR, after every splice."""
    try:
        verify(graph)
    except MatmorphError as error:
        error.add_note("after the rewrite pass")
        raise
    return graph


def _of_source(rows: Sequence[SiteRow], source: Graph) -> tuple[tuple[SiteRow, ...], tuple[SiteRow, ...]]:
    """Rows of the source's own sites, in its order, and those of inserted matmuls that a later stage rewrote."""
    order = {site.path: index for index, site in enumerate(find_sites(source))}
    own = sorted((row for row in rows if row.path in order), key=lambda row: order[row.path])
    inserted = tuple(
        replace(row, notes=(*row.notes, "a matmul that an earlier stage inserted: its errors refer to that matmul"))
        for row in rows
        if row.path not in order and row.status == "rewritten"
    )
    return tuple(own), inserted
