"""The text form: what it looks like, that it holds everything, and what its errors say."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_graphs import ORIGINS, RANGES, graph_of, graphs
from torch.utils._pytree import register_pytree_node, tree_structure
from transformers.modeling_outputs import BaseModelOutput

from matmorph.errors import InputError, VerifyError
from matmorph.ir.build import Builder
from matmorph.ir.core import Const, Graph, Input, Node, Range, Signature, Value
from matmorph.ir.text.printing import format_arg, parse_graph, print_graph
from matmorph.ir.text.scan import Scanner
from matmorph.ir.text.tree import format_tree, parse_tree
from matmorph.ir.types import TensorType, parse_dim
from matmorph.ir.verify import verify

GOLDEN = """graph device=cuda:0
note "train mode switched to \\"eval\\" for the trace"
range batch 1..
range seq 2..512
call ((), {"input_ids": *, "use_cache": *, "scale": *})
input %input_ids: int64[batch, seq] "input_ids"
literal "use_cache" = None
literal "scale" = 0.1
parameter %emb.weight: float32[10, 8] "emb.weight" "lm_head.weight" trainable
parameter %fc.low_rank.down: float32[8, 3] "fc.low_rank.down" rule="mlp"
buffer %mask: bool[1, 4] "mask" transient storage="shared"
constant %"a b%": int64[] "a b%"
%embedding: float32[batch, seq, 8] = aten.embedding.default(%emb.weight, %input_ids) @":Net/emb:Embedding"
%matmul: float32[batch, seq, 3] = aten.matmul.default(%embedding, %fc.low_rank.down) @":Net/fc:Linear" layer=0 rule="mlp" location="a:7"
%size: int(seq) = aten.sym_size.int(%matmul, 1)
%half: int((seq//2)) = operator.floordiv(%size, 2)
%n: bool = operator.eq(%half, 3)
%left: float32[batch, seq, 2], %right: float32[batch, seq, 1] = aten.split.Tensor(%matmul, 2, -1)
_ = aten._assert_async.msg(%n, "two\\nlines")
%cond: float32[3] = higher_order.cond(%n, graph device=cuda:0 {
    input %x: float32[3] "x"
    %neg: float32[3] = aten.neg.default(%x)
    output %neg "output"
}, graph device=cuda:0 {
    input %y: float32[3] "y"
    output %y "output"
}, [%left])
%cast: float16[batch, 1] = aten._to_copy.default(%left, dtype=torch.float16, layout=torch.strided, device=device("cpu"))
%copy: float16[batch, 1] = aten.clone.default(%cast, memory_format=torch.channels_last)
%full: float32[2] = aten.full.default([2, %half], -inf, pin_memory=False)
output %matmul "last_hidden_state"
output None "hidden_states"
output 3 "count"
"""


def test_golden() -> None:
    graph = parse_graph(GOLDEN)
    assert print_graph(graph) == GOLDEN
    assert (graph.device, graph.notes) == ("cuda:0", ('train mode switched to "eval" for the trace',))
    assert graph.ranges == {"batch": Range(1, None), "seq": Range(2, 512)}
    assert [(entry.name, entry.literal) for entry in graph.signature.inputs] == [("input_ids", None), ("use_cache", None), ("scale", 0.1)]
    assert graph.signature.in_spec == tree_structure(((), {"input_ids": 0, "use_cache": 0, "scale": 0}))
    assert graph.signature.out_spec == tree_structure((0, 0, 0))
    assert graph.outputs == (graph.nodes[1].output, None, 3)


def test_constants_keep_all_they_are() -> None:
    emb, down, mask, odd = parse_graph(GOLDEN).state
    assert (emb.kind, emb.names, emb.trainable, emb.storage) == ("parameter", ("emb.weight", "lm_head.weight"), True, "emb.weight")
    assert (down.trainable, down.rule, str(down.type)) == (False, "mlp", "float32[8, 3]")
    assert (mask.kind, mask.persistent, mask.storage) == ("buffer", False, "shared")
    assert (odd.kind, odd.name, odd.persistent) == ("constant", "a b%", True)


def test_nodes_keep_all_they_are() -> None:
    nodes = {node.name: node for node in parse_graph(GOLDEN).nodes}
    origin = nodes["matmul"].origin
    assert (origin.scopes, origin.layer, origin.rule, origin.location) == ((("", "Net"), ("fc", "Linear")), 0, "mlp", "a:7")
    assert nodes["cast"].attrs == {
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "layout": torch.strided,
    }
    assert nodes["copy"].attrs == {"memory_format": torch.channels_last}
    assert nodes["full"].args == ((2, nodes["half"].output), -math.inf)
    assert nodes["aten._assert_async.msg"].outputs == ()
    assert nodes["cond"].args[1].nodes[0].op == "aten.neg.default"
    assert nodes["half"].output.type.value == parse_dim("seq//2")


@given(graphs())
def test_random_graphs_are_read_back(graph: Graph) -> None:
    text = print_graph(graph)
    again = parse_graph(text, {const.path: const.load() for const in graph.state})
    assert print_graph(again) == text
    verify(again)
    assert [(node.op, node.origin) for node in again.nodes] == [(node.op, node.origin) for node in graph.nodes]
    assert all(torch.equal(one.load(), other.load()) for one, other in zip(again.state, graph.state, strict=True))


LITERALS = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.sampled_from([torch.float32, torch.int8, torch.strided, torch.preserve_format, torch.device("cpu"), torch.device("cuda", 1)]),
    ),
    lambda items: st.lists(items, max_size=3).map(tuple),
)


def same(left: object, right: object) -> bool:
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return repr(left) == repr(right)
    return type(left) is type(right) and left == right


@given(LITERALS, st.text(max_size=5), st.text(max_size=5))
def test_every_literal_and_every_name_is_read_back(literal: object, name: str, path: str) -> None:
    origin = replace(ORIGINS[2], scopes=((path, name or "C"), (f"{path}.a", "A"), ("b", path)), source=name)
    value = Value(name, TensorType("float32", ()))
    node = Node("aten.full.default", ((), literal), (value,), {"key": literal}, origin)
    in_spec, out_spec = tree_structure(((0,), {})), tree_structure(0)
    graph = Graph(Signature((Input(name, None, literal),), in_spec, (path,), out_spec), (node,), (literal,), notes=(path,))
    again = parse_graph(print_graph(graph))
    assert same((again.signature.inputs[0].literal, again.nodes[0].args[1], again.nodes[0].attrs["key"], again.outputs[0]), (literal,) * 4)
    assert (again.nodes[0].name, again.nodes[0].origin, again.notes, again.signature.outputs) == (name, origin, (path,), (path,))


@pytest.mark.parametrize("scopes", [origin.scopes for origin in ORIGINS])
def test_module_stacks_are_read_back(scopes: tuple[tuple[str, str], ...]) -> None:
    b = Builder(RANGES, origin=replace(ORIGINS[0], scopes=scopes))
    x = Value("x", TensorType("float32", (2,)))
    text = print_graph(graph_of(b, [x], [b("aten.relu.default", x)]))
    assert parse_graph(text).nodes[0].origin.scopes == scopes


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (((0, 0), {}), "((*, *), {})"),
        ([0, {"b": (0,), "a": None}], '[*, {"b": (*), "a": *}]'),
        ({1: 0}, "{1: *}"),
        (BaseModelOutput(last_hidden_state=torch.ones(1)), '"transformers.modeling_outputs.BaseModelOutput" ["last_hidden_state"] (*)'),
        (OrderedDict(k=0), '"collections.OrderedDict" ["k"] (*)'),
    ],
)
def test_pytrees(tree: object, text: str) -> None:
    spec = tree_structure(tree)
    assert format_tree(spec) == text
    assert parse_tree(Scanner(text)) == spec


class Unnamed:
    """A pytree node that torch has no serialised name for."""


def test_a_pytree_without_a_name_is_shown_but_not_read() -> None:
    register_pytree_node(Unnamed, lambda tree: ([0], None), lambda children, context: Unnamed())
    text = format_tree(tree_structure(Unnamed()))
    assert text.startswith('opaque "')
    with pytest.raises(InputError, match="cannot be read back"):
        parse_tree(Scanner(text))


def test_weights_are_found_by_any_name() -> None:
    text = 'graph device=cpu\nparameter %w: float32[2] "w" "tied"\noutput %w "output"\n'
    assert torch.equal(parse_graph(text, {"tied": torch.tensor([1.0, 2.0])}).state[0].load(), torch.tensor([1.0, 2.0]))
    with pytest.raises(InputError, match="constant %w has no weight: its graph was read from text"):
        parse_graph(text).state[0].load()
    with pytest.raises(InputError, match=r"constant %w is float32\[2\], its weight is float64\[3\]"):
        parse_graph(text, {"w": torch.zeros(3, dtype=torch.float64)}).state[0].load()


def test_blank_lines_and_comments_are_skipped() -> None:
    text = 'graph device=cpu\n\n  # a comment\n  input %x: float32[2] "x"  # another\n\noutput %x "#1"\n'
    assert print_graph(parse_graph(text)) == 'graph device=cpu\ninput %x: float32[2] "x"\noutput %x "#1"\n'


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        ("%y: float32[2] = aten.relu.default(%z)", 36, "%z is not bound"),
        ("%y: float32[2] = aten.relu.default(%y)", 36, "%y is not bound"),
        ("%x: float32[2] = aten.relu.default(%x)", 1, "%x is bound twice"),
        ("%y: float32[2], %y: float32[2] = aten.relu.default(%x)", 17, "%y is bound twice"),
        ("%y: float33[2] = aten.relu.default(%x)", 5, "unknown element type 'float33'"),
        ("%y: string = aten.relu.default(%x)", 5, "unknown type 'string'"),
        ("%y: float32[2 = aten.relu.default(%x)", 12, "expected dims in brackets, found '[2 = aten.relu.default(%x)'"),
        ("%y: float32[f.x] = aten.relu.default(%x)", 17, "not a dimension: 'f.x'"),
        ("%y: float32[2] = relu(%x)", 18, "expected an operator such as aten.linear.default, found 'relu(%x)'"),
        ("%y: float32[2] = aten.relu.default(%x", 38, "expected `,` or the end of the list, found the end of the line"),
        ("%y: float32[2] = aten.relu.default(dim=1, %x)", 43, "a positional argument after one with a name"),
        ("%y: float32[2] = aten.relu.default(maybe)", 36, "expected a value or a literal, found 'maybe'"),
        ('%y: float32[2] = aten.relu.default(device("gpu9"))', 43, "no such device"),
        ("%y: float32[2] = aten.relu.default(%x) later", 40, "expected the end of the line"),
        ('%y: float32[2] = aten.relu.default(%x) @"Net"', 41, "expected PATH:CLASS, found 'Net'"),
        ("output %x", 10, "expected a string in double quotes, found the end of the line"),
        ('output %x "open', 11, "Unterminated string starting at"),
        ("range seq 2-3", 11, "expected a range such as 2..512, found '2-3'"),
        ('parameter %w: int(3) "w"', 21, "a parameter is a tensor"),
        ("ouput %x", 1, "expected a value such as %x, found 'ouput %x'"),
    ],
)
def test_errors_have_line_and_column(line: str, column: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_graph(f'graph device=cpu\ninput %x: float32[2] "x"\n{line}')
    assert caught.value.message == f"graph text, line 3, column {column}: {message}"
    assert caught.value.details == (line, " " * (column - 1) + "^")


def test_outputs_have_names_of_their_own() -> None:
    """A file could not tell the two apart."""
    with pytest.raises(InputError, match=r"line 4, column 11: a second output is called 'y'"):
        parse_graph('graph device=cpu\ninput %x: float32[2] "x"\noutput %x "y"\noutput %x "y"')


@pytest.mark.parametrize(("text", "message"), [("", "expected `graph`"), ("graph", "expected `device=`")])
def test_a_text_starts_with_its_header(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_graph(text)


def test_an_unclosed_sub_graph() -> None:
    text = 'graph device=cpu\ninput %x: bool[] "x"\n%y: bool[] = higher_order.cond(%x, graph device=cpu {\noutput 1 "a"\n'
    with pytest.raises(InputError, match="expected `}`"):
        parse_graph(text)


def test_a_literal_without_a_form_is_an_error() -> None:
    with pytest.raises(VerifyError, match="a literal of type set has no place in the IR"):
        format_arg((1, {2}))


def test_lists_print_as_tuples_do() -> None:
    const = Const("w", TensorType("float32", ()), lambda: torch.ones(()), ("w",))
    assert format_arg([1, (const, [2.0])]) == "[1, [%w, [2.0]]]"


@pytest.mark.parametrize("text", [
    '(\n"collections.defaultdict" {"default_factory_module": "imported", "default_factory_name": "x", "dict_context": []} (*))',
    '"collections.OrderedDict" raw "{\\"\\\\u005f_enum__\\": true, \\"fqn\\": \\"imported:X\\", \\"name\\": \\"a\\"}" (*)',
    '"collections.OrderedDict" [[{"__enum__": true, "fqn": "imported:X", "name": "a"}]] (*)',
])  # fmt: skip
def test_a_pytree_imports_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="names a class to import, and nothing is imported for a text"):
        parse_tree(Scanner(text))
    assert not (tmp_path / "mark").exists()
