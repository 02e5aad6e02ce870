"""Each law of the IR, broken on purpose, is caught with the lines around it; `retype` carries a new width through."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from random_graphs import graphs

from matmorph.errors import VerifyError
from matmorph.ir.core import Graph, Node, Value
from matmorph.ir.text.printing import parse_graph, print_graph
from matmorph.ir.text.tree import default_specs
from matmorph.ir.types import TensorType, parse_dim
from matmorph.ir.verify import retype, verify

TEXT = """graph device=cpu
range batch 1..
input %x: float32[batch, 8] "x"
parameter %w: float32[4, 8] "w"
parameter %v: float32[3, 4] "v"
%a: float32[batch, 4] = aten.linear.default(%x, %w, None)
%b: float32[batch, 4] = aten.relu.default(%a)
%c: float32[batch, 3] = aten.linear.default(%b, %v, None)
%left: float32[batch, 2], %right: float32[batch, 1] = aten.split.Tensor(%c, 2, 1)
output %left "output_0"
output %right "output_1"
"""
COND = """graph device=cpu
range batch 1..
input %x: float32[batch, 8] "x"
input %c: bool[] "c"
parameter %w: float32[4, 8] "w"
%h: float32[batch, 4] = aten.linear.default(%x, %w, None)
%y: float32[batch, 4] = higher_order.cond(%c, graph device=cpu {
    input %h: float32[batch, 4] "h"
    %r: float32[batch, 4] = aten.relu.default(%h)
    output %r "output"
}, graph device=cpu {
    input %h: float32[batch, 4] "h"
    %r: float32[batch, 4] = aten.neg.default(%h)
    output %r "output"
}, [%h])
output %y "output"
"""


@pytest.fixture
def graph() -> Graph:
    return parse_graph(TEXT)


def fault(graph: Graph) -> VerifyError:
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    return caught.value


def with_nodes(graph: Graph, nodes: dict[int, Node]) -> Graph:
    return replace(graph, nodes=tuple(nodes.get(k, node) for k, node in enumerate(graph.nodes)))


@given(graphs())
def test_random_graphs_obey(graph: Graph) -> None:
    verify(graph)
    assert retype(graph) is graph


def test_the_examples_obey(graph: Graph) -> None:
    verify(graph)
    verify(parse_graph(COND))


def test_used_before_bound(graph: Graph) -> None:
    nodes = graph.nodes
    error = fault(replace(graph, nodes=(nodes[1], nodes[0], *nodes[2:])))
    assert error.message == "%a is read by aten.relu.default before it is bound"
    assert error.details == (
        "  graph device=cpu",
        "  range batch 1..",
        '  input %x: float32[batch, 8] "x"',
        '  parameter %w: float32[4, 8] "w"',
        '  parameter %v: float32[3, 4] "v"',
        "> %b: float32[batch, 4] = aten.relu.default(%a)",
        "  %a: float32[batch, 4] = aten.linear.default(%x, %w, None)",
        "  %c: float32[batch, 3] = aten.linear.default(%b, %v, None)",
        "  %left: float32[batch, 2], %right: float32[batch, 1] = aten.split.Tensor(%c, 2, 1)",
        '  output %left "output_0"',
        '  output %right "output_1"',
    )
    assert str(error).startswith("internal error (a bug in matmorph, not in your input): %a is read")


def test_a_constant_outside_of_the_state_is_not_bound(graph: Graph) -> None:
    assert fault(replace(graph, state=graph.state[:1])).message == "%v is read by aten.linear.default before it is bound"


def test_bound_twice(graph: Graph) -> None:
    again = replace(graph.nodes[1], outputs=graph.nodes[0].outputs)
    error = fault(with_nodes(graph, {1: again}))
    assert error.message == "%a is bound twice"
    assert "> %a: float32[batch, 4] = aten.relu.default(%a)" in error.details


def test_two_values_of_one_name(graph: Graph) -> None:
    named = Value("w", graph.nodes[3].outputs[0].type)
    last = replace(graph.nodes[3], outputs=(named, graph.nodes[3].outputs[1]))
    error = fault(replace(with_nodes(graph, {3: last}), outputs=last.outputs))
    assert error.message == "two values are named %w"
    assert "> %w: float32[batch, 2], %right: float32[batch, 1] = aten.split.Tensor(%c, 2, 1)" in error.details


@pytest.mark.parametrize(
    ("stored", "inferred"),
    [("float32[batch, 4]", "float32[batch, 5]"), ("float32[batch, 4]", "float16[batch, 4]"), ("float32[batch, 4]", "float32[4]")],
)
def test_wrong_type(stored: str, inferred: str) -> None:
    line = "%b: {} = aten.relu.default(%a)"
    error = fault(parse_graph(TEXT.replace(line.format(stored), line.format(inferred))))
    assert error.message == f"%b is stored as {inferred}, but aten.relu.default gives {stored}"
    assert "> " + line.format(inferred) in error.details


def test_an_operator_that_refuses_its_operands() -> None:
    error = fault(parse_graph(TEXT.replace("float32[3, 4]", "float32[3, 5]")))
    assert error.message.startswith("aten.linear.default refuses these operands")
    assert "> %c: float32[batch, 3] = aten.linear.default(%b, %v, None)" in error.details


def test_an_unknown_operator() -> None:
    error = fault(parse_graph(TEXT.replace("aten.relu", "aten.reelu")))
    assert error.message == "unknown operator 'aten.reelu.default'"
    assert "> %b: float32[batch, 4] = aten.reelu.default(%a)" in error.details


def test_another_number_of_results(graph: Graph) -> None:
    split = graph.nodes[3]
    error = fault(replace(with_nodes(graph, {3: replace(split, outputs=split.outputs[:1])}), outputs=split.outputs[:1] * 2))
    assert error.message == "aten.split.Tensor has 2 results, but the node binds 1"


def test_an_unbound_output(graph: Graph) -> None:
    stranger = Value("stranger", TensorType("float32", (parse_dim("batch"),)))
    error = fault(replace(graph, outputs=(stranger, graph.outputs[1])))
    assert error.message == "output %stranger is not bound"
    assert '> output %stranger "output_0"' in error.details


@pytest.mark.parametrize(("inputs", "outputs", "what"), [(2, 2, "leaves of the input"), (1, 3, "leaves of the output")])
def test_the_signature_fits_the_graph(graph: Graph, inputs: int, outputs: int, what: str) -> None:
    in_spec, out_spec = default_specs(inputs, outputs)
    error = fault(replace(graph, signature=replace(graph.signature, in_spec=in_spec, out_spec=out_spec)))
    assert what in error.message


def test_laws_hold_inside_of_sub_graphs() -> None:
    line = "%r: float32[batch, 4] = aten.neg.default(%h)"
    error = fault(parse_graph(COND.replace(line, line.replace("4]", "5]"))))
    assert error.message == "%r is stored as float32[batch, 5], but aten.neg.default gives float32[batch, 4]"
    assert "> " + line.replace("4]", "5]") in error.details
    before, _, after = COND.partition("{\n    input %h: float32[batch, 4]")
    error = fault(parse_graph(f"{before}{{\n    input %h: float32[4, 4]{after}"))
    assert error.message == "%h is a float32[4, 4], but higher_order.cond passes a float32[batch, 4]"


def test_retype_carries_a_width(graph: Graph) -> None:
    narrow = parse_graph(TEXT.replace("float32[4, 8]", "float32[2, 8]").replace("float32[3, 4]", "float32[3, 2]"))
    renewed = retype(narrow)
    verify(renewed)
    expected = TEXT.replace("float32[4, 8]", "float32[2, 8]").replace("float32[3, 4]", "float32[3, 2]").replace("[batch, 4]", "[batch, 2]")
    assert print_graph(renewed) == expected
    # What keeps its type stays the same object.
    assert renewed.nodes[3] is narrow.nodes[3]
    assert renewed.outputs == narrow.outputs
    assert retype(graph) is graph


def test_retype_enters_sub_graphs() -> None:
    renewed = retype(parse_graph(COND.replace("float32[4, 8]", "float32[6, 8]")))
    verify(renewed)
    assert print_graph(renewed) == COND.replace("[4, 8]", "[6, 8]").replace("[batch, 4]", "[batch, 6]")


def test_retype_says_where_a_width_does_not_fit() -> None:
    with pytest.raises(VerifyError, match="refuses these operands") as caught:
        retype(parse_graph(TEXT.replace("float32[4, 8]", "float32[2, 8]")))
    assert "> %c: float32[batch, 3] = aten.linear.default(%b, %v, None)" in caught.value.details
