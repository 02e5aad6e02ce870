"""Bytes of weights known before the export, against the data file that the export writes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exporting import Mlp, randn, seeded
from torch import nn

from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.ir.core import Graph
from matmorph.ir.tracing.trace import trace
from matmorph.passes.methods import method_table
from matmorph.passes.pipeline import compile_graph, plan_graph
from matmorph.passes.sizes import exported_sizes, item_size
from matmorph.specs.load import load_spec
from matmorph.specs.schema import Export

METHODS = {name: method() for name, method in method_table().items()}


class Tied(nn.Module):
    """The head reads the embedding table; `norm` and its input are no products."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 12)
        self.fc = nn.Linear(12, 10)
        self.norm = nn.LayerNorm(10)
        self.back = nn.Linear(10, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.back(self.norm(torch.relu(self.fc(self.table(ids))))))


class Readers(nn.Module):
    """Weights that are read in every way that decides whether half precision may store them."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Parameter(torch.randn(8, 6))
        self.product_and_sum = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(6))
        self.bias_behind_relu = nn.Parameter(torch.randn(6))
        self.scale = nn.Parameter(torch.randn(6))
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.rows = nn.Parameter(torch.randn(9, 6))
        self.spectrum = nn.Parameter(torch.randn(6, 6))
        self.conv = nn.Conv1d(6, 6, 1)
        self.register_buffer("steps", torch.arange(6))
        self.register_buffer("shift", torch.linspace(0, 1, 6), persistent=False)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        y = x @ self.product + self.bias
        y = torch.relu(y) + self.bias_behind_relu
        y = (y @ self.product_and_sum.T) * self.scale + self.product_and_sum.sum() * self.scalar + self.steps
        y = y + self.rows.index_select(0, index) + self.shift
        y = torch.einsum("ni,io->no", y, self.spectrum)
        return self.conv(y.unsqueeze(-1)).squeeze(-1)


MODELS: dict[str, tuple[Any, Any, Any]] = {
    "mlp": (Mlp, {"x": randn(3, 5, 8)}, {"x": {0: "batch", 1: "seq"}}),
    "tied": (Tied, (torch.arange(10).reshape(2, 5),), ({0: "batch", 1: "seq"},)),
    "readers": (Readers, (randn(4, 8), torch.arange(4)), ({0: "n"}, {0: "n"})),
}
PRECISIONS = ("fp32", "fp16", "bf16", "keep")


def graph_of(name: str, dtype: torch.dtype = torch.float32) -> Graph:
    factory, inputs, axes = MODELS[name]
    values = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    cast = [value.to(dtype) if value.is_floating_point() else value for value in values]
    return trace(seeded(factory).to(dtype), dict(zip(inputs, cast, strict=True)) if isinstance(inputs, dict) else tuple(cast), axes)


def spec_of(precision: str, rank: Any = 2) -> Any:
    rule = {"match": {"op": "matmul"}, "untie": True, "force": True, "rewrite": {"low_rank": {"rank": rank}}}
    return load_spec(
        {"version": 1, "name": "sizes", "rules": [rule], "export": {"precision": precision, "target": ["cuda"]}}, method_table()
    )


def written(folder: Path) -> dict[str, int]:
    """Bytes of each initializer in the data file, as model.onnx refers to them."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    places = {
        tensor.name: {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
        for tensor in model.graph.initializer
    }
    return {name: place["length"] for name, place in places.items() if place}


@pytest.fixture(scope="module")
def graphs() -> dict[tuple[str, torch.dtype], Graph]:
    return {(name, dtype): graph_of(name, dtype) for name, dtype in itertools.product(MODELS, (torch.float32, torch.bfloat16))}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_takes_the_bytes_that_were_foreseen(
    graphs: Any, name: str, dtype: torch.dtype, precision: str, tmp_path: Path
) -> None:
    graph = graphs[name, dtype]
    spec = spec_of(precision)
    done = compile_graph(graph, spec, METHODS, name)
    info = export_onnx(done.graph, tmp_path, spec.export)
    found = written(tmp_path)
    assert found == {const.path: size for const, size in exported_sizes(done.graph, precision).items()}
    assert sum(found.values()) == info.bytes == done.report.totals.bytes[1]
    assert plan_graph(graph, spec, METHODS, name).totals == done.report.totals


@pytest.mark.parametrize(("name", "precision"), [("mlp", "fp32"), ("tied", "fp16"), ("readers", "fp16")])
def test_bytes_before_are_those_of_the_dense_export(graphs: Any, name: str, precision: str, tmp_path: Path) -> None:
    graph = graphs[name, torch.float32]
    info = export_onnx(graph, tmp_path, Export(precision=precision))
    done = compile_graph(graph, spec_of(precision), METHODS, name)
    assert done.report.totals.bytes[0] == info.bytes == sum(written(tmp_path).values())


def test_rows_count_what_their_own_weights_take(graphs: Any) -> None:
    """Table [20, 12]: untied, it stays for the look-up and its factors (20 + 12) * 2 come on top; two bytes each in fp16."""
    rows = {row.path: row for row in compile_graph(graphs["tied", torch.float32], spec_of("fp16"), METHODS, "tied").report.sites}
    assert rows["table"].bytes == (480, 480 + 128)
    assert rows["table"].parameters == (240, 240 + 64)
    assert rows["fc"].bytes == (2 * 120, 2 * 2 * 22)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_module(graphs: Any, name: str) -> None:
    module = seeded(MODELS[name][0])
    done = compile_graph(graphs[name, torch.float32], spec_of("fp32"), METHODS, name)
    factors = sum(const.numel for const in done.graph.state if const.rule is not None)
    before = sum(parameter.numel() for parameter in module.parameters())
    gone = {const.path for const in done.source.state} - {const.path for const in done.graph.state}
    replaced = sum(const.numel for const in done.source.state if const.path in gone)
    assert done.report.totals.parameters == (before, before - replaced + factors)
    assert done.report.totals.trainable == factors


def test_wide_tables_and_integers() -> None:
    assert [item_size("float32", p) for p in PRECISIONS] == [4, 2, 2, 4]
    assert [item_size("bfloat16", p) for p in PRECISIONS] == [4, 2, 2, 2]
    assert [item_size("float64", p) for p in PRECISIONS] == [8, 8, 8, 8]
    assert [item_size("int8", p) for p in PRECISIONS] == [1, 1, 1, 1]
