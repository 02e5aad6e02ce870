"""The order of the stages, of a plan and of a compile; what they come to together, and the report of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from matmorph.errors import InputError, RewriteError
from matmorph.ir.adapter import Adapter, present
from matmorph.ir.core import Graph
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.budget.account import Decision
from matmorph.passes.budget.decide import without_labels
from matmorph.passes.methods.protocol import Methods
from matmorph.passes.reporting import dense_rows, planned_totals, totals
from matmorph.passes.rewriting.block_pass import PruningSoFar
from matmorph.passes.rewriting.tolerance import refuse_unmeasured
from matmorph.passes.selection.survey import Survey
from matmorph.passes.stage import Built, Run, built, decided, equalised, measured, planned, selected
from matmorph.passes.work.folder import WorkFolder
from matmorph.passes.work.hands import Hands
from matmorph.progress import Progress, silent
from matmorph.report.model import Report, SiteRow
from matmorph.runtime.targets import chosen_targets
from matmorph.specs.schema import Spec, Stage


@dataclass(frozen=True, slots=True, eq=False)
class Compilation:
    """`source` as traced, `graph` as rewritten. `decisions`: of the stages that a budget decided, in order. `adapters`: what
    trains to be exchanged and merged."""

    source: Graph
    graph: Graph
    report: Report
    decisions: tuple[Decision, ...] = ()
    adapters: tuple[Adapter, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class SoFar:
    """What the stages so far have come to. `rows`: by path, what the last stage that had something to say of a site says."""

    graph: Graph
    notes: tuple[str, ...]
    rows: Mapping[str, SiteRow] = field(default_factory=dict)
    pruning: PruningSoFar = field(default_factory=PruningSoFar)
    decisions: tuple[Decision, ...] = ()
    adapters: tuple[Adapter, ...] = ()

    def after(self, stage: Built) -> SoFar:
        decisions = (*self.decisions, *(() if stage.decision is None else (stage.decision,)))
        adapters = (*self.adapters, *stage.adapters)
        return SoFar(stage.graph, (*self.notes, *stage.notes), _entered(self.rows, stage.rows), stage.pruning, decisions, adapters)

    @property
    def coded(self) -> int:
        """Parameters that are codes now."""
        return sum(row.coded for row in self.rows.values())

    @property
    def all_notes(self) -> tuple[str, ...]:
        return (*self.notes, *self.pruning.notes())


def inspect_graph(graph: Graph, name: str, precision: str = "fp32") -> Report:
    """Every site as it is."""
    rows = dense_rows(find_sites(graph), graph, precision)
    return Report(name, "", rows, planned_totals(graph, rows, precision), graph.notes, is_plan=True)


def plan_graph(graph: Graph, spec: Spec, methods: Methods, name: str) -> Report:
    """What compile would do and what it would cost; reads no weight, except for the conditions that ask for a statistic of one.

    A stage after the first is planned on the source graph, because what the first one inserts exists only once it is compiled. Raises
    SpecError as compile does: dead rules, `expect`, ranks that no site can have, rejects under `strict`.
    """
    run = Run(graph, spec, methods)
    survey = Survey.of(graph)
    so_far = SoFar(graph, graph.notes)
    for number, stage in enumerate(run.stages):
        here, later = (stage, ()) if number == 0 else _without_inserted(stage)
        found = planned(selected(here, survey, run), so_far.pruning, run)
        so_far = replace(so_far, notes=(*so_far.notes, *later)).after(found)
        survey = survey.without(found.replaced)
    rows = tuple(so_far.rows.values())
    sums = planned_totals(graph, rows, spec.export.precision, so_far.pruning.aside)
    unplaced = tuple(target.title for target in chosen_targets(spec.export.target) if target.hands_back)
    return Report(name, spec.name, rows, sums, so_far.all_notes, is_plan=True, unplaced=unplaced)


def compile_graph(
    graph: Graph,
    spec: Spec,
    methods: Methods,
    name: str,
    *,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    hands: Hands | None = None,
    work: WorkFolder | None = None,
) -> Compilation:
    """The rewritten graph and its report. With calibration data every claimed site's output error is measured. `hands`, `work`: see `Run`.

    Raises SpecError (dead rules, `expect`, a method without the data it needs, rejects under `strict`), InputError (calibration data that
    is none), RewriteError (NaN or infinity in a weight), CheckError (tolerance) and VerifyError (our bug).
    """
    batches = _repeatable(calibration)
    if batches is None:
        for stage in spec.stages:
            refuse_unmeasured(stage.tolerance)
    _refuse_not_finite(graph)
    run = Run(graph, spec, methods, batches, without_labels(batches, spec, graph, methods), seed, progress, hands, work)
    so_far = SoFar(graph, graph.notes)
    for stage in run.shots:
        claims = selected(stage, Survey.of(so_far.graph), run)
        choice = decided(equalised(measured(claims, run), run), so_far.coded, run)
        so_far = so_far.after(built(choice, so_far.pruning, run))
    own, inserted = _of_source(tuple(so_far.rows.values()), graph)
    sums = totals(graph, so_far.graph, own, inserted, spec.export, methods)
    report = Report(name, spec.name, (*own, *inserted), sums, so_far.all_notes)
    return Compilation(graph, so_far.graph, report, so_far.decisions, present(so_far.adapters, so_far.graph))


def _entered(rows: Mapping[str, SiteRow], found: Iterable[SiteRow]) -> Mapping[str, SiteRow]:
    """A stage's rows over those of the stages before it: a rewrite stays, else the last rule that claimed the site has its say."""
    entered = dict(rows)
    for row in found:
        old = entered.get(row.path)
        if old is not None and old.status == row.status == "rewritten":
            entered[row.path] = _over(old, row)
        elif old is None or row.status == "rewritten" or (row.rule is not None and old.status != "rewritten"):
            entered[row.path] = row
    return entered


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


def _without_inserted(stage: Stage) -> tuple[Stage, tuple[str, ...]]:
    """The stage's rules on matmuls of the source, and a note for each on inserted ones."""
    later = tuple(rule for rule in stage.rules if rule.match.asks_for_inserted)
    notes = tuple(f"rule {rule.name} works on what an earlier stage inserts: planned only by compiling" for rule in later)
    return replace(stage, rules=tuple(rule for rule in stage.rules if rule not in later)), notes


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
