"""Updates of one dense matrix: what holds of every one of them, beside each method's own tests. Oracle: its formula in numpy, float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from adapting import ROUNDING, U4, X, compiled, far, network, trained
from matmul_forms import FORMS
from rewriting import LINEAR, graph_of, only_site
from test_dora import DORA
from test_ia3 import CASE as IA3
from test_loha import CASE as LOHA
from test_lokr import CASE as LOKR
from test_melora import CASE as MELORA
from updating import EXACT, Case

import matmorph as mm
from matmorph.ir.types import TensorType
from matmorph.passes.methods import all_methods
from matmorph.runtime import Session

CASES: Mapping[str, Case] = {"dora": DORA, "loha": LOHA, "lokr": LOKR, "melora": MELORA, "ia3": IA3}


def in_float64(model: torch.nn.Module, inputs: Any, name: str) -> mm.Compiled:
    rule = {"match": {"op": "matmul"}, "rewrite": {name: dict(CASES[name].settings)}}
    return mm.compile(model, {"version": 1, "rules": [rule]}, inputs, tuple({0: "batch"} for _ in inputs))


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_network_is_the_formula(name: str) -> None:
    """Two layers with trained numbers, as they are and merged; the start changes nothing, and the plan counts what is there."""
    model, x = network().double(), X.double()
    found = in_float64(model, (x,), name)
    assert far(found.module(x), model(x)) < EXACT
    values = {path: value.double() for path, value in trained(found).items()}
    case, y = CASES[name], x.numpy()
    for layer in ("0", "2"):
        parts = {path.split(".", 2)[2]: value.numpy() for path, value in values.items() if path.startswith(f"{layer}.{name}.")}
        linear = model[int(layer)]
        new, shift = case.formula(linear.weight.detach().numpy(), linear.bias.detach().numpy(), parts, case.scale)
        y = y @ new.T + shift
        y = y.clip(0) if layer == "0" else y
    ready, merged = found.load_trained(values), found.merge(values)
    assert far(ready.module(x), model(x)) > 0.1
    assert far(ready.module(x), torch.tensor(y)) < EXACT
    assert far(merged.module(x), torch.tensor(y)) < EXACT
    assert {const.path for const in merged.graph.state} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert merged.adapters == ()
    train = sum(parameter.numel() for path, parameter in found.module.named_parameters() if f".{name}." in path)
    plan = mm.plan(network(), {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {name: dict(case.settings)}}]}, (X,))
    assert plan.totals.trainable == found.report.totals.trainable == train


@pytest.mark.parametrize("form", [form if form == "[in, out]" else pytest.param(form, marks=pytest.mark.full) for form in FORMS])
@pytest.mark.parametrize("name", CASES)
def test_every_form_of_a_matmul_merges_exactly(name: str, form: str) -> None:
    make, shapes = FORMS[form]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double().eval()
        inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    found = in_float64(model, inputs, name)
    if not found.adapters:
        assert all(row.reason for row in found.report.sites)  # a structure that does not fit says so
        return
    assert far(found.module(*inputs), model(*inputs)) < EXACT
    values = {path: value.double() for path, value in trained(found).items()}
    ready, merged = found.load_trained(values), found.merge(values)
    assert far(ready.module(*inputs), model(*inputs)) > 1e-3  # the update is felt: a product of four numbers of size 0.2 or more
    assert far(merged.module(*inputs), ready.module(*inputs)) < EXACT
    assert not any(name in const.path for const in merged.graph.state)


@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_answers_the_same(name: str, tmp_path: Path) -> None:
    """In float32; a weight that is made of another is computed when the session loads, so that one matmul is left of each site."""
    found = compiled({name: dict(CASES[name].settings)})
    ready = found.load_trained(trained(found))
    ready.save(tmp_path / "out")
    answer = Session(tmp_path / "out", "cpu", log=lambda line: None).run({"input": X.numpy()})["output"]
    assert far(torch.from_numpy(answer), ready.module(X)) < ROUNDING
    if not CASES[name].inside:
        return
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    assert sorted(node.op_type for node in onnx.load(tmp_path / "folded.onnx", load_external_data=False).graph.node) == [
        "FusedGemm",
        "Gemm",
    ]


@pytest.mark.parametrize("name", CASES)
def test_half_precision_merges_too(name: str) -> None:
    """A model stored in float16, within some ten of its roundings (2^-11) of float32."""
    settings = dict(CASES[name].settings)
    rule = {"match": {"op": "matmul"}, "rewrite": {name: settings}}
    half = mm.compile(network().half(), {"version": 1, "rules": [rule]}, (X.half(),), ({0: "batch"},))
    whole = compiled({name: settings})
    values = trained(whole)
    wanted = whole.load_trained(values).module(X)
    ready = half.load_trained({path: value.half() for path, value in values.items()})
    assert far(ready.module(X.half()).float(), wanted) < 10 / 2048
    assert far(ready.merge().module(X.half()).float(), wanted) < 10 / 2048


@pytest.mark.parametrize("name", CASES)
def test_beside_codes_and_beside_lora(name: str) -> None:
    settings = dict(CASES[name].settings)
    on_codes = compiled([{"quantize": U4}, {name: settings}], path="0")
    (row,) = (row for row in on_codes.report.sites if row.path == "0")
    if CASES[name].inside:
        assert row.reason == f"{name} works on the dense weight, and quantize comes before it"
    else:
        values = trained(on_codes)
        ready, merged = on_codes.load_trained(values), on_codes.merge(values)
        assert far(merged.module(X), ready.module(X)) < 0.2  # 4-bit codes of another matrix, in blocks of 16
        assert far(on_codes.module(X), ready.module(X)) > 0.01
    found = compiled([{name: settings}, {"lora": {"rank": 2}}], path="0")
    values = trained(found)
    assert far(found.merge(values).module(X), found.load_trained(values).module(X)) < ROUNDING


@pytest.mark.parametrize("name", CASES)
def test_sites_that_are_not_one_matrix_of_a_matmul(name: str) -> None:
    method = all_methods()[name]
    spec, site = method.Spec(**CASES[name].settings), only_site(graph_of(LINEAR))
    assert method.check(site, spec) is None
    integers = replace(site.const, type=TensorType("int8", (10, 12)))
    for other, reason in (
        (replace(site, gathers=site.applications[:1]), f"the weight is also read as an embedding table; {name} serves only the matmul"),
        (replace(site, form="embedding"), f"{name} serves matmuls, this is an embedding table"),
        (replace(site, batch=4), f"{name} takes one matrix, this is a stack of 4 experts"),
        (replace(site, const=integers), f"{name} needs a floating-point weight, this one is int8"),
        (replace(site, blocked="overlaps"), "overlaps"),
    ):
        found = method.check(other, spec)
        assert found is not None
        assert found.reason.startswith(reason)
