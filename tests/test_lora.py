"""lora: PEFT's formulas, the identities of PiSSA and OLoRA, every form of a matmul, composition; mutants. Oracle: numpy in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from mutating import Mutant, mutated, unmutated
from quantizing import METHODS as QUANTIZED
from quantizing import quantize
from rewriting import LINEAR, graph_of, only_site, rewritten, rule_of, run, weights_of
from torch import nn
from zoo import ZOO

import matmorph as mm
from matmorph.errors import RewriteError, SpecError
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import bind
from matmorph.ir.site import Reject
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.text.printing import print_graph
from matmorph.passes.methods import method_table
from matmorph.passes.methods.lora.method import Lora, LoraSpec
from matmorph.passes.methods.protocol import Method
from matmorph.passes.rewriting.rewrite import appraise, rewrite
from matmorph.specs.load import load_spec
from matmorph.specs.schema import MethodUse, Rank

METHODS: dict[str, Any] = {**QUANTIZED, "lora": Lora()}
WEIGHTS = weights_of(LINEAR)
W = WEIGHTS["fc.weight"].double().numpy()
X = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
ROUNDING = 2e-6
"""Of float32 matmuls with sums of 12 terms and results of size 10: a few roundings of 6e-8 of them."""


def lora(rank: int = 4, **more: Any) -> MethodUse:
    return MethodUse("lora", LoraSpec(rank=Rank("fixed", rank), **more))


def parts_of(graph: Graph, label: str = "fc.lora.") -> dict[str, np.ndarray]:
    return {c.path.removeprefix(label): c.load().double().numpy() for c in graph.state if c.path.startswith(label)}


def with_values(graph: Graph, values: Mapping[str, torch.Tensor]) -> Graph:
    """The same graph with other weights."""
    return graph_of(print_graph(graph), {**{c.path: c.load() for c in graph.state}, **values})


def close(actual: Any, expected: np.ndarray, tolerance: float = ROUNDING) -> None:
    found = np.asarray(actual, np.float64)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


# the formulas


def test_golden_text() -> None:
    result, _ = rewritten(graph_of(LINEAR), rule_of(lora(3, alpha=6)), methods=METHODS)
    place = '@":Net/fc:Linear" layer=0'
    ours = f'{place} rule="all" location="s.yaml:3"'
    assert print_graph(result) == (
        "graph device=cpu\n"
        "range batch 1..\n"
        'input %x: float32[batch, 12] "x"\n'
        'parameter %fc.weight: float32[10, 12] "fc.weight" trainable\n'
        'parameter %fc.lora.down: float32[12, 3] "fc.lora.down" trainable rule="all" site="fc" method="lora" part="down"\n'
        'parameter %fc.lora.up: float32[3, 10] "fc.lora.up" trainable rule="all" site="fc" method="lora" part="up"\n'
        'parameter %fc.bias: float32[10] "fc.bias" trainable\n'
        f"%linear_dense: float32[batch, 10] = aten.linear.default(%x, %fc.weight, %fc.bias) {place}\n"
        f"%linear_down: float32[batch, 3] = aten.matmul.default(%x, %fc.lora.down) {ours}\n"
        f"%mul: float32[batch, 3] = aten.mul.Scalar(%linear_down, 2.0) {ours}\n"
        f"%linear_up: float32[batch, 10] = aten.matmul.default(%mul, %fc.lora.up) {ours}\n"
        f"%linear: float32[batch, 10] = aten.add.Tensor(%linear_dense, %linear_up) {ours}\n"
        '%relu: float32[batch, 10] = aten.relu.default(%linear) @":Net"\n'
        'output %relu "output"\n'
    )


@pytest.mark.parametrize("settings", [{}, {"alpha": 16}, {"alpha": 3.0}, {"alpha": 16, "rslora": True}])
@pytest.mark.parametrize("rank", [1, 4, 10])
def test_trained_factors_give_what_the_papers_say(settings: dict[str, Any], rank: int) -> None:
    """y = W x + b + s B A x with s = alpha / r, of rsLoRA alpha / sqrt(r), A [r, in], B [out, r]."""
    scale = settings.get("alpha", rank) / (sqrt(rank) if "rslora" in settings else rank)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((rank, 12)), rng.standard_normal((10, rank))
    result, _ = rewritten(graph_of(LINEAR), rule_of(lora(rank, **settings)), methods=METHODS)
    trained = with_values(result, {"fc.lora.down": torch.tensor(a.T).float(), "fc.lora.up": torch.tensor(b.T).float()})
    y = X.double().numpy() @ (W + scale * b @ a).T + WEIGHTS["fc.bias"].double().numpy()
    assert np.abs(scale * b @ a).max() > 0.1  # the update is felt
    close(run(trained, X)[0], np.maximum(y, 0))


@pytest.mark.parametrize("settings", [{}, {"init": "gaussian", "alpha": 8}, {"rslora": True, "alpha": 4}])
def test_a_fresh_adapter_changes_no_bit(settings: dict[str, Any]) -> None:
    graph = graph_of(LINEAR)
    result, (outcome,) = rewritten(graph, rule_of(lora(4, **settings)), methods=METHODS)
    assert torch.equal(run(result, X)[0], run(graph, X)[0])
    assert outcome.weight_error == 0
    parts = parts_of(result)
    assert not parts["up"].any()
    assert parts["down"].any()


def test_the_draw_is_that_of_the_libraries() -> None:
    """Kaiming uniform with a = sqrt(5) of [r, in]: within +- 1 / sqrt(in). Gaussian: deviation 1 / r."""
    text = LINEAR.replace("12", "400").replace("10", "300")
    kaiming, gaussian = (
        parts_of(rewritten(graph_of(text), rule_of(lora(16, init=init)), methods=METHODS)[0])["down"] for init in ("kaiming", "gaussian")
    )
    assert 0.999 / 20 < np.abs(kaiming).max() <= 1 / 20  # 6400 draws reach their bound
    assert kaiming.std() == pytest.approx(1 / 20 / sqrt(3), rel=0.03)  # a deviation of 6400 draws: 1 % is a standard error
    assert gaussian.std() == pytest.approx(1 / 16, rel=0.03)
    assert abs(gaussian.mean()) < 4 / 16 / sqrt(gaussian.size)


def test_every_site_draws_from_a_stream_of_its_own() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    both, second = (compiled(net, {"lora": {"rank": 2}}, (torch.zeros(2, 8),), path=path, seed=3) for path in (["0", "1"], ["1"]))
    downs = {name: value for name, value in both.module.named_parameters() if name.endswith("down")}
    assert not torch.equal(downs["0.lora.down"], downs["1.lora.down"])
    assert torch.equal(downs["1.lora.down"], dict(second.module.named_parameters())["1.lora.down"])
    other = compiled(net, {"lora": {"rank": 2}}, (torch.zeros(2, 8),), path=["1"], seed=4)
    assert not torch.equal(downs["1.lora.down"], dict(other.module.named_parameters())["1.lora.down"])


# PiSSA and OLoRA


@pytest.mark.parametrize("init", ["pissa", "olora", "milora"])
@pytest.mark.parametrize("settings", [{}, {"alpha": 8}, {"alpha": 8, "rslora": True}])
def test_base_and_factors_are_the_weight(init: str, settings: dict[str, Any]) -> None:
    for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-12)):  # each entry of the base is rounded once
        text = LINEAR.replace("float32", dtype)
        graph = graph_of(text)
        result, (outcome,) = rewritten(graph, rule_of(lora(3, init=init, **settings)), methods=METHODS)
        parts, w = parts_of(result), only_site(graph).weight().double().numpy()
        scale = settings.get("alpha", 3) / (sqrt(3) if "rslora" in settings else 3)
        whole = parts["base"] + scale * (parts["down"] @ parts["up"]).T
        assert np.abs(whole - w).max() <= tolerance * np.abs(w).max()
        assert outcome.weight_error <= tolerance
        assert "fc.weight" not in [c.path for c in result.state]
        frozen = {c.path: c.trainable for c in result.state}
        assert frozen["fc.lora.base"] is False
        assert frozen["fc.lora.down"]
        assert frozen["fc.lora.up"]
        x = X.to(getattr(torch, dtype))
        close(run(result, x)[0], run(graph, x)[0].double().numpy(), max(tolerance, ROUNDING if dtype == "float32" else 0))


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_pissa_holds_the_leading_triples(alpha: float | None) -> None:
    result, _ = rewritten(graph_of(LINEAR), rule_of(lora(3, init="pissa", alpha=alpha)), methods=METHODS)
    parts, scale = parts_of(result), 1.0 if alpha is None else alpha / 3
    u, s, vh = np.linalg.svd(W)
    close(scale * (parts["down"] @ parts["up"]).T, (u[:, :3] * s[:3]) @ vh[:3], 1e-5)  # float32 singular vectors
    for norms in (np.linalg.norm(parts["down"], axis=0), np.linalg.norm(parts["up"], axis=1)):
        np.testing.assert_allclose(norms, np.sqrt(s[:3] / scale), rtol=1e-5)  # the root of S on each side


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_milora_holds_the_last_triples(alpha: float | None) -> None:
    result, _ = rewritten(graph_of(LINEAR), rule_of(lora(3, init="milora", alpha=alpha)), methods=METHODS)
    parts, scale = parts_of(result), 1.0 if alpha is None else alpha / 3
    u, s, vh = np.linalg.svd(W, full_matrices=False)
    close(scale * (parts["down"] @ parts["up"]).T, (u[:, -3:] * s[-3:]) @ vh[-3:], 1e-6)  # factors rounded once to float32
    for norms in (np.linalg.norm(parts["down"], axis=0), np.linalg.norm(parts["up"], axis=1)):
        np.testing.assert_allclose(norms, np.sqrt(s[-3:] / scale), rtol=1e-6)  # the root of S on each side


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_olora_holds_the_first_columns_of_q(alpha: float | None) -> None:
    result, _ = rewritten(graph_of(LINEAR), rule_of(lora(3, init="olora", alpha=alpha)), methods=METHODS)
    parts = parts_of(result)
    q, r = np.linalg.qr(W)
    np.testing.assert_allclose(parts["up"].T, q[:, :3], atol=1e-6)  # float32 storage
    np.testing.assert_allclose(parts["down"].T, r[:3], atol=1e-5)


def test_what_starts_from_the_weight_wants_it_dense() -> None:
    graph = graph_of(LINEAR)
    base = quantize(quantizer="uniform", bits=8, block_size=16)
    for init in ("pissa", "olora"):
        for before in ((base,), (lora(2),)):
            found = appraise(only_site(graph), rule_of(*before, lora(2, init=init), force=True), METHODS)
            assert isinstance(found, Reject)
            assert found.reason == f"lora with this init takes its start out of the dense weight, and {before[0].method} comes before it"
    result, (outcome,) = rewritten(graph, rule_of(base, lora(2), force=True), methods=METHODS)
    assert outcome.reject is None
    assert {c.path for c in result.state} == {"fc.quantize.codes", "fc.quantize.scales", "fc.lora.down", "fc.lora.up", "fc.bias"}
    after, (second,) = rewritten(graph, rule_of(lora(2, init="pissa"), lora(3)), methods=METHODS)
    assert second.reject is None
    close(run(after, X)[0], run(graph, X)[0].double().numpy())


# forms


QUICK = [("mha-cross", "kaiming"), ("cnn", "pissa")]
GRID = [(name, init) for name in ("mha-cross", "cnn", "mixtral", "gpt2", "bert") for init in ("kaiming", "pissa", "olora")]


@pytest.mark.parametrize(("name", "init"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.full) for pair in GRID if pair not in QUICK)])
def test_every_form_of_a_matmul(name: str, init: str) -> None:
    """Fused qkv, slices of one weight, [in, out] layouts, expert stacks, 1x1 convolutions: a fresh adapter changes no bit, and what is
    taken out of a weight comes back through the factors (float32, amplified by the model's norms: 2e-4)."""
    model, inputs, shapes = ZOO[name].build()
    found = compiled(model, {"lora": {"rank": 2, "alpha": 3, "init": init}}, inputs, dynamic_shapes=shapes)
    rejected = [row for row in found.report.sites if row.rule and row.status != "rewritten"]
    assert all("embedding table" in str(row.reason) for row in rejected)  # a tied head
    assert any(row.status == "rewritten" for row in found.report.sites)
    flat = bind(found.source, *((), inputs) if isinstance(inputs, dict) else (inputs, {}))
    for new, old in zip(run(found.graph, *flat), run(found.source, *flat), strict=True):
        if isinstance(old, torch.Tensor):
            assert torch.equal(new, old) if init == "kaiming" else float((new - old).abs().max()) <= 2e-4 * max(1.0, float(old.abs().max()))


def test_rows_of_a_fused_weight_get_factors_of_their_own() -> None:
    """Queries and values of nn.MultiheadAttention's in_proj adapted, keys not."""
    model, inputs, shapes = ZOO["mha-cross"].build()
    rule = {"match": {"role": "cross_attention.{q,v}"}, "rewrite": {"lora": {"rank": 2}}}
    found = mm.compile(model, {"version": 1, "rules": [rule]}, inputs, shapes)
    rows = [row.path for row in found.report.sites if row.status == "rewritten"]
    assert rows
    assert all("[" in path for path in rows)
    names = dict(found.module.named_parameters())
    for path in rows:
        assert names[f"{path}.lora.down"].shape[1] == names[f"{path}.lora.up"].shape[0] == 2


# specs, plans, reports


def compiled(model: nn.Module, rewrite: Any, inputs: Any, path: Any = "**", **more: Any) -> mm.Compiled:
    return mm.compile(model, {"version": 1, "rules": [{"match": {"path": path}, "rewrite": rewrite}]}, inputs, **more)


def test_report_and_plan_agree() -> None:
    net = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    first = {"name": "first", "match": {"path": "0"}, "rewrite": {"lora": {"rank": 2}}}
    second = {"name": "second", "match": {"path": "2"}, "rewrite": {"lora": {"rank": 4, "alpha": 8, "init": "pissa"}}}
    spec, inputs = {"version": 1, "rules": [first, second]}, (torch.zeros(2, 24),)
    plan, report = mm.plan(net, spec, inputs), mm.compile(net, spec, inputs).report
    for sites in (plan.sites, report.sites):
        (a, b) = sites
        assert (a.rank, b.rank) == (2, 4)
        assert (a.trainable, b.trainable) == (2 * 40, 4 * 24)
        assert a.parameters == (24 * 16, 24 * 16 + 80)
        assert b.parameters == (16 * 8, 16 * 8 + 96)
        assert (a.bytes, b.bytes) == ((4 * 384, 4 * 464), (4 * 128, 4 * 224))
        assert (a.macs, b.macs) == ((384, 464), (128, 224))
        assert [part.method for part in a.parts] == ["lora"]
    assert plan.totals == report.totals
    assert report.sites[0].weight_error == 0


def test_a_tied_head_is_refused_and_untied_on_request() -> None:
    model, inputs, shapes = ZOO["gpt2"].build()
    rule = {"match": {"role": "head"}, "rewrite": {"lora": {"rank": 2}}}
    found = mm.plan(model, {"version": 1, "rules": [rule]}, inputs, shapes)
    assert [row.reason for row in found.sites if row.rule] == [
        "the weight is also read as an embedding table; lora serves only the matmul: use untie: true"
    ]
    for look in (mm.plan, mm.compile):
        report = getattr(found := look(model, {"version": 1, "rules": [{**rule, "untie": True}]}, inputs, shapes), "report", found)
        (row,) = (row for row in report.sites if row.rule)
        assert row.status == "rewritten"
        assert row.parameters[1] - row.parameters[0] == row.trainable  # the table stays one


def test_settings_that_cannot_be() -> None:
    def load(text: dict[str, Any]) -> Any:
        return load_spec({"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"lora": text}}]}, method_table())

    for settings, message in (
        ({"rank": {"energy": 0.9}}, "lora takes a number as its rank, not energy"),
        ({"rank": 2, "rslora": True}, r"rslora scales alpha by sqrt\(rank\): give alpha"),
        ({"rank": 2, "init": "loftq"}, "kaiming"),
        ({"rnak": 2}, "did you mean rank"),
    ):
        with pytest.raises(SpecError, match=message):
            load(settings)
    assert isinstance(Lora(), Method)
    with pytest.raises(SpecError, match="rule all: rank 99 is above min"):
        rewrite(graph_of(LINEAR), [(only_site(graph_of(LINEAR)), rule_of(lora(99)))], METHODS)
    broken = graph_of(LINEAR, {**WEIGHTS, "fc.weight": torch.full((10, 12), torch.nan)})
    with pytest.raises(RewriteError, match=r"fc.weight: 120 of 120 entries are NaN or infinite"):
        rewrite(broken, [(site, rule_of(lora(2, init="pissa"))) for site in find_sites(broken)], METHODS)


def test_the_library_spec_adapts_queries_and_values() -> None:
    for name, roles in (("bert", {"attention.q", "attention.v"}), ("gpt2", {"attention.qkv"})):
        model, inputs, shapes = ZOO[name].build()
        report = mm.plan(model, "lora-r8", inputs, shapes)
        assert {row.role for row in report.sites if row.status == "rewritten"} == roles
        assert {row.rank for row in report.sites if row.status == "rewritten"} == {8}


# mutants

MUTANTS = {
    "scale dropped from the graph": Mutant(
        "Lora.build",
        "times(b, narrow, scale)",
        "narrow if True else b('aten.mul.Scalar', narrow, scale)",
    ),
    "scale dropped from the merge": Mutant("Lora.merge", "float(parts.get('scale', 1.0))", "1.0"),
    "root of rslora forgotten": Mutant("scale_of", "sqrt(rank) if rslora else rank", "rank"),
    "rslora always": Mutant("scale_of", "sqrt(rank) if rslora else rank", "sqrt(rank)"),
    "base not reduced": Mutant("lora._base", "scale * (down @ up).transpose(-2, -1)", "0 * (down @ up).transpose(-2, -1)"),
    "base reduced without the scale": Mutant("lora._base", "scale * (down @ up).transpose(-2, -1)", "(down @ up).transpose(-2, -1)"),
    "pissa without its scale": Mutant("_pissa", "found.s / scale", "found.s"),
    "pissa without the root": Mutant("_pissa", "(found.s / scale).sqrt()", "found.s / scale"),
    "milora without its scale": Mutant("_milora", "s[..., -rank:] / scale", "s[..., -rank:]"),
    "milora from the front": Mutant("_milora", "vh[..., -rank:, :]", "vh[..., :rank, :]"),
    "olora from rows": Mutant("_olora", "w[..., :rank].double", "w[..., -rank:].double"),
    "factors in the wrong order": Mutant("Lora.build", "('down', 'up')", "('up', 'down')"),
    "transposed factor": Mutant(
        "_olora", "(w.double().transpose(-2, -1) @ q, q.transpose(-2, -1))", "(q, q.transpose(-2, -1) @ w.double())"
    ),
    "up drawn instead of zero": Mutant("Lora.solve", "torch.zeros(shape)", "torch.ones(shape)"),
    "base trains": Mutant("Lora.build", "b.const('base', left, trainable=False)", "b.const('base', left)"),
    "bias lost": Mutant("lora._product", "b('aten.linear.default', rows, base, b.bias())", "b('aten.linear.default', rows, base, None)"),
    "dense kept beside the base": Mutant("site_task.keeps_node", "not any((fragment.holds_dense for fragment in fragments))", "True"),
    "init on a base that is gone": Mutant("Lora.splits_weight", "spec.init in _PARTS", "False"),
}


def judged(m: Any) -> list[bool]:
    """What must hold of one linear, by the formulas."""
    method, spec_of = m.Lora(), m.LoraSpec
    apply: Callable[..., Any] = m.rewrite
    appraised = m.appraise
    methods = {**QUANTIZED, "lora": method}
    bias = WEIGHTS["fc.bias"].double().numpy()
    dense = np.maximum(X.double().numpy() @ W.T + bias, 0)
    checks: list[bool] = []
    for settings, scale in (
        ({"alpha": 8.0}, 2.0),
        ({"alpha": 6.0, "rslora": True}, 3.0),
        ({"alpha": 2.0, "init": "pissa"}, 0.5),
        ({"alpha": 8.0, "init": "olora"}, 2.0),
        ({"alpha": 8.0, "init": "milora"}, 2.0),
    ):
        use = MethodUse("lora", spec_of(rank=Rank("fixed", 4), **settings))
        graph = graph_of(LINEAR)
        result, (outcome,) = apply(graph, [(only_site(graph), rule_of(use))], methods)
        parts = parts_of(result)
        checks.append(bool(np.abs(run(result, X)[0].numpy() - dense).max() < 1e-4))
        checks.append(outcome.weight_error < 1e-6)
        checks.append({c.path: c.trainable for c in result.state}.get("fc.lora.base", False) is False)
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((4, 12)), rng.standard_normal((10, 4))
        put = with_values(result, {"fc.lora.down": torch.tensor(a.T).float(), "fc.lora.up": torch.tensor(b.T).float()})
        w = parts.get("base", W)
        checks.append(bool(np.abs(run(put, X)[0].numpy() - np.maximum(X.double().numpy() @ (w + scale * b @ a).T + bias, 0)).max() < 1e-4))
        given = {"down": torch.tensor(a.T), "up": torch.tensor(b.T), "scale": torch.tensor(scale)}
        checks.append(bool(np.allclose(method.merge(given)[0].numpy(), scale * b @ a)))
        if settings.get("init") == "pissa":
            u, s, vh = np.linalg.svd(W)
            checks.append(bool(np.allclose(scale * (parts["down"] @ parts["up"]).T, (u[:, :4] * s[:4]) @ vh[:4], atol=1e-4)))
            checks.append(bool(np.allclose(np.linalg.norm(parts["down"], axis=0), np.sqrt(s[:4] / scale), rtol=1e-3)))
            early = rule_of(quantize(quantizer="uniform", bits=8, block_size=16), use, force=True)
            checks.append(isinstance(appraised(only_site(graph), early, methods), Reject))
        if settings.get("init") == "milora":
            u, s, vh = np.linalg.svd(W, full_matrices=False)
            checks.append(bool(np.allclose(scale * (parts["down"] @ parts["up"]).T, (u[:, -4:] * s[-4:]) @ vh[-4:], atol=1e-4)))
        if settings.get("init") == "olora":
            checks.append(bool(np.allclose(parts["up"].T, np.linalg.qr(W)[0][:, :4], atol=1e-4)))
    return checks


def noticed(m: Any) -> bool:
    try:
        return not all(judged(m))
    except Exception:
        return True


def test_the_checks_pass_on_the_real_code() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert all(judged(m))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str) -> None:
    with mutated(MUTANTS[name]) as m:
        assert noticed(m), name
