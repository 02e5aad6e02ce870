"""Rows and totals of a report, from claims and outcomes. A plan's outcomes carry parts and costs but no errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from matmorph.ir.core import Const, Graph
from matmorph.ir.site import Cost, Site
from matmorph.passes.adapters.inference import inference_graph
from matmorph.passes.attention.coded_cache import code_cache
from matmorph.passes.kernel_costs import kernel_notes, times_of
from matmorph.passes.methods.protocol import Methods, dense_cost
from matmorph.passes.rewriting.rewrite import Outcome
from matmorph.passes.rewriting.sample import sample_notes
from matmorph.passes.selection.select import Claim
from matmorph.passes.sizes import cache_bytes, exported_sizes, item_size, site_bytes
from matmorph.report.model import Pair, PartRow, SiteRow, Totals
from matmorph.specs.schema import Export, Rank


def site_rows(claims: Iterable[Claim], outcomes: Mapping[Site, Outcome], graph: Graph, export: Export) -> tuple[SiteRow, ...]:
    """One row per claim on the graph, in order."""
    sizes = exported_sizes(graph, export.precision)
    return tuple(_row(claim, outcomes.get(claim.site), sizes, export) for claim in claims)


def dense_rows(sites: Iterable[Site], graph: Graph, precision: str) -> tuple[SiteRow, ...]:
    """Sites of the graph as they are."""
    sizes = exported_sizes(graph, precision)
    return tuple(_dense_row(site, sizes) for site in sites)


def _dense_row(site: Site, sizes: Mapping[Const, int]) -> SiteRow:
    cost = dense_cost(site)
    size = site_bytes(site, sizes)
    macs = 0 if site.form == "embedding" or site.listed else cost.macs
    return SiteRow(
        path=site.path,
        role=site.role,
        layer=site.layer,
        form=site.form,
        shape=(*((site.batch,) if site.batch else ()), site.out_features, site.in_features),
        rule=None,
        method=None,
        status="unclaimed",
        reason=site.blocked,
        parameters=(cost.parameters, cost.parameters),
        bytes=(size, size),
        macs=(macs, macs),
        applications=len(site.applications) + (len(site.gathers) if site.form == "embedding" else 0),
        notes=(f"its weight is computed from {', '.join(part.path for part in site.parts)}",) if site.parts else (),
        weights=tuple(part.path for part in site.parts) or (site.const.path,),
        stack=site.stack,
    )


def _row(claim: Claim, outcome: Outcome | None, sizes: Mapping[Const, int], export: Export) -> SiteRow:
    row = _dense_row(claim.site, sizes)
    if claim.rule is None:
        return replace(row, reason=claim.why)
    uses = claim.rule.rewrite
    row = replace(row, rule=claim.rule.name, method=" + ".join(use.method for use in uses) or "keep")
    if outcome is None and claim.rule.is_open:
        return replace(row, reason="left to the budget: decided when compiled", open=True)
    if outcome is None:
        return replace(row, reason=f"kept dense by rule {claim.rule.name}")
    if outcome.reject is not None:
        return replace(row, status="rejected", reason=outcome.reject.reason)
    return _rewritten(row, outcome, export)


def _rewritten(row: SiteRow, outcome: Outcome, export: Export) -> SiteRow:
    cost = outcome.cost or dense_cost(outcome.site)
    kept = outcome.keeps_dense or (not outcome.consts and all(part.kind == "update" for part in outcome.parts))
    stays = row.parameters[0] if outcome.rule.untie and outcome.site.gathers and not kept else 0  # the table keeps its gather
    inside = {part.use.method for part in outcome.parts if part.cost.trains}  # what they learn goes into the weight that there was
    given = {part.use.method for part in outcome.parts if part.kind == "update" and export.adapters == "inputs"}  # with a run, in no file
    made = [const for const in outcome.consts if const.method not in inside | given]
    new = [(const.tensor.dtype, const.numel) for const in made]  # as built; a plan has only what the methods promise
    if given and not outcome.consts:
        new = [item for part in outcome.parts if part.kind == "replace" for item in _stored(part.cost, outcome.site)]
    if kept and outcome.site.parts:  # the parts stay, whatever their types
        beside = row.bytes[0]
        planned = [item for part in outcome.parts for item in _stored(part.cost, outcome.site)]
        stored = new or ([] if given or outcome.consts else planned)
    else:
        beside = row.bytes[0] if stays else 0
        new += [(outcome.site.const.tensor.dtype, outcome.site.parameters)] if (new or given) and kept else []
        stored = new or list(_stored(cost, outcome.site))
    size = beside + sum(count * item_size(dtype, export.precision) for dtype, count in stored)
    trains = (
        sum(const.numel for const in outcome.consts if const.trainable)
        if outcome.consts
        else sum(part.cost.parameters - part.cost.coded - part.cost.frozen + part.cost.trains for part in outcome.parts)
    )
    main = outcome.parts[0]
    trains = 0 if main.kind == "block" else trains  # what is left of the model's own weights is none of the method's
    return replace(
        row,
        status="rewritten",
        reason=None,
        rank=main.choice.rank,
        rank_at_most=main.choice.at_most,
        requested_rank=_requested(main.use.spec),
        weight_error=outcome.weight_error,
        output_error=outcome.output_error,
        bound=outcome.bound,
        spectrum=outcome.spectrum,
        sample=outcome.sample,
        parameters=(row.parameters[0], cost.parameters + stays),
        bytes=(row.bytes[0], size),
        macs=(row.macs[0], cost.macs),
        trainable=trains,
        coded=cost.coded,
        parts=tuple(PartRow(part.use.method, part.choice.rank, part.notes) for part in outcome.parts),
        notes=(*row.notes, *outcome.notes, *sample_notes(outcome.sample, outcome.site.in_features), *kernel_notes(outcome, export)),
        times=times_of(outcome, export),
    )


def _stored(cost: Cost, site: Site) -> tuple[tuple[str, int], ...]:
    """(element type, count) of what a site takes."""
    return cost.stored or ((site.const.tensor.dtype, cost.parameters),)


def _requested(spec: Any) -> str | None:
    rank = getattr(spec, "rank", None)
    return str(rank) if isinstance(rank, Rank) else None


def planned_totals(source: Graph, rows: Sequence[SiteRow], precision: str, aside: Pair = (0, 0)) -> Totals:
    """Over the whole model, each weight once: the rows say what changes, `aside` what else does (parameters and bytes of biases)."""
    parameters, size = weights_of(source, precision)
    return Totals(
        parameters=(parameters, parameters + _change(row.parameters for row in rows) + aside[0]),
        bytes=(size, size + _change(row.bytes for row in rows) + aside[1]),
        macs=(sum(row.macs[0] for row in rows), sum(row.macs[1] for row in rows)),
        trainable=sum(row.trainable for row in rows),
    )


def totals(source: Graph, after: Graph, own: Sequence[SiteRow], inserted: Sequence[SiteRow], export: Export, methods: Methods) -> Totals:
    """Over the whole model, each weight once. `own`: rows of the source's sites; `inserted`: of matmuls that one stage put in and a later
    one rewrote, whose "before" is no part of the source."""
    before, later = (weights_of(graph, export.precision) for graph in (source, inference_graph(after, methods)))
    dense = sum(row.macs[0] for row in own)
    return Totals(
        parameters=(before[0], later[0] + sum(row.coded for row in (*own, *inserted))),  # codes are no parameters of the module
        bytes=(before[1], later[1]),
        macs=(dense, dense + _change(row.macs for row in (*own, *inserted))),
        trainable=sum(const.numel for const in after.used_state() if const.trainable and const.rule is not None),
        cache=_cache(source, after, export),
    )


def _cache(source: Graph, after: Graph, export: Export) -> Pair | None:
    kept = code_cache(after) if export.cache == "int8" else after
    before, later = cache_bytes(source, export.precision), cache_bytes(kept, export.precision)
    return None if before is None or later is None else (before, later)


def _change(pairs: Iterable[tuple[int, int]]) -> int:
    return sum(after - before for before, after in pairs)


def weights_of(graph: Graph, precision: str) -> tuple[int, int]:
    """(parameters of the module, those that nothing reads included; bytes of the data file, where only what is read goes, buffers and
    constants too). Equal storage counts once."""
    once = {(const.storage or const.path, size): size for const, size in exported_sizes(graph, precision).items()}
    parameters = {const.storage or const.path: const.numel for const in graph.state if const.kind == "parameter"}
    return sum(parameters.values()), sum(once.values())
