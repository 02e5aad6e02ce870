"""20 steps of AdamW on ONNX Runtime beside torch's autograd and torch.optim.AdamW: loss, parameters and moments.

Every fifth step has another batch and another length than the others. Adapters start where their methods put them (B = 0 for lora and
tt_lora). A few pairs of model and method here, so that each method occurs, and each model but T5; all pairs in the full grid.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch.nn.functional import cross_entropy, mse_loss
from zoo import SEQ, ZOO

import matmorph as mm
from matmorph.runtime import Trainer, TrainingError

pytestmark = pytest.mark.no_cover
"""What runs here is covered by the tests of its parts; the tracer of the coverage would take two fifths of the time."""

LR, DECAY, EPS, BETAS = 1e-3, 0.01, 1e-8, (0.9, 0.999)
STEPS = 20
TOLERANCE = 1e-5
"""Absolute for parameters (of size 1), relative to the loss for losses and to the largest moment for moments. Both sides are float32;
each step moves a parameter by up to 1e-3, and a gradient's relative rounding of 1e-6 comes through in that step by as much."""

QUANTIZED = {"rank": 4, "block_size": 16}
METHODS: Mapping[str, Any] = {
    "lora": {"lora": {"rank": 4, "alpha": 8}},
    "tt_lora": {"tt_lora": {"rank": 3, "alpha": 2}},
    "loftq-u4": {"loftq": {"quantizer": "uniform", "bits": 4, **QUANTIZED}},
    "loftq-nf4": {"loftq": {"quantizer": "nf4", **QUANTIZED}},
    "dora": {"dora": {"rank": 4, "alpha": 8}},
    "loha": {"loha": {"rank": 2, "alpha": 4}},
    "lokr": {"lokr": {"rank": 2, "alpha": 4}},
    "melora": {"melora": {"rank": 2, "groups": 2, "alpha": 4}},
    "ia3": {"ia3": {}},
    "low_rank": {"low_rank": {"rank": 6}},
    "full": "keep",
}
TRAINABLE = {"low_rank": "factors", "full": "all"}
# The bias of keys has no gradient (softmax does not see it): what rounding leaves of it is all that Adam would divide by its own size.
NO_GRADIENT = (".key.bias", ".k_proj.bias")
MODELS: Mapping[str, str] = {
    "mlp": "mse",
    "bert-classifier": "cross_entropy",
    "llama": "causal_lm",
    "vit": "cross_entropy",
    "t5": "cross_entropy",
}
SOME = (
    ("mlp", "tt_lora"),
    ("bert-classifier", "lora"),
    ("llama", "loftq-nf4"),
    ("mlp", "dora"),
    ("mlp", "loha"),
    ("mlp", "lokr"),
    ("mlp", "melora"),
    ("mlp", "ia3"),
    ("mlp", "low_rank"),
    ("mlp", "loftq-u4"),
    ("mlp", "full"),
)
GRID = [pytest.param(model, method, marks=() if (model, method) in SOME else pytest.mark.full) for model in MODELS for method in METHODS]


@dataclass(frozen=True)
class Case:
    """A compiled model and its training folder."""

    model: str
    method: str
    compiled: mm.Compiled
    folder: Path

    def batch(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs by name and labels; some labels do not count."""
        generator = torch.Generator().manual_seed(100 + step)
        other = step % 5 == 4
        given = ZOO[self.model].inputs(2 if other else 3, SEQ + 3 if other else SEQ, generator)
        inputs = dict(given) if isinstance(given, dict) else {"input": given[0]}
        shape = list(self.outputs(inputs).shape)
        if MODELS[self.model] == "mse":
            return inputs, torch.randn(shape, generator=generator)
        labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
        if labels.ndim > 1:
            labels[:, 2] = -100
        return inputs, labels

    def outputs(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        result = self.compiled.module(*inputs.values()) if self.model == "mlp" else self.compiled.module(**inputs)
        return result if isinstance(result, torch.Tensor) else result.logits

    def loss(self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """As torch and transformers have it."""
        found = self.outputs(inputs)
        if MODELS[self.model] == "mse":
            return mse_loss(found, labels)
        if MODELS[self.model] == "causal_lm":
            found, labels = found[:, :-1], labels[:, 1:]
        return cross_entropy(found.flatten(0, -2), labels.flatten(), ignore_index=-100)


def build(model: str, method: str, folder: Path) -> Case:
    module, inputs, dynamic = ZOO[model].build()
    rule = {"name": "all", "match": {"op": "matmul"}, "rewrite": METHODS[method]}
    if isinstance(METHODS[method], dict):
        rule["force"] = True
    compiled = mm.compile(module, {"version": 1, "rules": [rule]}, inputs, dynamic_shapes=dynamic)
    optimizer = mm.AdamW(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    trainable = [TRAINABLE.get(method, "adapters")]
    without = [name for name, _ in compiled.module.named_parameters() if name.endswith(NO_GRADIENT)]
    if method == "full" and without:
        trainable = [name for name, _ in compiled.module.named_parameters() if name not in without]
    compiled.export_training(folder, loss=MODELS[model], optimizer=optimizer, trainable=trainable)
    return Case(model, method, compiled, folder)


class Peer:
    """torch's training of the compiled module."""

    def __init__(self, case: Case, names: Sequence[str], betas: tuple[float, float] = BETAS, eps: float = EPS) -> None:
        self.case = case
        self.start = {name: tensor.detach().clone() for name, tensor in case.compiled.module.state_dict().items()}
        every = dict(case.compiled.module.named_parameters())
        for name, parameter in every.items():
            parameter.requires_grad_(name in names)
        self.parameters = {name: every[name] for name in names}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LR, betas=betas, eps=eps, weight_decay=DECAY, foreach=False)

    def step(self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.case.loss(inputs, labels)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def moments(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        state = self.optimizer.state[self.parameters[name]]
        return state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()

    def restore(self) -> None:
        with torch.no_grad():
            self.case.compiled.module.load_state_dict(self.start)


@dataclass(frozen=True)
class Differences:
    loss: float
    parameters: float
    moments: float

    @property
    def worst(self) -> float:
        return max(self.loss, self.parameters, self.moments)


def compare(case: Case, trainer: Trainer, steps: int = STEPS, **peer: Any) -> Differences:
    """Trains both; the module is as before afterwards."""
    names = [one.name for one in trainer.manifest.parameters]
    other = Peer(case, names, **peer)
    loss = 0.0
    try:
        for step in range(steps):
            with torch.no_grad():
                inputs, labels = case.batch(step)
            arrays = {name: tensor.numpy() for name, tensor in {**inputs, "labels": labels}.items()}
            expected = other.step(inputs, labels)
            loss = max(loss, abs(trainer.step(arrays) - expected) / max(1.0, abs(expected)))
        found, moments = trainer.parameters(), trainer.moments()
        parameters = max(float(np.abs(found[name] - other.parameters[name].detach().numpy()).max()) for name in names)
        sides = [(moments[name], other.moments(name)) for name in names]
    finally:
        other.restore()
    sizes = [max(float(np.abs(theirs[which]).max()) for _, theirs in sides) for which in (0, 1)]
    apart = [max(float(np.abs(ours[which] - theirs[which]).max()) for ours, theirs in sides) / sizes[which] for which in (0, 1)]
    return Differences(loss, parameters, max(apart))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tensors(compiled: mm.Compiled) -> dict[str, torch.Tensor]:
    """Parameters and buffers, a tied one under its first name only."""
    module = compiled.module
    return {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}


@pytest.mark.parametrize(("model", "method"), GRID)
def test_20_steps_as_torch(model: str, method: str, tmp_path: Path) -> None:
    case = build(model, method, tmp_path / "train")
    files, before = hashes(case.folder), {name: tensor.clone() for name, tensor in tensors(case.compiled).items()}
    trainer = Trainer(case.folder, "cpu", threads=1)
    start = trainer.parameters()
    assert compare(case, trainer).worst <= TOLERANCE
    trained = trainer.parameters()
    assert all((trained[name] != start[name]).any() for name in start)
    assert hashes(case.folder) == files
    after = tensors(case.compiled.load_trained(trained))
    assert after.keys() == before.keys()
    for name, value in after.items():
        expected = torch.from_numpy(trained[name]) if name in trained else before[name]
        assert torch.equal(value, expected), name  # frozen weights to the bit


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build("mlp", "lora", tmp_path_factory.mktemp("lora") / "train")


def edited(case: Case, folder: Path, name: str, change: Any) -> Trainer:
    """A Trainer of the same folder with one graph changed; nothing is what the manifests say any more, so nothing is held against them."""
    shutil.copytree(case.folder, folder)
    model = onnx.load(folder / name, load_external_data=False)
    change(model.graph)
    (folder / name).write_bytes(model.SerializeToString())
    return Trainer(folder, "cpu", threads=1, verify=False)


def constant(graph: onnx.GraphProto, value: float, new: float) -> None:
    """Exchanges a scalar constant."""
    found = [
        one for one in graph.initializer if not one.dims and one.data_type in (1, 11) and np.isclose(numpy_helper.to_array(one), value)
    ]
    assert found
    for one in found:
        one.CopyFrom(numpy_helper.from_array(np.asarray(new, numpy_helper.to_array(one).dtype), one.name))


def transposed_factor(graph: onnx.GraphProto) -> None:
    """The gradient of one factor is written down column by column."""
    last = next(node for node in graph.node if "grad" in node.output)
    assert last.op_type == "Concat"
    flat = {name: next(node for node in graph.node if name in node.output) for name in last.input}
    name, node = next((name, node) for name, node in flat.items() if node.op_type == "Reshape")
    graph.node.remove(node)
    at = list(graph.node).index(last)
    graph.node.insert(at, onnx.helper.make_node("Transpose", [node.input[0]], ["turned"]))
    graph.node.insert(at + 1, onnx.helper.make_node("Reshape", ["turned", node.input[1]], [name]))


MUTANTS = {
    "eps dropped": ("apply.onnx", lambda graph: constant(graph, EPS, 0.0)),
    "another beta1": ("apply.onnx", lambda graph: constant(graph, 0.9, 0.91)),
    "another beta2": ("apply.onnx", lambda graph: constant(graph, 0.999, 0.99)),
    "a factor transposed": ("grad.onnx", transposed_factor),
}


def test_unchanged_copy_passes(lora: Case, tmp_path: Path) -> None:
    assert compare(lora, edited(lora, tmp_path / "t", "apply.onnx", lambda graph: None)).worst <= TOLERANCE


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(lora: Case, tmp_path: Path, name: str) -> None:
    """Not only of loss: with eps dropped, the step at B = 0, where the gradient of A is 0, is 0 / 0."""
    file, change = MUTANTS[name]
    try:
        passed = compare(lora, edited(lora, tmp_path / "t", file, change), steps=6).worst <= TOLERANCE
    except TrainingError:
        passed = False
    assert not passed
