"""In which form a graph's attention over its cache is written, and the graph in that form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from matmorph.errors import ExportError
from matmorph.exporters.onnx.attention import NATIVE
from matmorph.exporters.vectors import widened
from matmorph.ir.cache import find_slots
from matmorph.ir.core import Graph
from matmorph.passes.attention.coded_cache import code_cache
from matmorph.passes.attention.fuse import Form, FusedAttention, fuse_attention, outcome_lines

if TYPE_CHECKING:
    from matmorph.specs.schema import Export

_COMPACT_NOTES = (
    "attention: the cache holds each row's tokens without gaps, and the mask counts their places, whatever position_ids say: rows may be "
    "padded behind their tokens alone",
    "attention: several tokens that meet a past are taken for one row, not for a batch (ONNX Runtime's GroupQueryAttention)",
)
_CODED_NOTE = (
    "cache: keys and values are kept as int8 codes with a scale for each token of each head; a call sees its own tokens as they are, and "
    "earlier ones to within half a step of their scale"
)
_FIXED_SCALES = (
    "export.cache int8 gives each token its own scale, and GroupQueryAttention (export.attention gqa) takes one for all tokens",
    ["set export.attention to standard or plain, or leave export.cache out"],
)


@dataclass(frozen=True, slots=True, eq=False)
class WrittenForm:
    """`graph` and `export` as they are written, `notes` for the report. Of `fused`: what was proved of each attention. `traced`: the graph
    with its attention as it was, against which the file is held; its cache is that of the file."""

    graph: Graph
    traced: Graph
    export: Export
    fused: FusedAttention
    notes: tuple[str, ...]


def written_form(graph: Graph, export: Export, max_length: int | None) -> WrittenForm:
    """The form that `export.attention` and `export.cache` ask for; under auto Attention where an opset may be written that has it, else
    plain.

    Raises ExportError where a form is asked for and the graph keeps no cache, and where the two do not go together.
    """
    form = _form(export)
    if not find_slots(graph):
        if export.cache != "float":
            raise ExportError(
                f"export.cache {export.cache} is of a key/value cache, and the model keeps none",
                ["compile a causal language model with its cache (cache=True), or leave cache out"],
            )
        if export.attention in ("standard", "gqa"):
            raise ExportError(
                f"export.attention {export.attention} is attention over a key/value cache, and the model keeps none",
                ["compile a causal language model with its cache (cache=True), or leave attention out"],
            )
        return WrittenForm(graph, graph, export, FusedAttention(graph), ())
    if export.cache == "int8" and form == "gqa":
        raise ExportError(*_FIXED_SCALES)
    fused = fuse_attention(graph, widened(graph), form, max_length)
    native = form == "standard" and any(outcome.fused for outcome in fused.outcomes)
    settled = replace(export, opset=NATIVE) if native and export.opset is None else export
    notes = (*outcome_lines(fused.outcomes), *(_COMPACT_NOTES if fused.compact else ()))
    if export.cache == "int8":
        return WrittenForm(code_cache(fused.graph), code_cache(graph), settled, fused, (*notes, _CODED_NOTE))
    return WrittenForm(fused.graph, graph, settled, fused, notes)


def _form(export: Export) -> Form:
    if export.attention != "auto":
        return export.attention
    return "standard" if export.opset is None or export.opset >= NATIVE else "plain"
