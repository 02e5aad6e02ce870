"""A complete artefact folder, built with `onnx.helper` alone: what the runtime's tests run against."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, WIDTH, OUT = 10, 4, 3


def weights() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((VOCABULARY, WIDTH), dtype=np.float32), rng.standard_normal((WIDTH, OUT), dtype=np.float32)


def expected_outputs(ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """numpy, float64 inside: hidden = table[ids] @ matrix * mask."""
    table, matrix = weights()
    hidden = (table[ids].astype(np.float64) @ matrix.astype(np.float64)) * mask[..., None]
    return {"hidden": hidden.astype(np.float32), "top": hidden.argmax(-1)}


def feeds(batch: int, seq: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"ids": rng.integers(0, VOCABULARY, (batch, seq)), "mask": np.ones((batch, seq), np.float32)}


def write_model(path: Path) -> None:
    table, matrix = weights()
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "matrix"], ["product"]),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["product", "column"], ["hidden"]),
        helper.make_node("ArgMax", ["hidden"], ["top"], axis=-1, keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "seq"]),
        helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", "seq"]),
    ]
    outputs = [
        helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "seq", OUT]),
        helper.make_tensor_value_info("top", TensorProto.INT64, ["batch", "seq"]),
    ]
    constants = {"table": table, "matrix": matrix, "last": np.array([-1], np.int64)}
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=64)  # shapes stay inside


def hash_files(folder: Path, **changes: object) -> None:
    """(Re)writes the manifest of what lies in the folder, with `changes` to its top-level keys."""
    names = [p.name for p in sorted(folder.iterdir()) if p.name not in ("manifest.json", "run.json")]
    files = {n: {"sha256": hashlib.sha256((folder / n).read_bytes()).hexdigest(), "bytes": (folder / n).stat().st_size} for n in names}
    axes = ["batch", "seq"]
    data = {
        "format": 1,
        "matmorph": "0.1.0",
        "source": {"weights_sha256": "0" * 64},
        "inputs": [{"name": "ids", "dtype": "int64", "shape": axes}, {"name": "mask", "dtype": "float32", "shape": axes}],
        "outputs": [{"name": "hidden", "dtype": "float32", "shape": [*axes, OUT]}, {"name": "top", "dtype": "int64", "shape": axes}],
        "ranges": {"batch": [1, None], "seq": [2, 8]},
        "precision": "fp32",
        "tolerance": 1e-5,
        "opset": 21,
        "target": ["cpu"],
        "notes": ["a note"],
        "files": files,
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(data), encoding="utf-8")


def write_artifact(folder: Path) -> Path:
    """model.onnx, its data, check.npz with three cases, manifest.json and run.json; returns the folder."""
    folder.mkdir()
    write_model(folder / "model.onnx")
    arrays = {}
    for k, (batch, seq) in enumerate(((1, 2), (2, 5), (3, 8))):
        case = feeds(batch, seq, seed=k)
        arrays |= {f"input:{n}:{k}": a for n, a in case.items()}
        arrays |= {f"output:{n}:{k}": a for n, a in expected_outputs(case["ids"], case["mask"]).items()}
    np.savez(folder / "check.npz", **arrays)
    hash_files(folder)
    (folder / "run.json").write_text("{}", encoding="utf-8")
    return folder
