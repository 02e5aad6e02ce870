"""Gradient graphs of whole models against torch.autograd: in float64 through `evaluate`, in float32 through ONNX Runtime; names, shapes,
frozen weights, half precision, quantised bases, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from differentiating import (
    autograd,
    check,
    check_onnx,
    distance,
    evaluated,
    feeds_of,
    labels_for,
    ordered,
    parameters_of,
    run,
)
from exporting import mlp_graph, randn, seeded
from quantised import Quantised, codebook, uniform
from torch import Tensor, nn
from zoo import ZOO, Entry

from matmorph.errors import ExportError, InputError
from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.ir.core import Const, Graph
from matmorph.ir.tracing.trace import trace
from matmorph.ir.training.gradient import gradient_graph, loss_graph
from matmorph.ir.training.losses import Loss, tensor_outputs
from matmorph.ir.verify import verify
from matmorph.runtime.format.artifact import MODEL
from matmorph.specs.schema import Export

MSE = Loss("mse")
FULL = pytest.mark.full
TASKS = {
    "mlp": MSE,
    "bert-classifier": Loss("cross_entropy", "logits"),
    "llama": Loss("causal_lm", "logits"),
    "vit": Loss("cross_entropy", "logits"),
    "t5": Loss("cross_entropy", "logits"),
}
SOME = {
    "everything": lambda path: True,
    "a few": lambda path: path.endswith(("bias", "norm.weight")) or "classifier" in path or "q_proj" in path,
}
HALF = 2e-2  # of the largest gradient: activations and cotangents of 11 bits through two layers, sums in float32


def samples_of(entry: Entry) -> tuple[nn.Module, list[Any]]:
    module, inputs, _ = entry.build()
    return module, [inputs, *entry.more_inputs()]


@cache
def bert() -> tuple[nn.Module, Any, Graph]:
    """The tiny classifier, its example inputs and its graph; nobody changes them."""
    module, inputs, axes = ZOO["bert-classifier"].build()
    return module, inputs, trace(module, inputs, axes)


@pytest.mark.parametrize("name", ["mlp", "bert-classifier", *(pytest.param(name, marks=FULL) for name in ("llama", "vit", "t5"))])
def test_every_parameter_in_float64(name: str) -> None:
    module, samples = samples_of(ZOO[name])
    verify(check(module, samples, ZOO[name].dynamic_shapes, TASKS[name]))


@pytest.mark.parametrize("some", [pytest.param("everything", marks=FULL), "a few"])
@pytest.mark.parametrize("name", ["mlp", "bert-classifier", *(pytest.param(name, marks=FULL) for name in ("llama", "vit", "t5"))])
def test_first_step_in_onnx_runtime(name: str, some: str, tmp_path: Path) -> None:
    module, samples = samples_of(ZOO[name])
    check_onnx(module, samples, ZOO[name].dynamic_shapes, TASKS[name], tmp_path, SOME[some])


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in ZOO if name not in TASKS])
def test_zoo_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    module, samples = samples_of(ZOO[name])
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("batched_mm")  # torch's own grouped product has no float64
    source = trace(module, samples[0], ZOO[name].dynamic_shapes)
    output = next(name for name in ("logits", *tensor_outputs(source)) if name in tensor_outputs(source))
    trained = {path for path, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    check_onnx(module, samples, ZOO[name].dynamic_shapes, Loss("mse", output), tmp_path, trained.__contains__)


# what a gradient graph looks like


def parts() -> tuple[Graph, list[Const], Loss]:
    source = mlp_graph()
    return source, parameters_of(source), MSE


def test_signature() -> None:
    source, consts, loss = parts()
    found = gradient_graph(source, consts, loss, ["output"])
    verify(found)
    assert [(entry.name, str(entry.value.type)) for entry in found.signature.inputs if entry.value is not None] == [
        ("theta", "float32[208]"),
        ("x", "float32[batch, seq, 8]"),
        ("labels", "float32[batch, seq, 4]"),
        ("loss_scale", "float32[]"),
    ]
    kinds = [str(value.type) for value in found.outputs]
    assert list(zip(found.signature.outputs, kinds, strict=True)) == [
        ("loss", "float32[]"),
        ("count", "float32[]"),
        ("grad", "float32[208]"),
        ("output", "float32[batch, seq, 4]"),
    ]
    assert [const.path for const in found.used_state()] == ["scale"]  # what trains is no constant, what is frozen keeps its name
    judged = loss_graph(source, consts, loss)
    verify(judged)
    assert judged.signature.outputs == ("loss", "count", "output")
    assert [entry.name for entry in judged.signature.inputs] == ["theta", "x", "labels"]


def test_same_input_same_text() -> None:
    from matmorph.ir.text.printing import print_graph

    first, second = (print_graph(gradient_graph(*parts())) for _ in range(2))
    assert first == second


def test_theta_is_in_the_order_given() -> None:
    source, consts, loss = parts()
    inputs = [randn(2, 3, 8)]
    labels = labels_for(loss, source, inputs)
    forward, backward = (
        evaluated(gradient_graph(source, order, loss), feeds_of(source, order, inputs, labels)) for order in (consts, consts[::-1])
    )
    sizes = [const.numel for const in consts]
    assert torch.equal(torch.cat(forward["grad"].split(sizes)[::-1]), backward["grad"])


def test_loss_scale_scales_the_gradient_alone() -> None:
    source, consts, loss = parts()
    inputs = [randn(2, 3, 8)]
    labels = labels_for(loss, source, inputs)
    found = gradient_graph(source, consts, loss)
    one, eight = (evaluated(found, feeds_of(source, consts, inputs, labels, scale)) for scale in (1.0, 8.0))
    assert torch.equal(eight["grad"], 8 * one["grad"])  # a power of two: exact
    assert torch.equal(eight["loss"], one["loss"])


def test_a_parameter_that_the_loss_does_not_reach_has_gradient_zero() -> None:
    source, consts, loss = parts()
    unused = next(const for const in source.state if const.path == "unused.weight")
    inputs = [randn(2, 3, 8)]
    found = gradient_graph(source, [unused, *consts], loss)
    results = evaluated(found, feeds_of(source, [unused, *consts], inputs, labels_for(loss, source, inputs)))
    assert torch.count_nonzero(results["grad"][: unused.numel]) == 0
    assert torch.count_nonzero(results["grad"][unused.numel :]) > 0


def test_nothing_is_differentiated_below_the_lowest_trainable() -> None:
    """With only the classifier training, the body of the model is copied as it is, and nothing behind it is written."""
    _, _, source = bert()
    found = gradient_graph(source, parameters_of(source, lambda path: path.startswith("classifier")), TASKS["bert-classifier"])
    ops = [node.op for node in found.nodes]
    assert ops.count("aten.scaled_dot_product_attention.default") == 2
    assert not any(node.op == "aten.mm.default" and node.origin.layer is not None for node in found.nodes)
    assert len(ops) < len(source.nodes) + 45


def test_backward_nodes_have_the_origin_of_their_forward() -> None:
    _, _, source = bert()
    found = gradient_graph(source, parameters_of(source), TASKS["bert-classifier"])
    layers = {node.origin.layer for node in found.nodes if node.op == "aten.mm.default"}
    assert layers == {None, 0, 1}
    paths = {node.origin.path for node in found.nodes if node.op == "aten.mm.default" and node.origin.layer == 1}
    assert "bert.encoder.layer.1.attention.self.query" in paths


def test_file_holds_the_frozen_weights_under_their_names(tmp_path: Path) -> None:
    module, inputs, source = bert()
    digest = {name: hashlib.sha256(tensor.numpy().tobytes()).digest() for name, tensor in module.state_dict().items()}
    consts = parameters_of(source, lambda path: path.endswith("query.weight"))
    export_onnx(gradient_graph(source, consts, TASKS["bert-classifier"]), tmp_path, Export())
    model = onnx.load(tmp_path / MODEL, load_external_data=False)
    external = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    assert external == {const.path for const in source.used_state()} - {const.path for const in consts}
    absent = {"BitShift", "BitwiseAnd", "BitwiseOr", "Unique", "SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss", "Einsum"}
    assert absent.isdisjoint({node.op_type for node in model.graph.node})
    samples = [inputs, *ZOO["bert-classifier"].more_inputs()]
    for sample in samples:
        run(
            tmp_path,
            feeds_of(source, consts, ordered(source, sample), labels_for(TASKS["bert-classifier"], source, ordered(source, sample))),
        )
    assert digest == {name: hashlib.sha256(tensor.numpy().tobytes()).digest() for name, tensor in module.state_dict().items()}


# half precision, quantised weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains_float32(dtype: torch.dtype) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(nn.functional.gelu(self.norm(self.a(x))))

    module, x = seeded(Small), randn(4, 5, 8)
    half = trace(seeded(Small).to(dtype), {"x": x.to(dtype)}, {"x": {0: "batch", 1: "seq"}})
    consts = parameters_of(half)
    found = gradient_graph(half, consts, Loss("cross_entropy"))
    verify(found)
    kinds = {entry.name: str(entry.value.type) for entry in found.signature.inputs if entry.value is not None}
    assert kinds["theta"] == "float32[227]"
    labels = labels_for(Loss("cross_entropy"), half, [x])
    feeds = {**feeds_of(half, consts, [x.to(dtype)], labels), "loss_scale": torch.tensor(256.0)}
    feeds["theta"] = feeds["theta"].float()
    results = evaluated(found, feeds)
    _, gradient = autograd(module.double(), {"x": x.double()}, Loss("cross_entropy"), labels, consts)
    assert {results[name].dtype for name in ("loss", "count", "grad")} == {torch.float32}
    assert distance(results["grad"] / 256, gradient) <= HALF * (1 if dtype is torch.float16 else 8)


@pytest.mark.parametrize(
    ("stored", "precision"),
    [(torch.float16, "keep"), *(pytest.param(d, "fp16", marks=FULL) for d in (torch.float16, torch.float32))],
)
def test_half_precision_in_onnx_runtime(stored: torch.dtype, precision: str, tmp_path: Path) -> None:
    module, sample, axes = ZOO["bert-classifier"].build()
    source, loss = trace(module.to(stored), sample, axes), TASKS["bert-classifier"]
    consts = parameters_of(source, lambda path: "layer" not in path or "query" in path)  # tables too
    export_onnx(gradient_graph(source, consts, loss), tmp_path, Export(precision=precision, target=("cpu",)))
    labels = labels_for(loss, source, ordered(source, sample))
    feeds = feeds_of(source, consts, ordered(source, sample), labels)
    results = run(tmp_path, {**feeds, "theta": feeds["theta"].float(), "loss_scale": torch.tensor(64.0)})
    _, gradient = autograd(module.double(), sample, loss, labels, consts)
    assert {results[name].dtype.name for name in ("loss", "count", "grad")} == {"float32"}
    assert distance(torch.from_numpy(results["grad"]) / 64, gradient) <= HALF


class Base(nn.Module):
    """A quantised layer between two that train."""

    def __init__(self, quantised: Callable[[np.random.Generator], Any]) -> None:
        super().__init__()
        weight = quantised(np.random.default_rng(0))
        self.weight = weight
        self.first = nn.Linear(5, 64)
        self.base = Quantised(weight, None)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.base(self.first(x))))


@pytest.mark.parametrize("kind", ["u4", "nf4"])
def test_quantised_base_stays_one_node_in_each_direction(kind: str) -> None:
    made = {"u4": lambda rng: uniform(rng, 16, 64, 4, 32, True), "nf4": lambda rng: codebook(rng, 16, 64, "nf4", 64)}[kind]
    module = seeded(lambda: Base(made)).double()
    dense = torch.from_numpy(module.weight.dense)
    x = randn(3, 4, 5).double()
    source = trace(module, {"x": x}, {"x": {0: "batch", 1: "seq"}})
    consts = parameters_of(source)
    found = gradient_graph(source, consts, MSE)
    verify(found)
    assert sum(node.op.startswith("matmorph.") for node in found.nodes) == 2
    labels = labels_for(MSE, source, [x])
    results = evaluated(found, feeds_of(source, consts, [x], labels))
    value = nn.functional.mse_loss(module.last(torch.tanh(module.first(x) @ dense.T)), labels["labels"])
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, [dict(module.named_parameters())[c.path] for c in consts])])
    assert distance(results["grad"], gradient) <= 1e-6  # scales are float32


# refusals


def test_refusals() -> None:
    source, consts, loss = parts()
    foreign = replace(consts[0])
    scale = next(const for const in source.state if const.path == "scale")
    for chosen, message in (
        ([], "nothing trains: no weight was named"),
        ([foreign], "fc1.weight is no weight of this graph"),
        ([consts[0], consts[0]], "fc1.weight is named twice among the trainables"),
        (
            [const for const in source.state if const.path == "unused.weight"],
            r"the loss does not depend on anything that trains \(unused.weight\)",
        ),
    ):
        with pytest.raises(InputError, match=message):
            gradient_graph(source, chosen, loss)
    assert str(gradient_graph(source, [scale], loss).outputs[2].type) == "float32[4]"  # a buffer may train too
    with pytest.raises(InputError, match="the model has no output outpu to keep; its outputs are output; did you mean output"):
        gradient_graph(source, consts, loss, ["outpu"])


def test_codes_do_not_train(rng: np.random.Generator) -> None:
    source = trace(Quantised(uniform(rng, 16, 64, 4, 32, True), None), {"x": randn(2, 64)}, {"x": {0: "batch"}})
    codes = [const for const in source.state if const.tensor.dtype == "uint8"]
    with pytest.raises(InputError, match=r"codes is uint8\[.*\] and cannot train; floating-point weights can"):
        gradient_graph(source, codes[:1], MSE)


@pytest.mark.parametrize(
    ("name", "what"), [("theta", "input"), ("labels", "input"), ("loss_scale", "input"), ("grad", "output"), ("loss", "output")]
)
def test_names_that_the_model_has_already(name: str, what: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, **x: Tensor) -> dict[str, Tensor]:
            y = sum(x.values()) * self.weight
            return {"logits": y, name if what == "output" else "other": y * 2}

    given = name if what == "input" else "x"
    source = trace(Named(), {given: randn(2, 3)})
    with pytest.raises(InputError, match=f"the model has an {what} {name} of its own"):
        gradient_graph(source, parameters_of(source), MSE, [name] if what == "output" else [])


def test_control_flow_is_refused_where_a_gradient_would_pass() -> None:
    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: y * 2.0, lambda y: y - 1.0, (x * self.weight,))

    source = trace(Cond(), {"x": randn(2, 3)})
    with pytest.raises(ExportError, match=r"higher_order\.cond cannot be differentiated"):
        gradient_graph(source, parameters_of(source), MSE)
