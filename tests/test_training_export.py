"""Training files of a folder: what lies where, that losses and gradients are torch's, and what is refused.

The oracle is torch.autograd in float64 on the network written out by hand, with torch's own loss functions: no code is shared with the
graphs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from exporting import session
from torch import nn
from torch.nn import functional

import matmorph as mm
from matmorph.compiled import Compiled
from matmorph.errors import CheckError, InputError, MatmorphError, SpecError
from matmorph.ir.text.printing import parse_graph, print_graph
from matmorph.runtime.check import check
from matmorph.runtime.train_manifest import read_train_manifest

TRAINING = {"grad.onnx", "eval.onnx", "apply.onnx", "trainable.safetensors", "train.json", "train_check.npz", "graph.ir"}
PLAIN = {"model.onnx", "model.onnx.data", "report.json", "report.html", "spec.yaml", "check.npz", "manifest.json", "run.json"}
PLAIN |= {"source.ir", "graph.ir"}
SPEC: Mapping[str, Any] = {
    "version": 1,
    "name": "toy",
    "rules": [{"name": "first", "match": {"path": "first"}, "rewrite": {"lora": {"rank": 2, "alpha": 4}}}],
    "train": {"loss": "cross_entropy", "output": "logits", "optimizer": {"adamw": {"lr": 1e-3}}, "trainable": ["adapters", "head.**"]},
}


class Net(nn.Module):
    """Two layers of which the first gets an adapter, and a head of five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = functional.gelu(self.second(functional.gelu(self.first(x))))
        return {"logits": self.head(hidden), "hidden": hidden}


def compiled(spec: Mapping[str, Any] = SPEC, dtype: torch.dtype = torch.float32) -> Compiled:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, x = Net().to(dtype).eval(), torch.randn(6, 64, dtype=dtype)
    return mm.compile(module, spec, {"x": x}, {"x": {0: "batch"}})


@pytest.fixture(scope="module")
def net() -> Compiled:
    return compiled()


@pytest.fixture(scope="module")
def folder(net: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return net.save(tmp_path_factory.mktemp("training") / "out")


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "train.json").read_text())
    return found


def batch(rows: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, rows)
    labels[rows // 2] = -100
    return rng.standard_normal((rows, 64), dtype=np.float32), labels


Objective = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]


def autograd(
    net: Compiled, folder: Path, theta: np.ndarray, x: np.ndarray, labels: np.ndarray, objective: Objective
) -> tuple[float, np.ndarray]:
    """Loss and flat gradient at `theta` of the network written out by hand, in float64."""
    w = {name: tensor.double() for name, tensor in net.module.state_dict().items()}
    taken = []
    for entry in described(folder)["parameters"]:
        piece = theta[entry["offset"] : entry["offset"] + w[entry["name"]].numel()]
        w[entry["name"]] = torch.from_numpy(piece.astype(np.float64)).reshape(entry["shape"]).requires_grad_()
        taken.append(w[entry["name"]])
    rows = torch.from_numpy(x).double()
    first = rows @ w["first.weight"].T + w["first.bias"] + 2 * (rows @ w["first.lora.down"] @ w["first.lora.up"])  # alpha / rank = 2
    hidden = functional.gelu(functional.gelu(first) @ w["second.weight"].T + w["second.bias"])
    loss = objective({"logits": hidden @ w["head.weight"].T + w["head.bias"], "hidden": hidden}, torch.from_numpy(labels))
    gradients = torch.autograd.grad(loss, taken)
    return float(loss.detach()), np.concatenate([gradient.reshape(-1).numpy() for gradient in gradients])


def somewhere(folder: Path) -> np.ndarray:
    """A theta away from the start, where one factor of each adapter is zero."""
    length = described(folder)["length"]
    return (0.2 * np.random.default_rng(5).standard_normal(length)).astype(np.float32)


def assert_torch_agrees(net: Compiled, folder: Path, objective: Objective, labels: np.ndarray, x: np.ndarray, scale: float = 8.0) -> None:
    theta = somewhere(folder)
    feeds = {"theta": theta, "x": x, "labels": labels, "loss_scale": np.asarray(scale, np.float32)}
    loss, grad = session(folder / "grad.onnx").run(["loss", "grad"], feeds)
    expected, gradient = autograd(net, folder, theta, x, labels, objective)
    # float32 against float64: some hundred roundings of 6e-8, relative to the largest entry
    assert abs(float(loss) - expected) <= 5e-6 * max(1.0, abs(expected))
    assert np.abs(grad - scale * gradient).max() <= 5e-6 * scale * np.abs(gradient).max()
    (again,) = session(folder / "eval.onnx").run(["loss"], {name: feeds[name] for name in ("theta", "x", "labels")})
    assert abs(float(again) - expected) <= 5e-6 * max(1.0, abs(expected))


def cross_entropy(outputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs["logits"], labels, ignore_index=-100)


# ---- the folder


def test_a_spec_with_train_saves_the_training_files_too(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == PLAIN | TRAINING
    result = check(folder)
    assert result.ok, result.problems
    assert any(line.startswith("training: 3 cases on CPUExecutionProvider") for line in result.lines)


def test_training_can_be_left_out(net: Compiled, folder: Path, tmp_path: Path) -> None:
    plain = net.save(tmp_path / "plain", train=False)
    assert {path.name for path in plain.iterdir()} == PLAIN
    for name in ("model.onnx", "check.npz"):
        assert (plain / name).read_bytes() == (folder / name).read_bytes()
    # one data file: beside the model's own weights only what the clean-up of the training graphs adds, if anything
    plain_size, full_size = ((place / "model.onnx.data").stat().st_size for place in (plain, folder))
    assert plain_size <= full_size <= plain_size + 4096


def test_frozen_weights_lie_once_in_the_data_file(folder: Path) -> None:
    places = {name: external(folder / name) for name in ("model.onnx", "grad.onnx", "eval.onnx")}
    frozen = {"first.weight", "first.bias", "second.weight", "second.bias"}
    for name in frozen:
        assert places["model.onnx"][name] == places["grad.onnx"][name] == places["eval.onnx"][name]
    trained = {entry["name"] for entry in described(folder)["parameters"]}
    assert trained == {"first.lora.down", "first.lora.up", "head.weight", "head.bias"}
    assert not trained & (places["grad.onnx"].keys() | places["eval.onnx"].keys())


def external(path: Path) -> dict[str, tuple[str, ...]]:
    """(file, offset, length) of each weight by name."""
    graph = onnx.load(path, load_external_data=False).graph
    return {one.name: tuple(entry.value for entry in one.external_data) for one in graph.initializer if one.external_data}


def test_train_json(net: Compiled, folder: Path) -> None:
    found = described(folder)
    assert (found["format"], found["matmorph"], found["precision"], found["length"]) == (
        2,
        mm.__version__,
        "fp32",
        2 * (64 + 96) + 64 * 5 + 5,
    )
    assert found["loss"] == {"name": "cross_entropy", "output": "logits", "ignore_index": -100}
    assert found["optimizer"] == {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    assert (found["states"], found["initial"], found["ranges"]) == (["m", "v"], "trainable.safetensors", {"batch": [1, None]})
    assert found["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 64]}]
    assert found["labels"] == [{"name": "labels", "dtype": "int64", "shape": ["batch"]}]
    assert [port["name"] for port in found["outputs"]] == ["logits", "hidden"]
    assert found["kept_outputs"] == []
    assert [(one["name"], one["offset"], one["segment"]) for one in found["parameters"]] == [
        ("first.lora.down", 0, "adapters"),
        ("first.lora.up", 128, "adapters"),
        ("head.weight", 320, "head.**"),
        ("head.bias", 640, "head.**"),
    ]
    assert found["segments"] == [{"name": "adapters", "offset": 0, "length": 320}, {"name": "head.**", "offset": 320, "length": 325}]
    assert [(one["site"], one["method"], one["consts"]) for one in found["adapters"]] == [
        ("first", "lora", {"down": "first.lora.down", "up": "first.lora.up"})
    ]
    for name, entry in found["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert found["files"].keys() == TRAINING - {"train.json"} | {"model.onnx.data"}
    assert read_train_manifest(folder).length == found["length"]  # the runtime's own reader accepts it


def test_the_fingerprint_is_of_the_frozen_weights(net: Compiled, folder: Path, tmp_path: Path) -> None:
    frozen = {
        name: tensor for name, tensor in net.module.state_dict().items() if name.split(".")[0] in ("first", "second") and "lora" not in name
    }
    digest = hashlib.sha256()
    for name, tensor in frozen.items():
        digest.update(f"{name} float32[{', '.join(map(str, tensor.shape))}]\n".encode() + tensor.numpy().tobytes())
    assert described(folder)["fingerprint"] == digest.hexdigest()
    other = net.export_training(tmp_path / "other", trainable=["adapters", "head.weight"])
    changed = described(other)
    assert changed["fingerprint"] != described(folder)["fingerprint"]
    assert changed["trainable_fingerprint"] != described(folder)["trainable_fingerprint"]


def test_training_starts_from_the_modules_own_values(net: Compiled, folder: Path) -> None:
    start = safetensors.torch.load_file(folder / "trainable.safetensors")
    own = dict(net.module.named_parameters())
    assert start.keys() == {one["name"] for one in described(folder)["parameters"]}
    assert all(torch.equal(tensor, own[name]) and tensor.dtype == torch.float32 for name, tensor in start.items())


def test_the_graph_lies_beside_as_text(net: Compiled, folder: Path) -> None:
    text = (folder / "graph.ir").read_text()
    again = parse_graph(text, {const.path: const.load() for const in net.graph.state})
    assert print_graph(again) == text
    assert [node.op for node in again.nodes] == [node.op for node in net.graph.nodes]
    assert str(Path(__file__).parent) not in text  # nothing of where the model's source lies
    assert "source=" not in text


def test_equal_exports_are_equal_to_the_byte(net: Compiled, folder: Path, tmp_path: Path) -> None:
    again = compiled().save(tmp_path / "again")
    for name in PLAIN | TRAINING - {"run.json"}:
        if name != "run.json":
            assert (again / name).read_bytes() == (folder / name).read_bytes(), name


# ---- losses and gradients


@pytest.mark.parametrize("rows", [1, 6, 17])
def test_gradients_are_torchs(net: Compiled, folder: Path, rows: int) -> None:
    x, labels = batch(rows + 1)
    assert_torch_agrees(net, folder, cross_entropy, labels, x)


OBJECTIVES: dict[str, tuple[dict[str, Any], Objective]] = {
    "mse": (
        {"loss": "mse", "output": "hidden", "trainable": ["adapters"]},
        lambda outputs, labels: functional.mse_loss(outputs["hidden"], labels.double()),
    ),
    "cosine": (
        {"loss": "cosine", "output": "hidden", "trainable": "all", "optimizer": mm.Lion(1e-4)},
        lambda outputs, labels: (1 - functional.cosine_similarity(outputs["hidden"], labels.double(), -1)).mean(),
    ),
    "a function": (
        {
            "loss": lambda outputs, labels: (outputs["hidden"] - labels["labels"]).abs().mean() + outputs["logits"].square().mean(),
            "output": None,
            "labels": {"labels": torch.zeros(6, 64)},
            "label_shapes": {"labels": {0: "batch"}},
            "optimizer": mm.SGD(0.1, momentum=0.9),
        },
        lambda outputs, labels: (outputs["hidden"] - labels.double()).abs().mean() + outputs["logits"].square().mean(),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_losses(net: Compiled, tmp_path: Path, name: str) -> None:
    options, objective = OBJECTIVES[name]
    out = net.export_training(tmp_path / "out", **options)
    assert check(out).ok
    rng = np.random.default_rng(1)
    x, labels = (rng.standard_normal((4, 64), dtype=np.float32) for _ in range(2))
    assert_torch_agrees(net, out, objective, labels, x)
    found = described(out)
    assert found["loss"]["name"] == (name if name != "a function" else "function")
    assert found["states"] == {"mse": ["m", "v"], "cosine": ["m"], "a function": ["m"]}[name]
    if name == "cosine":  # `all` leaves out what the loss does not reach
        assert not any(one["name"].startswith("head") for one in found["parameters"])


def test_outputs_can_be_kept(net: Compiled, folder: Path, tmp_path: Path) -> None:
    out = net.export_training(tmp_path / "out", keep_outputs=["logits"])
    assert [port["name"] for port in described(out)["kept_outputs"]] == ["logits"]
    x, labels = batch(4)
    theta = somewhere(out)
    (kept,) = session(out / "grad.onnx").run(["logits"], {"theta": theta, "x": x, "labels": labels, "loss_scale": np.ones((), np.float32)})
    (right,) = session(folder / "eval.onnx").run(["logits"], {"theta": theta, "x": x, "labels": labels})
    np.testing.assert_allclose(kept, right, atol=1e-6)  # the same sums, perhaps fused differently: a few roundings of values of order 1


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_quantised_base_stays_packed_and_theta_is_float32(precision: str, tmp_path: Path) -> None:
    quantised = {"quantizer": "uniform", "bits": 4, "block_size": 32, "rank": 2}
    rule = {"name": "both", "match": {"path": "{first,second}"}, "rewrite": {"loftq": quantised}}
    out = compiled({**SPEC, "rules": [rule], "export": {"precision": precision}}).save(tmp_path / "out")
    assert check(out).ok
    model, grad = (external(out / name) for name in ("model.onnx", "grad.onnx"))
    codes = {name for name in model if name.endswith("codes")}
    assert len(codes) == 2
    assert all(model[name] == grad[name] for name in codes)
    theta = next(one for one in onnx.load(out / "grad.onnx", load_external_data=False).graph.input if one.name == "theta")
    assert theta.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert all(one["dtype"] == "float32" for one in described(out)["inputs"])


BOTH = {"name": "both", "match": {"path": "{first,second}"}, "force": True}
FACTORS = {"loss": "cross_entropy", "output": "logits", "trainable": ["factors"], "optimizer": {"adam_atan2": {"lr": 1e-3}}}
FORMS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "a model in half precision": ({"export": {"precision": "keep"}}, torch.float16),
    "products in int8": (
        {"rules": [{**BOTH, "rewrite": {"loftq": {"quantizer": "uniform", "bits": 8, "block_size": 32, "rank": 2}}}],
         "export": {"activations": "int8"}}, torch.float32,
    ),
    "packed tables": (
        {"rules": [{**BOTH, "rewrite": {"loftq": {"quantizer": "nf3", "block_size": 32, "rank": 2}}}],
         "export": {"codebook": "packed"}}, torch.float32,
    ),
    "adapters as inputs": ({"export": {"adapters": "inputs"}}, torch.float32),
    "low-rank factors": ({"rules": [{**BOTH, "rewrite": {"low_rank": {"rank": 8}}}], "train": FACTORS}, torch.float32),
    "pissa": ({"rules": [{**BOTH, "rewrite": {"lora": {"rank": 4, "alpha": 4, "init": "pissa"}}}]}, torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_model_has_checked_training_graphs(name: str, tmp_path: Path) -> None:
    changes, dtype = FORMS[name]
    out = compiled({**SPEC, **changes}, dtype).save(tmp_path / "out")
    result = check(out)
    assert result.ok, result.problems
    assert any(line.startswith("training: 3 cases") for line in result.lines)
    assert described(out)["length"] == sum(int(np.prod(one["shape"])) for one in described(out)["parameters"])


# ---- the check before the folder takes its name


def test_a_wrong_gradient_is_not_written(net: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matmorph.exporters.training import prepare_training

    right = prepare_training.gradient_graph
    monkeypatch.setattr(prepare_training, "gradient_graph", lambda graph, consts, loss, keep: right(graph, consts[::-1], loss, keep))
    with pytest.raises(CheckError, match="nothing was written") as caught:
        net.save(tmp_path / "out")
    assert any("grad of grad.onnx differs by" in line for line in caught.value.details)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_training_file_is_named(folder: Path, tmp_path: Path) -> None:
    for name in sorted(TRAINING):
        place = tmp_path / name.replace(".", "_")
        shutil.copytree(folder, place)
        data = bytearray((place / name).read_bytes())
        data[len(data) // 2] ^= 1
        (place / name).write_bytes(bytes(data))
        assert check(place).problems == (f"changed file: {place / name} has another sha256 than manifest.json says",)
        (place / name).unlink()
        assert check(place).problems == (f"missing file: {place / name}",)


def rehashed(folder: Path, name: str, data: bytes) -> None:
    """Puts other bytes in, and their hash into the manifest: what only a run can notice."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def swapped(folder: Path) -> None:
    rehashed(folder, "grad.onnx", (folder / "eval.onnx").read_bytes())


def other_start(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "trainable.safetensors")
    tensors["head.bias"] += 1
    rehashed(folder, "trainable.safetensors", safetensors.torch.save(tensors))


def other_update(folder: Path) -> None:
    """apply.onnx whose next theta is its first moment."""
    model = onnx.load(folder / "apply.onnx")
    names = {output.name: output for output in model.graph.output}
    for node in model.graph.node:
        node.output[:] = ["_" if name == "theta_next" else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Identity", ["m"], ["theta_next"]))
    assert "theta_next" in names
    rehashed(folder, "apply.onnx", model.SerializeToString())


def other_loss(folder: Path) -> None:
    arrays = dict(np.load(folder / "train_check.npz"))
    np.savez(folder / "other.npz", **{**arrays, "loss:1": arrays["loss:1"] + 1})
    data = (folder / "other.npz").read_bytes()
    (folder / "other.npz").unlink()
    rehashed(folder, "train_check.npz", data)


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "another graph": (swapped, "grad.onnx: CPUExecutionProvider: "),
    "another start": (other_start, "output logits of eval.onnx differs by"),
    "another update": (other_update, "apply.onnx changes parameters at a learning rate of zero"),
    "another loss": (other_loss, "training case 1: loss of grad.onnx differs by"),
    "no train.json": (lambda folder: rehashed(folder, "train.json", b"{}"), "format: this matmorph reads format 2"),
    "no vectors": (lambda folder: rehashed(folder, "train_check.npz", b"x"), "train_check.npz: cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_computes_wrongly_is_found(folder: Path, tmp_path: Path, name: str) -> None:
    spoil, message = WRONG[name]
    place = tmp_path / "out"
    shutil.copytree(folder, place)
    spoil(place)
    problems = check(place).problems
    assert problems
    assert message in "\n".join(problems)


@pytest.mark.parametrize(("off", "held"), [(1.5, True), (2.5, False)])
def test_two_graphs_may_each_be_off_by_the_tolerance(folder: Path, off: float, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tolerance = json.loads((folder / "manifest.json").read_text())["tolerance"]
    monkeypatch.setattr("matmorph.runtime.training_check.difference", lambda *_: off * tolerance)
    result = check(folder)
    assert result.training_apart == off * tolerance
    assert result.ok is held


def test_a_model_that_feels_rounding_is_held_to_more_there_too(net: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matmorph.runtime.training_check.difference", lambda *_: 5e-4)
    with pytest.raises(CheckError, match="does not answer as torch does"):
        net.save(tmp_path / "refused")
    monkeypatch.setattr("matmorph.folders.save._felt", lambda *_: 3e-4)
    out = net.save(tmp_path / "out")
    assert json.loads((out / "manifest.json").read_text())["tolerance"] == 3e-4


# ---- refusals


FREE: Mapping[str, Any] = {name: entry for name, entry in SPEC.items() if name != "train"}
LABELS = {"labels": torch.zeros(6, 64)}
HIDDEN = {"loss": "mse", "output": "hidden"}
CLASSES = {"loss": "cross_entropy"}
REFUSED: dict[str, tuple[dict[str, Any], type[MatmorphError], str]] = {
    "no loss": ({}, InputError, "export_training needs a loss"),
    "unknown loss": ({"loss": "crossentropy", "output": "logits"}, InputError, "there is no loss crossentropy"),
    "unknown output": ({"loss": "mse", "output": "logit"}, SpecError, "train.output: the model has no output logit; did you mean logits?"),
    "which output": ({"loss": "causal_lm"}, InputError, "causal_lm needs logits [batch, seq, vocabulary]"),
    "a function without labels": ({"loss": lambda outputs, labels: outputs["logits"].sum()}, InputError, "a loss function needs example"),
    "a function that fails": (
        {"loss": lambda outputs, labels: outputs["nothing"], "labels": LABELS}, InputError, "the loss function cannot be traced"
    ),
    "a function that gives no scalar": (
        {"loss": lambda outputs, labels: outputs["logits"], "labels": LABELS}, InputError, "a loss function gives a scalar tensor"
    ),
    "axes of no label": (
        {"loss": lambda outputs, labels: outputs["logits"].sum(), "labels": LABELS, "label_shapes": {"label": {0: "batch"}}},
        InputError, "label_shapes: there is no label label; did you mean labels?",
    ),
    "an unknown axis": (
        {"loss": lambda outputs, labels: outputs["logits"].sum(), "labels": LABELS, "label_shapes": {"labels": {0: "bacth"}}},
        InputError, "label_shapes: axis 0 of labels cannot be bacth; did you mean batch?",
    ),
    "axes that the loss knows": ({**HIDDEN, "label_shapes": {"labels": {0: "batch"}}}, InputError, "label_shapes belongs to"),
    "another label": ({**HIDDEN, "labels": {"label": torch.zeros(6, 64)}}, InputError, "the loss takes no label"),
    "no label": ({**HIDDEN, "labels": {}}, InputError, "labels: labels is missing; the loss takes labels"),
    "labels of another type": (
        {**HIDDEN, "labels": {"labels": torch.zeros(6, 64, dtype=torch.int64)}},
        InputError, "labels: labels must be float32[batch, 64], got int64[6, 64]",
    ),
    "labels of another batch": (
        {**HIDDEN, "labels": {"labels": torch.zeros(5, 64)}},
        InputError, "labels: labels must be float32[batch, 64], that is [6, 64] beside the example inputs, got float32[5, 64]",
    ),
    "labels that are not finite": (
        {**HIDDEN, "labels": {"labels": torch.full((6, 64), torch.inf)}}, InputError, "the loss is inf on the example"
    ),
    "nothing trains": ({**CLASSES, "trainable": ["factors"]}, SpecError, "trainable[0]: the model has no factors"),
    "an empty list": ({**CLASSES, "trainable": []}, SpecError, "train.trainable is empty: nothing trains"),
    "both lists": (
        {**CLASSES, "trainable": ["adapters"], "frozen": ["first.**"]},
        SpecError, "trainable[0]: first.lora.down is matched by both train.trainable (adapters) and train.frozen (first.**)",
    ),
    "no words": ({**CLASSES, "trainable": [7]}, InputError, "trainable is a list of words or globs, got [7]"),
    "unreached": ({**HIDDEN, "trainable": ["head.**"]}, SpecError, "the loss does not depend on what head.** chooses"),
    "no optimizer": ({**CLASSES, "optimizer": "adamw"}, SpecError, "optimizer: expected an optimizer (AdamW, SGD, AdamAtan2, Lion)"),
    "a bad rate": ({**CLASSES, "optimizer": mm.AdamW(-1.0)}, SpecError, "adamw.lr: expected a number > 0, got -1.0"),
    "no output to keep": ({**CLASSES, "keep_outputs": ["logit"]}, InputError, "the model has no output logit to keep"),
}  # fmt: skip


@pytest.fixture(scope="module")
def free() -> Compiled:
    return compiled(FREE)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(free: Compiled, tmp_path: Path, name: str) -> None:
    options, kind, message = REFUSED[name]
    with pytest.raises(kind) as caught:
        free.export_training(tmp_path / "out", **options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_saving_with_training_needs_the_specs_word(free: Compiled, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the spec says nothing of training"):
        free.save(tmp_path / "out", train=True)
    assert {path.name for path in free.save(tmp_path / "out").iterdir()} == PLAIN


def test_a_refusal_names_the_place_in_the_spec(tmp_path: Path) -> None:
    text = """version: 1
rules: [{match: {path: first}, rewrite: {lora: {rank: 2}}}]
train: {loss: cross_entropy, output: logit, trainable: [adapters, heads.*]}
"""
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match=r"a.yaml:3:8: train.output: the model has no output logit; did you mean logits\?"):
        compiled(mm.load_spec(file)).save(tmp_path / "out")  # type: ignore[arg-type]
    file.write_text(text.replace("logit,", "logits,"))
    with pytest.raises(SpecError, match=r"a.yaml:3:68: train.trainable\[1\]: no parameter is called heads.\*"):
        compiled(mm.load_spec(file)).save(tmp_path / "out")  # type: ignore[arg-type]


def test_double_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"first.lora.down is float64, and training keeps its parameters in float32"):
        compiled(dtype=torch.float64).save(tmp_path / "out")


def test_the_request_is_not_kept(net: Compiled, tmp_path: Path) -> None:
    """An export for one task leaves the next one as the spec says."""
    net.export_training(tmp_path / "one", loss="mse", output="hidden", trainable="adapters")
    assert described(net.save(tmp_path / "two"))["loss"]["name"] == "cross_entropy"
    assert replace(net.spec, name="x").train == net.spec.train


@pytest.mark.parametrize("kind", [nn.LSTM, pytest.param(nn.GRU, marks=pytest.mark.full)])
def test_an_adapter_before_a_recurrent_layer_learns(kind: Any, tmp_path: Path) -> None:
    """Its gradient is torch's own formula, traced; the written file is held against autograd."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cell, self.head = nn.Linear(5, 4), kind(4, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cell(self.first(x))[0][:, -1])

    torch.manual_seed(0)
    model = Net()
    spec = {"version": 1, "rules": [{"match": {"path": "first"}, "rewrite": {"lora": {"rank": 2}}}]}
    compiled = mm.compile(model, spec, (torch.randn(3, 2, 5),), ({0: "batch"},))
    compiled.export_training(tmp_path / "out", loss="cross_entropy")
    assert check(tmp_path / "out").ok
