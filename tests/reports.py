"""Reports made by hand, for tests of what is drawn from them."""

from __future__ import annotations

from matmorph.ir.site import Bound
from matmorph.report.model import Parity, Report, SiteRow, Totals

ROLES = (
    ("attention.q", "attention.self.query", (384, 384)),
    ("attention.k", "attention.self.key", (384, 384)),
    ("attention.v", "attention.self.value", (384, 384)),
    ("attention.o", "attention.output.dense", (384, 384)),
    ("mlp.fc1", "intermediate.dense", (1536, 384)),
    ("mlp.fc2", "output.dense", (384, 1536)),
)


def _row(layer: int, role: str, name: str, shape: tuple[int, int], rewritten: bool, is_plan: bool) -> SiteRow:
    dense = shape[0] * shape[1]
    rank = 6 * dense // (10 * sum(shape)) + layer
    after = rank * sum(shape) if rewritten else dense
    return SiteRow(
        path=f"encoder.layer.{layer}.{name}",
        role=role,
        layer=layer,
        form="linear",
        shape=shape,
        rule="encoder" if rewritten else None,
        method="low_rank" if rewritten else None,
        status="rewritten" if rewritten else "unclaimed",
        rank=rank if rewritten else None,
        requested_rank="ratio 0.6" if rewritten else None,
        weight_error=None if is_plan or not rewritten else 0.2 + layer / 100,
        output_error=None if is_plan or not rewritten else 0.05 + layer / 100,
        bound=Bound("eckart_young", "weight_error", 0.19) if rewritten and not is_plan else None,
        parameters=(dense, after),
        bytes=(4 * dense, 4 * after),
        macs=(dense, after),
    )


def make_report(layers: int = 6, rewritten: bool = True, is_plan: bool = False) -> Report:
    """An encoder of `layers` layers; after it a pooler that was rejected and a head that no rule claimed."""
    rows = [_row(layer, *entry, rewritten, is_plan) for layer in range(layers) for entry in ROLES]
    pooler = SiteRow(
        path="pooler.dense",
        role="other",
        layer=None,
        form="linear",
        shape=(384, 384),
        rule="encoder",
        method="low_rank",
        status="rejected",
        reason="rank 300 takes 921,600 bytes, dense takes 589,824 <b>",
        parameters=(147456, 147456),
        bytes=(589824, 589824),
        macs=(147456, 147456),
    )
    rows.append(pooler)
    before, after = (sum(row.parameters[side] for row in rows) + 12_000_000 for side in (0, 1))
    macs = (before - 12_000_000, after - 12_000_000)
    return Report(
        name="BertModel",
        spec_name="low-rank-60",
        sites=tuple(rows),
        totals=Totals((before, after), (4 * before, 4 * after), macs),
        notes=("train mode switched to eval for the trace",),
        parity=None if is_plan else Parity(2.4e-07, 1e-4, 3, "CPUExecutionProvider"),
        versions={"matmorph": "0.1.0", "torch": "2.13.0"},
        is_plan=is_plan,
    )
