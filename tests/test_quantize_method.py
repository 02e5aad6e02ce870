"""quantize and qlora as methods: every quantizer in every form of a matmul, bytes, errors, notes, bad input. Oracle: numpy in float64."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import site as bare_site
from quantizing import METHODS, QUANTIZERS, dense, loftq, names_of, parts_of, put_in, qlora, quantize, relative, stands_for
from rewriting import LINEAR, graph_of, low_rank, moment, only_site, rewritten, rule_of, run, weights_of
from torch import nn

import matmorph as mm
from matmorph.errors import RewriteError, SpecError
from matmorph.ir.core import Graph
from matmorph.ir.site import Choice, Reject
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.kernel_costs import kernel_notes
from matmorph.passes.linalg.quantize import Quantizer
from matmorph.passes.methods import method_table
from matmorph.passes.rewriting.rewrite import rewrite
from matmorph.specs.load import load_spec
from matmorph.specs.schema import Export

# every quantizer: the graph computes with the matrix that its packed weights stand for


def shift_of(w: np.ndarray, spec: Any) -> float:
    """What uniform_clipped adds to every weight, from its definition: clip to mean +- 2 std, then equal steps from low to high."""
    if spec.quantizer != "uniform_clipped":
        return 0.0
    mean, deviation = w.mean(), w.std(ddof=1)
    low, high = max(w.min(), mean - 2 * deviation), min(w.max(), mean + 2 * deviation)
    return float(low + 2 ** (spec.bits - 1) * (high - low + 1e-8) / (2**spec.bits - 1))


def added(graph: Graph) -> float:
    """The same as the graph says it: LoftQ clips what its factors leave over, which no definition knows beforehand."""
    sums = {node.output for node in graph.nodes if node.op == "aten.sum.dim_IntList"}
    factors = [node.args[1] for node in graph.nodes if node.op == "aten.mul.Scalar" and node.args[0] in sums]
    return float(factors[0]) if factors else 0.0


def check_graph(text: str, use: Any, *inputs: torch.Tensor, scale: float = 1.0) -> None:
    graph = graph_of(text)
    result, outcomes = rewritten(graph, rule_of(use, force=True), methods=METHODS)
    assert all(outcome.reject is None for outcome in outcomes), outcomes
    matrices = {}
    for outcome in outcomes:
        w = outcome.site.weight().double().numpy()
        matrices[outcome.site] = stands_for(outcome, scale) + (added(result) if use.method == "loftq" else shift_of(w, use.spec))
        assert outcome.weight_error == pytest.approx(relative(w, matrices[outcome.site]), rel=1e-5)  # float32 levels
    for found, wanted in zip(run(result, *inputs), run(put_in(graph, matrices), *inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5)  # float32, sums of 12 or less of size 10


@pytest.mark.parametrize("settings", QUANTIZERS, ids=names_of)
@pytest.mark.parametrize("method", [quantize, qlora, loftq])
def test_a_linear_computes_with_what_its_codes_stand_for(method: Any, settings: dict[str, Any]) -> None:
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(3))
    check_graph(LINEAR, method(**settings), x)


FORMS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "x @ W.T, three axes, no bias": (
        """range s 1..
input %x: float32[b, s, 6] "x"
parameter %w: float32[5, 6] "fc.weight"
%t: float32[6, 5] = aten.transpose.int(%w, 0, 1)
%y: float32[b, s, 5] = aten.matmul.default(%x, %t)
output %y "output"
""",
        (2, 3, 6),
    ),
    "Conv1D": (
        """input %x: float32[b, 6] "x"
parameter %w: float32[6, 5] "fc.weight"
parameter %c: float32[5] "fc.bias"
%y: float32[b, 5] = aten.addmm.default(%c, %x, %w)
output %y "output"
""",
        (4, 6),
    ),
    "addmm with a bias of two axes": (
        """input %x: float32[b, 6] "x"
parameter %w: float32[6, 5] "fc.weight"
parameter %c: float32[1, 5] "fc.bias"
%y: float32[b, 5] = aten.addmm.default(%c, %x, %w)
output %y "output"
""",
        (4, 6),
    ),
    "W @ x": (
        """range s 1..
input %x: float32[b, 6, s] "x"
parameter %w: float32[5, 6] "fc.weight"
%y: float32[b, 5, s] = aten.matmul.default(%w, %x)
output %y "output"
""",
        (2, 6, 3),
    ),
    "1x1 convolution with a bias": (
        """input %x: float32[b, 6, 4, 3] "x"
parameter %w: float32[5, 6, 1, 1] "conv.weight"
parameter %c: float32[5] "conv.bias"
%y: float32[b, 5, 4, 3] = aten.conv2d.default(%x, %w, %c)
output %y "output"
""",
        (2, 6, 4, 3),
    ),
    "slices of one weight": (
        """input %x: float32[b, 6] "x"
parameter %w: float32[12, 6] "in_proj_weight"
parameter %c: float32[5] "q.bias"
%q: float32[5, 6] = aten.slice.Tensor(%w, 0, 0, 5)
%k: float32[7, 6] = aten.slice.Tensor(%w, 0, 5, 12)
%y: float32[b, 5] = aten.linear.default(%x, %q, %c)
%z: float32[b, 7] = aten.linear.default(%x, %k)
output %y "output_0"
output %z "output_1"
""",
        (2, 6),
    ),
    "one weight in two places": (
        """input %x: float32[b, 6] "x"
parameter %w: float32[6, 6] "fc.weight"
parameter %c: float32[6] "fc.bias"
%y: float32[b, 6] = aten.linear.default(%x, %w, %c)
%z: float32[b, 6] = aten.linear.default(%y, %w)
output %z "output"
""",
        (2, 6),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "use",
    [
        quantize(quantizer="nf4"),
        quantize(quantizer="uniform_clipped", bits=4),
        loftq(quantizer="uniform", bits=4, zero_point=True, alpha=6),
    ],
    ids=["nf4", "clipped", "loftq"],
)
def test_every_form(form: str, use: Any) -> None:
    text, shape = FORMS[form]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    check_graph(f"graph device=cpu\nrange b 1..\n{text}", use, x, scale=getattr(use.spec, "adapter_scale", 1.0))


def test_the_bias_goes_into_the_kernel_where_it_can() -> None:
    def added(form: str) -> list[str]:
        graph = graph_of(f"graph device=cpu\nrange b 1..\n{FORMS[form][0]}")
        result, _ = rewritten(graph, rule_of(quantize(quantizer="uniform", bits=4), force=True), methods=METHODS)
        return [node.op for node in result.nodes if node.op.startswith(("aten.add", "matmorph"))]

    kernel, addition = "matmorph.matmul_nbits.default", "aten.add.Tensor"
    assert added("Conv1D") == [kernel]
    assert added("1x1 convolution with a bias") == [kernel]
    assert added("addmm with a bias of two axes") == [kernel, addition]  # kernels take [out] only
    assert added("one weight in two places") == [kernel, kernel]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("use", [quantize(quantizer="nf4"), loftq(quantizer="uniform", bits=4)], ids=["nf4", "u4"])
def test_other_float_types(dtype: str, use: Any) -> None:
    text = LINEAR.replace("float32", dtype)
    graph = graph_of(text)
    result, (outcome,) = rewritten(graph, rule_of(use, force=True), methods=METHODS)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    parts = {const.path.rpartition(".")[2]: const.load() for const in outcome.consts}
    assert parts["scales"].dtype == (torch.float16 if dtype == "float16" and use.method == "loftq" else torch.float32)
    assert all(parts[name].dtype == x.dtype for name in ("down", "up") if name in parts)
    arrays = {name: (part if part.dtype == torch.uint8 else part.double()).detach().numpy() for name, part in parts.items()}
    matrix = dense(arrays, (10, 12), use.spec)
    if "down" in arrays:
        matrix += (arrays["down"] @ arrays["up"]).T
    wanted = torch.relu(x.double() @ torch.from_numpy(matrix).T + weights_of(text, dtype=x.dtype)["fc.bias"].double())
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    torch.testing.assert_close(run(result, x)[0].double(), wanted, rtol=0, atol=60 * rounding)  # a few roundings of numbers up to 15


# what it takes


@pytest.mark.parametrize("settings", QUANTIZERS, ids=names_of)
@pytest.mark.parametrize("shape", [(10, 12), (7, 200), (33, 65)])
def test_cost_is_what_is_built(shape: tuple[int, int], settings: dict[str, Any]) -> None:
    n, k = shape
    text = LINEAR.replace("12", str(k)).replace("10", str(n))
    _, (outcome,) = rewritten(graph_of(text), rule_of(loftq(2, iterations=1, **settings), force=True), methods=METHODS)
    assert outcome.cost.bytes == sum(const.nbytes for const in outcome.consts)
    assert outcome.cost.parameters == n * k + 2 * (n + k)
    assert outcome.cost.coded == n * k
    shift = k if settings["quantizer"] == "uniform_clipped" else 0
    assert outcome.cost.macs == n * k + 2 * (n + k) + shift
    spec = outcome.parts[0].use.spec
    quantizer = Quantizer("uniform" if shift else spec.quantizer, spec.bits, spec.block_size, spec.zero_point, spec.scale)
    assert outcome.cost.bytes == quantizer.nbytes(shape) + 4 * 2 * (n + k)
    assert {const.path: (const.kind, const.trainable) for const in outcome.consts if "loftq.down" not in const.path} | {} == {
        f"fc.loftq.{name}": ("buffer", False) if name != "up" else ("parameter", True)
        for name in ("codes", "scales", *(["zero_points"] if spec.zero_point else []), "up")
    }


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24, padding_idx=0)
        self.fc1, self.fc2, self.head = nn.Linear(24, 70), nn.Linear(70, 24, bias=False), nn.Linear(24, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc2(torch.relu(self.fc1(self.embed(ids)))))


def net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.randint(0, 40, (3, 5))


SPECS: dict[str, dict[str, Any]] = {
    "nf4": {"quantize": {"quantizer": "nf4"}},
    "u2": {"loftq": {"quantizer": "uniform", "bits": 2, "zero_point": True, "scale": "search", "rank": 2}},
    "clipped": {"qlora": {"quantizer": "uniform_clipped", "bits": 8, "rank": 2, "alpha": 4}},
}


def spec_of(rewrite: Any, match: Any = None, **more: Any) -> dict[str, Any]:
    rule = {"name": "all", "match": match or {"op": "matmul"}, "rewrite": rewrite, "force": True}
    return {"version": 1, "name": "q", "rules": [rule], **more}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "keep"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("half", [False, True])
def test_a_plan_says_what_compile_does(name: str, precision: str, half: bool) -> None:
    model, ids = net()
    model = model.half() if half else model
    spec = spec_of(SPECS[name], export={"precision": precision})
    plan = mm.plan(model, spec, (ids,)).to_dict()
    made = mm.compile(model, spec, (ids,)).report.to_dict()
    for planned, row in zip(plan["sites"], made["sites"], strict=True):
        for key in ("path", "status", "parameters", "bytes", "macs", "trainable", "coded", "rank"):
            assert planned[key] == row[key], (planned["path"], key)
        assert set(planned["notes"]) <= set(row["notes"])
    assert plan["totals"] == made["totals"]
    assert set(plan["notes"]) == set(made["notes"])


def test_totals_count_codes_as_the_numbers_they_stand_for() -> None:
    model, ids = net()
    report = mm.compile(model, spec_of(SPECS["u2"]), (ids,)).report
    factors = 2 * ((24 + 70) + (70 + 24) + (24 + 3))
    before = sum(parameter.numel() for parameter in model.parameters())
    assert report.totals.parameters == (before, before + factors)
    assert report.totals.trainable == factors
    assert [row.coded for row in report.sites if row.form != "embedding"] == [24 * 70, 70 * 24, 24 * 3]


def test_a_stage_can_quantise_what_another_inserted() -> None:
    model, ids = net()
    first = {"name": "low", "match": {"path": "fc1"}, "rewrite": {"low_rank": {"rank": 8}}}
    second = {
        "name": "codes",
        "match": {"inserted_by": "low"},
        "rewrite": {"quantize": {"quantizer": "uniform", "bits": 8, "block_size": 16}},
    }
    stages = [{"name": "a", "rules": [first]}, {"name": "b", "rules": [second]}]
    made = mm.compile(model, {"version": 1, "stages": stages}, (ids,))
    assert made.report.totals.parameters[1] == made.report.totals.parameters[0] - 24 * 70 + 8 * (24 + 70)
    assert sum(op.op.startswith("matmorph") for op in made.graph.nodes) == 2
    factors = mm.compile(model, {"version": 1, "rules": [first]}, (ids,)).module
    assert 0 < (made.module(ids) - factors(ids)).abs().max() < 0.01  # 8 bits of outputs of size 1


def test_a_quantised_weight_is_no_site_any_more() -> None:
    model, ids = net()
    rule = {"name": "one", "match": {"path": "fc1"}, "rewrite": SPECS["nf4"]}
    stages = [{"name": "a", "rules": [rule]}, {"name": "b", "rules": [{**rule, "name": "two"}]}]
    with pytest.raises(SpecError) as caught:
        mm.compile(model, {"version": 1, "stages": stages}, (ids,))
    assert "quantised already by an earlier stage: fc1" in str(caught.value)


# what is refused


@pytest.mark.parametrize(
    ("given", "use", "reason"),
    [
        ({"batch": 4}, quantize(quantizer="nf4"), "quantize takes one matrix, this is a stack of 4 experts"),
        ({"blocked": "overlap"}, quantize(quantizer="nf4"), "overlap"),
        ({"form": "embedding", "gathers": (None,)}, loftq(quantizer="nf4"), "this is an embedding table: quantize serves it"),
        ({"gathers": (None,)}, qlora(quantizer="nf4"), "use untie: true"),
        ({"gathers": (None,)}, quantize(quantizer="nf4"), "can be looked up in uniform codes only"),
        ({}, loftq(5, quantizer="nf4"), r"rank 5 is above min\(in, out\) = 4"),
        ({"weight": torch.ones(4, 8, dtype=torch.float32)}, quantize(quantizer="nf4"), ""),
    ],
)
def test_check(given: dict[str, Any], use: Any, reason: str) -> None:
    found = METHODS[use.method].check(bare_site("a", **given), use.spec)
    if not reason:
        assert found is None
        return
    assert isinstance(found, Reject)
    assert re.search(reason, found.reason)


def test_a_weight_that_is_no_float_is_refused() -> None:
    one = bare_site("a")
    eight = replace(one, const=replace(one.const, type=replace(one.const.tensor, dtype="float8_e4m3fn")))
    assert "needs a weight of float16" in METHODS["quantize"].check(eight, quantize(quantizer="nf4").spec).reason


def test_bytes_law() -> None:
    """One column per row takes a whole block of codes and a scale: more than a float."""
    graph = graph_of(LINEAR.replace("12", "1"))
    for force, rejected in ((False, True), (True, False)):
        _, (outcome,) = rewritten(graph, rule_of(quantize(quantizer="uniform", bits=8), force=force), methods=METHODS)
        assert (outcome.reject is not None) is rejected


@pytest.mark.parametrize("use", [quantize(quantizer="uniform", bits=4), loftq(quantizer="nf4"), qlora(quantizer="nf2")])
def test_a_bad_weight_is_named(use: Any) -> None:
    weights = weights_of(LINEAR)
    weights["fc.weight"][1, 1] = float("inf")
    with pytest.raises(RewriteError, match=r"^fc\.weight: 1 of 120 entries are NaN or infinite"):
        rewritten(graph_of(LINEAR, weights), rule_of(use), methods=METHODS)


@pytest.mark.parametrize("settings", QUANTIZERS, ids=names_of)
@pytest.mark.parametrize("value", [0.0, 1e-42, 3.0, -5e30])
def test_degenerate_weights(value: float, settings: dict[str, Any]) -> None:
    """All zero, denormal, constant, huge: finite, and no further from the weight than the weight is from zero."""
    weights = weights_of(LINEAR) | {"fc.weight": torch.full((10, 12), value)}
    _, (outcome,) = rewritten(graph_of(LINEAR, weights), rule_of(quantize(**settings), force=True), methods=METHODS)
    assert np.isfinite(stands_for(outcome)).all()
    assert outcome.weight_error <= 1 + 1e-6  # float32


def test_the_largest_float16_weights_keep_their_scales_in_float16() -> None:
    """The step over a range of 1.2e5 is 4e4, below float16's 65504: finite, and half a step is a third of each |w|."""
    weights = weights_of(LINEAR) | {"fc.weight": torch.full((10, 12), 6e4) * torch.tensor([1.0, -1.0]).repeat(6)}
    weights = {name: tensor.half() for name, tensor in weights.items()}
    use = quantize(quantizer="uniform", bits=2, zero_point=True)
    _, (outcome,) = rewritten(graph_of(LINEAR.replace("float32", "float16"), weights), rule_of(use, force=True), methods=METHODS)
    assert np.isfinite(stands_for(outcome)).all()
    assert outcome.weight_error <= 1 / 3 + 2**-10  # and the scale's own rounding to float16


HEAD = """version: 1
rules:
  - name: all
    match: {op: matmul}
    rewrite:
      """
BAD = [
    ("quantize: {bits: 4}", "s.yaml:6:17: rules[0].rewrite.quantize: quantizer is missing"),
    (
        "quantize: {quantizer: nf5}",
        "s.yaml:6:29: rules[0].rewrite.quantize.quantizer: expected one of nf4, nf3, nf2, uniform, uniform_clipped",
    ),
    ("quantize: {quantizer: uniform}", "s.yaml:6:17: rules[0].rewrite.quantize: uniform needs bits: 2, 3, 4, 8"),
    ("quantize: {quantizer: uniform, bits: 5}", "s.yaml:6:44: rules[0].rewrite.quantize.bits: expected one of 2, 3, 4, 8 or auto, got 5"),
    ("quantize: {quantizer: nf4, bits: 2}", "s.yaml:6:17: rules[0].rewrite.quantize: nf4 has 4 bits, not 2"),
    ("quantize: {quantizer: nf4, block_size: 48}", "block_size: expected one of 16, 32, 64, 128, 256 or channel, got 48"),
    ("quantize: {quantizer: nf4, scale: search}", "nf4 has neither a zero point nor a scale search: they belong to uniform"),
    ("quantize: {quantizer: uniform, bits: 4, double_quant: true}", "double quantisation is for tables (nf4, nf3, nf2), not for uniform"),
    ("quantize: {quantizer: uniform, bits: 4, rounding: gptp}", "rounding: expected one of nearest, gptq, got gptp; did you mean gptq?"),
    ("quantize: {quantizer: uniform, bits: 8, zero_point: float}", "zero points that are no whole numbers with 2, 3, 4 bits, not 8"),
    ("loftq: {quantizer: nf4}", "s.yaml:6:14: rules[0].rewrite.loftq: rank is missing"),
    ("loftq: {quantizer: nf4, rank: {energy: 0.9}}", "s.yaml:6:14: rules[0].rewrite.loftq: loftq takes a number as its rank, not energy"),
    ("loftq: {quantizer: nf4, rank: 4, iterations: 0}", "s.yaml:6:52: rules[0].rewrite.loftq.iterations: expected an integer >= 1, got 0"),
    ("qlora: {quantizer: nf4, rank: 4, alpha: 0}", "s.yaml:6:47: rules[0].rewrite.qlora.alpha: expected a number > 0, got 0"),
    ("qlora: {quantizer: nf4, rank: 4, iterations: 2}", "s.yaml:6:40: rules[0].rewrite.qlora.iterations: unknown key"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_settings_are_named_with_their_place(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(HEAD + text + "\n")
    with pytest.raises(SpecError) as caught:
        load_spec("s.yaml", method_table())
    assert message in str(caught.value)
    assert str(caught.value).startswith("s.yaml:6:")


@pytest.mark.parametrize("method", [loftq, qlora])
def test_a_rank_that_no_site_has_is_a_spec_error(method: Any) -> None:
    with pytest.raises(SpecError, match=r"rule all: rank 11 is above min\(in, out\) of every matched site"):
        rewritten(graph_of(LINEAR), rule_of(method(11, quantizer="nf4")), methods=METHODS)


# qlora, double quantisation, whitening and merging


def test_qlora_starts_from_the_quantised_weight() -> None:
    graph = graph_of(LINEAR)
    _, (plain,) = rewritten(graph, rule_of(quantize(quantizer="nf4"), force=True), methods=METHODS)
    _, (outcome,) = rewritten(graph, rule_of(qlora(4, quantizer="nf4", alpha=8), force=True), methods=METHODS)
    parts = parts_of(outcome.consts)
    assert outcome.weight_error == plain.weight_error
    assert not parts["up"].any()
    assert np.abs(parts["down"]).max() <= 12**-0.5
    assert np.abs(parts["down"]).max() > 0.8 * 12**-0.5  # 48 numbers: below 0.8 with probability 2e-5
    assert {const.path for const in outcome.consts if const.trainable} == {"fc.qlora.down", "fc.qlora.up"}


def test_the_draw_depends_on_site_and_seed_alone() -> None:
    def down(seed: int, name: str = "fc") -> np.ndarray:
        graph = graph_of(LINEAR.replace("fc.weight", f"{name}.weight"), weights_of(LINEAR.replace("fc.weight", f"{name}.weight")))
        rule = rule_of(qlora(quantizer="nf4"), force=True)
        _, (outcome,) = rewrite(graph, [(find_sites(graph)[0], rule)], METHODS, seed=seed)
        return parts_of(outcome.consts)["down"]

    np.testing.assert_array_equal(down(1), down(1))
    assert (down(1) != down(2)).all()
    assert (down(1) != down(1, "other")).all()


def test_double_quantisation_rounds_the_scales_and_says_what_it_saves() -> None:
    text = LINEAR.replace("12", "128").replace("10", "64")
    found = {}
    for double in (False, True):
        _, (found[double],) = rewritten(graph_of(text), rule_of(quantize(quantizer="nf4", double_quant=double)), methods=METHODS)
    plain, twice = (parts_of(found[double].consts) for double in (False, True))
    np.testing.assert_array_equal(plain["codes"], twice["codes"])
    assert 0 < np.abs(plain["scales"] - twice["scales"]).max() <= np.abs(plain["scales"] - plain["scales"].mean()).max() / 100
    assert found[True].cost == found[False].cost
    numbers = Quantizer("nf4", double=True).nbytes((64, 128)), 64 * 128 // 2 + 4 * 128
    assert found[True].notes == (
        f"double quantisation: {numbers[0]:,} bytes as a storage format, {numbers[1]:,} here, where the kernel takes expanded scales",
    )


def test_output_errors_are_measured_where_there_is_data() -> None:
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, -1, 12)
    _, (outcome,) = rewritten(graph_of(LINEAR), rule_of(quantize(quantizer="nf2"), force=True), {"fc": moment(x)}, METHODS)
    w, rows = only_site(graph_of(LINEAR)).weight().double().numpy(), x.double().numpy()
    assert outcome.output_error == pytest.approx(relative(rows @ w.T, rows @ stands_for(outcome).T), rel=1e-5)  # float32 levels


def test_the_predicted_error_of_loftq_is_that_of_its_first_iterate() -> None:
    graph, use = graph_of(LINEAR), loftq(quantizer="nf4", iterations=5)
    _, (outcome,) = rewritten(graph, rule_of(use, force=True), methods=METHODS)
    method, site = METHODS[use.method], only_site(graph)
    (error,) = method.errors(site, use.spec, list(method.choices(site, use.spec)), None)
    assert outcome.weight_error < error.weight_error  # the best of five iterates; here a later one is better than the first


@pytest.mark.parametrize("use", [quantize(quantizer="nf4"), qlora(quantizer="nf4"), loftq(quantizer="nf4", iterations=1)])
def test_errors_without_a_rewrite_and_merge(use: Any) -> None:
    graph = graph_of(LINEAR)
    method, site = METHODS[use.method], only_site(graph)
    _, (outcome,) = rewritten(graph, rule_of(use, force=True), methods=METHODS)
    (error,) = method.errors(site, use.spec, list(method.choices(site, use.spec)), None)
    assert error.weight_error == pytest.approx(outcome.weight_error, rel=1e-4)  # float32 products
    parts = {name: torch.from_numpy(part) for name, part in parts_of(outcome.consts).items()}
    base = torch.from_numpy(dense(parts_of(outcome.consts), (10, 12), use.spec)).float()
    merged, bias = method.merge({**parts, "base": base})
    assert bias is None
    np.testing.assert_allclose(merged.numpy(), stands_for(outcome), atol=1e-6)  # float32


# notes on kernels


@pytest.mark.parametrize(
    ("use", "export", "words"),
    [
        (quantize(quantizer="nf4"), Export(target=("cpu",)), ["MatMulBnb4", "3.5 to 7.1 x at 1 row", "3.6 to 3.7 x at 16 rows"]),
        (quantize(quantizer="nf4"), Export(target=("cuda",)), ["cuda"]),
        (quantize(quantizer="nf4"), Export(target=("cpu",), tokens=(300,)), ["1.2 to 1.5 x at 256 rows"]),
        (quantize(quantizer="uniform", bits=4), Export(target=("cpu",)), ["float32 activations", "0.25 to 0.7 x at 1 row"]),
        (quantize(quantizer="uniform", bits=4), Export(activations="int8"), ["int8 activations", "0.08 to 0.26 x at 1 row"]),
        (quantize(quantizer="uniform", bits=2), Export(), ["17 to 20 x at 1 row"]),
        (quantize(quantizer="uniform_clipped", bits=2), Export(activations="int8"), ["0.07 to 0.22 x at 1 row"]),
        (quantize(quantizer="uniform", bits=2, block_size=16), Export(activations="int8"), ["float32", "17 to 20 x at 1 row"]),
        (quantize(quantizer="uniform", bits=8), Export(activations="int8"), ["0.36 x at 1 row"]),
        (quantize(quantizer="nf2"), Export(), ["rebuild", "speed and memory of dense"]),
        (quantize(quantizer="nf2"), Export(codebook="packed"), ["22 to 28 x at 1 row"]),
        (loftq(quantizer="nf3"), Export(codebook="packed"), ["48 to 51 x at 1 row"]),
    ],
)
def test_known_costs_of_kernels(use: Any, export: Export, words: list[str]) -> None:
    _, (outcome,) = rewritten(graph_of(LINEAR), rule_of(use, force=True), methods=METHODS)
    notes = kernel_notes(outcome, export)
    assert all(any(word in note for note in notes) for word in words), notes
    places = {note.partition(" ")[0].rstrip(":") for note in notes} & {"cpu", "cuda"}
    assert places == (set(export.target) if "rebuild" not in notes[0] else set())


def test_methods_without_codes_have_no_such_notes() -> None:
    _, (outcome,) = rewritten(graph_of(LINEAR), rule_of(low_rank(2)))
    assert kernel_notes(outcome, Export()) == ()


def test_choices_are_one() -> None:
    site = only_site(graph_of(LINEAR))
    assert list(METHODS["quantize"].choices(site, quantize(quantizer="nf4").spec)) == [Choice()]
    assert list(METHODS["loftq"].choices(site, loftq(3, quantizer="nf4").spec)) == [Choice(3)]


# ONNX Runtime


@pytest.mark.parametrize("settings", [s for s in QUANTIZERS if s.get("bits", 4) == 4 or s["quantizer"] == "nf2"], ids=names_of)
def test_the_artefact_agrees_with_torch(settings: dict[str, Any], tmp_path: Path) -> None:
    from matmorph.runtime import Session

    model, ids = net()
    made = mm.compile(model, spec_of({"loftq": {**settings, "rank": 2, "alpha": 4}}, export={"target": ["cpu"]}), (ids,))
    folder = made.save(tmp_path / "out")
    (found,) = Session(folder, "cpu").run({"ids": ids.numpy()}).values()
    np.testing.assert_allclose(found, made.module(ids).detach().numpy(), atol=1e-5)  # float32, outputs of size 1
    assert made.report.totals.bytes[1] <= (folder / "model.onnx.data").stat().st_size <= made.report.totals.bytes[1] + 16 * 64  # padding
