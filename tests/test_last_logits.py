"""Logits of the last place alone. Oracle: the last row of what the whole model answers in torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exporting import seeded
from torch import Tensor, nn

import matmorph as mm
from matmorph.errors import ExportError
from matmorph.exporters.last_logits import last_logits
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import evaluate
from matmorph.ir.tracing.trace import trace
from matmorph.runtime import Session

WORDS, WIDTH = 24, 16
ROUNDING = 2e-6
"""Of results of size 1: products of at most 32 terms in another order, each rounded to 6e-8."""


class Language(nn.Module):
    """A table, attention to what came before, an MLP, a norm and a head."""

    def __init__(self, tail: str = "plain") -> None:
        super().__init__()
        self.tail = tail
        self.table = nn.Embedding(WORDS, WIDTH)
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down, self.norm = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.table(ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        places = torch.arange(ids.shape[1])
        scores = (q @ k.transpose(1, 2) / 4).masked_fill(places > places[:, None], -1e9)
        x = x + self.o(torch.softmax(scores, -1) @ v)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        if self.tail == "capped":
            return {"logits": 5 * torch.tanh(self.head(x) / 5)}
        if self.tail == "tied":
            return {"logits": x @ self.table.weight.T}
        if self.tail == "two":
            return {"logits": self.head(x), "more": self.up(x)}
        if self.tail == "pooled":
            return {"scores": self.head(x.mean(1))}
        return {"logits": self.head(x), "hidden": x} if self.tail == "hidden" else {"logits": self.head(x)}


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
AXES = {"ids": {0: "batch", 1: "tokens"}}


def language(tail: str = "plain") -> nn.Module:
    return seeded(lambda: Language(tail))


def graph_of(tail: str) -> Graph:
    return trace(language(tail), {"ids": IDS}, AXES)


def rows_of(graph: Graph, op: str) -> list[Any]:
    return [node.output.tensor.shape[1] for node in graph.nodes if node.op == op]


@pytest.mark.parametrize("tail", ["plain", "capped", "tied", "hidden"])
def test_the_last_row_is_that_of_the_whole(tail: str) -> None:
    graph = graph_of(tail)
    cut = last_logits(graph)
    for ids in (IDS, IDS[:1, :1], IDS[:, :3]):
        whole, last = evaluate(graph, [ids]), evaluate(cut, [ids])
        assert last[0].shape == (len(ids), 1, WORDS)
        assert (last[0] - whole[0][:, -1:]).abs().max() <= ROUNDING
        assert all(torch.equal(found, wanted) for found, wanted in zip(last[1:], whole[1:], strict=True))


def test_all_that_goes_row_by_row_below_the_head_is_cut_too() -> None:
    rows = rows_of(last_logits(graph_of("plain")), "aten.linear.default")
    assert [row == 1 for row in rows] == [False, True, True, True, True]  # keys and values need every token; o, up, down and head do not


def test_what_others_read_stays_whole() -> None:
    rows = rows_of(last_logits(graph_of("hidden")), "aten.linear.default")
    assert [row == 1 for row in rows] == [False, False, False, False, True]


@pytest.mark.parametrize(("tail", "reason"), [("pooled", "no output is one"), ("two", "logits and more are such outputs")])
def test_what_cannot_be_meant_is_refused(tail: str, reason: str, tmp_path: Path) -> None:
    compiled = mm.compile(language(tail), spec(), {"ids": IDS}, AXES)
    with pytest.raises(ExportError, match=reason):
        compiled.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spec(rewrite: Any = "keep", path: str = "head", **export: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": {"path": path}, "rewrite": rewrite, "force": True}], "export": {"logits": "last", **export}}


@pytest.mark.parametrize(
    "rewrite", ["keep", {"low_rank": {"rank": 4}}, {"quantize": {"quantizer": "uniform", "bits": 4, "block_size": 16}}]
)
def test_the_file_says_so_and_is_checked(rewrite: Any, tmp_path: Path) -> None:
    compiled = mm.compile(language(), spec(rewrite), {"ids": IDS}, AXES)
    folder = compiled.save(tmp_path / "out")
    with torch.no_grad():
        expected = compiled.module(ids=IDS)["logits"]
    assert expected.shape == (2, 5, WORDS)  # under torch nothing is cut
    session = Session(folder, providers=["cpu"])
    assert session.manifest.outputs[0].shape == ("batch", 1, WORDS)
    assert np.abs(session.run({"ids": IDS.numpy()})["logits"] - expected[:, -1:].numpy()).max() <= ROUNDING
    assert any("last column" in note for note in json.loads((folder / "manifest.json").read_text())["notes"])
    shapes = [list(dim.dim_value for dim in out.type.tensor_type.shape.dim) for out in onnx.load(folder / "model.onnx").graph.output]
    assert shapes == [[0, 1, WORDS]]


def test_eight_bit_activations_are_foreseen_for_the_last_row(tmp_path: Path) -> None:
    rewrite = {"quantize": {"quantizer": "uniform", "bits": 4, "block_size": 16}}
    compiled = mm.compile(language(), spec(rewrite, "**", activations="int8", target=["cpu"]), {"ids": IDS}, AXES)
    assert Session(compiled.save(tmp_path / "out"), providers=["cpu"]).run({"ids": IDS.numpy()})["logits"].shape == (2, 1, WORDS)
