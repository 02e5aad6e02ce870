"""`export: {logits: last}`: a language model's head for the last place of each row alone, which is all that choosing a token looks at.

A prompt of a thousand tokens has a thousand rows of as many logits as the vocabulary has words, and whoever generates throws all but the
last away. The output keeps its rank, [batch, 1, words]. What is cut is found by dataflow: the one output [batch, tokens, words] that a
product with a weight makes for every token of an input [batch, tokens]. The cut moves up as far as operators go row by row, so that the
norm and the MLP below the head compute one row as well.

The last place is the last column of the batch. Where a row is padded on the right, its last token lies before that: such a batch has to go
row by row, which the runtime's Generator says, and a note says here.
"""

from __future__ import annotations

from dataclasses import replace

from matmorph.errors import ExportError
from matmorph.ir.build import Builder
from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.op_reading import operands_of
from matmorph.ir.op_table import of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.training.narrowing import narrow
from matmorph.ir.types import TensorType
from matmorph.runtime.format.cases import Case

_PRODUCTS = of_kind("linear", "matmul")
_PASSED = of_kind("elementwise", "same")


def logits_output(graph: Graph) -> str:
    """The name of the output that is cut. ExportError with the reason where not exactly one output can be meant."""
    found = [name for name, value in graph.results if _is_logits(graph, value)]
    if len(found) != 1:
        what = f"{' and '.join(found)} are such outputs" if found else "no output is one"
        raise ExportError(
            "export.logits: last is for one output [batch, tokens, words] that a product with a weight makes for every token of an input "
            f"[batch, tokens]; {what}",
            ["leave export.logits out, or give the model one such output"],
        )
    return found[0]


def last_logits(graph: Graph) -> Graph:
    """The graph with that output [batch, 1, words]. ExportError as `logits_output`, and where the product does not go row by row."""
    name = logits_output(graph)
    index = graph.signature.outputs.index(name)
    value = graph.outputs[index]
    b = Builder(graph)
    last = b("aten.unsqueeze.default", b("aten.select.int", value, 1, -1, name=f"{value.name}_last"), 1, name=f"{value.name}_row")
    outputs = (*graph.outputs[:index], last, *graph.outputs[index + 1 :])
    cut = narrow(replace(graph, nodes=(*graph.nodes, *b.nodes), outputs=outputs), graph.signature.outputs)
    head = _product(cut, last)
    if head is None or head.output.tensor.shape[1] != 1:
        raise ExportError(f"export.logits: last, and what makes {name} does not compute it row by row", ["leave export.logits out"])
    return cut


def last_rows(case: Case, name: str) -> Case:
    """A check of the whole graph as one of the cut one."""
    compared = {each: places[:, -1:] if each == name else places for each, places in case.compared.items()}
    return replace(case, outputs={**case.outputs, name: case.outputs[name][:, -1:]}, compared=compared)


def last_note(name: str) -> str:
    """For whoever reads the report or the manifest."""
    return f"{name} is of the last column of a batch alone: where shorter rows are padded on the right, give them one at a time"


def _is_logits(graph: Graph, value: Value) -> bool:
    kind = value.type
    if not isinstance(kind, TensorType) or len(kind.shape) != 3 or not kind.torch_dtype.is_floating_point:
        return False
    tokens = {
        given.tensor.shape for given in graph.inputs if len(given.tensor.shape) == 2 and not given.tensor.torch_dtype.is_floating_point
    }
    return not isinstance(kind.shape[1], int) and kind.shape[:2] in tokens and _product(graph, value) is not None


def _product(graph: Graph, value: Value) -> Node | None:
    """The product with a weight that makes the value, below what bends, scales or copies it element by element."""
    producers = graph.producers()
    node = producers.get(value)
    while node is not None and base_name(node.op) not in _PRODUCTS:
        through = base_name(node.op) in _PASSED or base_name(node.op) in ("select", "unsqueeze")
        operands = [arg for arg in operands_of(node).values() if arg in producers] if through else []
        node = producers[operands[0]] if len(operands) == 1 else None
    return node if node is not None and any(isinstance(arg, Const) or _is_of_weight(producers, arg) for arg in node.args[1:2]) else None


def _is_of_weight(producers: dict[Value, Node], arg: object) -> bool:
    """A weight in another layout."""
    node = producers.get(arg) if isinstance(arg, Value) else None
    return node is not None and base_name(node.op) in of_kind("permute", "same") and isinstance(node.args[0], Const)
