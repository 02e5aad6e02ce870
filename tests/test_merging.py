"""Adapters merged, unmerged, loaded; every kind of base. Oracle: float64 numpy and the quantizer called directly; mutants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapting import ROUNDING, U4, X, compiled, far, network, trained, weights
from mutating import Mutant, mutated, unmutated
from safetensors.torch import save_file
from zoo import ZOO

import matmorph as mm
from matmorph.errors import InputError, VerifyError
from matmorph.ir.adapter import as_data, read_adapters
from matmorph.ir.evaluate import bind, evaluate
from matmorph.ir.joins import joins
from matmorph.ir.text.printing import print_graph
from matmorph.passes.adapters.merging import factors_of, merge
from matmorph.passes.linalg.quantize import Quantizer, quantize
from matmorph.passes.methods import method_table
from matmorph.runtime import Session

DENSE: Mapping[str, Any] = {
    "lora": {"lora": {"rank": 2, "alpha": 4}},
    "rslora": {"lora": {"rank": 4, "alpha": 4, "rslora": True}},
    "pissa": {"lora": {"rank": 2, "alpha": 4, "init": "pissa"}},
    "olora": {"lora": {"rank": 2, "init": "olora"}},
    "two": [{"lora": {"rank": 2, "alpha": 4, "init": "pissa"}}, {"lora": {"rank": 3}}],
    "tt_lora": {"tt_lora": {"rank": 2, "alpha": 4, "cores": 4, "init": "direct"}},
    "lora + tt_lora": [{"lora": {"rank": 2}}, {"tt_lora": {"rank": 2, "cores": 4, "init": "direct"}}],
}


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_base_takes_the_update_in_exactly(name: str) -> None:
    found = compiled(DENSE[name])
    values = trained(found)
    ready, merged = found.load_trained(values), found.merge(values)
    assert far(merged.module(X), ready.module(X)) < ROUNDING
    assert merged.adapters == ()
    assert {const.path for const in merged.graph.state} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert len(merged.graph.nodes) == len(found.source.nodes)
    for line in merged.merged:
        assert line.base == "dense"
        assert line.error < 6e-8  # one rounding to float32
    by_row = {row.path: row for row in merged.report.sites}
    assert by_row["0"].bytes == (4 * 384, 4 * 384)
    assert by_row["0"].trainable == merged.report.totals.trainable == 0


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_merged_weight_is_the_formula(scale: float) -> None:
    found = compiled({"lora": {"rank": 2, "alpha": 2 * scale}})
    values = trained(found)
    before, after = weights(found), weights(found.merge(values))
    for site in ("0", "2"):
        down, up = (values[f"{site}.lora.{part}"].double().numpy() for part in ("down", "up"))
        wanted = before[f"{site}.weight"] + scale * (down @ up).T
        np.testing.assert_array_equal(after[f"{site}.weight"], wanted.astype(np.float32))
        np.testing.assert_array_equal(after[f"{site}.bias"], before[f"{site}.bias"])


def test_merging_a_fresh_adapter_gives_the_source_back() -> None:
    found = compiled({"lora": {"rank": 2}})
    text = print_graph(found.merge().graph).replace(' storage="0.weight (changed)"', "").replace(' storage="2.weight (changed)"', "")
    assert text == print_graph(found.source)
    assert torch.equal(found.merge().module(X), network()(X))


QUANTIZED: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "loftq": ({"loftq": {**U4, "rank": 2, "alpha": 3}}, U4),
    "qlora nf4": ({"qlora": {"quantizer": "nf4", "block_size": 16, "rank": 2}}, {"quantizer": "nf4", "block_size": 16}),
    "nf2": ({"loftq": {"quantizer": "nf2", "block_size": 16, "rank": 2}}, {"quantizer": "nf2", "block_size": 16}),
    "clipped": (
        {"qlora": {"quantizer": "uniform_clipped", "bits": 8, "rank": 2}},
        {"quantizer": "uniform_clipped", "bits": 8, "block_size": 64},
    ),
    "searched": (
        {"loftq": {**U4, "zero_point": True, "scale": "search", "rank": 2}},
        {**U4, "zero_point": True, "scale": "search"},
    ),
    "quantize + lora": ([{"quantize": U4}, {"lora": {"rank": 2}}], U4),
    "loftq + lora": ([{"loftq": {**U4, "rank": 2}}, {"lora": {"rank": 2}}], U4),
}


def standing(found: mm.Compiled) -> np.ndarray:
    """W [out, in] of the first layer: its answer to the unit vectors, less that to zero."""
    graph = found.graph
    relu = next(node for node in graph.nodes if node.op == "aten.relu.default")
    probe = replace(graph, outputs=(relu.args[0],))
    (y,) = evaluate(probe, (torch.cat([torch.eye(24), torch.zeros(1, 24)]),))
    return (y[:-1] - y[-1]).T.detach().double().numpy()


def quantized(w: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """What the quantizer makes of a matrix."""
    named = {"name": settings["quantizer"], **{key: value for key, value in settings.items() if key != "quantizer"}}
    return quantize(torch.tensor(w).float(), Quantizer(**named)).dequantize().double().numpy()


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantised_base_is_quantised_anew(name: str) -> None:
    rewrite, settings = QUANTIZED[name]
    found = compiled(rewrite, path="0")
    values = trained(found)
    ready, merged = found.load_trained(values), found.merge(values)
    wanted = standing(ready)
    oracle = quantized(wanted, settings)
    got = standing(merged)
    step = np.abs(oracle - wanted).max()  # where W' lies between two codes, its own rounding may take the other one
    assert np.abs(got - oracle).max() <= 2.1 * step
    assert np.linalg.norm(got - oracle) <= 0.05 * np.linalg.norm(oracle)
    (line,) = merged.merged
    assert line.error == pytest.approx(np.linalg.norm(got - wanted) / np.linalg.norm(wanted), rel=0.01)  # float32 probes
    assert 0 < line.error < 0.7
    paths = {const.path for const in merged.graph.state}
    assert {"0.quantize.codes", "0.quantize.scales", "0.bias"} <= paths
    assert not any("lora" in path or "loftq" in path for path in paths)
    (row,) = (row for row in merged.report.sites if row.path == "0")
    assert row.bytes[1] == sum(const.nbytes for const in merged.graph.state if const.path.startswith("0.quantize"))
    assert any("largest error of a merged weight" in note for note in merged.report.notes)


@pytest.mark.parametrize(
    "name", ["cnn", "mha-cross", pytest.param("mixtral", marks=pytest.mark.full), pytest.param("gpt2", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("init", ["kaiming", pytest.param("pissa", marks=pytest.mark.full)])
def test_every_form_of_a_matmul(name: str, init: str) -> None:
    """Slices, 1x1 convolutions, expert stacks, [in, out] layouts. Tolerance: float32 through the model's norms."""
    model, inputs, shapes = ZOO[name].build()
    rule = {"match": {"op": "matmul"}, "rewrite": {"lora": {"rank": 2, "alpha": 1, "init": init}}}
    found = mm.compile(model, {"version": 1, "rules": [rule]}, inputs, shapes)
    values = trained(found)
    flat = bind(found.source, *((), inputs) if isinstance(inputs, dict) else (inputs, {}))
    with torch.no_grad():
        pairs = zip(evaluate(found.load_trained(values).graph, flat), evaluate(found.merge(values).graph, flat), strict=True)
        for adapted, merged in pairs:
            if isinstance(adapted, torch.Tensor):
                assert far(merged, adapted) < 2e-4


@pytest.mark.full
def test_an_untied_head_is_merged_apart_from_the_table() -> None:
    model, inputs, shapes = ZOO["gpt2"].build()
    rule = {"match": {"role": "head"}, "untie": True, "rewrite": {"lora": {"rank": 2}}}
    found = mm.compile(model, {"version": 1, "rules": [rule]}, inputs, shapes)
    values = trained(found)
    table = next(const for const in found.graph.state if "wte" in const.path)
    merged = found.merge(values)
    assert torch.equal(next(const for const in merged.graph.state if const.path == table.path).load(), table.load())
    flat = bind(found.source, (), inputs)
    pairs = zip(evaluate(found.load_trained(values).graph, flat), evaluate(merged.graph, flat), strict=True)
    assert all(far(new, old) < 2e-4 for old, new in pairs if isinstance(old, torch.Tensor))


def test_unmerging_gives_base_and_adapters_back() -> None:
    found = compiled(DENSE["lora"])
    values = trained(found)
    back = found.merge(values).unmerge()
    assert torch.equal(back.module(X), found.load_trained(values).module(X))
    state = {const.path: const.load() for const in back.graph.state}
    assert all(torch.equal(state[name], value) for name, value in values.items())
    with pytest.raises(InputError, match="nothing to unmerge: this model was not made by merge"):
        found.unmerge()


def test_factors_are_found_again_from_merged_weights() -> None:
    found = compiled({"lora": {"rank": 2, "alpha": 6}})
    values = trained(found)
    merged, before = weights(found.merge(values)), weights(found)
    for adapter in found.adapters:
        path = f"{adapter.site}.weight"
        factors, rest = factors_of(torch.tensor(merged[path]), torch.tensor(before[path]), adapter, 2)
        down, up = (values[adapter.consts[part]].double() for part in ("down", "up"))
        torch.testing.assert_close(factors["down"] @ factors["up"], down @ up, rtol=0, atol=1e-6)  # W' is rounded to float32
        assert rest < 1e-6
    _, rest = factors_of(torch.tensor(merged["0.weight"]), torch.tensor(before["0.weight"]), found.adapters[0], 1)
    assert rest > 0.1


def test_values_come_from_mappings_files_and_folders(tmp_path: Path) -> None:
    found = compiled({"lora": {"rank": 2}})
    values = trained(found)
    save_file(values, tmp_path / "trainable.safetensors")
    wanted = found.load_trained(values).module(X)
    arrays = {name: value.numpy() for name, value in values.items()}
    for source in (arrays, tmp_path, tmp_path / "trainable.safetensors", str(tmp_path)):
        assert torch.equal(found.load_trained(source).module(X), wanted)
    head = {"2.bias": torch.ones(8)}
    torch.testing.assert_close(found.load_trained(head).module(X), network()(X) - network()[2].bias + 1)
    assert torch.equal(found.module(X), network()(X))  # what was compiled stays


def test_a_merged_model_is_saved_and_runs(tmp_path: Path) -> None:
    found = compiled({"loftq": {**U4, "rank": 2}})
    merged = found.merge(trained(found))
    session = Session(merged.save(tmp_path / "out"), ["cpu"])
    answer = session.run({"input": X.numpy()})["output"]
    assert far(torch.tensor(answer), merged.module(X)) < 1e-5  # the export's own tolerance
    assert merged.report.parity is not None


@pytest.mark.parametrize(("values", "message"), [
    ({"0.lora.dwn": torch.zeros(24, 2)}, r"the values: the model has no parameter 0.lora.dwn; did you mean 0.lora.down\?"),
    ({"0.lora.down": torch.zeros(24, 3)}, r"0.lora.down is \[24, 3\] there and \[24, 2\] in this model: an adapter of another rank"),
    ({"0.weight": torch.zeros(16, 25)}, r"0.weight is \[16, 25\] there and \[16, 24\] in this model: an adapter of another base"),
    ({"0.lora.down": torch.full((24, 2), torch.nan)}, "0.lora.down has NaN or infinity"),
    ({}, "there are no values to load"),
    ("nowhere.safetensors", "nowhere.safetensors: no such file"),
])  # fmt: skip
def test_values_that_do_not_fit(values: Any, message: str) -> None:
    found = compiled({"lora": {"rank": 2}})
    for call in (found.load_trained, found.merge):
        with pytest.raises(InputError, match=message):
            call(values)


def test_files_that_hold_no_values(tmp_path: Path) -> None:
    found = compiled({"lora": {"rank": 2}})
    with pytest.raises(InputError, match="no trained values in this folder"):
        found.merge(tmp_path)
    (tmp_path / "trainable.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        found.merge(tmp_path)


def test_what_cannot_be_merged() -> None:
    with pytest.raises(InputError, match="nothing to merge: the model has no adapters"):
        compiled({"low_rank": {"rank": 2}}).merge()
    found = compiled({"lora": {"rank": 2}})
    with pytest.raises(InputError, match="nothing to merge"):
        found.merge().merge()
    with pytest.raises(InputError, match="0: its base is low_rank, which keeps its form only as it is"):
        compiled([{"low_rank": {"rank": 2}}, {"lora": {"rank": 2}}]).merge()
    with pytest.raises(InputError, match=r"the graph has no weight 0\.lora\.down: its adapters were merged already"):
        merge(found.merge().graph, found.adapters, {})
    with pytest.raises(VerifyError, match="are not added to a matmul"):
        joins(found.source, [const for const in found.source.state if const.path == "0.bias"])


def test_the_table_survives_a_file() -> None:
    import json

    found = compiled([{"loftq": {**U4, "rank": 2}}, {"lora": {"rank": 3, "alpha": 6}}])
    table = json.loads(json.dumps(as_data(found.adapters)))
    assert [(entry["site"], entry["method"], entry["base"], entry["scale"]) for entry in table[:2]] == [
        ("0", "loftq", "loftq", 1.0),
        ("0", "lora", "loftq", 2.0),
    ]
    methods = {name: method() for name, method in method_table().items()}
    values = trained(found)
    again, _ = merge(found.graph, read_adapters(table, "train.json"), methods, values)
    assert print_graph(again) == print_graph(found.merge(values).graph)
    with pytest.raises(InputError, match=r"train\.json: its table of adapters cannot be read"):
        read_adapters([{"site": "0"}], "train.json")


MUTANTS = {
    "scale forgotten": Mutant("_Factors.product", "torch.tensor(adapter.scale, dtype=torch.float64)", "torch.tensor(1.0)"),
    "only the last of two updates": Mutant("merging._update", "total + one.product()", "one.product()"),
    "offset of the whole matrix forgotten": Mutant(
        "_put_codes", "_dequantised(nodes[0]) + _shift(graph, nodes[0])", "_dequantised(nodes[0])"
    ),
    "offset added twice": Mutant("_made_dense", "end[0].output if end else node.output", "node.output"),
    "bias lost": Mutant("_made_dense", "(node.args[0], const, bias)", "(node.args[0], const, None)"),
    "update forgotten": Mutant("_put_codes", "wanted = base + update", "wanted = base"),
    "values not put in": Mutant("merging.merge", "with_values(graph, values or {})", "graph"),
    "adapter stays": Mutant("without", "node not in dropped and tainted.isdisjoint(node.outputs)", "True"),
}


def holds(m: Any) -> bool:
    """Two dense updates, and an offset for the whole matrix with a bias: outputs as of the formula, nothing of the adapters left."""
    methods = {name: method() for name, method in method_table().items()}
    for rewrite, settings in ((DENSE["two"], None), QUANTIZED["clipped"], QUANTIZED["loftq + lora"]):
        found = compiled(rewrite, path="0")
        values = trained(found)
        graph, _ = m["merging.merge"](found.graph, found.adapters, methods, values)
        w = standing(found.load_trained(values))
        wanted = w if settings is None else quantized(w, settings)
        net = network()
        y = torch.relu(X @ torch.tensor(wanted).float().T + net[0].bias) @ net[2].weight.T + net[2].bias
        if any("lora" in const.path or "loftq" in const.path for const in graph.state) or far(evaluate(graph, (X,))[0], y) > 1e-4:
            return False
    return True


def test_the_checks_pass_on_the_real_code() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert holds(m)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str) -> None:
    with mutated(MUTANTS[name]) as m:
        try:
            noticed = not holds(m)
        except Exception:
            noticed = True
        assert noticed, name


@pytest.mark.parametrize(("size", "said"), [(0.05, True), (1.0, False)])
def test_an_update_that_codes_round_away_is_warned_of(size: float, said: bool) -> None:
    """Oracle: the outputs of the first layer with codes alone, with the update beside them, and with it merged."""
    found = compiled({"qlora": {**U4, "rank": 2}}, "0")
    values = {name: size * value for name, value in trained(found).items()}
    merged = found.merge(values)
    (line,) = merged.merged
    eye = torch.eye(24)

    def first(model: mm.Compiled) -> torch.Tensor:
        """The matrix of the first layer, by what it makes of unit vectors before the ReLU cuts it: both signs of them."""
        graph, node = model.graph, next(n for n in model.graph.nodes if n.op == "aten.relu.default")
        seen: list[torch.Tensor] = []
        evaluate(graph, [torch.cat([eye, 0 * eye[:1]])], {node.args[0]: seen.append})
        return (seen[0][:-1] - seen[0][-1]).double().detach()

    base, wanted, stored = (
        first(found.load_trained({n: 0 * v for n, v in values.items()})),
        first(found.load_trained(values)),
        first(merged),
    )
    expected = float((stored - wanted).norm() / (wanted - base).norm())
    assert line.lost == pytest.approx(expected, rel=1e-3)  # outputs in float32
    assert (expected > 0.5) == said
    notes = [note for note in merged.report.notes if note.startswith("merging into codes lost most of what was learned at 1 of 1 sites")]
    assert bool(notes) == said
    assert not said or (
        f"rounding changes the weight by {line.lost:.2f} x what training did; keep the factors beside the codes" in notes[0]
    )
