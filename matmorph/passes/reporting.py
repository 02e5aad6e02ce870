"""Rows and totals of a report, from claims and outcomes. A plan's outcomes carry parts and costs but no errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from matmorph.ir.core import Const, Graph
from matmorph.ir.site import Site
from matmorph.passes.methods import dense_cost
from matmorph.passes.rewrite import Outcome
from matmorph.passes.select import Claim
from matmorph.passes.sizes import exported_sizes, item_size
from matmorph.report.model import PartRow, SiteRow, Totals
from matmorph.specs.schema import Rank


def site_rows(claims: Iterable[Claim], outcomes: Mapping[Site, Outcome], precision: str) -> tuple[SiteRow, ...]:
    """One row per claim, in order."""
    return tuple(_row(claim, outcomes.get(claim.site), precision) for claim in claims)


def dense_row(site: Site, precision: str) -> SiteRow:
    """A site as it is."""
    cost = dense_cost(site)
    size = site.parameters * item_size(site.const.tensor.dtype, precision)
    macs = 0 if site.form == "embedding" else cost.macs
    return SiteRow(
        path=site.path,
        role=site.role,
        layer=site.layer,
        form=site.form,
        shape=(*((site.batch,) if site.batch else ()), site.out_features, site.in_features),
        rule=None,
        method=None,
        status="unclaimed",
        parameters=(site.parameters, site.parameters),
        bytes=(size, size),
        macs=(macs, macs),
        applications=len(site.applications) + (len(site.gathers) if site.form == "embedding" else 0),
    )


def _row(claim: Claim, outcome: Outcome | None, precision: str) -> SiteRow:
    row = dense_row(claim.site, precision)
    if claim.rule is None:
        return replace(row, reason=claim.why)
    uses = claim.rule.rewrite
    row = replace(row, rule=claim.rule.name, method=" + ".join(use.method for use in uses) or "keep")
    if outcome is None:
        return replace(row, reason=f"kept dense by rule {claim.rule.name}")
    if outcome.reject is not None:
        return replace(row, status="rejected", reason=outcome.reject.reason)
    return _rewritten(row, outcome, precision)


def _rewritten(row: SiteRow, outcome: Outcome, precision: str) -> SiteRow:
    cost = outcome.cost or dense_cost(outcome.site)
    stays = row.parameters[0] if outcome.rule.untie and outcome.site.gathers else 0  # the table keeps its gather
    item = item_size(outcome.site.const.tensor.dtype, precision)
    size = _stored(outcome.consts, precision) if outcome.consts else cost.bytes * item // outcome.site.const.tensor.torch_dtype.itemsize
    trains = (
        sum(const.numel for const in outcome.consts if const.trainable) if outcome.consts else sum(p.cost.parameters for p in outcome.parts)
    )
    main = outcome.parts[0]
    return replace(
        row,
        status="rewritten",
        rank=main.choice.rank,
        rank_at_most=main.choice.at_most,
        requested_rank=_requested(main.use.spec),
        weight_error=outcome.weight_error,
        output_error=outcome.output_error,
        bound=outcome.bound,
        parameters=(row.parameters[0], cost.parameters + stays),
        bytes=(row.bytes[0], size + stays * item),
        macs=(row.macs[0], cost.macs),
        trainable=trains,
        parts=tuple(PartRow(part.use.method, part.choice.rank, part.notes) for part in outcome.parts),
        notes=outcome.notes,
    )


def _stored(consts: Sequence[Const], precision: str) -> int:
    return sum(const.numel * item_size(const.tensor.dtype, precision) for const in consts)


def _requested(spec: Any) -> str | None:
    rank = getattr(spec, "rank", None)
    if not isinstance(rank, Rank):
        return None
    return str(rank.value) if rank.kind == "fixed" else f"{rank.kind} {rank.value}"


def totals(source: Graph, rows: Sequence[SiteRow], precision: str, after: Graph | None = None) -> Totals:
    """Over the whole model, each weight once. `after` is the rewritten graph; without it (a plan) the rows say what changes."""
    before = _weights(source, precision)
    change = [sum(row.parameters[1] - row.parameters[0] for row in rows), sum(row.bytes[1] - row.bytes[0] for row in rows)]
    later = _weights(after, precision) if after is not None else (before[0] + change[0], before[1] + change[1])
    macs = (sum(row.macs[0] for row in rows), sum(row.macs[1] for row in rows))
    return Totals((before[0], later[0]), (before[1], later[1]), macs, sum(row.trainable for row in rows))


def _weights(graph: Graph, precision: str) -> tuple[int, int]:
    """(parameters, bytes of the data file); buffers and constants count in bytes only. Equal storage counts once."""
    sizes = exported_sizes(graph, precision)
    once = {const.storage or const.path: (const, size) for const, size in sizes.items()}
    return sum(c.numel for c, _ in once.values() if c.kind == "parameter"), sum(size for _, size in once.values())
