"""Axes that are arithmetic over others, and axes that may be empty. Oracle: the torch module itself, called as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import randn, seeded
from torch import nn
from torch.export import Dim

import matmorph as mm
from matmorph.errors import InputError, TraceError
from matmorph.exporters.vectors import check_shapes
from matmorph.ir.core import Range
from matmorph.ir.evaluate import evaluate
from matmorph.ir.text.printing import parse_graph, print_graph
from matmorph.runtime import InputMismatch, Session

PAST = {"name": "past", "min": 0}
AXES = {
    "x": {0: "batch", 1: "seq"},
    "mask": {0: "batch", 1: "past + seq"},
    "past": {"key": {0: "batch", 1: PAST}, "value": {0: "batch", 1: PAST}},
}


class Cached(nn.Module):
    """Attention over what came before and what is new."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, past: dict[str, torch.Tensor]) -> dict[str, Any]:
        new = self.kv(x).chunk(2, -1)
        key, value = (torch.cat([before, after], 1) for before, after in zip(past.values(), new, strict=True))
        scores = self.q(x) @ key.transpose(1, 2) + torch.where(mask[:, None, :] > 0, 0.0, -1e9)
        return {"y": self.o(torch.softmax(scores, -1) @ value), "present": {"key": key, "value": value}}


def example(batch: int = 2, seq: int = 3, past: int = 5, seed: int = 0) -> dict[str, Any]:
    key, value = randn(batch, past, 16), randn(batch, past, 16)
    return {
        "x": randn(batch, seq, 16) + seed,
        "mask": torch.ones(batch, past + seq, dtype=torch.int64),
        "past": {"key": key, "value": value},
    }


def flat(inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    past = {f"past.{name}": tensor for name, tensor in inputs["past"].items()}
    return {name: tensor.numpy() for name, tensor in {"x": inputs["x"], "mask": inputs["mask"], **past}.items()}


@pytest.fixture(scope="module")
def compiled() -> mm.Compiled:
    spec = {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}]}
    return mm.compile(seeded(Cached).eval(), spec, example(), AXES)


@pytest.fixture(scope="module")
def folder(compiled: mm.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.save(tmp_path_factory.mktemp("axes") / "out")


def test_the_graph_has_the_expression_and_no_axis_more(compiled: mm.Compiled) -> None:
    graph = compiled.graph
    assert [str(value.type) for value in graph.inputs] == [
        "float32[batch, seq, 16]",
        "int64[batch, past + seq]",
        "float32[batch, past, 16]",
        "float32[batch, past, 16]",
    ]
    assert dict(graph.ranges) == {"batch": Range(1), "seq": Range(1), "past": Range(0)}
    assert [str(value.type) for value in graph.outputs][1:] == ["float32[batch, past + seq, 16]"] * 2
    assert parse_graph(print_graph(graph)).ranges == graph.ranges


@pytest.mark.parametrize(("batch", "seq", "past"), [(1, 4, 0), (2, 1, 0), (2, 1, 7), (3, 2, 1), (1, 1, 1)])
def test_prompt_and_single_tokens_are_one_file(folder: Path, batch: int, seq: int, past: int) -> None:
    inputs = example(batch, seq, past, seed=1)
    with torch.no_grad():
        expected = seeded(Cached).eval()(**inputs)
    found = Session(folder, providers=["cpu"]).run(flat(inputs))
    # sums of 16 products in float32: some ten roundings of 6e-8
    assert np.abs(found["y"] - expected["y"].numpy()).max() <= 2e-6
    assert found["present.key"].shape == (batch, past + seq, 16)
    assert np.abs(found["present.value"] - expected["present"]["value"].numpy()).max() <= 2e-6


def test_the_past_of_one_call_is_the_present_of_the_last(folder: Path) -> None:
    session, whole = Session(folder, providers=["cpu"]), example(2, 6, 0)
    expected = session.run(flat(whole))["y"]
    past = {"past.key": np.zeros((2, 0, 16), np.float32), "past.value": np.zeros((2, 0, 16), np.float32)}
    for step in range(6):
        found = session.run({"x": whole["x"][:, step : step + 1].numpy(), "mask": np.ones((2, step + 1), np.int64), **past})
        past = {f"past.{name}": found[f"present.{name}"] for name in ("key", "value")}
    # no causal mask in this model: only the last token has seen everything in both
    assert np.abs(found["y"][:, 0] - expected[:, -1]).max() <= 2e-6


def test_checks_include_no_past_and_one_token_with_a_past(folder: Path) -> None:
    arrays = np.load(folder / "check.npz")
    shapes = {(arrays[f"input:x:{k}"].shape[1], arrays[f"input:past.key:{k}"].shape[1]) for k in range(5)}
    assert {(3, 0), (1, 5)} <= shapes
    assert check_shapes({"batch": 2, "seq": 3}, {}) == [{"batch": 2, "seq": 3}, {"batch": 1, "seq": 1}, {"batch": 3, "seq": 6}]


def test_sizes_that_do_not_add_up_are_refused_everywhere(compiled: mm.Compiled, folder: Path) -> None:
    wrong = {**example(2, 3, 5), "mask": torch.ones(2, 9, dtype=torch.int64)}
    with pytest.raises(InputMismatch, match=r"input mask, axis 1: expected past \+ seq = 8 .*, got 9"):
        Session(folder, providers=["cpu"]).run(flat(wrong))
    with pytest.raises(InputError, match=r"past \+ seq is 8, but mask has 9 there"):
        compiled.module(**wrong)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.lin(torch.cat([x, x, x[:1]]) + y)


@pytest.mark.parametrize("axis", ["2*half + 1", 2 * Dim("half") + 1])
def test_one_axis_may_derive_from_another(axis: Any) -> None:
    model, x, y = seeded(Doubled).eval(), randn(3, 4), randn(7, 4)
    graph = mm.trace(model, (x, y), ({0: "half"}, {0: axis}))
    assert [str(value.type) for value in graph.inputs] == ["float32[half, 4]", "float32[2*half + 1, 4]"]
    x, y = randn(5, 4), randn(11, 4)
    [found] = evaluate(graph, [x, y])
    assert torch.equal(found, model(x, y))


def test_what_the_model_needs_otherwise_is_an_error() -> None:
    with pytest.raises(TraceError, match="cannot be traced"):
        mm.trace(seeded(Doubled).eval(), (randn(3, 4), randn(7, 4)), ({0: "half"}, {0: "half + 4"}))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"x": {0: "a"}, "y": {0: "2*b + 1"}}, r"axis 2\*b \+ 1: no axis is named b"),
        ({"x": {0: "a"}, "y": {0: "3*a"}}, r"the example has size 7 at axis 0 of y, where 3\*a is 9"),
        ({"x": {0: {"name": "a", "min": -1}}}, r"takes name, min and max \(0 <= min < max\)"),
        ({"x": {0: "a +"}}, 'needs a name such as "batch"'),
        ({"x": {0: "open('f')"}}, 'needs a name such as "batch"'),
    ],
)
def test_axes_that_make_no_sense(axes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mm.trace(seeded(Doubled).eval(), {"x": randn(3, 4), "y": randn(7, 4)}, axes)
