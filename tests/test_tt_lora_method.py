"""tt_lora as a method: the papers' forward and counts, starts, composition, two factors, ONNX Runtime; mutants of both methods of tensor
trains. Oracle: numpy in float64, from the papers' formulas."""

from __future__ import annotations

from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import answers, difference, feeds, session
from mutating import Check, Mutant, killer, mutated, unmutated
from quantizing import dense, loftq, parts_of, qlora
from rewriting import LINEAR, graph_of, only_site, rewritten, rule_of, run, weights_of
from trains import METHODS, contracted, cores_of, matrix, tt, tt_lora
from zoo import ZOO, hugging_face

import matmorph as mm
from matmorph.errors import RewriteError, SpecError
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.methods.tt_lora.method import two_factor_form

METHOD = METHODS["tt_lora"]
TEXT = LINEAR.replace("12", "24").replace("10", "18").replace("float32", "float64")
BATCHED = TEXT.replace("range batch 1..", "range batch 1..\nrange seq 1..").replace("float64[batch, ", "float64[batch, seq, ")
STATIC = TEXT.replace("[batch, ", "[7, ").replace("range batch 1..\n", "")
W = weights_of(TEXT)["fc.weight"].numpy()
BIAS = weights_of(TEXT)["fc.bias"].numpy()
X = torch.randn(7, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SHAPE = (4, 3, 2, 2, 3, 3)
"""4 * 3 * 2 inputs, then 2 * 3 * 3 outputs."""
FORMS = [{"shape": SHAPE}, {}, {"cores": 4}, {"shape": (24, 18)}, {"modes": ([3, 6], [6, 4])}]


def outcome_of(use: Any, text: str = TEXT) -> Any:
    _, (outcome,) = rewritten(graph_of(text), rule_of(use), methods=METHODS)
    return outcome


def update_of(outcome: Any, alpha: float) -> np.ndarray:
    """alpha dW [out, in] of the stored cores."""
    cores = cores_of(outcome.consts)
    if cores[0].ndim == 4:
        return alpha * matrix(cores)
    inputs = next(p for p in range(1, len(cores)) if prod(core.shape[1] for core in cores[:p]) == outcome.site.in_features)
    return alpha * contracted(np.eye(outcome.site.in_features), cores, inputs).T


# the update


@pytest.mark.parametrize("plan", ["auto", "contract", "rebuild"])
@pytest.mark.parametrize("text", [TEXT, BATCHED, STATIC], ids=["rows", "batched", "static"])
@pytest.mark.parametrize("form", FORMS, ids=["shape", "automatic", "four", "two", "matrix"])
def test_contraction_is_reconstruction_is_merged(plan: str, text: str, form: dict[str, Any]) -> None:
    use = tt_lora(3, alpha=2.5, init="direct", plan=plan, **form)
    result, (outcome,) = rewritten(graph_of(text), rule_of(use), methods=METHODS)
    whole = W + update_of(outcome, 2.5)
    x = X.reshape(1, 7, 24) if text is BATCHED else X
    np.testing.assert_allclose(run(result, x)[0].numpy(), np.maximum(x.numpy() @ whole.T + BIAS, 0), rtol=0, atol=1e-12)  # float64
    parts = {const.path.rpartition(".")[2]: const.load() for const in outcome.consts}
    merged, bias = METHOD.merge({**parts, "base": torch.from_numpy(W), "scale": torch.tensor(2.5)})
    np.testing.assert_allclose(merged.numpy(), whole, rtol=0, atol=1e-12)
    assert bias is None
    numbers = {"scale": torch.tensor(2.5), "in_features": torch.tensor(24)}
    np.testing.assert_allclose(METHOD.merge({**parts, **numbers})[0].numpy(), whole - W, rtol=0, atol=1e-12)
    assert outcome.weight_error == pytest.approx(np.linalg.norm(whole - W) / np.linalg.norm(W), rel=1e-6)
    assert [const.path for const in result.state][:2] == ["fc.weight", "fc.tt_lora.core_0"]
    assert not any("einsum" in node.op for node in result.nodes)


def test_two_factors_are_the_same_update() -> None:
    for form in FORMS[:4]:
        outcome = outcome_of(tt_lora(4, alpha=3, init="tt_svd", **form))
        down, up = two_factor_form([const.load() for const in outcome.consts], 24, 3)
        assert (down.shape[0], up.shape[1], down.shape[1]) == (24, 18, up.shape[0])
        assert down.shape[1] == 4
        np.testing.assert_allclose((down @ up).T.numpy(), update_of(outcome, 3), rtol=0, atol=1e-12)  # float64
    pairs = outcome_of(tt_lora(2, modes=([3, 6], [6, 4])))
    with pytest.raises(ValueError, match="a TT-matrix has no border"):
        two_factor_form([const.load() for const in pairs.consts], 24, 1)


def test_a_vector_is_not_merged_without_its_border() -> None:
    parts = {const.path.rpartition(".")[2]: const.load() for const in outcome_of(tt_lora(2)).consts}
    with pytest.raises(RewriteError, match="merged into a base, or with its number of in_features"):
        METHOD.merge(parts)


# starts


def test_zero_leaves_the_model_as_it_is_to_the_bit_and_trains() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(24, 18), torch.nn.ReLU(), torch.nn.Linear(18, 12)).eval()
    x = torch.randn(5, 24)
    for form in ({}, {"modes": {"out": [3, 6], "in": [6, 4]}}, {"plan": "rebuild"}):
        spec = spec_of({"tt_lora": {"rank": 3, "alpha": 8, **form}}, optional=True, match={"path": "0"})
        compiled = mm.compile(module, spec, (x,))
        assert torch.equal(compiled.module(x), module(x))
        row = compiled.report.sites[0]
        assert (row.weight_error, row.status) == (0.0, "rewritten")
        compiled.module(x).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in compiled.module.named_parameters() if "tt_lora" in name}
        assert sum(gradient.numel() for gradient in gradients.values()) == row.trainable == row.parameters[1] - row.parameters[0]
        last = max(gradients)
        assert gradients[last].abs().max() > 0
        assert all(gradient.abs().max() == 0 for name, gradient in gradients.items() if name != last)  # the product's other side is zero


def test_random_starts_train_in_every_core() -> None:
    module, x = torch.nn.Linear(24, 18), torch.randn(5, 24)
    for init in ("direct", "tt_svd"):
        compiled = mm.compile(module, spec_of({"tt_lora": {"rank": 3, "init": init}}), (x,))
        compiled.module(x).square().sum().backward()
        gradients = [parameter.grad for name, parameter in compiled.module.named_parameters() if "tt_lora" in name]
        assert len(gradients) == 6
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_direct_cores_have_norm_one() -> None:
    for core in cores_of(outcome_of(tt_lora(3, init="direct")).consts):
        assert np.linalg.norm(core) == pytest.approx(1, abs=1e-4)  # 1e-6 is added to the norm that divides
        assert np.abs(core).max() < 1


def test_tt_svd_is_the_train_of_a_kaiming_matrix() -> None:
    """At full ranks the update is the drawn matrix itself: uniform within +- sqrt(2 / 9) sqrt(3 / in), so of deviation sqrt(2 / 9 / in)."""
    for form in ({"shape": SHAPE}, {"modes": ([3, 6], [6, 4])}):
        drawn = update_of(outcome_of(tt_lora(100, init="tt_svd", **form)), 1)
        bound = sqrt(2 / 9) * sqrt(3 / 24)
        assert 0.97 * bound < np.abs(drawn).max() <= bound * (1 + 1e-6)  # 432 draws; float32
        assert drawn.std() == pytest.approx(bound / sqrt(3), rel=0.1)  # standard error 2.2 %
        small = update_of(outcome_of(tt_lora(4, init="tt_svd", **form)), 1)
        left = np.linalg.norm(drawn - small) / np.linalg.norm(drawn)
        assert 0.2 < left < 1
        assert np.sum(small * (drawn - small)) / np.sum(drawn**2) == pytest.approx(0, abs=1e-5)  # an orthogonal projection


@pytest.mark.parametrize("init", ["zero", "direct", "tt_svd"])
def test_every_site_has_a_stream_of_its_own(init: str) -> None:
    module, x = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Linear(24, 24)), torch.zeros(2, 24)
    spec = spec_of({"tt_lora": {"rank": 3, "init": init}})

    def cores(seed: int, rule: dict[str, Any] = spec) -> dict[str, torch.Tensor]:
        compiled = mm.compile(module, rule, (x,), seed=seed)
        return {name: parameter.detach() for name, parameter in compiled.module.named_parameters() if "core_0" in name}

    first, again, other = cores(0), cores(0), cores(1)
    (a, b) = sorted(first)
    assert torch.equal(first[a], again[a])
    assert not torch.equal(first[a], first[b])
    assert not torch.equal(first[a], other[a])
    alone = cores(0, spec_of({"tt_lora": {"rank": 3, "init": init}}, match={"path": "1"}))
    assert torch.equal(alone[b], first[b])


def test_promised_errors_are_those_reached() -> None:
    site = only_site(graph_of(TEXT))
    for init in ("zero", "direct", "tt_svd"):
        use = tt_lora(3, alpha=2, init=init)
        (error,) = METHOD.errors(site, use.spec, list(METHOD.choices(site, use.spec)), None)
        assert outcome_of(use).weight_error == pytest.approx(error.weight_error, rel=1e-6)


# what others count


def test_the_papers_counts_per_matrix() -> None:
    site = only_site(graph_of(TEXT))

    def count(shape: list[int], rank: int, out: int, in_features: int) -> int:
        from dataclasses import replace

        like = replace(site, out_features=out, in_features=in_features)
        use = tt_lora(rank, shape=tuple(shape))
        assert METHOD.check(like, use.spec) is None
        (choice,) = METHOD.choices(like, use.spec)
        assert choice.clamped is None
        return METHOD.cost(like, use.spec, choice).parameters

    assert count([12, 8, 8, 2, 2, 2, 8, 12], 4, 768, 768) == 576
    assert count([64, 4, 3, 3, 4, 64], 5, 768, 768) == 990
    for rank, expected in ((2, 224), (4, 768), (5, 1160), (6, 1632), (8, 2816), (10, 4320), (12, 6144)):
        assert count([16, 8, 8, 4, 4, 8, 8, 16], rank, 4096, 4096) == expected


LLAMAS = [
    ("tt-lora-llama2-7b", 4096, 4096, 32, 49_152),
    ("tt-lora-llama3.2-1b", 2048, 512, 16, 33_920),
    ("tt-lora-llama3.2-3b", 3072, 1024, 28, 48_860),
    ("tt-lora-llama3.1-8b", 4096, 1024, 32, 58_240),
    ("tt-lora-llama3.1-70b", 8192, 1024, 80, 157_600),
]


@pytest.mark.parametrize(("name", "hidden", "narrow", "layers", "total"), LLAMAS, ids=[row[0] for row in LLAMAS])
def test_the_presets_count_as_the_papers_do(name: str, hidden: int, narrow: int, layers: int, total: int) -> None:
    """Weights on the meta device; one layer, times those of the model."""
    sizes = {"hidden_size": hidden, "num_attention_heads": hidden // 128, "num_key_value_heads": narrow // 128, "head_dim": 128}
    few = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 32, "max_position_embeddings": 64}
    with torch.device("meta"):
        module = hugging_face("LlamaForCausalLM", "LlamaConfig", **sizes, **few)()
    inputs = {"input_ids": torch.zeros(2, 6, dtype=torch.int64, device="meta")}
    plan = mm.plan(module, name, inputs, dynamic_shapes={"input_ids": {0: "batch", 1: "seq"}})
    assert plan.totals.trainable * layers == total
    assert plan.totals.parameters[1] - plan.totals.parameters[0] == plan.totals.trainable
    assert [row.role for row in plan.sites if row.status == "rewritten"] == ["attention.q", "attention.v"]
    if name == "tt-lora-llama3.2-1b":
        assert round(100 * total / 1_703_936, 2) == 1.99  # percent of LoRA of rank 16


def test_roberta_presets_on_meta_weights() -> None:
    few = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 32, "max_position_embeddings": 64}
    with torch.device("meta"):
        module = hugging_face("RobertaModel", "RobertaConfig", hidden_size=768, num_attention_heads=12, **few)()
    inputs = {"input_ids": torch.zeros(2, 6, dtype=torch.int64, device="meta")}
    shapes = {"input_ids": {0: "batch", 1: "seq"}}
    assert mm.plan(module, "tt-lora-roberta", inputs, dynamic_shapes=shapes).totals.trainable * 12 == 13_824
    automatic = mm.plan(module, "tt-lora", inputs, dynamic_shapes=shapes)
    assert [row.rank for row in automatic.sites if row.status == "rewritten"] == [4, 4]
    wrong = mm.load_spec("tt-lora-llama3.2-1b")
    with pytest.raises(SpecError, match=r"shape \[16, 8, 4, 4, 4, 4, 8, 16\] multiplies to 4194304, not to in \* out = 768 \* 768"):
        mm.plan(module, wrong, inputs, dynamic_shapes=shapes)


# beside a quantised base


@pytest.mark.parametrize("base", [loftq(3, quantizer="nf4"), qlora(3, quantizer="uniform", bits=4, alpha=6)], ids=["loftq", "qlora"])
@pytest.mark.parametrize("init", ["zero", "direct"])
def test_an_update_beside_a_quantised_base(base: Any, init: str) -> None:
    text = TEXT.replace("float64", "float32")
    result, (outcome,) = rewritten(graph_of(text), rule_of(base, tt_lora(3, alpha=4, init=init), force=True), methods=METHODS)
    parts = parts_of(outcome.consts)
    scale = base.spec.adapter_scale
    base_matrix = dense(parts, (18, 24), base.spec) + scale * (parts["down"].astype(np.float64) @ parts["up"]).T
    whole = base_matrix + update_of(outcome, 4)
    expected = np.maximum(X.numpy() @ whole.T + BIAS, 0)
    np.testing.assert_allclose(run(result, X.float())[0].numpy(), expected, rtol=0, atol=2e-4)  # float32, sums of 24 of size 10
    assert outcome.weight_error == pytest.approx(np.linalg.norm(W - whole) / np.linalg.norm(W), rel=1e-3)
    assert [part.use.method for part in outcome.parts] == [base.method, "tt_lora"]
    assert "fc.weight" not in [const.path for const in result.state]
    assert {const.path for const in outcome.consts if const.trainable} == {
        *(f"fc.{base.method}.{name}" for name in ("down", "up")),
        *(f"fc.tt_lora.core_{k}" for k in range(6)),
    }


def test_an_update_sees_what_the_base_leaves() -> None:
    seen = []

    class Spy(type(METHOD)):
        def build(self, site: Any, spec: Any, choice: Any, stats: Any, b: Any) -> Any:
            seen.append((b.weight().double().numpy(), b.residual().double().numpy()))
            return super().build(site, spec, choice, stats, b)

    base = loftq(3, quantizer="nf4")
    rule = rule_of(base, tt_lora(3), force=True)
    _, (outcome,) = rewritten(graph_of(TEXT.replace("float64", "float32")), rule, methods={**METHODS, "tt_lora": Spy()})
    parts = parts_of(outcome.consts)
    stands = dense(parts, (18, 24), base.spec) + (parts["down"].astype(np.float64) @ parts["up"]).T
    np.testing.assert_allclose(seen[0][0], W, atol=1e-6)  # float32
    np.testing.assert_allclose(seen[0][1], W - stands, atol=1e-5)


def test_the_report_of_both_parts() -> None:
    module, x = torch.nn.Linear(24, 18), torch.randn(5, 24)
    rewrite = [{"loftq": {"quantizer": "nf4", "rank": 3}}, {"tt_lora": {"rank": [4, 3, 2, 3, 3], "alpha": 2, "shape": list(SHAPE)}}]
    planned = mm.plan(module, spec_of(rewrite, force=True), (x,)).sites[0]
    row = mm.compile(module, spec_of(rewrite, force=True), (x,)).report.sites[0]
    assert row.method == "loftq + tt_lora"
    assert [(part.method, part.rank) for part in row.parts] == [("loftq", 3), ("tt_lora", 4)]
    assert row.parts[1].notes[0] == "shape [4, 3, 2, 2, 3, 3]; ranks [4, 3, 2, 3, 3]"
    cores = 4 * 4 + 4 * 3 * 3 + 3 * 2 * 2 + 2 * 2 * 3 + 3 * 3 * 3 + 3 * 3
    assert row.trainable == planned.trainable == 3 * (24 + 18) + cores
    assert row.bytes == planned.bytes
    assert row.parameters == planned.parameters


# ONNX Runtime


def spec_of(rewrite: Any, **more: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": rewrite, **more}]}


CASES = [
    ("bert", {"role": ["attention.q", "attention.v"]}, {"tt_lora": {"rank": 3, "alpha": 8, "init": "tt_svd"}}),
    ("gpt2", {"role": "attention.*"}, {"tt_lora": {"rank": 2, "cores": 4, "init": "direct", "plan": "contract"}}),
    ("cnn", {"op": "conv1x1"}, {"tt_lora": {"rank": 2, "cores": 2, "init": "direct", "plan": "rebuild"}}),
    ("llama", {"role": "attention.*"}, [{"loftq": {"quantizer": "nf4", "rank": 2}}, {"tt_lora": {"rank": 3, "init": "tt_svd"}}]),
]


@pytest.mark.parametrize(("model", "match", "rewrite"), CASES, ids=[row[0] for row in CASES])
def test_onnx_runtime_answers_as_torch(model: str, match: dict[str, Any], rewrite: Any, tmp_path: Path) -> None:
    module, inputs, shapes = ZOO[model].build()
    compiled = mm.compile(module, spec_of(rewrite, match=match, force=True), inputs, dynamic_shapes=shapes)
    assert sum(row.status == "rewritten" for row in compiled.report.sites) >= 1
    assert difference(answers(compiled.module, inputs), answers(module, inputs)) > 1e-4  # the start is felt
    compiled.save(tmp_path / "out")
    running = session(tmp_path / "out" / "model.onnx")
    for case in (inputs, *ZOO[model].more_inputs()):
        assert difference(running.run(None, feeds(running, case)), answers(compiled.module, case)) < 5e-5  # float32: some layers of it


# bad input


BAD_SETTINGS = [
    ("{rank: 2, alpha: 0}", "s.yaml:4:39: rules[0].rewrite.tt_lora.alpha: expected a number > 0, got 0"),
    ("{rank: 2, alpha: -1}", "s.yaml:4:39: rules[0].rewrite.tt_lora.alpha: expected a number > 0, got -1"),
    ("{rank: 2, alpha: .nan}", "s.yaml:4:39: rules[0].rewrite.tt_lora.alpha: expected a number > 0, got .nan"),
    (
        "{rank: [2, 3], shape: [4, 6, 18]}",
        "",
    ),
    (
        "{rank: [2], shape: [4, 6, 18]}",
        "s.yaml:4:22: rules[0].rewrite.tt_lora: 3 cores (shape) take a list of 2, one rank between neighbours; this list has 1",
    ),
    (
        "{rank: 2, shape: [24, 18], cores: 2}",
        "s.yaml:4:22: rules[0].rewrite.tt_lora: give one of shape, modes and cores, not shape and cores",
    ),
    ("{rank: {energy: 0.9}}", "s.yaml:4:22: rules[0].rewrite.tt_lora: tt_lora takes a number or a list as its rank, not energy"),
    ("{rank: 2, shape: [432]}", "s.yaml:4:39: rules[0].rewrite.tt_lora.shape: expected a list of at least 2, got a list of 1"),
    (
        "{rank: 2, init: zeros}",
        "s.yaml:4:38: rules[0].rewrite.tt_lora.init: expected one of zero, tt_svd, direct, got zeros; did you mean zero?",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_SETTINGS)
def test_bad_settings_are_named_with_their_place(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(f"version: 1\nrules:\n- match: {{op: matmul}}\n  rewrite: {{tt_lora: {text}}}\n")
    if not message:
        assert mm.load_spec("s.yaml").rules[0].rewrite[0].spec.rank.each == (2, 3)
        return
    with pytest.raises(SpecError) as caught:
        mm.load_spec("s.yaml")
    assert str(caught.value).split("\n")[0] == message


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (
            [4, 6, 9],
            "shape [4, 6, 9] multiplies to 216, not to in * out = 24 * 18 = 432; [6, 4, 18] would fit",
        ),
        ([9, 48], "no first modes of shape [9, 48] multiply to in_features = 24 (they give 9, 432); [24, 18] would fit"),
    ],
)
def test_a_shape_that_does_not_fit_says_which_would(shape: list[int], reason: str) -> None:
    with pytest.raises(SpecError) as caught:
        mm.plan(torch.nn.Linear(24, 18), spec_of({"tt_lora": {"rank": 2, "shape": shape}}), (torch.zeros(2, 24),))
    assert str(caught.value).endswith(reason)
    module = torch.nn.Sequential(torch.nn.Linear(24, 18), torch.nn.Linear(18, 12))
    spec = spec_of({"tt_lora": {"rank": 2, "shape": [24, 18]}})
    assert [row.status for row in mm.plan(module, spec, (torch.zeros(2, 24),)).sites] == ["rewritten", "rejected"]


def test_prime_sizes_are_rejected_with_those_that_work() -> None:
    (row,) = mm.plan(torch.nn.Linear(24, 59), spec_of({"tt_lora": {"rank": 2}}), (torch.zeros(2, 24),)).sites
    assert (row.status, row.reason) == (
        "rejected",
        "out_features = 59 has no 3 balanced factors; the nearest sizes that have: 56 (7 x 4 x 2) and 60 (5 x 4 x 3)",
    )


def test_a_clamped_rank_is_said_and_is_an_error_when_strict() -> None:
    spec = spec_of({"tt_lora": {"rank": 5, "shape": [4, 3, 2, 2, 3, 3]}})
    (row,) = mm.compile(torch.nn.Linear(24, 18), spec, (torch.zeros(2, 24),)).report.sites
    said = "rank 5 is above what the modes allow: clamped to [4, 5, 5, 5, 3]"
    assert row.notes[0] == said
    assert row.trainable == 4 * 4 + 4 * 3 * 5 + 5 * 2 * 5 + 5 * 2 * 5 + 5 * 3 * 3 + 3 * 3
    with pytest.raises(SpecError, match=r"strict: rule rule-1 cannot treat .* as it says: rank 5 is above what the modes allow"):
        mm.plan(torch.nn.Linear(24, 18), {**spec, "strict": True}, (torch.zeros(2, 24),))


def test_nan_in_the_weight_is_refused_and_zeros_are_no_trouble() -> None:
    linear = torch.nn.Linear(24, 18)
    spec = spec_of({"tt_lora": {"rank": 2, "init": "tt_svd"}})
    with torch.no_grad():
        linear.weight.zero_()
    assert mm.compile(linear, spec, (torch.zeros(2, 24),)).report.sites[0].status == "rewritten"
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(RewriteError, match="1 of 432 entries are NaN or infinite"):
        mm.compile(linear, spec, (torch.zeros(2, 24),))


# mutants: each plants one plausible mistake, the checks below must notice

MUTANTS = {
    "modes in the wrong order": Mutant(
        "tt._train",
        "matrix_train(modes.out, modes.in_, (1, *choice.ranks, 1))",
        "matrix_train(modes.in_, modes.out, (1, *choice.ranks, 1))",
    ),
    "outputs and inputs of a matrix form exchanged": Mutant(
        "tt_lora._train", "matrix_train(form.out, form.in_, ranks)", "matrix_train(form.in_, form.out, ranks)"
    ),
    "inputs in order, not in reverse": Mutant("vector_tensor_to_weight", "reversed(range(p))", "range(p)"),
    "outputs in reverse": Mutant("vector_tensor_to_weight", "range(p, tensor.dim())", "reversed(range(p, tensor.dim()))"),
    "scale dropped": Mutant("matmul_train", "ops.scaled(core, scale) if k == smallest and scale != 1 else core", "core"),
    "scale on every core": Mutant("matmul_train", "k == smallest and scale != 1", "scale != 1"),
    "scale divided by the rank": Mutant(
        "TTLora.build",
        "matmul_train(b, train, spec, rows, consts, site.out_features, spec.alpha)",
        "matmul_train(b, train, spec, rows, consts, site.out_features, spec.alpha / (choice.rank or 1))",
    ),
    "scale not merged": Mutant("TTLora.merge", "float(parts.get('scale', 1.0))", "1.0"),
    "scale not in the factors": Mutant("two_factor_form", "(down, alpha * up)", "(down, up)"),
    "first core zero": Mutant(
        "_zero", "*cores, last = _direct(site, spec, choice, generator)", "last, *cores = _direct(site, spec, choice, generator)"
    ),
    "zero start is random": Mutant("_zero", "torch.zeros_like(last)", "last"),
    "cores not normalised": Mutant("_direct", "core / (torch.linalg.vector_norm(core) + 1e-06)", "core"),
    "Kaiming with a = sqrt(5)": Mutant("_uniform", "sqrt(2 / (1 + 8))", "sqrt(2 / (1 + 5))"),
    "fan of the outputs": Mutant(
        "_svd",
        "_uniform((site.out_features, site.in_features), site.in_features, generator)",
        "_uniform((site.out_features, site.in_features), site.out_features, generator)",
    ),
    "one stream for all sites": Mutant("TTLora.solve", "own_stream(seed, site.path)", "own_stream(seed)"),
    "padding forgotten": Mutant(
        "matmul_train",
        "b('aten.constant_pad_nd.default', rows, (0, padded), 0.0)",
        "b('aten.constant_pad_nd.default', rows, (0, padded), 1.0)",
    ),
    "padding left in the result": Mutant("matmul_train", "train.out_features == out", "True"),
    "ratio of the wrong size": Mutant("_rank_of_ratio", "float(rank.value or 0) * elements", "float(rank.value or 0) * elements * 2"),
    "clamp not said": Mutant("chosen_ranks", "rank.kind == 'fixed' and ranks != asked", "False"),
    "NaN let through": Mutant("readable", "not isfinite(largest(w))", "False"),
    "bytes are parameters": Mutant("train_cost", "parameters * size", "parameters"),
    "dense cost of a contraction": Mutant(
        "train_cost",
        "site.in_features * site.out_features if dense else last.flops // (2 * last.tokens)",
        "site.in_features * site.out_features if True else last.flops // (2 * last.tokens)",
    ),
    "size not judged": Mutant("_too_large", "rule.force", "True"),
}


def treated(m: Any, text: str, use: Any, **more: Any) -> Any:
    graph = graph_of(text)
    (site,) = find_sites(graph)
    methods = {"tt": m.TT(), "tt_lora": m.TTLora()}
    result, (outcome,) = m.rewrite(graph, [(site, rule_of(use, **{"force": True, **more}))], methods)
    return graph, result, outcome


def check_replacing(m: Any) -> None:
    bias = BIAS
    for use in (tt(5, modes=([2, 3, 3], [4, 3, 2])), tt(3, modes=([3, 6], [4, 6]), plan="contract"), tt(4, plan="rebuild")):
        _, result, outcome = treated(m, TEXT, use)
        whole = matrix(cores_of(outcome.consts))
        np.testing.assert_allclose(run(result, X)[0].numpy(), np.maximum(X.numpy() @ whole.T + bias, 0), rtol=0, atol=1e-11)  # float64
        assert outcome.weight_error == pytest.approx(np.linalg.norm(W - whole) / np.linalg.norm(W), rel=1e-9)
        assert outcome.weight_error < 0.99
        assert outcome.cost.bytes == sum(const.nbytes for const in outcome.consts)
    assert [treated(m, TEXT, tt(rank, modes=([3, 6], [3, 8])), force=False)[2].reject is None for rank in (7, 8)] == [True, False]
    chosen = treated(m, TEXT, tt({"ratio": 0.5}))[2]
    assert 0.3 * W.size < sum(const.numel for const in chosen.consts) <= 0.5 * W.size
    assert treated(m, TEXT, tt(9, modes=([2, 9], [2, 12])))[2].parts[0].choice.clamped is not None
    assert treated(m, TEXT, tt(2, modes=([3, 6], [6, 4]), plan="contract"))[2].cost.macs == 6 * 6 * 4 + 3 * 8 * 6


def check_padded(m: Any) -> None:
    text = TEXT.replace("24", "23").replace("18", "17")
    weights = weights_of(text)
    x = X[:, :23]
    for plan in ("contract", "rebuild"):
        _, result, outcome = treated(m, text, tt(3, padding="pad", plan=plan, cores=2))
        whole = matrix(cores_of(outcome.consts))[:17, :23]
        expected = np.maximum(x.numpy() @ whole.T + weights["fc.bias"].numpy(), 0)
        np.testing.assert_allclose(run(result, x)[0].numpy(), expected, rtol=0, atol=1e-11)


def check_update(m: Any) -> None:
    for form in FORMS:
        _, result, outcome = treated(m, TEXT, tt_lora(3, alpha=2.5, init="direct", **form))
        whole = W + update_of(outcome, 2.5)
        np.testing.assert_allclose(run(result, X)[0].numpy(), np.maximum(X.numpy() @ whole.T + BIAS, 0), rtol=0, atol=1e-12)
        assert outcome.weight_error == pytest.approx(np.linalg.norm(whole - W) / np.linalg.norm(W), rel=1e-6)
        assert outcome.weight_error > 1e-3
        parts = {const.path.rpartition(".")[2]: const.load() for const in outcome.consts}
        merged, _ = m.TTLora().merge({**parts, "base": torch.from_numpy(W), "scale": torch.tensor(2.5)})
        np.testing.assert_allclose(merged.numpy(), whole, rtol=0, atol=1e-12)
        if "modes" not in form:
            down, up = m.two_factor_form([const.load() for const in outcome.consts], 24, 2.5)
            np.testing.assert_allclose((down @ up).T.numpy(), whole - W, rtol=0, atol=1e-12)


def check_starts(m: Any) -> None:
    zero, direct, drawn = (treated(m, TEXT, tt_lora(100, init=init))[2] for init in ("zero", "direct", "tt_svd"))
    assert not cores_of(zero.consts)[-1].any()
    assert cores_of(zero.consts)[0].any()
    assert all(abs(np.linalg.norm(core) - 1) < 1e-4 for core in cores_of(direct.consts))
    assert update_of(drawn, 1).std() == pytest.approx(sqrt(2 / 9 / 24), rel=0.1)
    other = treated(m, TEXT.replace("fc.weight", "other.weight"), tt_lora(100, init="direct"))[2]
    assert not np.array_equal(cores_of(other.consts)[0], cores_of(direct.consts)[0])


def check_bad_weight(m: Any) -> None:
    weights = weights_of(TEXT)
    weights["fc.weight"][2, 3] = float("nan")
    graph = graph_of(TEXT, weights)
    with pytest.raises(RewriteError, match=r"fc\.weight: 1 of 432"):
        m.rewrite(graph, [(find_sites(graph)[0], rule_of(tt(2), force=True))], {"tt": m.TT()})


CHECKS: tuple[Check, ...] = (check_update, check_starts, check_replacing, check_padded, check_bad_weight)


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed(name: str) -> None:
    assert killer(mutated(MUTANTS[name]), CHECKS), "no check noticed"
