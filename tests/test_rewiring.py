"""Values exchanged in a graph, and what nothing reads any more taken out, on printed IR."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.rewiring import exchanged, loaded, needed, rewired, rewired_outputs, swept
from matmorph.ir.text.printing import format_node, parse_graph, print_graph
from matmorph.ir.types import TensorType
from matmorph.ir.verify import verify

TEXT = """graph device=cpu
range batch 1..
input %x: float32[batch, 4] "x"
parameter %w: float32[4, 4] "w"
parameter %v: float32[4, 4] "v"
parameter %unused: float32[2] "unused"
%t: float32[4, 4] = aten.t.default(%w)
%bare: float32[batch, 4] = aten.relu.default(%x)
%a: float32[batch, 4] = aten.mm.default(%x, %t)
%b: float32[batch, 4] = aten.linear.default(%x, %v, None)
%cat: float32[batch, 12] = aten.cat.default([%a, %b, %a], 1)
%left: float32[batch, 6], %right: float32[batch, 6] = aten.split.Tensor(%cat, 6, 1)
%high: float32[batch, 6] = aten.clamp.Tensor(%left, max=%left)
output %high "first"
output None "none"
"""


@pytest.fixture
def graph() -> Graph:
    return parse_graph(TEXT)


def named(graph: Graph, name: str) -> Value:
    values = (*graph.inputs, *graph.state, *(value for node in graph.nodes for value in node.outputs))
    return next(value for value in values if value.name == name)


def maker(graph: Graph, name: str) -> Node:
    return graph.producers()[named(graph, name)]


def ops(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def without(graph: Graph, *names: str) -> Graph:
    return replace(graph, nodes=tuple(node for node in graph.nodes if node.name not in names))


# rewired


def test_a_node_reads_another_value_in_every_place_of_a_nest(graph: Graph) -> None:
    new = rewired(maker(graph, "cat"), {named(graph, "a"): named(graph, "bare")})
    assert format_node(new) == "%cat: float32[batch, 12] = aten.cat.default([%bare, %b, %bare], 1)"


def test_a_keyword_is_rewired_too(graph: Graph) -> None:
    new = rewired(maker(graph, "high"), {named(graph, "left"): named(graph, "right")})
    assert format_node(new) == "%high: float32[batch, 6] = aten.clamp.Tensor(%right, max=%right)"


def test_what_a_node_makes_is_rewired_too(graph: Graph) -> None:
    node = maker(graph, "left")
    new = rewired(node, {named(graph, "right"): Value("rest", named(graph, "right").type)})
    assert format_node(new) == "%left: float32[batch, 6], %rest: float32[batch, 6] = aten.split.Tensor(%cat, 6, 1)"
    assert new.outputs[0] is node.outputs[0]


def test_a_node_that_has_none_of_the_values_is_itself(graph: Graph) -> None:
    node = maker(graph, "cat")
    assert rewired(node, {named(graph, "x"): named(graph, "a")}) is node
    assert rewired(node, {}) is node


def test_a_change_is_made_once_and_not_followed(graph: Graph) -> None:
    a, b = named(graph, "a"), named(graph, "b")
    new = rewired(maker(graph, "cat"), {a: b, b: a})
    assert format_node(new) == "%cat: float32[batch, 12] = aten.cat.default([%b, %a, %b], 1)"


def test_results_of_a_graph_are_rewired_and_literals_stay(graph: Graph) -> None:
    left = named(graph, "left")
    assert rewired_outputs(graph, {named(graph, "high"): left}) == (left, None)


# exchanged, loaded


def test_a_weight_is_exchanged_where_it_is_read_where_it_is_given_and_in_the_state(graph: Graph) -> None:
    v = next(const for const in graph.state if const.name == "v")
    given = replace(graph, outputs=(named(graph, "high"), v))
    found = exchanged(given, {v: loaded(v, torch.zeros(4, 4, dtype=torch.float64), "u")})
    wanted = TEXT.replace('parameter %v: float32[4, 4] "v"', 'parameter %u: float64[4, 4] "u" storage="u (changed)"').replace(
        "%x, %v", "%x, %u"
    )
    assert print_graph(found) == print_graph(parse_graph(wanted.replace('None "none"', '%u "none"')))


def test_nothing_but_what_changes_is_made_anew(graph: Graph) -> None:
    v = next(const for const in graph.state if const.name == "v")
    found = exchanged(graph, {v: loaded(v, torch.zeros(4, 4))})
    same = [old is new for old, new in zip(graph.nodes, found.nodes, strict=True)]
    assert same == [node.name != "b" for node in graph.nodes]


def test_loaded_numbers_keep_the_names_and_the_role_of_a_weight() -> None:
    type = TensorType("float32", (2,))
    const = Const("w", type, lambda: torch.ones(2), ("w", "tied"), trainable=True, storage="bytes", rule="r")
    tensor = torch.zeros(3, dtype=torch.float16)
    same = loaded(const, tensor)
    assert (same.names, same.trainable, same.rule, same.type) == (("w", "tied"), True, "r", TensorType("float16", (3,)))
    assert same.load() is tensor
    assert same.storage != const.storage
    other = loaded(const, tensor, "x")
    assert (other.name, other.names) == ("x", ("x",))


# needed


def test_only_what_the_results_depend_on_is_needed(graph: Graph) -> None:
    kept = needed(graph.nodes, (named(graph, "a"), None))
    assert [node.name for node in kept] == ["t", "a"]


def test_a_node_is_needed_for_one_of_its_results(graph: Graph) -> None:
    assert [node.name for node in needed(graph.nodes, (named(graph, "right"),))] == ["t", "a", "b", "cat", "left"]


# swept


def test_what_only_a_dropped_node_read_goes_with_its_weights(graph: Graph) -> None:
    a, b = named(graph, "a"), named(graph, "b")
    changed = without(graph, "a")
    found = swept(replace(changed, nodes=tuple(rewired(node, {a: b}) for node in changed.nodes)), graph)
    lines = [
        line.replace("[%a, %b, %a]", "[%b, %b, %b]") for line in TEXT.splitlines() if not line.startswith(("parameter %w", "%t", "%a"))
    ]
    assert print_graph(found) == print_graph(parse_graph("\n".join(lines) + "\n"))
    verify(found)


def test_what_nobody_ever_read_stays(graph: Graph) -> None:
    """A node that the model computes for nobody, and a weight that it does not use, are its own affair."""
    found = swept(graph, graph)
    assert (found.nodes, found.state) == (graph.nodes, graph.state)
    assert "bare" in ops(found)


def test_a_result_is_read(graph: Graph) -> None:
    given = replace(graph, outputs=(named(graph, "a"), named(graph, "v")))
    found = swept(without(given, "high"), given)
    assert ops(found) == ["t", "bare", "a"]
    assert [const.name for const in found.state] == ["w", "v", "unused"]


def test_a_node_stays_for_one_of_its_results(graph: Graph) -> None:
    high = maker(graph, "high")
    turned = rewired(high, {named(graph, "left"): named(graph, "right")})
    found = swept(replace(graph, nodes=tuple(turned if node is high else node for node in graph.nodes)), graph)
    assert ops(found) == ops(graph)


def test_what_was_put_in_goes_too_where_its_only_reader_goes(graph: Graph) -> None:
    """`bare` was read by nobody; now `b` reads it, and nobody reads `b`."""
    cat, b = maker(graph, "cat"), maker(graph, "b")
    nodes = {
        cat: rewired(cat, {named(graph, "b"): named(graph, "a")}),
        b: rewired(b, {named(graph, "x"): named(graph, "bare")}),
    }
    found = swept(replace(graph, nodes=tuple(nodes.get(node, node) for node in graph.nodes)), graph)
    assert ops(found) == ["t", "a", "cat", "left", "high"]
    assert [const.name for const in found.state] == ["w", "unused"]


def test_a_new_weight_that_no_node_reads_stays(graph: Graph) -> None:
    new = loaded(graph.state[0], torch.zeros(4, 4), "new")
    assert swept(replace(graph, state=(*graph.state, new)), graph).state == (*graph.state, new)
