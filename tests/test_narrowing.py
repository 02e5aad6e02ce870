"""Rows that nobody reads are not computed: printed graphs, the same numbers, and what must stay whole."""

from __future__ import annotations

import pytest
import torch
from exporting import randn, seeded
from handmade import graph_of
from torch import Tensor, nn

from matmorph.ir.core import Graph
from matmorph.ir.evaluate import evaluate
from matmorph.ir.text.printing import print_graph
from matmorph.ir.tracing.trace import trace
from matmorph.ir.training.narrowing import narrow
from matmorph.ir.verify import verify

ROUNDING = 1e-12  # of float64 sums of at most 64 terms, in another order

HEAD = """
range batch 1..
range seq 1..
input %x: float32[batch, seq, 8] "x"
parameter %w: float32[16, 8] "w"
parameter %v: float32[8, 16] "v"
"""
MLP = """
%h: float32[batch, seq, 16] = aten.linear.default(%x, %w)
%a: float32[batch, seq, 16] = aten.gelu.default(%h)
%y: float32[batch, seq, 8] = aten.linear.default(%a, %v)
%r: float32[batch, seq, 8] = aten.add.Tensor(%y, %x)
%first: float32[batch, 8] = aten.select.int(%r, 1, 0)
"""


def body(graph: Graph) -> str:
    return "\n".join(line for line in print_graph(graph).splitlines() if line.startswith(("%", "output")))


def test_a_layer_of_which_one_row_is_read() -> None:
    graph = graph_of(f'{HEAD}{MLP}output %first "first"')
    assert body(narrow(graph, ["first"])) == (
        "%x_row: float32[batch, 1, 8] = aten.slice.Tensor(%x, 1, 0, 1)\n"
        "%h: float32[batch, 1, 16] = aten.linear.default(%x_row, %w)\n"
        "%a: float32[batch, 1, 16] = aten.gelu.default(%h)\n"
        "%y: float32[batch, 1, 8] = aten.linear.default(%a, %v)\n"
        "%r: float32[batch, 1, 8] = aten.add.Tensor(%y, %x_row)\n"
        "%first: float32[batch, 8] = aten.select.int(%r, 1, 0)\n"
        'output %first "first"'
    )


def test_what_somebody_reads_whole_stays_whole() -> None:
    """`a` is an output; behind it one row is enough, and a slice takes it."""
    graph = graph_of(f'{HEAD}{MLP}output %first "first"\noutput %a "hidden"')
    both = narrow(graph, ["first", "hidden"])
    assert "%a: float32[batch, seq, 16] = aten.gelu.default(%h)\n" in body(both)
    assert "%y: float32[batch, 1, 8] = aten.linear.default(%a_row, %v)\n" in body(both)
    assert both.outputs[1] is graph.outputs[1]
    assert body(narrow(graph, ["first"])).endswith('output %first "first"\noutput None "hidden"')


def test_two_rows_are_no_row() -> None:
    """Another index, or the sum over the axis, asks for another part."""
    for other in ("%z: float32[batch, 8] = aten.select.int(%r, 1, 1)", "%z: float32[batch, 8] = aten.sum.dim_IntList(%r, [1])"):
        graph = graph_of(f'{HEAD}{MLP}{other}\noutput %first "first"\noutput %z "z"')
        assert body(narrow(graph, ["first", "z"])) == body(graph)


def test_names_stay_unique_and_inputs_untouched() -> None:
    graph = graph_of(f'{HEAD}%x_row: float32[batch, seq, 8] = aten.neg.default(%x)\n{MLP.replace("%x", "%x_row")}output %first "first"')
    verify(narrow(graph, ["first"]))
    assert narrow(graph, []).nodes == ()


class Attention(nn.Module):
    """One attention layer with what a transformer does around it; `read` picks from its result."""

    def __init__(self, read: str, mask: str = "none", form: str = "sdpa") -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.read, self.mask, self.form = read, mask, form

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        batch, seq = x.shape[:2]
        q, k, v = (linear(x).view(batch, seq, 2, 4).transpose(1, 2) for linear in self.qkv)
        mask = {"none": None, "columns": keep[:, None, None, :], "rows": keep[:, None, None, :] & keep[:, None, :, None]}.get(self.mask)
        if self.form == "sdpa":
            o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.mask == "causal")
        else:
            scores = q @ k.transpose(-1, -2) / 2.0
            o = torch.softmax(scores if mask is None else scores.masked_fill(~mask, -1e9), -1) @ v
        x = self.norm(x + self.out(o.permute(0, 2, 1, 3).contiguous().reshape(batch, seq, 8)))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        if self.read == "mean":
            return x.mean(1)
        return x[:, 0] if self.read == "first" else x[:, -1]


def attention(read: str, mask: str, form: str) -> tuple[Graph, list[Tensor]]:
    inputs = [randn(2, 5, 8).double(), torch.arange(10).view(2, 5) % 4 > 0]
    inputs[1][:, 0] = True  # no row without anything to attend to
    inputs[1][:, -1] = True
    axes = {0: "batch", 1: "seq"}
    return trace(seeded(lambda: Attention(read, mask, form)).double(), tuple(inputs), (axes, axes)), inputs


@pytest.mark.parametrize(
    ("form", "read", "mask"),
    [
        ("sdpa", "first", "columns"),
        ("sdpa", "last", "rows"),
        ("sdpa", "first", "causal"),
        ("written out", "last", "none"),
        ("written out", "first", "rows"),
    ],
)
def test_attention_gives_the_same_numbers(form: str, read: str, mask: str) -> None:
    graph, inputs = attention(read, mask, form)
    small = narrow(graph, graph.signature.outputs)
    verify(small)
    for batch, seq in ((2, 5), (1, 3), (2, 1)):
        given = [tensor[:batch, :seq] for tensor in inputs]
        ((before,), (after,)) = evaluate(graph, given), evaluate(small, given)
        assert torch.allclose(before, after, rtol=0, atol=ROUNDING * float(before.abs().max()))
    widths = {node.output.tensor.shape[1] for node in small.nodes if node.op == "aten.gelu.default"}
    assert widths == {1}
    attended = [node.output.tensor.shape[-2] for node in small.nodes if "attention" in node.op or node.op.startswith("aten.softmax")]
    causal = mask == "causal" and form == "sdpa"
    assert all((dim == 1) is not causal for dim in attended)
    keys = [node for node in small.nodes if node.op == "aten.linear.default" and node.output.tensor.shape[1] != 1]
    assert len(keys) == (3 if causal else 2), "keys and values of every row, queries only of rows that are read"


def test_a_mean_reads_every_row() -> None:
    graph, _ = attention("mean", "none", "sdpa")
    assert body(narrow(graph, graph.signature.outputs)) == body(graph)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("%y: float32[batch, seq, 8] = aten.softmax.int(%x, 1)", False),
        ("%y: float32[batch, seq, 8] = aten.softmax.int(%x, -1)", True),
        ("%y: float32[batch, seq, 8] = aten.slice.Tensor(%x, 1, 0, 9223372036854775807)", True),
        ("%y: float32[batch, seq, 8] = aten.flip.default(%x, [1])", False),
        ("%y: float32[batch, seq, 8] = aten.layer_norm.default(%x, [8])", True),
        ("%y: float32[batch, seq, 8] = aten.add.Tensor(%x, %x, alpha=3)", True),
        ("%y: float32[batch, seq, 8] = aten.matmul.default(%x, %m)", True),
        ("%y: float32[batch, seq, 8] = aten.cumsum.default(%x, 1)", False),
    ],
)
def test_operators(text: str, cut: bool) -> None:
    graph = graph_of(f'{HEAD}parameter %m: float32[8, 8] "m"\n{text}\n%z: float32[batch, 8] = aten.select.int(%y, 1, -1)\noutput %z "z"')
    small = narrow(graph, ["z"])
    assert (small.producers()[small.outputs[0]].args[0].tensor.shape[1] == 1) is cut
