"""Bytes of weights in the exported data file, known before anything is exported."""

from __future__ import annotations

from collections.abc import Mapping

from matmorph.ir.cache import find_slots
from matmorph.ir.core import Const, Graph, Node, Value, values_in
from matmorph.ir.op_table import LAYOUT_OPS, having, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.site import Site
from matmorph.ir.types import element_size

FLOATS = frozenset({"float16", "bfloat16", "float32"})
WEIGHED = having(of_kind("matmul", "linear", "einsum", "convolution"), half=True)
"""Operators that the half precisions compute in half precision, reading their weights and biases as such."""
LOOKUPS = having(of_kind("lookup"), half=True) | {"index_select", "select"}
"""Operators that read rows of a table, which may be narrow whatever becomes of the rows: those that are one Gather in ONNX."""


def exported_sizes(graph: Graph, precision: str) -> dict[Const, int]:
    """Bytes of every weight that the graph reads, under `export.precision`: fp32 widens half-precision weights, keep leaves all as they
    are, fp16 and bf16 narrow a weight where only matrix products, additions to their results and table look-ups read it."""
    half = precision in ("fp16", "bf16")
    readers = _Readers(graph) if half else None
    found = {}
    for const in graph.used_state():
        narrow = readers is not None and readers.are_products(const)
        found[const] = const.numel * _item(const.tensor.dtype, precision, narrow)
    return found


def site_bytes(site: Site, sizes: Mapping[Const, int]) -> int:
    """Of what is stored for a site; `sizes`: of all weights, as `exported_sizes` gives them."""
    if site.parts:
        return site.held[1] if site.rows is not None else sum(sizes[part] for part in site.parts)
    return site.parameters * (sizes[site.const] // max(site.const.numel, 1))


def item_size(dtype: str, precision: str) -> int:
    """Bytes of one element of a matmul's weight in the data file."""
    return _item(dtype, precision, precision in ("fp16", "bf16"))


def _item(dtype: str, precision: str, narrow: bool) -> int:
    if dtype not in FLOATS or precision == "keep":
        return element_size(dtype)
    return 2 if narrow else 4


def cache_bytes(graph: Graph, precision: str) -> int | None:
    """Bytes of keys and values per token of one row, as exported; those of a size that is not fixed do not count. None for a graph that
    keeps no cache. Under bf16, which numpy has not, a cache is exported in float32."""
    slots, kept = find_slots(graph), "fp32" if precision == "bf16" else precision
    sizes = [(slot.elements_per_token or 0) * item_size(slot.past.tensor.dtype, kept) for slot in slots]
    return sum(sizes) if slots else None


class _Readers:
    """Who reads a value, seen through changes of layout."""

    def __init__(self, graph: Graph) -> None:
        self._users = graph.users()
        self._producers = graph.producers()
        self._kept = set(values_in(graph.outputs))

    def are_products(self, value: Value) -> bool:
        """Whether all of them can read it in half precision."""
        nodes = self._users.get(value, ())
        return bool(nodes) and value not in self._kept and all(self._reads_half(node, value) for node in nodes)

    def _reads_half(self, node: Node, value: Value) -> bool:
        name = base_name(node.op)
        if name in WEIGHED:
            return True
        if name in LOOKUPS:
            return node.args[0] is value or name == "gather_nbits"  # which reads scales too
        if name == "add":
            return any(self._is_product(other) for other in node.inputs() if other is not value)
        if name in LAYOUT_OPS or name in ("slice", "split", "split_with_sizes"):
            return all(self.are_products(output) for output in node.outputs if output in self._users)
        return False

    def _is_product(self, value: Value) -> bool:
        producer = self._producers.get(value)
        return producer is not None and base_name(producer.op) in WEIGHED
