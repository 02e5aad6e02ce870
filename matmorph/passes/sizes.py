"""Bytes of weights in the exported data file, known before anything is exported."""

from __future__ import annotations

from collections.abc import Mapping

from matmorph.ir.core import Const, Graph, Node, Value, values_in
from matmorph.ir.ops import LAYOUT_OPS, base_name
from matmorph.ir.types import element_size

FLOATS = frozenset({"float16", "bfloat16", "float32"})
PRODUCTS = frozenset(
    "linear addmm mm bmm matmul baddbmm conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d embedding".split()
)
"""Operators that the half precisions compute in half precision, reading their weights and biases as such."""


def exported_sizes(graph: Graph, precision: str) -> dict[Const, int]:
    """Bytes of every weight that the graph reads, under `export.precision`: fp32 widens half-precision weights, keep leaves all as they
    are, fp16 and bf16 narrow a float32 weight where only matrix products and table look-ups read it."""
    half = precision in ("fp16", "bf16")
    users = graph.users() if half else {}
    kept = set(values_in(graph.outputs))
    found = {}
    for const in graph.used_state():
        narrow = half and const not in kept and const.tensor.shape != () and _only_products(const, users)
        found[const] = const.numel * _item(const.tensor.dtype, precision, narrow)
    return found


def item_size(dtype: str, precision: str) -> int:
    """Bytes of one element of a matmul's weight in the data file."""
    return _item(dtype, precision, precision in ("fp16", "bf16"))


def _item(dtype: str, precision: str, narrow: bool) -> int:
    if dtype not in FLOATS or precision == "keep":
        return element_size(dtype)
    return 2 if narrow else 4


def _only_products(value: Value, users: Mapping[Value, tuple[Node, ...]]) -> bool:
    readers = users.get(value, ())
    return bool(readers) and all(_is_product(node, value, users) for node in readers)


def _is_product(node: Node, value: Value, users: Mapping[Value, tuple[Node, ...]]) -> bool:
    name = base_name(node.op)
    if name in PRODUCTS:
        return True
    if name in LAYOUT_OPS or name in ("index_select", "index", "slice", "split", "select"):
        return all(_only_products(output, users) for output in node.outputs)
    return False
