"""Reports made by hand, for tests of what is drawn from them."""

from __future__ import annotations

from matmorph.ir.site import Bound, Spectrum
from matmorph.report.model import Parity, PartRow, Report, SiteRow, Totals
from matmorph.report.reading import Context

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


HOSTILE = "<img src=x onerror=alert(1)>.\"q\" 'r' </script></style></title>&amp;{{ 7 * 7 }}"
"""A name that would end a tag, an attribute, a script or a template expression."""

_LARGE_ROLES = (
    ("attention.q", "self_attn.q_proj", (4096, 4096)),
    ("attention.k", "self_attn.k_proj", (1024, 4096)),
    ("attention.v", "self_attn.v_proj", (1024, 4096)),
    ("attention.o", "self_attn.o_proj", (4096, 4096)),
    ("mlp.gate", "mlp.gate_proj", (14336, 4096)),
    ("mlp.up", "mlp.up_proj", (14336, 4096)),
    ("mlp.down", "mlp.down_proj", (4096, 14336)),
)
_LARGE_METHODS = ("low_rank", "loftq", "quantize", "tt")


def make_large_report(layers: int = 32) -> Report:
    """A decoder with seven matmuls in each layer under several methods, low_rank ones with spectra; a table and a head that stay."""
    rows = [_large_row(layer, number) for layer in range(layers) for number in range(len(_LARGE_ROLES))]
    ends = (("model.embed_tokens", "embedding", "embedding"), (f"lm_head.{HOSTILE}", "head", "linear"))
    for path, role, form in ends:
        size = 128_256 * 4096
        rows.append(
            SiteRow(
                path,
                role,
                None,
                form,
                (128_256, 4096),
                None,
                None,
                "unclaimed",
                "no rule matches",
                parameters=(size, size),
                bytes=(2 * size,) * 2,
            )
        )
    sums = {name: tuple(sum(getattr(row, name)[side] for row in rows) for side in (0, 1)) for name in ("parameters", "bytes", "macs")}
    return Report("LlamaForCausalLM", "mixed", tuple(rows), Totals(**sums, trainable=1234), parity=Parity(3e-06, 1e-4, 3, "CPU"))  # type: ignore[arg-type]


def _large_row(layer: int, number: int) -> SiteRow:
    role, name, shape = _LARGE_ROLES[number]
    method = _LARGE_METHODS[(layer // 8 + number) % len(_LARGE_METHODS)]
    done, dense = (layer * 7 + number) % 11 != 0, shape[0] * shape[1]
    factored = done and method == "low_rank"
    at = tuple(sorted({1 + round(k * 1023 / 39) for k in range(40)} | {256}))
    return SiteRow(
        path=f"model.layers.{layer}.{name}",
        role=role,
        layer=layer,
        form="linear",
        shape=shape,
        rule=f"rule-{number % 3}",
        method=method,
        status="rewritten" if done else "rejected",
        reason=None if done else "does not pay",
        rank=256 if factored else None,
        weight_error=0.1 + layer / 1000 if done else None,
        output_error=0.02 + number / 100 if done else None,
        bound=Bound("eckart_young", "output_error", 0.015 + number / 100) if factored else None,
        parameters=(dense, dense // 3 if done else dense),
        bytes=(2 * dense, 2 * dense // 3 if done else 2 * dense),
        macs=(dense, dense // 3 if done else dense),
        parts=(PartRow(method),) if done else (),
        notes=("a note of some length about the solver that was taken",) if number == 2 else (),
        spectrum=Spectrum("W L", 1024, at, tuple(float(f"{9 / k:.4e}") for k in at)) if factored else None,
    )


def make_context() -> Context:
    """What a folder holds beside the report, with times and a Pareto front."""
    return Context(
        spec="version: 1\nname: <low> & rank\n",
        source_sha256="ab" * 32,
        files={"model.onnx": ("cd" * 32, 113_706), "model.onnx.data": ("ef" * 32, 74_008_064)},
        run={"seconds": {"trace": 1.5, "compile": 20.0, "save": 3.25}, "machine": "x86_64", "processors": 2},
        pareto={
            "resource": "bytes",
            "of": "model",
            "points": [
                {"limit": share * 10**6, "total": share * 10**6, "error": 9 / share, "share": share / 100} for share in (40, 60, 80)
            ],
        },
    )
