"""transact in specs: widths and shots, plans, exported models, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pruning import compiled, planned, pruned, run, spec_of, traced
from rewriting import graph_of, weights_of
from zoo import ZOO

import matmorph as mm
from matmorph.errors import CheckError, InputError, SpecError
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.methods.transact.method import Transact, TransactSpec
from matmorph.passes.pruning.axes import QK, V
from matmorph.passes.pruning.find_blocks import find_blocks
from matmorph.specs.notations import Width

BOTH = ["attention", "mlp"]
FIVE = [(name, unit) for name in ("gpt2", "llama", "phi3", "bert", "vit") for unit in ("heads", "head_dims")]
QUICK = [("llama", "head_dims")]

# ------------------------------------------------------------------------------------------------------------- ONNX Runtime


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["mha", "mha-weights", "transformer-encoder", "t5", "albert", "bart", "whisper", "clip", "deberta", "gemma3"]
)
@pytest.mark.parametrize("unit", ["heads", "head_dims"])
def test_other_layouts_agree_with_onnx_runtime(name: str, unit: str, tmp_path: Any) -> None:
    """The exporter compares ONNX Runtime with torch before the folder takes its name."""
    model, inputs, shapes = ZOO[name].build()
    found = mm.compile(model, spec_of(BOTH, width="50%", unit=unit), inputs, shapes, calibration=[inputs])
    assert any(row.status == "rewritten" for row in found.report.sites)
    found.save(tmp_path / "out")


@pytest.mark.parametrize(("name", "unit"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.full) for pair in FIVE])
def test_pruned_models_in_onnx_runtime(name: str, unit: str, tmp_path: Any) -> None:
    from matmorph.runtime import Session

    model, inputs, shapes = ZOO[name].build()
    found = mm.compile(model, spec_of(BOTH, width="50%", unit=unit), inputs, shapes, calibration=[inputs])
    session = Session(found.save(tmp_path / "out"), providers=["CPUExecutionProvider"])
    for more in ZOO[name].more_inputs():
        given = session.run({key: value.numpy() for key, value in dict(more).items()})
        expected = run(found.module, more).numpy()
        np.testing.assert_allclose(next(iter(given.values())), expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))  # float32


# ------------------------------------------------------------------------------------------------------------- shots, figures


def test_the_schedule_of_the_paper() -> None:
    heads = mm.prune_schedule(4096, 768, 8, multiple_of=128)
    assert [width // 128 for width in heads] == [29, 26, 23, 20, 17, 14, 10, 6]
    assert heads == (3712, 3328, 2944, 2560, 2176, 1792, 1280, 768)
    assert mm.prune_schedule(11008, 1536) == (9824, 8640, 7456, 6272, 5088, 3904, 2720, 1536)
    assert mm.prune_schedule(32, 32, 2) == (32, 32)
    for wrong in ((8, 9, 1), (8, 0, 1), (8, 4, 0)):
        with pytest.raises(InputError, match="a schedule goes from a width down"):
            mm.prune_schedule(*wrong)


def test_shots_score_the_pruned_model_and_report_against_the_source() -> None:
    model, found, inputs = compiled("bert", "mlp", width="50%", multiple_of=2, shots=4)
    row = next(row for row in found.report.sites if row.path == "encoder.layer.1.output.dense")
    assert (row.shape, row.parameters, row.rank) == ((32, 44), (32 * 44, 32 * 22), 22)
    once = compiled("bert", "mlp", width="50%", multiple_of=2)[1]
    assert found.report.totals == once.report.totals
    assert run(found.module, inputs).shape == run(model, inputs).shape
    first = [next(r for r in c.report.sites if r.path == "encoder.layer.0.output.dense").output_error for c in (found, once)]
    assert all(0 < error < 1 for error in first)


def test_llama_2_7b_on_the_meta_device() -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000, use_cache=False
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    rules = [
        {"name": "attention", "match": {"block": "attention"}, "expect": 128, "rewrite": {"transact": {"width": 768}}},
        {"name": "mlp", "match": {"block": "mlp"}, "expect": 96, "rewrite": {"transact": {"width": 1536}}},
    ]
    inputs = {"input_ids": torch.zeros(2, 8, dtype=torch.int64, device="meta")}
    plan = mm.plan(model, {"version": 1, "name": "7b", "rules": rules}, inputs, {"input_ids": {0: "batch", 1: "seq"}})
    assert plan.totals.parameters == (6_738_415_616, 1_269_043_200)
    assert "keys and values (KV cache): 262,144 -> 49,152 elements per token (18.75%)" in plan.notes


@pytest.mark.parametrize(("name", "unit"), FIVE)
def test_a_plan_is_what_compile_does(name: str, unit: str) -> None:
    _, inputs, graph = traced(name)
    spec = spec_of(BOTH, width="50%", unit=unit)
    plan = planned(graph, spec)
    found = pruned(graph, spec, [inputs])
    assert plan.totals == found.report.totals
    assert [note for note in plan.notes if "KV" in note] == [note for note in found.report.notes if "KV" in note]
    for ours, row in zip(plan.sites, found.report.sites, strict=True):
        assert (ours.path, ours.status, ours.rank) == (row.path, row.status, row.rank)
        assert (ours.parameters, ours.bytes, ours.macs) == (row.parameters, row.bytes, row.macs)


# ------------------------------------------------------------------------------------------------------------- bad input

BAD = [
    ({"width": 0}, "rules[0].rewrite.transact.width: expected a whole number >= 1, got 0"),
    ({"width": "0%"}, "rules[0].rewrite.transact.width: expected a percentage > 0% and <= 100%"),
    ({"width": "half"}, 'rules[0].rewrite.transact.width: expected a number of features, a percentage such as "50%", or auto'),
    (
        {"width": "50%", "score": "tailor"},
        'rules[0].rewrite.transact.score: expected one of activation, taylor, weight, got the text "tailor"; did you mean taylor?',
    ),
    (
        {"width": "50%", "unit": "head"},
        'rules[0].rewrite.transact.unit: expected one of heads, head_dims, got the text "head"; did you mean heads?',
    ),
    ({"width": "50%", "shots": 0}, "rules[0].rewrite.transact.shots: expected an integer >= 1, got 0"),
    ({"with": "50%"}, "rules[0].rewrite.transact.with: unknown key; did you mean width?"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_that_say_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        mm.load_spec(spec_of("mlp", **settings))
    assert message in str(caught.value)


IMPOSSIBLE = [
    ("attention", {"width": 12, "unit": "head_dims"}, "rule prune: width 12 is no even dimension for each of 4 heads (.*); near: 8, 16"),
    ("attention", {"width": 4, "unit": "head_dims"}, "width 4 is no even dimension for each of 4 heads (.*); near: 8"),
    ("mlp", {"width": 45}, r"rule prune: width 45 is above that of every matched block; the widest is 44 \(encoder.layer.0.output.dense\)"),
]


@pytest.mark.parametrize(("block", "settings", "message"), IMPOSSIBLE)
def test_widths_that_no_block_can_have(block: str, settings: dict[str, Any], message: str) -> None:
    _, inputs, graph = traced("bert")
    with pytest.raises(SpecError, match=message):
        planned(graph, spec_of(block, **settings))
    with pytest.raises(SpecError, match=message):
        pruned(graph, spec_of(block, **settings), [inputs])


def test_calibration_is_missing() -> None:
    graph = traced("bert")[2]
    with pytest.raises(SpecError, match=r"rule prune: transact needs calibration data \(input_second_moment\) and none was given"):
        pruned(graph, spec_of("mlp", width="50%"), None)
    found = pruned(graph, spec_of("mlp", width="50%", score="weight", compensate="none"), None)
    assert found.report.sites[0].output_error is None


def test_two_rules_on_one_block(tmp_path: Any) -> None:
    text = """version: 1
rules:
  - {name: first, match: {role: attention.q}, rewrite: {low_rank: {rank: 4}}}
  - {name: second, match: {block: attention}, rewrite: {transact: {width: 50%}}}
"""
    (tmp_path / "s.yaml").write_text(text)
    graph = traced("bert")[2]
    with pytest.raises(SpecError) as caught:
        planned(graph, tmp_path / "s.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(
        "s.yaml:3:5: rules second and first claim parts of one block: "
        "encoder.layer.0.attention.self.key and encoder.layer.0.attention.self.query"
    )
    assert lines[1].startswith("  rule second is at ")
    assert lines[1].endswith("s.yaml:4:5")


def test_a_part_of_a_block_is_rejected_as_a_whole() -> None:
    graph = traced("bert")[2]
    spec = spec_of("attention", width="50%")
    spec["rules"][0]["match"] = {"role": ["attention.q", "attention.k", "attention.o"], "layer": 0}
    plan = planned(graph, spec)
    reasons = {row.reason for row in plan.sites if row.status == "rejected"}
    assert reasons == {
        "the attention block of encoder.layer.0.attention.output.dense is incomplete: rule prune does not match "
        "encoder.layer.0.attention.self.value"
    }
    with pytest.raises(SpecError, match=r"strict: rule prune cannot rewrite encoder\.layer\.0\.attention\.self\.query"):
        planned(graph, {**spec, "strict": True})


def test_what_is_in_no_block() -> None:
    graph = traced("bert")[2]
    spec = spec_of("mlp", width="50%")
    spec["rules"][0]["match"] = {"role": "head"}
    [row] = [row for row in planned(graph, spec).sites if row.rule]
    assert (row.path, row.reason) == ("pooler.dense", "it is part of no attention or MLP block")


def test_a_block_is_taken_back_as_a_whole() -> None:
    _, inputs, graph = traced("bert")
    spec = {**spec_of("mlp", width="50%"), "tolerance": {"output_error": 1e-6, "on_exceed": "roll_back"}}
    found = pruned(graph, spec, [inputs] * 5)  # more rows than features, and one batch to measure on
    rows = [row for row in found.report.sites if row.rule]
    assert {row.status for row in rows} == {"rejected"}
    assert all("rolled back: " in row.reason and "exceeds 1e-06" in row.reason for row in rows)
    assert found.report.totals.parameters[0] == found.report.totals.parameters[1]
    with pytest.raises(CheckError, match=r"output_error .* exceeds 1e-06"):
        pruned(graph, {**spec, "tolerance": {"output_error": 1e-6}}, [inputs] * 5)


def test_heads_round_up_and_say_so() -> None:
    graph = traced("bert")[2]
    plan = planned(graph, spec_of("attention", width=17))
    row = next(row for row in plan.sites if row.path == "encoder.layer.0.attention.output.dense")
    assert (row.rank, row.notes) == (24, ("width 17 rounds up to 24: 3 heads",))


def test_pruned_matmuls_can_be_replaced_by_a_later_stage() -> None:
    _, inputs, graph = traced("bert")
    low_rank = {"low_rank": {"rank": 8}}
    stages = [
        {"name": "prune", "rules": [{"name": "half", "match": {"block": "mlp"}, "rewrite": {"transact": {"width": "50%"}}}]},
        {"name": "factors", "rules": [{"name": "q", "match": {"role": "mlp.fc1"}, "rewrite": low_rank}]},
    ]
    spec = {"version": 1, "name": "two", "stages": stages}
    found = pruned(graph, spec, [inputs])
    row = next(row for row in found.report.sites if row.path == "encoder.layer.0.intermediate.dense")
    assert (row.method, row.shape, row.parameters) == ("transact, then low_rank", (44, 32), (44 * 32, 8 * (24 + 32)))
    assert planned(graph, spec).sites[0].path == found.report.sites[0].path


def test_units_by_name() -> None:
    """The parts that a head's dimensions are counted in: rotary pairs for q and k, single ones for v."""
    _, _, graph = traced("llama")
    block = next(block for block in find_blocks(graph, find_sites(graph)) if block.kind == "attention")
    spec = TransactSpec(Width("ratio", 0.5), unit="head_dims")
    [choice] = Transact().choices(block, spec)
    assert Transact().counts(block, spec, choice) == {V: 4, QK: 2}


@pytest.mark.parametrize(
    ("model", "kind", "unit", "width", "expected"),
    [
        ("bert", "mlp", "heads", Width("ratio", 0.3), 16),  # 44 * 0.3 = 13.2
        ("bert", "mlp", "heads", Width("fixed", 9), 16),
        ("bert", "mlp", "heads", Width("ratio", 1.0), 44),  # nothing to prune, so nothing is rounded
        ("bert", "attention", "heads", Width("ratio", 0.3), 16),  # 2 heads of 8
        ("llama", "attention", "heads", Width("fixed", 1), 16),  # one key/value head with its 2 query heads
        ("llama", "attention", "head_dims", Width("ratio", 0.3), 16),  # 4 heads of 8 dimensions: 4 each, a rotary pair less would be 2
    ],
)
def test_widths_round_up_to_whole_units(model: str, kind: str, unit: str, width: Width, expected: int) -> None:
    graph = traced(model)[2]
    block = next(block for block in find_blocks(graph, find_sites(graph)) if block.kind == kind)
    [choice] = Transact().choices(block, TransactSpec(width, unit=unit))
    assert choice.rank == expected


NORMED = """graph device=cpu
range batch 1..
input %x: float32[batch, 6] "x"
parameter %up: float32[12, 6] "up.weight" trainable
parameter %down: float32[6, 12] "down.weight" trainable
%u: float32[batch, 12] = aten.linear.default(%x, %up)
%a: float32[batch, 12] = aten.relu.default(%u)
%n: float32[batch, 12] = aten.softmax.int(%a, -1)
%d: float32[batch, 6] = aten.linear.default(%n, %down)
%y: float32[batch, 6] = aten.add.Tensor(%x, %d)
output %y "output"
"""


def test_what_mixes_the_features_is_named() -> None:
    graph = graph_of(NORMED, weights_of(NORMED))
    rows = [row for row in planned(graph, spec_of("mlp", width="50%")).sites if row.rule]
    assert {row.status for row in rows} == {"rejected"}
    assert {row.reason for row in rows} == {"cannot be pruned: softmax (%n) computes across an axis of the block"}
