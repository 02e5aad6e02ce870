"""glora: the paper's formula, every form of a matmul, special cases by their own formulas, merging; mutants. Oracle: numpy in float64."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from adapting import U4, X, compiled, far, network, trained
from matmul_forms import FORMS
from mutating import Mutant, mutated, unmutated
from torch import nn

import matmorph as mm
from matmorph.errors import ExportError, SpecError
from matmorph.ir.evaluate import bind, evaluate
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace
from matmorph.passes.adapters.values import with_values
from matmorph.passes.methods.glora.method import Glora
from matmorph.passes.methods.glora.settings import COLUMNS, GATE_COLUMNS, WORDS, GloraSpec
from matmorph.passes.rewriting.rewrite import rewrite
from matmorph.runtime import Session

ROUNDING = 2e-6
"""Of float32 networks of two layers, relative to the largest output: roundings of 6e-8 of sums of some 24 terms."""
EXACT = 1e-12
"""Of the same in float64: roundings of 1e-16, with room for the sums."""
ALL = {"A": "lora", "B": "lora", "C": "lora", "D": "vector", "E": "vector", "rank": 2}
CHOICES = [dict(zip(WORDS, words, strict=True)) for words in itertools.product(*WORDS.values())]


def numbers(shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: 0.3 * rng.standard_normal(shape) for name, shape in shapes.items()}


def tensor_of(parts: Mapping[str, np.ndarray], name: str, rows: int) -> np.ndarray | float:
    """A to E as what broadcasts to its size, columns for vectors."""
    if f"{name}_up" in parts:
        return parts[f"{name}_up"] @ parts[f"{name}_down"]
    if name not in parts:
        return 0.0
    return parts[name].reshape(-1, 1) if len(parts[name]) == rows else float(parts[name][0])


def formula(x: np.ndarray, w: np.ndarray, b: np.ndarray | None, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """(W + W o A + B) x + W C + D o b + E + b, eq. 10, term by term."""
    outs, ins = w.shape
    y = x @ w.T + x @ (w * tensor_of(parts, "A", outs)).T + x @ (np.zeros_like(w) + tensor_of(parts, "B", outs)).T
    y = y + (w @ (np.zeros((ins, 1)) + tensor_of(parts, "C", ins))).T
    for name in "DE":
        column = np.zeros((outs, 1)) + tensor_of(parts, name, outs)
        y = y + (column.T if name == "E" else 0 if b is None else column.T * b)
    return y if b is None else y + b


def parts_of(values: Mapping[str, torch.Tensor], site: str = "0") -> dict[str, np.ndarray]:
    start = f"{site}.glora."
    return {name.removeprefix(start): value.double().numpy() for name, value in values.items() if name.startswith(start)}


def lone(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(24, 16, bias=bias)).to(dtype)


# the spec


def test_the_words_are_those_of_the_paper() -> None:
    assert len(CHOICES) == 432
    assert GATE_COLUMNS == len(COLUMNS) == 17
    assert [len(words) for words in WORDS.values()] == [4, 4, 3, 3, 3]
    searched = GloraSpec(search=True)
    assert searched.words == WORDS


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "glora changes nothing where A to E are all none"),
    ({"A": ["lora", "vector"]}, "A is one of lora, vector: name one, or set search: true"),
    ({"A": "vector", "search": True, "B": "none", "C": "none", "D": "none", "E": "none"}, "there is nothing to search"),
    ({"E": ["scalar", "scalar"], "search": True}, "E names a word twice"),
    ({"C": "scalar"}, "expected"),
    ({"A": "vektor"}, "did you mean vector"),
    ({"F": "vector"}, "unknown key"),
    ({"A": "lora", "rank": 0}, "rank"),
])  # fmt: skip
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        mm.load_spec({"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"glora": settings}}]})
    assert message in str(caught.value)


# the formula


@pytest.mark.parametrize("bias", [True, False])
def test_merging_is_the_formula_in_every_configuration(bias: bool) -> None:
    """432 configurations in float64: `Glora.merge` against eq. 10 term by term."""
    rng = np.random.default_rng(0)
    w, b, x = rng.standard_normal((16, 24)), rng.standard_normal(16), rng.standard_normal((5, 24))
    sides = {"A": (16, 24), "B": (16, 24), "C": (24, 1), "D": (16, 1), "E": (16, 1)}
    for words in CHOICES:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, word in words.items():
            n, m = sides[name]
            shapes |= {"lora": {f"{name}_up": (n, 3), f"{name}_down": (3, m)}, "vector": {name: (n,)}, "scalar": {name: (1,)}}.get(word, {})
        parts = numbers(shapes)
        given = {name: torch.tensor(value) for name, value in {"base": w, **({"bias": b} if bias else {}), **parts}.items()}
        merged, shift = Glora().merge(given)
        y = x @ merged.numpy().T + (0 if shift is None else shift.numpy())
        np.testing.assert_allclose(y, formula(x, w, b if bias else None, parts), rtol=0, atol=50 * EXACT)  # results are of size 50


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_matmul_merges_exactly(form: str) -> None:
    """Unmerged and merged in float64, all five tensors random; and the start changes nothing."""
    make, shapes = FORMS[form]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double().eval()
        inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    rule = {"match": {"op": "matmul"}, "rewrite": {"glora": ALL}}
    found = mm.compile(model, {"version": 1, "rules": [rule]}, inputs, tuple({0: "batch"} for _ in inputs))
    assert all(row.status == "rewritten" for row in found.report.sites)
    assert far(found.module(*inputs), model(*inputs)) < EXACT
    values = trained(found)
    ready, merged = found.load_trained({name: value.double() for name, value in values.items()}), found.merge(values)
    assert far(ready.module(*inputs), model(*inputs)) > 0.1
    assert far(merged.module(*inputs), ready.module(*inputs)) < EXACT
    assert merged.adapters == ()
    assert not any("glora" in const.path for const in merged.graph.state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [ALL, {"C": "vector"}, {"A": "scalar", "B": "vector", "E": "scalar"}])
def test_a_compiled_layer_is_the_formula(settings: dict[str, Any], bias: bool) -> None:
    model, x = lone(bias), X.double()
    rules = [{"match": {"op": "matmul"}, "rewrite": {"glora": settings}}]
    found = mm.compile(model, {"version": 1, "rules": rules}, (x,), ({0: "batch"},))
    values = {name: value.double() for name, value in trained(found).items()}
    ready, merged = found.load_trained(values), found.merge(values)
    w, b = model[0].weight.detach().numpy(), model[0].bias.detach().numpy() if bias else None
    wanted = torch.tensor(formula(x.numpy(), w, b, parts_of(values)))
    assert far(ready.module(x), wanted) < EXACT
    assert far(merged.module(x), wanted) < EXACT
    gains = not bias and any(name in settings for name in "CE")
    assert ("0.bias" in {const.path for const in merged.graph.state}) == (bias or gains)
    (row,) = found.report.sites
    assert ("the layer has no bias, and gains one" in row.notes) == gains
    assert row.weight_error == 0
    assert row.trainable == sum(value.numel() for value in values.values())


def test_merged_in_float32_to_a_rounding() -> None:
    found = compiled({"glora": ALL})
    values = trained(found)
    merged = found.merge(values)
    assert far(merged.module(X), found.load_trained(values).module(X)) < ROUNDING
    assert {const.path for const in merged.graph.state} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert len(merged.graph.nodes) == len(found.source.nodes)
    for line in merged.merged:
        assert (line.base, line.methods) == ("dense", ("glora",))
        assert line.error < 6e-8  # one rounding to float32
    assert merged.report.totals.trainable == 0
    assert merged.report.totals.parameters[1] == merged.report.totals.parameters[0]
    assert torch.equal(merged.unmerge().module(X), found.load_trained(values).module(X))


def test_with_lora_beside_it() -> None:
    for both in ([{"glora": ALL}, {"lora": {"rank": 2}}], [{"lora": {"rank": 2}}, {"glora": ALL}]):
        found = compiled(both, path="0")
        values = trained(found)
        merged = found.merge(values)
        assert far(merged.module(X), found.load_trained(values).module(X)) < ROUNDING
        assert merged.merged[0].methods == tuple(next(iter(use)) for use in both)


# special cases, each by its own formula


def special(settings: dict[str, Any], values: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """(answer with these values, W, b) of one float64 layer."""
    model, x = lone(), X.double()
    found = mm.compile(model, {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"glora": settings}}]}, (x,), ({0: "batch"},))
    ready = found.load_trained({f"0.glora.{name}": torch.tensor(value) for name, value in values.items()})
    return ready.module(x), model[0].weight.detach().numpy(), model[0].bias.detach().numpy()


def settings_of(preset: str) -> dict[str, Any]:
    (rule,) = mm.load_spec(preset).rules
    spec = rule.rewrite[0].spec
    return {**{name: list(words) for name, words in spec.words.items() if words != ("none",)}, "rank": spec.rank}


def test_lora() -> None:
    parts = numbers({"B_up": (16, 2), "B_down": (2, 24)})
    y, w, b = special({"B": "lora", "rank": 2}, parts)
    assert far(y, torch.tensor(X.double().numpy() @ (w + parts["B_up"] @ parts["B_down"]).T + b)) < EXACT


def test_bitfit() -> None:
    parts = numbers({"E": (16,)})
    y, w, b = special(settings_of("bitfit"), parts)
    assert far(y, torch.tensor(X.double().numpy() @ w.T + (b + parts["E"]))) < EXACT


def test_ssf() -> None:
    """y = gamma o (W x + b) + beta with gamma = 1 + A = 1 + D."""
    scale, shift = numbers({"A": (16,), "E": (16,)}).values()
    y, w, b = special(settings_of("ssf"), {"A": scale, "D": scale, "E": shift})
    assert far(y, torch.tensor((1 + scale) * (X.double().numpy() @ w.T + b) + shift)) < EXACT


def test_channel_scale() -> None:
    parts = numbers({"A": (16,)})
    y, w, b = special(settings_of("channel-scale"), parts)
    assert far(y, torch.tensor((1 + parts["A"]) * (X.double().numpy() @ w.T) + b)) < EXACT


# parameters


class Block(nn.Module):
    """The matmuls of a layer of ViT-B; on the meta device nothing is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(768, 2304), nn.Linear(768, 768)
        self.fc1, self.fc2 = nn.Linear(768, 3072), nn.Linear(3072, 768)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(self.proj(self.qkv(x)[..., :768])).relu())


@pytest.mark.parametrize(("settings", "wanted"), [
    ({"search": True, "rank": 4}, 1_603_776),
    ({"B": "lora", "rank": 4}, 589_824),
    ({"A": "vector", "B": "vector", "C": "vector", "D": "vector", "E": "vector"}, 396_288),
])  # fmt: skip
def test_parameters_of_vit_b(settings: dict[str, Any], wanted: int) -> None:
    """r (out + in) for A and B, r (in + 1) for C, out for D and E; out or in for vectors: 12 layers of qkv, proj, fc1, fc2."""
    with torch.device("meta"):
        model = nn.Sequential(*(Block() for _ in range(12)))
        x = torch.empty(2, 768)
    rule = {"match": {"op": "matmul"}, "expect": 48, "rewrite": {"glora": settings}}
    plan = mm.plan(model, {"version": 1, "rules": [rule]}, (x,), ({0: "batch"},))
    assert sum(row.trainable for row in plan.sites) == wanted
    assert plan.totals.macs[0] == plan.totals.macs[1]


# one dense matmul


@pytest.mark.parametrize("settings", [ALL, {"search": True, "rank": 2}], ids=["all", "search"])
def test_onnx_runtime_folds_everything_into_one_matmul(settings: dict[str, Any], tmp_path: Path) -> None:
    found = compiled({"glora": settings}) if "search" in settings else compiled({"glora": settings}).load_trained(
        trained(compiled({"glora": settings}))
    )  # fmt: skip
    found.save(tmp_path / "out")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node]
    assert sorted(kinds) == ["FusedGemm", "Gemm"]  # the ReLU is inside the first
    answer = Session(tmp_path / "out", "cpu", log=lambda line: None).run({"input": X.numpy()})["output"]
    assert far(torch.from_numpy(answer), found.module(X)) < ROUNDING


# a quantised base


def test_beside_a_quantised_base() -> None:
    """x B^T + D o b + E is added; merging quantises W + B anew, and the bias takes D o b + E exactly."""
    settings = {"B": "lora", "D": "vector", "E": "scalar", "rank": 2}
    found = compiled([{"quantize": U4}, {"glora": settings}], path="0")
    values = trained(found)
    parts = parts_of(values)
    base = evaluate(compiled({"quantize": U4}, path="0").graph, bind(found.graph, (X,), {}))[0]
    assert torch.equal(found.module(X), base)
    ready, merged = found.load_trained(values), found.merge(values)
    bias = network()[0].bias.detach().double().numpy()
    wanted = bias + parts["D"] * bias + parts["E"]
    (line,) = merged.merged
    assert line.base == "quantize"
    state = {const.path: const.load() for const in merged.graph.state}
    np.testing.assert_array_equal(state["0.bias"].numpy(), wanted.astype(np.float32))
    error = far(merged.module(X), ready.module(X))
    assert error < 0.2  # the rounding of 4 bits, as measured for lora on such a base
    assert line.error < 0.15


@pytest.mark.parametrize("name", ["A", "C"])
def test_a_and_c_need_the_dense_weight(name: str) -> None:
    found = compiled([{"quantize": U4}, {"glora": {name: "vector", "E": "vector"}}], path="0")
    row = next(row for row in found.report.sites if row.path == "0")
    assert row.status == "rejected"
    assert row.reason == f"{name} of glora needs the dense weight, whose place another method takes; B, D and E can stand beside"
    assert far(found.module(X), network()(X)) == 0


@pytest.mark.parametrize(("rewrite", "reason"), [
    ([{"glora": {"E": "vector"}}, {"glora": {"A": "vector"}}],
     "glora works on the dense weight, and glora before it has made that its own"),
    ([{"lora": {"rank": 2, "init": "pissa"}}, {"glora": {"A": "vector"}}],
     "glora works on the dense weight, and lora before it has made that its own"),
])  # fmt: skip
def test_rejects(rewrite: Any, reason: str) -> None:
    row = next(row for row in compiled(rewrite, path="0").report.sites if row.path == "0")
    assert (row.status, row.reason) == ("rejected", reason)


def test_a_rank_above_every_matrix_is_refused() -> None:
    with pytest.raises(SpecError, match=r"rank 17 is above min\(in, out\) of every matched site; the largest is 16 \(0\)"):
        compiled({"glora": {"A": "lora", "rank": 17}}, path="0")


def test_d_alone_without_a_bias_is_rejected() -> None:
    found = compiled({"glora": {"D": "vector"}}, model=lone(False, torch.float32))
    assert [row.reason for row in found.report.sites] == ["D scales the bias, and this layer has none"]
    both = compiled({"glora": {"D": "vector", "E": "vector"}}, model=lone(False, torch.float32))
    assert "D is left out: the layer has no bias to scale" in both.report.sites[0].notes
    assert both.report.sites[0].trainable == 16


def test_glora_cannot_be_an_input(tmp_path: Path) -> None:
    found = compiled({"glora": ALL}, export={"adapters": "inputs"})
    with pytest.raises(ExportError, match="adapters of glora cannot be inputs"):
        found.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision(tmp_path: Path) -> None:
    """fp16 takes the same file through the parity check of save."""
    compiled({"glora": ALL}, path="0", export={"precision": "fp16"}).save(tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").is_file()


# mutants

MUTANTS = {
    "W C of the new W": Mutant("Tensors.bias", "self.b('aten.matmul.default', w, c)", "self.b('aten.matmul.default', self.weight(w), c)"),
    "A is added": Mutant("Tensors.weight", "self.b('aten.mul.Tensor', w, a)", "self.b('aten.add.Tensor', w, a)"),
    "A forgets W": Mutant(
        "Tensors.weight", "self.b('aten.add.Tensor', w, self.b('aten.mul.Tensor', w, a))", "self.b('aten.mul.Tensor', w, a)"
    ),
    "D is added": Mutant("Tensors._shift", "self.b('aten.mul.Tensor', b, value)", "self.b('aten.add.Tensor', b, value)"),
    "the bias is lost": Mutant("Tensors.bias", "[own, *self._shift(b)]", "self._shift(b)"),
    "B left out": Mutant(
        "Tensors.weight",
        "scaled if shift is None else self.b('aten.add.Tensor', scaled, shift)",
        "scaled if True else self.b('aten.add.Tensor', scaled, shift)",
    ),
    "C left out": Mutant("Tensors.bias", "c is not None", "False"),
}


def distance(m: Any) -> float:
    """Of a layer that the method of `m` has rewritten from the formula, relative."""
    model, x = lone(), X.double()
    spec = mm.load_spec({"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"glora": ALL}}]})
    graph = trace(model, (x,), ({0: "batch"},))
    result, _ = rewrite(graph, [(site, spec.rules[0]) for site in find_sites(graph)], {"glora": m.Glora()})
    g = torch.Generator().manual_seed(1)
    values = {c.path: 0.2 * torch.randn([int(d) for d in c.tensor.shape], generator=g) for c in result.state if ".glora." in c.path}
    (y,) = evaluate(with_values(result, values), [x])
    w, b = model[0].weight.detach().numpy(), model[0].bias.detach().numpy()
    parts = {name: value.double().numpy() for name, value in values.items()}
    wanted = torch.tensor(formula(x.numpy(), w, b, {name.removeprefix("0.glora."): value for name, value in parts.items()}))
    return far(y, wanted)


def test_the_real_code_is_the_formula() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert distance(m) < EXACT


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name: str) -> None:
    with mutated(MUTANTS[name]) as m:
        assert distance(m) > 1e-3
