"""Clean-up of gradient graphs: each rule on a printed graph, what must not change, and equal numbers on the gradients of real models."""

from __future__ import annotations

import pytest
import torch
from handmade import graph_of
from zoo import ZOO

from matmorph.ir.core import Graph
from matmorph.ir.evaluate import evaluate
from matmorph.ir.text.printing import print_graph
from matmorph.ir.tracing.trace import trace
from matmorph.ir.training import gradient
from matmorph.ir.training.gradient_cleanup import simplify_gradient
from matmorph.ir.training.losses import Loss
from matmorph.ir.verify import verify

ROUNDING = 1e-12  # of the largest entry, in float64

HEAD = """
range batch 1..
range seq 1..
input %x: float32[batch, seq, 8] "x"
input %row: float32[1, 1, 8] "row"
%b: int(batch) = aten.sym_size.int(%x, 0)
%s: int(seq) = aten.sym_size.int(%x, 1)
%n: int(8*seq) = operator.mul(8, %s)
"""
X, T = "float32[batch, seq, 8]", "float32[seq, batch, 8]"


def body(graph: Graph) -> str:
    return "\n".join(line for line in print_graph(graph).splitlines() if line.startswith("%"))


def cleaned(lines: str) -> str:
    """The nodes that are left; the last one's result is the output."""
    last = lines.strip().splitlines()[-1].split(":")[0]
    graph = simplify_gradient(graph_of(f'{HEAD}{lines.strip()}\noutput {last} "y"'))
    verify(graph)
    return body(graph)


RULES = {
    "order and back": (
        f"%a: {T} = aten.transpose.int(%x, 0, 1)\n%e: {X} = aten.permute.default(%a, [1, 0, 2])\n%y: {X} = aten.neg.default(%e)",
        f"%y: {X} = aten.neg.default(%x)",
    ),
    "two orders": (
        f"%a: {T} = aten.transpose.int(%x, 0, 1)\n%y: float32[seq, 8, batch] = aten.transpose.int(%a, 1, 2)",
        "%permute: float32[seq, 8, batch] = aten.permute.default(%x, [1, 2, 0])",
    ),
    "two shapes": (
        "%a: float32[batch, 8*seq] = aten.reshape.default(%x, [-1, %n])\n%y: float32[8*batch*seq] = aten.reshape.default(%a, [-1])",
        "%reshape: float32[8*batch*seq] = aten.reshape.default(%x, [-1])",
    ),
    "expanded for a pointwise operator": (
        f"%a: {X} = aten.expand.default(%row, [%b, %s, 8])\n%y: {X} = aten.mul.Tensor(%x, %a)",
        f"%mul: {X} = aten.mul.Tensor(%x, %row)",
    ),
    "one number everywhere": (
        f"%a: {X} = aten.ones_like.default(%x)\n%c: {X} = aten.mul.Tensor(%x, %a)\n%z: {X} = aten.zeros_like.default(%x)\n"
        f"%d: {X} = aten.add.Tensor(%z, %c)\n%y: {X} = aten.exp.default(%d)",
        f"%y: {X} = aten.exp.default(%x)",
    ),
    "a full tensor": (
        f"%a: {X} = aten.full_like.default(%x, 0.5)\n%y: {X} = aten.sub.Tensor(%x, %a)",
        f"%sub: {X} = aten.sub.Tensor(%x, 0.5)",
    ),
    "factors": (
        f"%a: {X} = aten.mul.Tensor(%x, 0.5)\n%y: {X} = aten.mul.Tensor(%a, 4.0)",
        f"%mul: {X} = aten.mul.Tensor(%x, 2.0)",
    ),
    "signs": (
        f"%a: {X} = aten.neg.default(%x)\n%e: {X} = aten.exp.default(%x)\n%y: {X} = aten.add.Tensor(%a, %e)",
        f"%e: {X} = aten.exp.default(%x)\n%sub: {X} = aten.sub.Tensor(%e, %x)",
    ),
    "a sign on the right": (
        f"%a: {X} = aten.neg.default(%x)\n%e: {X} = aten.exp.default(%x)\n%y: {X} = aten.add.Tensor(%e, %a)",
        f"%e: {X} = aten.exp.default(%x)\n%sub: {X} = aten.sub.Tensor(%e, %x)",
    ),
    "minus minus": (
        f"%a: {X} = aten.neg.default(%x)\n%e: {X} = aten.exp.default(%x)\n%y: {X} = aten.sub.Tensor(%e, %a)",
        f"%e: {X} = aten.exp.default(%x)\n%add: {X} = aten.add.Tensor(%e, %x)",
    ),
    "sum over one": (
        "%a: float32[1, 1, 8] = aten.sum.dim_IntList(%row, [0, 1], True)\n%y: float32[8] = aten.sum.dim_IntList(%a, [0, 1])",
        "%squeeze: float32[8] = aten.squeeze.dims(%row, [0, 1])",
    ),
    "one of one": (
        "%a: float32[1, 8] = aten.select.int(%row, 1, 0)\n%e: float32[1, 8] = aten.exp.default(%a)\n"
        "%y: float32[1, 1, 8] = aten.select_backward.default(%e, [1, 1, 8], 1, 0)",
        "%squeeze: float32[1, 8] = aten.squeeze.dim(%row, 1)\n%e: float32[1, 8] = aten.exp.default(%squeeze)\n"
        "%unsqueeze: float32[1, 1, 8] = aten.unsqueeze.default(%e, 1)",
    ),
    "copies": (
        f"%a: {X} = aten.clone.default(%x)\n%e: {X} = aten._to_copy.default(%a, dtype=torch.float32)\n"
        f"%c: {X} = aten.slice.Tensor(%e, 1, 0, 9223372036854775807)\n"
        f"%d: {X} = aten.slice_backward.default(%c, [%b, %s, 8], 1, 0, 9223372036854775807, 1)\n%y: {X} = aten.neg.default(%d)",
        f"%y: {X} = aten.neg.default(%x)",
    ),
    "masks once": (
        f"%m: bool[batch, seq, 8] = aten.gt.Scalar(%x, 0)\n%o: bool[batch, seq, 8] = aten.gt.Scalar(%x, 0)\n"
        f"%a: {X} = aten.where.ScalarOther(%m, %x, 0.0)\n%e: {X} = aten.where.ScalarOther(%o, %x, 1.0)\n%y: {X} = aten.mul.Tensor(%a, %e)",
        f"%m: bool[batch, seq, 8] = aten.gt.Scalar(%x, 0)\n%a: {X} = aten.where.ScalarOther(%m, %x, 0.0)\n"
        f"%e: {X} = aten.where.ScalarOther(%m, %x, 1.0)\n%y: {X} = aten.mul.Tensor(%a, %e)",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    before, after = RULES[name]
    assert cleaned(before) == after


KEPT = {
    "an eps": f"%y: {X} = aten.add.Tensor(%x, 1e-12)",
    "almost one": f"%y: {X} = aten.mul.Tensor(%x, 1.000001)",
    "another type": "%y: float64[batch, seq, 8] = aten._to_copy.default(%x, dtype=torch.float64)",
    "an order that others read": f"%a: {T} = aten.transpose.int(%x, 0, 1)\n%e: float32[seq, 8, batch] = aten.transpose.int(%a, 1, 2)\n"
    "%y: float32[seq, 8, 8] = aten.matmul.default(%e, %a)",
    "expanded where nothing else has the axis": "%a: float32[batch, 1, 8] = aten.expand.default(%row, [%b, 1, 8])\n"
    "%y: float32[batch, 1, 8] = aten.mul.Tensor(%a, %row)",
    "rounded": f'%y: {X} = aten.div.Tensor_mode(%x, 1, rounding_mode="floor")',
    "a part": "%y: float32[1, 1, 4] = aten.slice.Tensor(%row, 2, 0, 4)",
    "random": f"%a: {X} = aten.rand_like.default(%x)\n%e: {X} = aten.rand_like.default(%x)\n%y: {X} = aten.sub.Tensor(%a, %e)",
    "1 is not True": "%a: int64[2] = aten.full.default([2], 1)\n%e: bool[2] = aten.full.default([2], True)\n"
    "%y: int64[2, 2] = aten.outer.default(%a, %e)",
    "a sum of many": "%y: float32[batch, 1, 8] = aten.sum.dim_IntList(%x, [1], True)",
    "one of many": "%y: float32[batch, 8] = aten.select.int(%x, 1, 0)",
}


@pytest.mark.parametrize("name", KEPT)
def test_what_must_stay(name: str) -> None:
    sizes = "%b: int(batch) = aten.sym_size.int(%x, 0)\n" if "[%b," in KEPT[name] else ""
    assert cleaned(KEPT[name]) == sizes + KEPT[name]


def gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Graph, list[torch.Tensor]]:
    """The gradient of a mean square with respect to queries and norms, as it is written before any clean-up, and its inputs."""
    module, inputs, axes = ZOO[name].build()
    given = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    graph = trace(module.double(), given, axes)
    words = ("query", "q_proj", ".q.", "norm")
    trainables = [const for const in graph.used_state() if const.kind == "parameter" and any(w in const.path.lower() for w in words)]
    with monkeypatch.context() as patch:
        patch.setattr(gradient, "simplify_gradient", lambda made: made)
        found = gradient.gradient_graph(graph, trainables, Loss("mse", output=graph.signature.outputs[0]))
    output = evaluate(graph, [given[entry.name] for entry in graph.signature.inputs if entry.value is not None])[0]
    given["theta"] = torch.cat([const.load().detach().reshape(-1) for const in trainables])
    given |= {"labels": torch.full_like(output, 0.5), "loss_scale": torch.tensor(2.0, dtype=torch.float64)}
    return found, [given[entry.name] for entry in found.signature.inputs if entry.value is not None]


@pytest.mark.parametrize(
    "name", ["llama-eager", *(pytest.param(name, marks=pytest.mark.full) for name in ("bert-classifier", "t5", "vit"))]
)
def test_gradients_of_real_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, feeds = gradients(name, monkeypatch)
    after = simplify_gradient(before)
    verify(after)
    assert len(after.nodes) < len(before.nodes)
    assert after.signature == before.signature
    assert simplify_gradient(after) is after
    results = [evaluate(graph, feeds) for graph in (before, after)]
    assert float(results[0][2].abs().max()) > 0
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=ROUNDING * float(a.abs().max()))
