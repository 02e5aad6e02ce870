"""The normal form of a trace, and that a program read without a second trace is the program read with one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

from matmorph.ir.core import Graph
from matmorph.ir.evaluate import evaluate
from matmorph.ir.tracing import trace as tracing
from matmorph.ir.tracing.trace import trace

AXES = ({0: "batch", 1: "seq"},)


class Pure(nn.Module):
    """Everything that the normal form replaces."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = functional.dropout(x.contiguous().clone(), 0.5, self.training).to(torch.float32).to("cpu")
        half = x.double().float()
        heads = half.unflatten(-1, (2, 3)).transpose(1, 2)
        rows = heads.transpose(1, 2).reshape(x.shape[0], x.shape[1], 6).view(x.shape[0], -1, 6)
        first, second = rows.chunk(2, dim=-1)
        return first + second, x.flatten(0, 1), x.clone()


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.mul_(2)
        return y


class TwoSymbols(nn.Module):
    """Shapes with two symbolic dims cannot be written as one reshape with a single -1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(2).flatten(2) + x.unflatten(2, (3, 2)).flatten(2)


def x(batch: int = 3, seq: int = 5) -> torch.Tensor:
    return torch.randn(batch, seq, 6, generator=torch.Generator().manual_seed(batch))


def second_traces(monkeypatch: pytest.MonkeyPatch, module: nn.Module, functional_too: bool = True) -> tuple[Graph, list[bool]]:
    """The graph, and for each program whether it was read as it was. `functional_too=False` forces the second trace."""
    found: list[bool] = []
    judge = tracing.is_functional

    def record(program: torch.export.ExportedProgram) -> bool:
        found.append(judge(program) and functional_too)
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(tracing, "is_functional", record)
        return trace(module.eval(), (x(),), AXES), found


def test_what_changes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, direct = second_traces(monkeypatch, Pure())
    assert direct == [True]
    names = Counter(node.op for node in graph.nodes)
    gone = ("dropout", "contiguous", "view", "_unsafe_view", "flatten", "chunk", "to")
    assert not [op for op in names if op.split(".")[1] in gone]
    assert names["aten._to_copy.default"] == 2  # to float64 and back
    assert names["aten.clone.default"] == 1  # a result of the program is never the caller's own tensor
    assert names["aten.split.Tensor"] == 1


@pytest.mark.parametrize("module", [Pure(), InPlace(), TwoSymbols()], ids=lambda module: type(module).__name__)
def test_with_and_without_a_second_trace(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    once, _ = second_traces(monkeypatch, module)
    twice, direct = second_traces(monkeypatch, module, functional_too=False)
    assert direct == [False]
    for shape in ((3, 5), (1, 2), (4, 9)):
        expected = module(x(*shape))
        for graph in (once, twice):
            results = evaluate(graph, [x(*shape)])
            for got, wanted in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
                assert torch.equal(got, wanted)  # the same kernels on the same numbers: exact
    assert [str(value.type) for value in once.inputs] == [str(value.type) for value in twice.inputs]
    assert [str(value.type) for value in once.outputs] == [str(value.type) for value in twice.outputs]


def test_in_place_operators_need_the_second_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, direct = second_traces(monkeypatch, InPlace())
    assert direct == [False]
    assert [node.op for node in graph.nodes] == ["aten.add.Tensor", "aten.mul.Tensor"]


def test_dead_code_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.sin().cos()
            return x + 1

    graph, _ = second_traces(monkeypatch, Dead())
    assert [node.op for node in graph.nodes] == ["aten.add.Tensor"]
