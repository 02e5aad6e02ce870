"""The benchmark scripts run: toy sizes, JSON out, a plain word where data is missing. Their figures are not judged here."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.no_cover
"""What runs here is covered by the tests of its parts; the tracer of the coverage would take two fifths of the time."""

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = (
    "sts",
    "prune",
    "low_rank",
    "loftq",
    "quantized",
    "resident",
    "cache_memory",
    "compile_time",
    "plan_7b",
    "scale",
    "train_memory",
    "train_step",
    "sparse_grad",
    "tensor_train",
    "tensor_train_plans",
    "product_rates",
    "run",
    "ort_quantizers",
    "perplexity",
    "gallery",
    "allocate_time",
    "artefact_hashes",
    "decode",
)
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """A script as a module, with `_common` beside it importable as when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))  # plan_7b measures a process of its own
    threads = torch.get_num_threads()

    def module(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made

    yield module
    torch.set_num_threads(threads)


def tiny(module: ModuleType, capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, Any]]:
    module.main(["--tiny", "--json", "--threads", "1", *more])
    result = json.loads(capsys.readouterr().out)
    assert {"environment", "rows", "notes"} <= set(result)
    assert result["environment"]["threads"] == 1
    rows: list[dict[str, Any]] = result["rows"]
    return rows


def test_every_script_is_listed_and_explained(load: Load) -> None:
    assert sorted(path.stem for path in BENCHMARKS.glob("[a-z]*.py")) == sorted(SCRIPTS)
    readme = (BENCHMARKS / "README.md").read_text()
    for name in SCRIPTS:
        assert f"`{name}.py`" in readme
        assert f"python benchmarks/{name}.py" in (load(name).__doc__ or "")


def test_loftq_runs_with_and_without_peft(load: Load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.utils.loftq_utils", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = tiny(load("loftq"), capsys)
    assert [(row["matrices"], row["iterations"], row["peft_s"]) for row in rows] == [("2", 1, None), ("2", 5, None), ("344x128", 5, None)]
    assert rows[1]["residual"] < rows[0]["residual"] < 0.1
    assert rows[2]["memory_x"] >= 0


def test_quantized_prints_ratios(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny(load("quantized"), capsys, "--kernels", "u4-int8", "nf4")
    assert [(row["tokens"], row["kernel"]) for row in rows] == [(1, "u4-int8"), (1, "nf4"), (2, "u4-int8"), (2, "nf4")]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["quantized_ms"] / row["dense_ms"])


@pytest.mark.full
def test_decode_prints_ratios_beside_torch(load: Load, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the model is one of transformers")
    rows = tiny(load("decode"), capsys, "--only", "dense", "adapter-r8", "--keep", str(tmp_path))
    assert [(row["past"], row["model"]) for row in rows] == [(4, "torch eager"), (4, "dense"), (4, "adapter-r8")]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["cpu_ms"])
        assert row["over_torch"] == pytest.approx(rows[0]["cpu_ms"] / row["cpu_ms"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-r8", "dense"]


def test_low_rank_prints_time_beside_flops(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny(load("low_rank"), capsys)
    assert [(row["size"], row["rank"], row["tokens"]) for row in rows] == [(32, 4, 1), (32, 4, 2)]
    for row in rows:
        assert row["flop_ratio"] == 0.25, "4 * (32 + 32) / (32 * 32)"
        assert row["dense_ms"] > 0
        assert row["over"] == pytest.approx(row["low_rank_ms"] / row["dense_ms"] / 0.25, rel=1e-12)  # float64 rounding


@pytest.mark.full
def test_compile_time_prints_ratios_of_what_it_timed(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = tiny(load("compile_time"), capsys)
    assert row["ratio"] == pytest.approx(row["ours_s"] / (row["export_s"] + row["svd_s"]), rel=1e-12)  # float64 rounding
    assert row["ratio_solver"] == pytest.approx(row["ours_s"] / (row["export_s"] + row["solver_s"]), rel=1e-12)


@pytest.mark.full
def test_plan_7b_plans_the_configurations_widths(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = tiny(load("plan_7b"), capsys)
    assert row["sites"] == 14
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert row["parameters"] == 2 * layer + 2 * 32000 * 4096 + 4096, "two layers, table, head and the last norm"
    assert 0 < row["peak_gib"] < 4, "two layers of real weights alone would take 2.5 GiB in float32"


@pytest.mark.full
def test_scale_measures_a_compile_of_a_folder_that_it_makes(load: Load, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    [row] = tiny(load("scale"), capsys, "--place", str(tmp_path))
    table, layer = 128 * 64, 2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert row["parameters"] == 2 * table + 2 * layer + 64
    assert row["model_gib"] == pytest.approx(2 * row["parameters"] / 2**30, rel=1e-12)  # float64 rounding
    assert 0 < row["peak_gib"] <= row["limit_gib"]
    assert list(tmp_path.iterdir()) == []


def test_tensor_train_plans_prints_the_worst_of_its_rows(
    load: Load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tltorch", None)
    monkeypatch.setitem(sys.modules, "tltorch.factorized_layers", None)
    script = load("tensor_train_plans")
    script.main(["--tiny", "--json", "--threads", "1", "--plans"])
    result = json.loads(capsys.readouterr().out)
    main = [row for row in result["rows"] if row["best"]]
    assert [(row["size"], row["rank"], row["tokens"]) for row in main] == [(12, 2, 1), (12, 2, 2)]
    assert len(result["rows"]) == 2 * (1 + 13), "13 plans of three cores, each at two token counts"
    assert all(row["tltorch"] is None for row in main)
    assert result["notes"][1] == "tensorly-torch is not installed: no tltorch column"
    for name in ("over_best", "over_dense"):
        assert result["worst"][name] == max(row[name] for row in main)
    assert all(row["over_best"] == pytest.approx(row["over_dense"] / row["best_over_dense"], rel=1e-12) for row in main)  # float64 rounding


def test_product_rates_fits_every_constant(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny(load("product_rates"), capsys)
    assert [row["constant"] for row in rows][:3] == ["node", "call", "work"]
    assert all(row["seconds"] > 0 for row in rows)


def test_product_rates_finds_the_constants_that_times_were_made_with(load: Load) -> None:
    script = load("product_rates")
    base = script.CPU_RATES
    items = script.nodes([4, 16], [1, 16, 256], script.MODES, 1e9)
    names, table = script.features(items, base)
    truth = script.constants_of(base)
    assert len(names) == len(truth)
    times = table @ truth
    assert times == pytest.approx([base.product(item) for item in items], rel=1e-12)  # float64 sums of 11
    found, errors = script.fit(table, times, 2 * truth)
    assert abs(errors).max() < 1e-3  # an exact fit exists; the search stops near it
    assert found[:3] == pytest.approx(truth[:3], rel=0.01)  # likewise


def test_resident_prints_growth_over_the_file(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = tiny(load("resident"), capsys, "--specs", "toy")
    assert row["spec"] == "toy"
    assert row["file_mb"] > 0
    assert row["growth_over_file"] == pytest.approx(row["growth_mb"] / row["file_mb"], rel=1e-9)  # the same two numbers, divided


@pytest.mark.full
def test_cache_memory_prints_what_the_manifest_foresees(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    dense, half = tiny(load("cache_memory"), capsys)
    assert dense["held MB"] == dense["foreseen MB"] == 256 * 2 * 2 * 2 * 8 * 4 / 1e6  # tokens, layers, keys and values, heads, size, bytes
    assert half["held MB"] == half["foreseen MB"] == dense["held MB"] / 2
    assert half["held x"] == 0.5


def test_train_memory_counts_over_dense_weights(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny(load("train_memory"), capsys, "--forms", "u4", "nf2")
    assert [row["form"] for row in rows] == ["fp32", "u4", "nf2"]
    for row in rows:
        assert row["parameters_m"] == 2 * 128 * 128 / 1e6
        assert row["run_over_fp32"] == pytest.approx(row["run_mb"] / row["parameters_m"] / 4, rel=1e-9)  # the same numbers, divided
    assert rows[0]["file_mb"] > 6 * rows[1]["file_mb"] > rows[2]["file_mb"], "4 bits and 2 bits of 32, with scales"


def test_tensor_train_compares_errors_on_the_same_tensor(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny(load("tensor_train"), capsys)
    assert [(row["tensor"], row["peer"]) for row in rows] == [
        (name, peer) for name in ("train", "matrix") for peer in ("truncated_svd", "randomized_svd")
    ]
    for row in rows:
        assert row["error_ratio"] < 1.001, "the full SVD of each unfolding is the same algorithm, the randomised one is no better"
        assert row["speed_up"] == pytest.approx(row["peer_s"] / row["ours_s"], rel=1e-12)  # float64 rounding


def test_tensor_train_runs_without_tensorly(load: Load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorly", None)
    rows = tiny(load("tensor_train"), capsys)
    assert [(row["peer"], row["peer_s"], row["error_ratio"]) for row in rows] == [("none", None, None)] * 2
    assert all(0 < row["ours_error"] < 1 for row in rows)


@pytest.mark.full  # three processes that import torch and transformers
def test_train_step_runs_beside_torch(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    rows = tiny(load("train_step"), capsys, "--peers", "--methods", "lora", "loftq", "--heads", "first")
    assert [(row["method"], row["peer"]) for row in rows] == [("lora", "peft"), ("loftq", "module")]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ort_ms"] / row["eager_ms"], rel=1e-12)  # float64 rounding
        assert row["ort_peak_mb"] > row["ort_growth_mb"] > 0


@pytest.mark.full  # four processes that import the runtime
def test_sparse_grad_prints_both_ratios(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny(load("sparse_grad"), capsys)
    assert [row["method"] for row in rows] == ["full", "sparse_grad", "fixed", "none"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["step_ms"] / rows[0]["step_ms"], rel=1e-12)  # float64 rounding
        assert row["over"] == pytest.approx(row["ratio"] / row["predicted"], rel=1e-12)
        assert row["peak_mb"] > row["growth_mb"] > 0
    # Of 16 tokens: 3 products of tokens with each MLP weight, all others of the step, and the rotations
    assert rows[3]["predicted"] == 1 < rows[1]["predicted"] == rows[2]["predicted"]
    assert [row["numbers"] for row in rows] == [4096, 4096, 40, 4096]
    assert rows[2]["state_mb"] == pytest.approx(3 * 4 * 40 / 1e6)


@pytest.mark.full
def test_gallery_measures_one_spec(load: Load, toy_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [fits, other] = tiny(load("gallery"), capsys, "--data", str(toy_data), "--specs", "quantize-u4", "tt-lora-roberta")
    assert fits["reason"] is None
    assert 0 < fits["bytes"] < 20e6
    assert fits["time_over_dense"] > 0
    assert other["bytes"] is None
    assert other["reason"].startswith("shape [12, 8, 8, 2, 2, 2, 8, 12] multiplies to 589824")


@pytest.mark.full
def test_ort_quantizers_quantise_the_same_matmuls(load: Load, toy_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny(load("ort_quantizers"), capsys, "--data", str(toy_data), "--models", "ORT u4 rtn", "matmorph u4")
    assert [(row["model"], row["quantised_nodes"]) for row in rows] == [("dense", 0), ("ORT u4 rtn", 36), ("matmorph u4", 36)]
    assert rows[2]["mb"] == pytest.approx(rows[1]["mb"], rel=0.02)  # the same codes, scales and zero points; names and layouts differ


@pytest.mark.full
def test_perplexity_puts_peers_beside_ours(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("perplexity")
    (tmp_path / "wikitext2").mkdir()
    rng = np.random.default_rng(0)
    lines = [" ".join(f"word{k}" for k in rng.integers(0, 50, 12)) for _ in range(200)]
    (tmp_path / "wikitext2" / "valid.txt").write_text("\n".join(lines) + "\n")
    rows = tiny(script, capsys, "--data", str(tmp_path), "--specs", "u4-32", "no-such-spec", "--peers", *script.PEERS, *script.RECIPES)
    assert [row["model"] for row in rows] == ["dense", "u4-32", "no-such-spec", *script.PEERS, *script.RECIPES]
    assert rows[2]["fault"].startswith("SpecError")
    made = [row for row in rows if not row["fault"]]
    absent = [row for row in rows if row["fault"].startswith("ImportError: PEFT is not compared with")]
    assert len(made) + len(absent) == len(rows) - 1
    assert all(row["mb"] < (0.95 if row["model"].startswith("SVD-LLM") else 0.75) * rows[0]["mb"] for row in made[1:])
    assert all(0.9 < row["over_dense"] < 1.1 for row in made)  # of a model that knows nothing, whatever its weights


@pytest.mark.full
def test_perplexity_heals_what_distils(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wikitext2").mkdir()
    rng = np.random.default_rng(0)
    lines = [" ".join(f"word{k}" for k in rng.integers(0, 50, 12)) for _ in range(200)]
    (tmp_path / "wikitext2" / "valid.txt").write_text("\n".join(lines) + "\n")
    spec = tmp_path / "cut.yaml"
    rule = "{match: {role: 'mlp.*'}, rewrite: {low_rank: {rank: 4}}, force: true}"
    spec.write_text(f"version: 1\nrules: [{rule}]\ntrain: {{loss: distill, trainable: [factors]}}\n")
    healing = ["--heal", "200", "--heal-window", "20"]
    rows = tiny(load("perplexity"), capsys, "--data", str(tmp_path), "--specs", str(spec), "--peers", *healing)
    assert [row["model"] for row in rows] == ["dense", str(spec), f"{spec}, healed"]
    assert not any(row["fault"] for row in rows)
    assert rows[2]["make_min"] > rows[1]["make_min"]
    assert [row["healed"] > 0 for row in rows] == [False, False, True]


def test_perplexity_joins_words_and_spreads_windows(load: Load) -> None:
    script = load("perplexity")
    split = 'the " Ben @-@ Hur " ( 1 @,@ 959 ) , it \'s 2 @.@ 5 .'
    assert script.joined(split) == 'the "Ben-Hur" (1,959), it\'s 2.5.'
    assert script.spread_windows(np.arange(100), 10, 3).tolist() == [*range(10), *range(45, 55), *range(90, 100)]
    assert script.spread_windows(np.arange(15), 10, 3).tolist() == list(range(10))


def test_run_keeps_what_scripts_print_and_writes_the_page(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load("run")
    assert set(run.scripts()) == set(SCRIPTS) - set(run.NOT_RUN)
    page, out = tmp_path / "page.md", tmp_path / "results"
    words = ["--tiny", "--threads", "1", "--out", str(out), "--page", str(page), "--date", "2000-01-01", "--only", "low_rank"]
    run.main(words)
    capsys.readouterr()
    kept = json.loads((out / "2000-01-01.json").read_text())
    [row] = [row for row in kept["results"]["low_rank"]["rows"] if row["tokens"] == 1]
    text = page.read_text()
    assert f"| {row['size']} | {row['rank']} | 1 | {row['dense_ms']:.4g} |" in text
    assert "## low_rank" in text
    assert set(kept["peers"]) == set(run.PEERS)


def test_run_says_what_failed(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = load("run")
    monkeypatch.setattr(run, "run_one", lambda name, options: {"error": f"{name} stopped", "seconds": 1.0})
    words = ["--tiny", "--out", str(tmp_path), "--page", str(tmp_path / "page.md"), "--date", "2000-01-01", "--only", "low_rank", "plan_7b"]
    with pytest.raises(SystemExit) as caught:
        run.main(words)
    assert caught.value.code == 1
    assert capsys.readouterr().out.splitlines() == ["low_rank: low_rank stopped (1.0 s)", "plan_7b: plan_7b stopped (1.0 s)"]
    assert "did not come to an end" in (tmp_path / "page.md").read_text()
    assert run.table([{"a": 1.23456, "b": "x|y"}, {"a": None}]) == ["| a | b |", "| ---: | --- |", "| 1.235 | x\\|y |", "|  |  |"]


def test_table_is_printed_without_json(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    load("low_rank").main(["--tiny", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["size", "rank", "tokens", "dense_ms", "low_rank_ms", "time_ratio", "flop_ratio", "over"]
    assert "threads 1" in lines[-1]


# ---- sts.py


@pytest.fixture
def toy_data(tmp_path: Path) -> Path:
    """Two files of the benchmark's format; a higher score for pairs that share more words."""
    pairs = [("A cat sleeps.", f"A cat sleeps {'very ' * (number % 5)}deep.", 5 - number % 5) for number in range(20)]
    lines = [f"main\tx\t2012\t{number}\t{score}\t{left}\t{right}" for number, (left, right, score) in enumerate(pairs)]
    (tmp_path / "stsb").mkdir()
    for name in ("sts-dev.csv", "sts-train.csv"):
        (tmp_path / "stsb" / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def test_sts_reads_pairs_and_spreads_its_samples(load: Load, toy_data: Path) -> None:
    sts = load("sts")
    scores, left, right = sts.read(toy_data / "stsb" / "sts-dev.csv")
    assert (scores[3], left[3], right[3]) == (2.0, "A cat sleeps.", "A cat sleeps very very very deep.")
    assert len(scores) == 20
    assert sts.spread([str(number) for number in range(10)], 5) == ["0", "2", "4", "6", "8"]
    assert sts.spread(["a", "b"], 5) == ["a", "b"]


@pytest.mark.full
def test_sts_runs_on_toy_data(load: Load, toy_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny(load("sts"), capsys, "--data", str(toy_data), "--methods", "plain", "--forms", "loftq")
    assert [row["model"] for row in rows] == ["dense", "plain-80", "nf4 loftq", "mlp low_rank", "budget-60", "quantize-u4"]
    assert rows[5]["mb"] < rows[2]["mb"] < rows[3]["mb"] < rows[1]["mb"] < rows[0]["mb"]
    assert all(-100 <= row["spearman"] <= 100 for row in rows)
    assert rows[1]["parameters"] < rows[0]["parameters"]


@pytest.mark.full
def test_prune_prints_quality_beside_time(load: Load, toy_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, plain, fitted = tiny(load("prune"), capsys, "--data", str(toy_data), "--forms", "plain", "compensated")
    assert [row["model"] for row in (dense, plain, fitted)] == ["dense", "plain", "compensated"]
    assert dense["output_error"] == 0
    assert (dense["time_ratio"], dense["mac_ratio"]) == (1, 1)
    assert plain["parameters"] == fitted["parameters"] == dense["parameters"] - 6 * (2 * 384 * 768 + 768)
    per_layer = 12 * 384**2 + 2 * 8 * 384  # MACs per token of all matmuls, and of the attention over 8 keys
    assert plain["mac_ratio"] == pytest.approx(1 - 6 * 2 * 384 * 768 / (6 * per_layer), rel=0.02), "the pooler is left out here"
    assert 0 < fitted["output_error"] < plain["output_error"]


def test_missing_data_is_said_plainly(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sts = load("sts")
    with pytest.raises(SystemExit) as caught:
        sts.main(["--data", str(tmp_path)])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"no data: {tmp_path / 'stsb'} is not there; name its parent with --data or MATMORPH_DATA\n"
    monkeypatch.setenv("MATMORPH_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(SystemExit):
        sts.main([])
    assert str(tmp_path / "elsewhere" / "stsb") in capsys.readouterr().err


@pytest.mark.data
def test_dense_quality_is_the_published_one(load: Load) -> None:
    sts = load("sts")
    folder = Path(os.environ.get("MATMORPH_DATA", BENCHMARKS.parent.parent / "shared" / "data")) / "stsb"
    if not folder.is_dir():
        pytest.skip(f"no data: {folder} is not there (MATMORPH_DATA names its parent)")
    human, left, right = sts.read(folder / "sts-dev.csv")
    assert len(human) == 1500
    data = (human[::10], left[::10], right[::10])
    spearman = sts.score(sts.torch_encoder(sts.minilm().module), data)
    assert spearman == pytest.approx(86.7, abs=3.0)  # all 1500 pairs give 86.7; a tenth of them has a standard error near 1


def test_artefact_hashes_see_arrays_and_data_and_not_what_is_installed(load: Load, tmp_path: Path) -> None:
    script = load("artefact_hashes")
    for name, array in (("a", [1.0, 2.0]), ("b", [1.0, 2.0]), ("c", [1.0, -2.0])):
        np.savez(tmp_path / f"{name}.npz", x=np.array(array))
    assert script.file_hash(tmp_path / "a.npz") == script.file_hash(tmp_path / "b.npz") != script.file_hash(tmp_path / "c.npz")
    for name, data in (("a", {"rank": 3, "versions": {"torch": "1"}}), ("b", {"rank": 3, "versions": {}}), ("c", {"rank": 4})):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    assert script.file_hash(tmp_path / "a.json") == script.file_hash(tmp_path / "b.json") != script.file_hash(tmp_path / "c.json")


def test_artefact_hashes_say_what_differs(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("artefact_hashes")
    before = {"half/mlp/model.onnx": "1", "half/mlp/check.npz": "2", "tt/cnn/refused": "SpecError: no"}
    after = {"half/mlp/model.onnx": "3", "half/mlp/new.bin": "2", "tt/cnn/refused": "SpecError: never"}
    for name, data in (("before", before), ("after", after)):
        (tmp_path / name).write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="0"):
        script.main(["--compare", str(tmp_path / "before"), str(tmp_path / "before")])
    assert capsys.readouterr().out == "3 files are identical\n"
    with pytest.raises(SystemExit, match="1"):
        script.main(["--compare", str(tmp_path / "before"), str(tmp_path / "after")])
    assert capsys.readouterr().out.splitlines() == [
        "missing: half/mlp/check.npz",
        "different: half/mlp/model.onnx",
        "extra: half/mlp/new.bin",
        "different: tt/cnn/refused (SpecError: no / SpecError: never)",
    ]
    with pytest.raises(SystemExit, match="no such name"):
        script.main(["--out", str(tmp_path / "out"), "--only", "nothing/*"])
