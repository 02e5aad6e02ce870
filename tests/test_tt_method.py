"""tt as a method: modes, ranks, checks, costs, cores, plans, padding, ONNX Runtime. Oracle: numpy in float64, from the formula."""

from __future__ import annotations

from dataclasses import replace
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import answers, difference, feeds, session
from handmade import gather
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rewriting import LINEAR, graph_of, only_site, rewritten, rule_of, run, weights_of
from trains import METHODS, cores_of, matrix, ranks, tt
from zoo import ZOO

import matmorph as mm
from matmorph.errors import RewriteError, SpecError
from matmorph.ir.site import Choice, Site
from matmorph.passes.linalg.tensor_train import tt_parameters
from matmorph.passes.methods.train_settings import ModesSpec
from matmorph.passes.methods.tt_base import chosen_ranks

METHOD = METHODS["tt"]
TEXT = LINEAR.replace("12", "24").replace("10", "18")
SITE = only_site(graph_of(TEXT))  # [18, 24]
W = weights_of(TEXT)["fc.weight"].double().numpy()
DOUBLE = TEXT.replace("float32", "float64")
BATCHED = DOUBLE.replace("range batch 1..", "range batch 1..\nrange seq 1..").replace("float64[batch, ", "float64[batch, seq, ")
STATIC = DOUBLE.replace("[batch, ", "[7, ").replace("range batch 1..\n", "")
PLANS = ("auto", "contract", "rebuild")


def outcome_of(use: Any, text: str = TEXT, **more: Any) -> Any:
    _, (outcome,) = rewritten(graph_of(text), rule_of(use, **{"force": True, **more}), methods=METHODS)
    return outcome


def only(use: Any, site: Site = SITE) -> Choice:
    (choice,) = METHOD.choices(site, use.spec)
    return choice


# ranks and modes


def test_ranks_that_shapes_decide() -> None:
    modes = (9, 16, 3)  # TT-SVD's own limits are [9, 3]
    assert chosen_ranks(ranks(2), modes, 432).ranks == (2, 2)
    assert chosen_ranks(ranks(2), modes, 432).clamped is None
    assert chosen_ranks(ranks([9, 3]), modes, 432) == Choice(9, ranks=(9, 3))
    clamped = chosen_ranks(ranks(5), modes, 432)
    assert (clamped.rank, clamped.ranks, clamped.clamped) == (5, (5, 3), "rank 5 is above what the modes allow: clamped to [5, 3]")
    assert chosen_ranks(ranks([2, 4]), modes, 432).clamped == "rank [2, 4] is above what the modes allow: clamped to [2, 3]"
    assert chosen_ranks(ranks({"energy": 0.9}), modes, 432) == Choice(9, at_most=True, ranks=(9, 3))
    assert chosen_ranks(ranks({"error": 0.1, "max": 4}), modes, 432) == Choice(4, at_most=True, ranks=(4, 3))


@given(ratio=st.floats(0.05, 1.0), modes=st.lists(st.integers(2, 30), min_size=2, max_size=5), step=st.sampled_from([1, 4]))
def test_ratio_is_the_largest_rank_that_keeps_the_promise(ratio: float, modes: list[int], step: int) -> None:
    elements = prod(modes)
    choice = chosen_ranks(ranks({"ratio": ratio, "multiple_of": step}), modes, elements)
    if choice.rank > step:
        assert tt_parameters(modes, choice.ranks) <= ratio * elements
        assert choice.rank % step == 0 or choice.ranks == chosen_ranks(ranks(10**6), modes, elements).ranks
    if choice.ranks != chosen_ranks(ranks(10**6), modes, elements).ranks:
        assert tt_parameters(modes, choice.rank + step) > ratio * elements or step > 1
    assert choice.clamped is None


def test_automatic_modes_and_those_by_hand() -> None:
    assert only(tt()).notes[0] == "modes out 3 x 3 x 2, in 3 x 2 x 4; ranks [3, 3]"
    assert only(tt(cores=2)).notes[0] == "modes out 6 x 3, in 4 x 6; ranks [3]"
    by_hand = only(tt([2, 4], modes=([2, 3, 3], [2, 3, 4])))
    assert by_hand.notes[0] == "modes out 2 x 3 x 3, in 2 x 3 x 4; ranks [2, 4]"
    assert METHOD.cost(SITE, tt([2, 4], modes=([2, 3, 3], [2, 3, 4])).spec, by_hand).parameters == 4 * 2 + 2 * 9 * 4 + 4 * 12


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_error_and_energy_keep_their_promise(share: float) -> None:
    for rank in ({"error": share}, {"energy": 1 - share**2}):
        outcome = outcome_of(tt(rank))
        assert outcome.weight_error <= share * (1 + 1e-5)  # float32 cores
        plain = outcome.parts[0].choice.ranks
        wide = outcome_of(tt({**rank, "multiple_of": 3, "min": 2})).parts[0].choice.ranks
        limits = only(tt({"energy": 1.0})).ranks
        assert all(one >= max(other, 2) and (one % 3 == 0 or one == limit) for one, other, limit in zip(wide, plain, limits, strict=True))


# checks and costs


@pytest.mark.parametrize(
    ("site", "use", "reason"),
    [
        (replace(SITE, blocked="its rows overlap"), tt(), "its rows overlap"),
        (replace(SITE, batch=3), tt(), "tt takes one matrix, this is a stack of 3 experts"),
        (replace(SITE, form="embedding", applications=()), tt(), "tt serves matmuls, this is an embedding table"),
        (replace(SITE, gathers=(gather(),)), tt(), "tt serves only the matmul: use untie: true"),
        (
            replace(SITE, out_features=4099),
            tt(),
            "out_features = 4099 has no 3 balanced factors; the nearest sizes that have: 4096 (16 x 16 x 16) and 4100 (41 x 10 x 10); "
            "padding: pad takes the larger ones",
        ),
        (SITE, tt([2], modes=([3, 6], [5, 5])), "in modes [5, 5] multiply to 25, not to in_features = 24; [6, 4] would fit"),
    ],
)
def test_rejects(site: Site, use: Any, reason: str) -> None:
    found = METHOD.check(site, use.spec)
    assert found is not None
    assert reason in found.reason


def test_break_even_is_exact() -> None:
    """[18, 24] as 3 x 3, 6 x 8: rank 9 would take 9 * 9 + 9 * 48 = 513 numbers, 432 are dense; rank 7 takes 399."""
    modes = {"modes": ([3, 6], [3, 8])}
    for rank, kept in ((7, True), (8, False)):
        outcome = outcome_of(tt(rank, **modes), force=False)
        assert (outcome.reject is None) == kept
    assert outcome.reject.reason == "does not pay: 1,824 bytes, the dense weight has 1,728 (force: true rewrites it all the same)"
    cost = METHOD.cost(SITE, tt(7, **modes).spec, only(tt(7, **modes)))
    assert (cost.parameters, cost.bytes, [tokens for tokens, _ in cost.times]) == (399, 1596, [1, 16, 256])


def test_macs_are_those_of_the_plan_that_runs() -> None:
    """x [24] as 6 x 4 against cores [1, 3, 6, 2], [2, 6, 4, 1]: from the left 6*6 * 4 + 3 * 8 * 6; dense where it is rebuilt."""
    use = tt(2, modes=([3, 6], [6, 4]))
    found = {plan: METHOD.cost(SITE, replace(use.spec, plan=plan), only(use)).macs for plan in ("contract", "rebuild")}
    assert found == {"contract": 6 * 6 * 4 + 3 * 8 * 6, "rebuild": 18 * 24}


# what comes out


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("text", "sizes"), [(DOUBLE, (7,)), (BATCHED, (3, 5)), (STATIC, (7,))])
@pytest.mark.parametrize("how", [{"cores": 2}, {}, {"cores": 4}, {"modes": ([2, 3, 3], [2, 3, 4])}])
def test_contraction_is_reconstruction_is_merged(plan: str, text: str, sizes: tuple[int, ...], how: dict[str, Any]) -> None:
    result, (outcome,) = rewritten(graph_of(text), rule_of(tt(5, plan=plan, **how), force=True), methods=METHODS)
    whole = matrix(cores_of(outcome.consts))
    x = torch.randn(*sizes, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = np.maximum(x.numpy() @ whole.T + weights_of(text)["fc.bias"].double().numpy(), 0)
    np.testing.assert_allclose(run(result, x)[0].numpy(), expected, rtol=0, atol=1e-12)  # float64, sums of 24 of size 10
    merged, bias = METHOD.merge({const.path.rpartition(".")[2]: const.load() for const in outcome.consts})
    np.testing.assert_allclose(merged.numpy(), whole, rtol=0, atol=1e-12)
    assert bias is None
    left = np.linalg.norm(weights_of(text)["fc.weight"].double().numpy() - whole) / np.linalg.norm(W)
    assert outcome.weight_error == pytest.approx(left, rel=1e-9)
    assert outcome.bound.name == "eckart_young_unfolding"
    edges = len(outcome.consts) - 1
    assert outcome.bound.value <= outcome.weight_error <= sqrt(edges) * outcome.bound.value * 1.02  # the solver's guard is 1 %
    assert [const.path for const in result.state][:2] == ["fc.tt.core_0", "fc.tt.core_1"]
    assert all(const.trainable for const in outcome.consts)


def test_full_ranks_lose_nothing() -> None:
    for plan in PLANS:
        outcome = outcome_of(tt({"energy": 1.0}, plan=plan), text=DOUBLE)
        assert outcome.weight_error < 1e-12  # float64


@given(out=st.integers(2, 40), in_features=st.integers(2, 40), rank=st.integers(1, 6), cores=st.integers(2, 4))
@example(out=17, in_features=23, rank=3, cores=2)
@settings(max_examples=12, deadline=None)
def test_every_size_works_when_padded(out: int, in_features: int, rank: int, cores: int) -> None:
    text = DOUBLE.replace("24", "IN").replace("18", "OUT").replace("IN", str(in_features)).replace("OUT", str(out))
    weights = weights_of(text)
    x = torch.randn(3, in_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for plan in ("contract", "rebuild"):
        use = tt(rank, cores=cores, plan=plan, padding="pad")
        result, (outcome,) = rewritten(graph_of(text, weights), rule_of(use, force=True), methods=METHODS)
        whole = matrix(cores_of(outcome.consts))[:out, :in_features]
        expected = np.maximum(x.numpy() @ whole.T + weights["fc.bias"].numpy(), 0)
        np.testing.assert_allclose(run(result, x)[0].numpy(), expected, rtol=0, atol=1e-11)  # float64, sums of 40 of size 10
        left = np.linalg.norm(weights["fc.weight"].numpy() - whole) / np.linalg.norm(weights["fc.weight"].numpy())
        assert outcome.weight_error == pytest.approx(left, rel=1e-9, abs=1e-12)


def test_padding_is_said() -> None:
    text = TEXT.replace("18", "59")
    outcome = outcome_of(tt(3, padding="pad"), text=text)
    assert outcome.parts[0].notes[1] == "padded with zeros from 59 x 24 to 60 x 24"
    modes = ([4, 5, 3], [2, 3, 4])
    assert outcome_of(tt(3, padding="pad", modes=modes), text=text).parts[0].notes[1] == outcome.parts[0].notes[1]


def test_zero_weight_has_no_error() -> None:
    weights = weights_of(TEXT) | {"fc.weight": torch.zeros(18, 24)}
    for rank in (3, {"energy": 0.9}, {"error": 0.1}):
        _, (outcome,) = rewritten(graph_of(TEXT, weights), rule_of(tt(rank), force=True), methods=METHODS)
        assert (outcome.weight_error, outcome.bound) == (0.0, None)
        assert not matrix(cores_of(outcome.consts)).any()


@pytest.mark.parametrize(("bad", "count"), [(float("nan"), 1), (float("inf"), 2)])
def test_nan_and_infinity_are_named(bad: float, count: int) -> None:
    weights = weights_of(TEXT)
    weights["fc.weight"].flatten()[:count] = bad
    with pytest.raises(RewriteError, match=rf"fc.weight: {count} of 432 entries are NaN or infinite"):
        rewritten(graph_of(TEXT, weights), rule_of(tt(), force=True), methods=METHODS)


def test_promised_errors_are_those_reached() -> None:
    for rank in (1, 4, [3, 2]):
        (error,) = METHOD.errors(SITE, tt(rank).spec, [only(tt(rank))], None)
        assert outcome_of(tt(rank)).weight_error == pytest.approx(error.weight_error, rel=1e-5)  # float32 cores


def test_merge_refuses_what_is_no_train() -> None:
    with pytest.raises(RewriteError, match="no tensor train: "):
        METHOD.merge({"core_0": torch.zeros(1, 2, 2, 3), "core_1": torch.zeros(2, 2, 2, 1)})
    with pytest.raises(RewriteError, match="no tensor train: "):
        METHOD.merge({"core_1": torch.zeros(1, 2, 2, 1)})


# through the whole thing


def spec_of(rewrite: Any, **more: Any) -> dict[str, Any]:
    rule = {"match": {"op": "matmul"}, "rewrite": rewrite, "force": True, "name": "all"}
    top = {key: more.pop(key) for key in ("export", "strict") if key in more}
    return {"version": 1, "rules": [{**rule, **more}], **top}


CASES = [
    ("mlp", {"rank": 3, "plan": "contract"}),
    ("cnn", {"rank": 3, "padding": "pad", "plan": "contract"}),
    ("gpt2", {"rank": {"ratio": 0.5}, "plan": "rebuild"}),
    ("mha", {"rank": 2, "cores": 2, "plan": "contract"}),
]


@pytest.mark.parametrize(("model", "settings_"), CASES, ids=[name for name, _ in CASES])
def test_onnx_runtime_answers_as_torch(model: str, settings_: dict[str, Any], tmp_path: Path) -> None:
    module, inputs, shapes = ZOO[model].build()
    compiled = mm.compile(module, spec_of({"tt": settings_}), inputs, dynamic_shapes=shapes)
    assert sum(row.status == "rewritten" for row in compiled.report.sites) >= 2
    compiled.save(tmp_path / "out")
    running = session(tmp_path / "out" / "model.onnx")
    for case in (inputs, *ZOO[model].more_inputs()):
        actual = running.run(None, feeds(running, case))
        assert difference(actual, answers(compiled.module, case)) < 2e-5  # float32: sums of 44 and some layers of it


def optimised(folder: Path) -> list[str]:
    """Operators that run, after ONNX Runtime has computed what it can at load."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(folder / "out" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx", load_external_data=False).graph.node]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "keep"])
def test_the_file_holds_cores_and_the_session_computes_what_they_make(dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    """Under half precision too, although ONNX Runtime computes no product in half precision when it loads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(48, 36), torch.nn.ReLU(), torch.nn.Linear(36, 24)).to(dtype).eval()
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    for plan, products in (("rebuild", 2), ("contract", 6)):
        folder = tmp_path / plan
        folder.mkdir()
        spec = spec_of({"tt": {"rank": 3, "plan": plan}}, export={"precision": precision, "target": "cpu"})
        compiled = mm.compile(module, spec, (x,), dynamic_shapes=({0: "batch"},))
        compiled.save(folder / "out")
        held = compiled.report.totals.bytes[1]
        assert held < 1600  # float32; the dense weights have 10368
        assert held <= (folder / "out" / "model.onnx.data").stat().st_size <= held + 64 * 8  # every tensor is aligned
        ran = optimised(folder)
        assert sum(op in ("MatMul", "Gemm", "FusedMatMul") for op in ran) <= products
        assert "Transpose" not in ran or plan == "contract"


def test_the_plan_says_what_compile_does_without_weights() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(48, 36), torch.nn.ReLU(), torch.nn.Linear(36, 24))
    spec = spec_of({"tt": {"rank": 100, "cores": 2}}, export={"tokens": [4], "target": ["cpu"]})
    plan = mm.plan(module.to("meta"), spec, (torch.zeros(2, 48, device="meta"),)).sites
    compiled = mm.compile(module.to_empty(device="cpu").requires_grad_(False).apply(_fill), spec, (torch.zeros(2, 48),)).report.sites
    for before, after in zip(plan, compiled, strict=True):
        assert (before.rank, before.parameters, before.bytes, before.macs, before.trainable) == (
            after.rank,
            after.parameters,
            after.bytes,
            after.macs,
            after.trainable,
        )
        assert before.notes == after.notes[: len(before.notes)]
        assert before.notes[0].startswith("rank 100 is above what the modes allow: clamped to [")
        assert before.notes[2].startswith("contraction: ")
        assert before.notes[2].endswith("for 4 rows on cpu")
        assert before.requested_rank == "100"


def _fill(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.normal_(generator=torch.Generator().manual_seed(0))


# bad input


BAD_SETTINGS = [
    (
        "{rank: [2, 2, 2]}",
        "s.yaml:4:17: rules[0].rewrite.tt: 3 cores (the default) take a list of 2, one rank between neighbours; this list has 3",
    ),
    (
        "{rank: [2], cores: 4}",
        "s.yaml:4:17: rules[0].rewrite.tt: 4 cores (cores) take a list of 3, one rank between neighbours; this list has 1",
    ),
    (
        "{rank: [2, 2], modes: {out: [2, 9], in: [4, 6]}}",
        "s.yaml:4:17: rules[0].rewrite.tt: 2 cores (modes) take a list of 1, one rank between neighbours; this list has 2",
    ),
    (
        "{rank: 2, modes: {out: [2, 9], in: [4, 3, 2]}}",
        "s.yaml:4:34: rules[0].rewrite.tt.modes: a core has one output mode and one input mode: out gives 2, in gives 3",
    ),
    (
        "{rank: 2, cores: 3, modes: {out: [2, 9], in: [4, 6]}}",
        "s.yaml:4:17: rules[0].rewrite.tt: modes say how many cores there are: give modes or cores, not both",
    ),
    ("{rank: 0}", "s.yaml:4:24: rules[0].rewrite.tt.rank: expected an integer >= 1, got 0"),
    (
        "{rank: many}",
        "s.yaml:4:24: rules[0].rewrite.tt.rank: expected an integer >= 1, a list of them, {energy: e}, {ratio: r} or {error: e}, got many",
    ),
    ("{rank: []}", "s.yaml:4:24: rules[0].rewrite.tt.rank: the list of ranks is empty"),
    ("{rank: [2, 2], max: 4}", "s.yaml:4:37: rules[0].rewrite.tt.max: has no meaning beside a list of ranks"),
    ("{rank: auto}", "s.yaml:4:24: rules[0].rewrite.tt.rank: auto needs a budget to be decided by"),
    ("{rank: 2, cores: 1}", "s.yaml:4:34: rules[0].rewrite.tt.cores: expected an integer >= 2, got 1"),
]


def spec_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewrite: str, *more: str) -> str:
    monkeypatch.chdir(tmp_path)
    lines = ["version: 1", "rules:", "- match: {op: matmul}", f"  rewrite: {rewrite}", *more]
    Path("s.yaml").write_text("\n".join(lines) + "\n")
    return "s.yaml"


@pytest.mark.parametrize(("text", "message"), BAD_SETTINGS)
def test_bad_settings_are_named_with_their_place(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError) as caught:
        mm.load_spec(spec_file(tmp_path, monkeypatch, f"{{tt: {text}}}"))
    assert str(caught.value).split("\n")[0] == message


def two_linears() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    return torch.nn.Sequential(torch.nn.Linear(24, 18), torch.nn.Linear(18, 13)), (torch.randn(2, 24),)


def test_modes_that_fit_no_site_are_a_spec_error_and_of_some_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = two_linears()
    none = spec_file(tmp_path, monkeypatch, "{tt: {rank: 2, modes: {out: [4, 4], in: [4, 6]}}}")
    with pytest.raises(SpecError) as caught:
        mm.plan(module, none, inputs)
    assert str(caught.value) == ("s.yaml:4:13: rule rule-1: 0: out modes [4, 4] multiply to 16, not to out_features = 18; [6, 3] would fit")
    one = spec_file(tmp_path, monkeypatch, "{tt: {rank: 2, modes: {out: [3, 6], in: [4, 6]}}}")
    first, second = mm.plan(module, one, inputs).sites
    assert (first.status, second.status) == ("rewritten", "rejected")
    assert second.reason.startswith("out modes [3, 6] multiply to 18, not to out_features = 13; ")
    assert second.reason.endswith(" would fit")


def test_clamps_are_notes_and_errors_when_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = torch.nn.Linear(24, 18), (torch.randn(2, 24),)
    text = "{tt: {rank: 9, modes: {out: [2, 9], in: [2, 12]}}}"
    loose = spec_file(tmp_path, monkeypatch, text, "  force: true")
    for report in (mm.plan(module, loose, inputs), mm.compile(module, loose, inputs).report):
        assert report.sites[0].notes[0] == "rank 9 is above what the modes allow: clamped to [4]"
    strict = spec_file(tmp_path, monkeypatch, text, "  force: true", "strict: true")
    for call in (mm.plan, mm.compile):
        with pytest.raises(SpecError) as caught:
            call(module, strict, inputs)
        message = str(caught.value)
        assert message.startswith("s.yaml:3:3: strict: rule rule-1 cannot treat ")
        assert message.endswith(" as it says: rank 9 is above what the modes allow: clamped to [4]")


def test_the_command_line_says_it_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from matmorph.cli.main import main

    spec = spec_file(tmp_path, monkeypatch, "{tt: {rank: [2, 2, 2]}}")
    with pytest.raises(SystemExit) as caught:
        main(["specs", "check", spec])
    assert caught.value.code == 2
    assert capsys.readouterr().err == BAD_SETTINGS[0][1] + "\n"


# planning for an export, and predicted time


def test_tokens_and_target_come_from_the_export_unless_given() -> None:
    module, inputs = torch.nn.Linear(24, 18), (torch.randn(2, 24),)
    for settings_, export, said in (
        ({}, {"tokens": [3], "target": ["cpu"]}, "for 3 rows on cpu"),
        ({"tokens": [5, 6], "target": ["cuda"]}, {"tokens": [3], "target": ["cpu"]}, "for 5, 6 rows on cuda"),
        ({}, {"tokens": [2], "target": ["cuda"]}, "for 2 rows on cuda"),
    ):
        (row,) = mm.plan(module, spec_of({"tt": {"rank": 2, **settings_}}, export=export), inputs).sites
        assert row.notes[-1].endswith(said)


def test_predicted_slowness_rejects_only_when_asked() -> None:
    module, inputs = torch.nn.Linear(48, 36), (torch.randn(2, 48),)
    slow = {"tt": {"rank": 12, "plan": "contract"}}
    assert mm.plan(module, spec_of(slow), inputs).sites[0].status == "rewritten"
    for call in (lambda *a: mm.plan(*a), lambda *a: mm.compile(*a).report):
        (row,) = call(module, spec_of(slow, pays={"time": True}), inputs).sites
        assert row.status == "rejected"
        assert row.reason.startswith("predicted to be slower: ")
        assert row.reason.endswith(" rows (pays: {time: true} refuses it)")
        (row,) = call(module, spec_of({"tt": {"rank": 12}}, pays={"time": True}), inputs).sites
        assert row.status == "rewritten"  # rebuilt at load: the time of dense
    for rank, status in ((4, "rewritten"), (300, "rejected")):
        (row,) = mm.plan(
            torch.nn.Linear(512, 512), spec_of({"low_rank": {"rank": rank}}, pays={"time": True}), (inputs[0].new_zeros(2, 512),)
        ).sites
        assert row.status == status
    quantized = {"quantize": {"quantizer": "nf4"}}
    (row,) = mm.plan(module, spec_of(quantized, pays={"time": True}), inputs).sites
    assert row.reason.startswith("predicted to be slower: 3.5 x dense at 1 row, 3.6 x dense at 16 rows, 1.2 x dense at 256 rows")


@pytest.mark.parametrize(
    ("rewrite", "export", "message"),
    [
        ({"loftq": {"quantizer": "nf4", "rank": 2}}, {"target": "cuda"}, "rule all: pays.time: the time of loftq is not predicted on cuda"),
        ({"quantize": {"quantizer": "nf4"}}, {"target": "cuda"}, "rule all: pays.time: the time of quantize is not predicted on cuda"),
        ({"tt_lora": {"rank": 2}}, {}, "rule all: pays.time judges what replaces a matmul, and tt_lora only adds to it"),
    ],
)
def test_time_that_nobody_predicts_is_not_passed_over(rewrite: Any, export: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        mm.plan(torch.nn.Linear(48, 36), spec_of(rewrite, pays={"time": True}, export=export), (torch.randn(2, 48),))


def test_resolved_specs_load_again() -> None:
    rewrite = {"tt": {"rank": [2, 3], "modes": {"out": [2, 3, 3], "in": [2, 3, 4]}, "tokens": 4, "target": "cpu"}}
    spec = mm.load_spec(spec_of(rewrite))
    assert mm.load_spec(spec.resolved) == spec
    use = spec.rules[0].rewrite[0].spec
    assert (use.rank.each, use.modes, use.tokens, use.target) == ((2, 3), ModesSpec((2, 3, 3), (2, 3, 4)), (4,), ("cpu",))
