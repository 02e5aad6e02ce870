"""Embedding tables in codes: alone, tied to the head, in every type; what is refused, and what is reported. Oracle: numpy in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from quantizing import METHODS, QUANTIZERS, loftq, names_of, parts_of, put_in, quantize, relative, stands_for
from rewriting import graph_of, rule_of, run
from torch import nn

import matmorph as mm
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.verify import verify
from matmorph.passes.rewriting.rewrite import rewrite

TABLE = """graph device=cpu
range b 1..
range s 1..
input %i: int64[b, s] "ids"
parameter %w: float32[30, 12] "embed.weight"
%e: float32[b, s, 12] = aten.embedding.default(%w, %i, 0)
%f: float32[b, s, 12] = aten.embedding.default(%w, %i)
%y: float32[b, s, 12] = aten.add.Tensor(%e, %f)
output %y "output"
"""
TIED = """graph device=cpu
range b 1..
input %i: int64[b] "ids"
parameter %w: float32[30, 12] "wte.weight" "head.weight"
parameter %c: float32[30] "head.bias"
%e: float32[b, 12] = aten.embedding.default(%w, %i)
%h: float32[b, 12] = aten.relu.default(%e)
%y: float32[b, 30] = aten.linear.default(%h, %w, %c)
output %y "output"
"""
UNIFORM = [settings for settings in QUANTIZERS if settings["quantizer"] == "uniform"]
IDS = torch.arange(30)


def treated(text: str, use: Any, **more: Any) -> Any:
    graph = graph_of(text)
    (site,) = find_sites(graph)
    result, (outcome,) = rewrite(graph, [(site, rule_of(use, **{"force": True, **more}))], METHODS)
    verify(result)
    return graph, result, outcome


@pytest.mark.parametrize("settings", UNIFORM, ids=names_of)
@pytest.mark.parametrize(
    "text", [TABLE, TIED, TABLE.replace("12", "65"), TIED.replace("12", "65")], ids=["table", "tied", "wide", "wide tied"]
)
def test_lookups_give_the_rows_that_the_codes_stand_for(text: str, settings: dict[str, Any]) -> None:
    """Widths that fill no block, two lookups of one table, one of them with padding_idx (which has no part in inference)."""
    graph, result, outcome = treated(text, quantize(**settings))
    ids = IDS if "b, s" not in text else IDS.view(5, 6)
    wanted = put_in(graph, {outcome.site: stands_for(outcome)})
    torch.testing.assert_close(run(result, ids)[0], run(wanted, ids)[0], rtol=0, atol=1e-4)  # float32, sums of 65 of size 3
    w = outcome.site.weight().double().numpy()
    assert outcome.weight_error == pytest.approx(relative(w, stands_for(outcome)), rel=1e-5)
    assert outcome.cost.bytes == sum(const.nbytes for const in outcome.consts)
    assert "aten.embedding.default" not in {node.op for node in result.nodes}
    assert not any(const.path.startswith(("embed.weight", "wte.weight")) for const in result.state)


def test_one_set_of_codes_serves_the_head_and_the_table() -> None:
    _, result, outcome = treated(TIED, quantize(quantizer="uniform", bits=4))
    readers = [(node.op, node.args[1]) for node in result.nodes if node.op.startswith("matmorph")]
    assert [op for op, _ in readers] == ["matmorph.gather_nbits.default", "matmorph.matmul_nbits.default"]
    assert readers[0][1] is readers[1][1]
    assert [const.path for const in outcome.consts] == ["wte.quantize.codes", "wte.quantize.scales"]
    assert outcome.cost.macs == 30 * 12  # a lookup multiplies nothing


def test_clipped_tables() -> None:
    _, result, outcome = treated(TABLE, quantize(quantizer="uniform_clipped", bits=8))
    w = outcome.site.weight().double().numpy()
    low, high = (max(w.min(), w.mean() - 2 * w.std(ddof=1)), min(w.max(), w.mean() + 2 * w.std(ddof=1)))
    matrix = stands_for(outcome) + low + 128 * (high - low) / 255
    np.testing.assert_allclose(run(result, IDS.view(5, 6))[0].view(30, 12).numpy(), 2 * matrix, atol=1e-5)  # float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("integers", ["int64", "int32"])
def test_other_types(dtype: str, integers: str) -> None:
    text = TABLE.replace("float32", dtype).replace("int64", integers)
    _, result, outcome = treated(text, quantize(quantizer="uniform", bits=8, block_size=16))
    (found,) = run(result, IDS.view(5, 6).to(getattr(torch, integers)))
    assert found.dtype == getattr(torch, dtype)
    rounding = {"float16": 2**-11, "bfloat16": 2**-8, "float64": 2**-24}[dtype]
    np.testing.assert_allclose(found.double().view(30, 12).numpy(), 2 * stands_for(outcome), atol=10 * rounding)  # rows of size 3, doubled


def test_untie_leaves_the_table_and_quantises_the_head() -> None:
    graph, result, outcome = treated(TIED, loftq(3, quantizer="nf4"), untie=True)
    assert outcome.reject is None
    assert [node.op for node in result.nodes][:2] == ["aten.embedding.default", "aten.relu.default"]
    rows = torch.relu(outcome.site.weight().double())
    bias = next(const for const in graph.state if const.path == "head.bias").load().double()
    wanted = rows @ torch.from_numpy(stands_for(outcome)).T + bias
    torch.testing.assert_close(run(result, IDS)[0].double(), wanted, rtol=0, atol=1e-4)  # float32, sums of 12


@pytest.mark.parametrize(
    ("text", "use", "reason"),
    [
        (TABLE, quantize(quantizer="nf4"), "uniform codes only"),
        (TIED, quantize(quantizer="nf2"), "uniform codes only"),
        (TABLE, loftq(quantizer="uniform", bits=4), "this is an embedding table: quantize serves it"),
        (TIED, loftq(quantizer="uniform", bits=4), "use untie: true"),
    ],
)
def test_what_tables_cannot_be(text: str, use: Any, reason: str) -> None:
    graph, result, outcome = treated(text, use)
    assert reason in outcome.reject.reason
    assert [node.op for node in result.nodes] == [node.op for node in graph.nodes]


# whole models


class Net(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 40, padding_idx=0), nn.Embedding(16, 40)
        self.fc, self.head = nn.Linear(40, 40), nn.Linear(40, 50, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(torch.relu(self.fc(x)))


SPEC: dict[str, Any] = {
    "version": 1,
    "rules": [
        {
            "name": "all",
            "match": {"op": ["matmul", "embedding"]},
            "rewrite": {"quantize": {"quantizer": "uniform", "bits": 4, "zero_point": True, "scale": "search"}},
        }
    ],
    "tolerance": {"output_error": 0.5},
    "export": {"target": ["cpu"]},
}


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_tables(tied: bool, tmp_path: Path) -> None:
    from matmorph.runtime import Session

    torch.manual_seed(0)
    model, ids = Net(tied).eval(), torch.randint(0, 50, (3, 9))
    shapes = ({0: "batch", 1: "seq"},)
    plan = mm.plan(model, SPEC, (ids,), dynamic_shapes=shapes)
    batches = [(torch.randint(0, 50, (4, 9)),) for _ in range(3)]
    made = mm.compile(model, SPEC, (ids,), dynamic_shapes=shapes, calibration=batches)
    rows = {row.path: row for row in made.report.sites}
    assert {row.status for row in rows.values()} == {"rewritten"}
    assert set(rows) == ({"words", "places", "fc"} if tied else {"words", "places", "fc", "head"})
    for planned in plan.sites:
        row = rows[planned.path]
        assert (planned.bytes, planned.parameters, planned.macs, planned.trainable) == (row.bytes, row.parameters, row.macs, row.trainable)
    assert plan.totals == made.report.totals
    assert rows["places"].output_error is None  # no matmul reads it, and no tolerance on outputs applies to it
    assert (rows["words"].output_error is None) is not tied
    assert rows["words"].bytes == (4 * 50 * 40, 50 * (64 // 2 + 4 + 1))
    assert any("GatherBlockQuantized" in note for note in rows["words"].notes)
    folder = made.save(tmp_path / "out")
    (found,) = Session(folder, "cpu").run({"ids": ids.numpy()}).values()
    np.testing.assert_allclose(found, made.module(ids).detach().numpy(), atol=1e-5)  # float32, outputs of size 1
    size = (folder / "model.onnx.data").stat().st_size
    assert made.report.totals.bytes[1] <= size <= made.report.totals.bytes[1] + 64 * 16  # alignment


@pytest.mark.parametrize("precision", ["fp32", "fp16", "keep"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("settings", [{"quantizer": "nf4"}, {"quantizer": "nf2"}, {"quantizer": "uniform", "bits": 8}], ids=names_of)
def test_bytes_of_the_report_are_those_of_the_file(settings: dict[str, Any], half: bool, precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Net(tied=True).eval(), torch.randint(0, 50, (3, 9))
    rule = {"name": "all", "match": {"op": "matmul"}, "rewrite": {"loftq": {**settings, "rank": 2}}, "force": True, "untie": True}
    tables = {"name": "tables", "match": {"path": "places", "op": "embedding"}, "rewrite": SPEC["rules"][0]["rewrite"]}
    spec = {"version": 1, "rules": [rule, tables], "export": {"target": ["cpu"], "precision": precision}}
    made = mm.compile(model.half() if half else model, spec, (ids,))
    assert {row.status for row in made.report.sites} == {"rewritten"}
    saved = onnx.load(str(made.save(tmp_path / "out") / "model.onnx"), load_external_data=False)
    lengths = [int(entry.value) for tensor in saved.graph.initializer for entry in tensor.external_data if entry.key == "length"]
    assert sum(lengths) == made.report.totals.bytes[1]


def test_a_tied_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 60, (2, 7))
    made = mm.compile(model, {**SPEC, "tolerance": {"weight_error": 0.2}}, kwargs_of(ids))
    rows = {row.path: row for row in made.report.sites}
    assert {row.status for row in rows.values()} == {"rewritten"}
    assert rows["transformer.wte"].role == "head"
    dense = {const.path: const for const in made.graph.used_state()}
    parts = parts_of([const for path, const in dense.items() if path.startswith("transformer.wte.")])
    assert set(parts) == {"codes", "scales", "zero_points"}
    exchanged = transformers.GPT2LMHeadModel(config).eval()
    exchanged.load_state_dict(model.state_dict())
    with torch.no_grad():
        for row in made.report.sites:
            weight = exchanged.get_submodule(row.path).weight
            weight.copy_(matrix_of(dense, row.path, weight, transposed="wte" not in row.path and "wpe" not in row.path))
    with torch.no_grad():
        torch.testing.assert_close(made.module(input_ids=ids).logits, exchanged(ids).logits, rtol=0, atol=1e-5)  # float32


def kwargs_of(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids}


def matrix_of(state: dict[str, Any], path: str, weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """The matrix in the layout of the module (GPT-2's Conv1D is [in, out])."""
    from quantizing import dense

    parts = parts_of([const for name, const in state.items() if name.startswith(f"{path}.quantize.")])
    n, k = weight.shape[::-1] if transposed else weight.shape
    matrix = torch.from_numpy(dense(parts, (n, k), quantize(quantizer="uniform", bits=4).spec))
    return matrix.T if transposed else matrix
