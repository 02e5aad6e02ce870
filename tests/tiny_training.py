"""A complete training folder, built with `onnx.helper` alone: linear regression y = x W + b with mse, its gradient written by hand.

grad.onnx and eval.onnx follow train.json's contract; apply.onnx is the real one. `Oracle` is the same training in numpy, float64.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

from matmorph.exporters.training.apply_graph import optimizer_model
from matmorph.optimizers import AdamW, AnyOptimizer, optimizer_name

IN, OUT = 4, 3
N = IN * OUT + OUT
LR = 1e-2


def initial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {"fc.weight": rng.standard_normal((IN, OUT), dtype=np.float32), "fc.bias": np.zeros(OUT, np.float32)}


def batch(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, IN), dtype=np.float32)
    target = (x @ np.arange(IN * OUT, dtype=np.float32).reshape(IN, OUT) / 10 + 0.5).astype(np.float32)
    return {"x": x, "labels": target}


def joined(*parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


_FORWARD = [
    helper.make_node("Slice", ["theta", "zero", "weights"], ["flat"]),
    helper.make_node("Reshape", ["flat", "matrix"], ["w"]),
    helper.make_node("Slice", ["theta", "weights", "all"], ["b"]),
    helper.make_node("MatMul", ["x", "w"], ["product"]),
    helper.make_node("Add", ["product", "b"], ["y"]),
    helper.make_node("Sub", ["y", "labels"], ["error"]),
    helper.make_node("Mul", ["error", "error"], ["square"]),
    helper.make_node("ReduceMean", ["square"], ["loss"], keepdims=0),
    helper.make_node("Size", ["error"], ["elements"]),
    helper.make_node("Cast", ["elements"], ["count"], to=TensorProto.FLOAT),
]
_BACKWARD = [
    helper.make_node("Div", ["loss_scale", "count"], ["each"]),
    helper.make_node("Mul", ["each", "two"], ["twice"]),
    helper.make_node("Mul", ["error", "twice"], ["dy"]),
    helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0]),
    helper.make_node("MatMul", ["xt", "dy"], ["dw"]),
    helper.make_node("Reshape", ["dw", "line"], ["dw_flat"]),
    helper.make_node("ReduceSum", ["dy", "zero"], ["db"], keepdims=0),
    helper.make_node("Concat", ["dw_flat", "db"], ["grad"], axis=0),
]
_CONSTANTS = {
    "zero": np.array([0]),
    "weights": np.array([IN * OUT]),
    "all": np.array([N]),
    "matrix": np.array([IN, OUT]),
    "line": np.array([-1]),
    "two": np.array(2, np.float32),
}


def _save(path: Path, nodes: list[onnx.NodeProto], inputs: list[str], outputs: dict[str, list[Any]]) -> None:
    shapes = {"theta": [N], "x": ["batch", IN], "labels": ["batch", OUT], "loss_scale": []}
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in _CONSTANTS.items() if any(name in node.input for node in nodes)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save_model(model, path)


def write_json(folder: Path, **changes: Any) -> None:
    """(Re)writes train.json for what lies in the folder, with `changes` to its top-level keys."""
    names = ("grad.onnx", "apply.onnx", "eval.onnx", "trainable.safetensors")
    files = {n: {"sha256": hashlib.sha256((folder / n).read_bytes()).hexdigest(), "bytes": (folder / n).stat().st_size} for n in names}
    data = {
        "format": 2,
        "matmorph": "0.1.0",
        "fingerprint": "a" * 64,
        "trainable_fingerprint": "b" * 64,
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", IN]}],
        "labels": [{"name": "labels", "dtype": "float32", "shape": ["batch", OUT]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", OUT]}],
        "kept_outputs": [],
        "ranges": {"batch": [1, 64]},
        "loss": {"name": "mse", "output": "y", "ignore_index": -100},
        "optimizer": {"name": "adamw", "lr": LR, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
        "states": ["m", "v"],
        "length": N,
        "parameters": [
            {"name": "fc.weight", "shape": [IN, OUT], "offset": 0, "segment": "matrix"},
            {"name": "fc.bias", "shape": [OUT], "offset": IN * OUT, "segment": "bias"},
        ],
        "segments": [{"name": "matrix", "offset": 0, "length": IN * OUT}, {"name": "bias", "offset": IN * OUT, "length": OUT}],
        "files": files,
        "initial": "trainable.safetensors",
        **changes,
    }
    (folder / "train.json").write_text(json.dumps(data), encoding="utf-8")


def write_training(folder: Path, optimizer: AnyOptimizer | None = None, **changes: Any) -> Path:
    """The five files; returns the folder. `optimizer`: AdamW(LR) by default."""
    folder.mkdir(parents=True)
    batch_inputs = ["x", "labels"]
    _save(folder / "grad.onnx", _FORWARD + _BACKWARD, ["theta", *batch_inputs, "loss_scale"], {"loss": [], "count": [], "grad": [N]})
    _save(folder / "eval.onnx", _FORWARD, ["theta", *batch_inputs], {"loss": [], "count": [], "y": ["batch", OUT]})
    chosen = optimizer or AdamW(LR)
    onnx.save_model(optimizer_model(chosen, [IN * OUT, OUT]), folder / "apply.onnx")
    safetensors.numpy.save_file(initial(), folder / "trainable.safetensors")
    if optimizer:
        settings = {name: getattr(optimizer, name) for name in type(optimizer).__slots__}
        changes = {"optimizer": {"name": optimizer_name(optimizer), **settings}, "states": optimizer.STATES, **changes}
    write_json(folder, **changes)
    return folder


class Oracle:
    """AdamW on the same regression, in float64: Loshchilov and Hutter 2019, algorithm 2."""

    def __init__(self) -> None:
        start = initial()
        self.w, self.b = start["fc.weight"].astype(np.float64), start["fc.bias"].astype(np.float64)
        self.m, self.v, self.t = np.zeros(N), np.zeros(N), 0

    def loss(self, data: dict[str, np.ndarray]) -> float:
        return float(((data["x"].astype(np.float64) @ self.w + self.b - data["labels"]) ** 2).mean())

    def step(self, data: dict[str, np.ndarray], lr: float = LR, decay: float = 0.01, clip: float = np.inf) -> float:
        """The loss before the step."""
        loss = self.loss(data)
        error = 2 * (data["x"].astype(np.float64) @ self.w + self.b - data["labels"]) / data["labels"].size
        grad = np.concatenate([(data["x"].T.astype(np.float64) @ error).reshape(-1), error.sum(0)])
        grad *= min(1.0, clip / (np.linalg.norm(grad) + 1e-6))
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * grad, 0.999 * self.v + 0.001 * grad**2
        theta = np.concatenate([self.w.reshape(-1), self.b])
        theta -= lr * decay * theta
        theta -= lr * (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        self.w, self.b = theta[: IN * OUT].reshape(IN, OUT), theta[IN * OUT :]
        return loss
