"""In which form a graph's attention over its cache is written, and the graph in that form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from matmorph.errors import ExportError
from matmorph.exporters.onnx.attention import NATIVE
from matmorph.exporters.vectors import widened
from matmorph.ir.cache import find_slots
from matmorph.ir.core import Graph
from matmorph.passes.attention.fuse import Form, FusedAttention, fuse_attention, outcome_lines

if TYPE_CHECKING:
    from matmorph.specs.schema import Export

_COMPACT_NOTES = (
    "attention: the cache holds each row's tokens without gaps, and the mask counts their places, whatever position_ids say: rows may be "
    "padded behind their tokens alone",
    "attention: several tokens that meet a past are taken for one row, not for a batch (ONNX Runtime's GroupQueryAttention)",
)


@dataclass(frozen=True, slots=True, eq=False)
class WrittenForm:
    """`graph` and `export` as they are written, `notes` for the report. Of `fused`: what was proved of each attention."""

    graph: Graph
    export: Export
    fused: FusedAttention
    notes: tuple[str, ...]


def written_form(graph: Graph, export: Export, max_length: int | None) -> WrittenForm:
    """The form that `export.attention` asks for; under auto Attention where an opset may be written that has it, else plain.

    Raises ExportError where a form is asked for and the graph keeps no cache.
    """
    form = _form(export)
    if not find_slots(graph):
        if export.attention in ("standard", "gqa"):
            raise ExportError(
                f"export.attention {export.attention} is attention over a key/value cache, and the model keeps none",
                ["compile a causal language model with its cache (cache=True), or leave attention out"],
            )
        return WrittenForm(graph, export, FusedAttention(graph), ())
    fused = fuse_attention(graph, widened(graph), form, max_length)
    native = form == "standard" and any(outcome.fused for outcome in fused.outcomes)
    settled = replace(export, opset=NATIVE) if native and export.opset is None else export
    return WrittenForm(fused.graph, settled, fused, (*outcome_lines(fused.outcomes), *(_COMPACT_NOTES if fused.compact else ())))


def _form(export: Export) -> Form:
    if export.attention != "auto":
        return export.attention
    return "standard" if export.opset is None or export.opset >= NATIVE else "plain"
