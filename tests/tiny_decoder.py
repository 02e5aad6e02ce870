"""A decoder of one attention written by hand in ONNX, with a growing cache or one shared buffer, and its definition in numpy.

No tracing and no torch, so that what a Generator does is tested in milliseconds. Logits are those of one attention over the embeddings of
tokens and their positions; keys hold both, so that a wrong position, mask or past changes the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny_artifact import hash_files

VOCAB, HEADS, SIZE, POSITIONS, EOS, PAD = 23, 2, 8, 48, 2, 0
WIDTH = HEADS * SIZE
NAMES = ("past.key", "past.value"), ("new.key", "new.value")  # of no pattern that a reader could guess


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = {"tokens": (VOCAB, WIDTH), "places": (POSITIONS, WIDTH), "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in {**shapes, "head": (WIDTH, VOCAB)}.items()}


def logits_of(row: Sequence[int], bias: np.ndarray | float = 0.0) -> np.ndarray:
    """float64 [tokens of the row, VOCAB], by the definition; `bias` is added to the keys' matrix."""
    w = {name: array.astype(np.float64) for name, array in weights().items()}
    x = w["tokens"][list(row)] + w["places"][: len(row)]
    q, k, v = ((x @ (w[name] + (bias if name == "k" else 0))).reshape(-1, HEADS, SIZE).transpose(1, 0, 2) for name in "qkv")
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(SIZE) + np.triu(np.full((len(row), len(row)), -np.inf), 1)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (shares / shares.sum(-1, keepdims=True)) @ v
    return mixed.transpose(1, 0, 2).reshape(-1, WIDTH) @ w["head"]


def greedy(row: Sequence[int], new: int, eos: Sequence[int] = (EOS,), bias: np.ndarray | float = 0.0) -> list[int]:
    """New tokens by the definition, up to the first end token; the gap to the second best must be beyond any rounding."""
    found: list[int] = []
    while len(found) < new and not (found and found[-1] in eos):
        last = logits_of([*row, *found], bias)[-1]
        best, second = np.sort(last)[[-1, -2]]
        assert best - second > 1e-3, "a near tie: choose another prompt"
        found.append(int(last.argmax()))
    return found


def _nodes(shared: bool, adapter: bool, last_only: bool) -> list[Any]:
    node = helper.make_node
    project = [node("MatMul", ["x", name], [f"{name}.flat"]) for name in "qkv"]
    if adapter:
        project[1] = node("MatMul", ["x", "k"], ["k.base"])
        project += [node("MatMul", ["x", "down"], ["low"]), node("MatMul", ["low", "up"], ["k.more"])]
        project.append(node("Add", ["k.base", "k.more"], ["k.flat"]))
    first = [
        node("Gather", ["tokens", "input_ids"], ["t"]),
        node("Gather", ["places", "position_ids"], ["p"]),
        node("Add", ["t", "p"], ["x"]),
        *project,
    ]
    last = [node("MatMul", ["mixed", "head"], ["logits.all" if last_only else "logits"])]
    last += [node("Slice", ["logits.all", "minus", "far", "one"], ["logits"])] if last_only else []
    if shared:
        gqa = ["q.flat", "k.flat", "v.flat", *NAMES[0], "lengths", "total"]
        return [
            *first,
            node("ReduceSum", ["attention_mask", "one"], ["sums"], keepdims=0),
            node("Sub", ["sums", "one.scalar"], ["lengths.64"]),
            node("Cast", ["lengths.64"], ["lengths"], to=TensorProto.INT32),
            node("Shape", ["attention_mask"], ["total.1"], start=1, end=2),
            node("Squeeze", ["total.1"], ["total.64"]),
            node("Cast", ["total.64"], ["total"], to=TensorProto.INT32),
            node("GroupQueryAttention", gqa, ["mixed", *NAMES[1]], domain="com.microsoft", num_heads=HEADS, kv_num_heads=HEADS),
            *last,
        ]
    split = [
        other
        for name in "qkv"
        for other in (
            node("Reshape", [f"{name}.flat", "split"], [f"{name}.split"]),
            node("Transpose", [f"{name}.split"], [f"{name}.new"], perm=[0, 2, 1, 3]),
        )
    ]
    return [
        *first,
        *split,
        node("Concat", [NAMES[0][0], "k.new"], [NAMES[1][0]], axis=2),
        node("Concat", [NAMES[0][1], "v.new"], [NAMES[1][1]], axis=2),
        node("Transpose", [NAMES[1][0]], ["k.t"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q.new", "k.t"], ["scores"]),
        node("Mul", ["scores", "scale"], ["scaled"]),
        node("Shape", ["attention_mask"], ["total.1"], start=1, end=2),
        node("Squeeze", ["total.1"], ["total"]),
        node("Shape", ["input_ids"], ["new.1"], start=1, end=2),
        node("Squeeze", ["new.1"], ["new"]),
        node("Sub", ["total", "new"], ["past"]),
        node("Range", ["zero.scalar", "total", "one.scalar"], ["columns"]),
        node("Range", ["past", "total", "one.scalar"], ["lines"]),
        node("Unsqueeze", ["lines", "one"], ["lines.2"]),
        node("LessOrEqual", ["columns", "lines.2"], ["causal"]),
        node("Cast", ["attention_mask"], ["shown"], to=TensorProto.BOOL),
        node("Unsqueeze", ["shown", "axes"], ["shown.4"]),
        node("And", ["shown.4", "causal"], ["keep"]),
        node("Where", ["keep", "scaled", "low.scalar"], ["masked"]),
        node("Softmax", ["masked"], ["shares"], axis=-1),
        node("MatMul", ["shares", NAMES[1][1]], ["heads"]),
        node("Transpose", ["heads"], ["joined"], perm=[0, 2, 1, 3]),
        node("Reshape", ["joined", "flat"], ["mixed"]),
        *last,
    ]


def write_decoder(folder: Path, *, shared: bool = False, adapter: bool = False, last_only: bool = False, **changes: Any) -> Path:
    """The folder; `changes`: to top-level keys of the manifest. `adapter`: the keys take a pair of factors as inputs, of rank 0 by
    default. `last_only`: logits of the last column alone."""
    folder.mkdir()
    rows, new, past, total = "batch_size", "sequence_length", "past_sequence_length", "past_sequence_length + sequence_length"
    ints = {"input_ids": [rows, new], "attention_mask": [rows, total], "position_ids": [rows, new]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in ints.items()]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, HEADS, past, SIZE]) for name in NAMES[0]]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [rows, 1 if last_only else new, VOCAB])]
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, HEADS, total, SIZE]) for name in NAMES[1]]
    constants = {
        **weights(),
        "one": np.array([1]),
        "minus": np.array([-1]),
        "far": np.array([np.iinfo(np.int64).max]),
        "one.scalar": np.array(1),
        "zero.scalar": np.array(0),
        "axes": np.array([1, 2]),
        "split": np.array([0, 0, HEADS, SIZE]),
        "flat": np.array([0, 0, WIDTH]),
        "scale": np.array(1 / np.sqrt(SIZE), np.float32),
        "low.scalar": np.array(-1e9, np.float32),
    }
    if adapter:
        constants |= {"down": np.zeros((WIDTH, 0), np.float32), "up": np.zeros((0, WIDTH), np.float32)}
        inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("down", [WIDTH, "r"]), ("up", ["r", WIDTH]))]
    nodes = _nodes(shared, adapter, last_only)
    used = {name for node in nodes for name in node.input}
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, stored)
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save_model(helper.make_model(graph, opset_imports=sets, ir_version=10), folder / "model.onnx")
    told: dict[str, Any] = {
        "inputs": [*({"name": n, "dtype": "int64", "shape": s} for n, s in ints.items()), *_infos(NAMES[0], [rows, HEADS, past, SIZE])],
        "outputs": [*_infos(["logits"], [rows, 1 if last_only else new, VOCAB]), *_infos(NAMES[1], [rows, HEADS, total, SIZE])],
        "ranges": {rows: [1, None], new: [1, None], past: [0, None]},
        "cache": {
            "slots": [{"past": past, "present": present, "axis": 2} for past, present in zip(*NAMES, strict=True)],
            "padding": "right" if shared else "any",
            "share_buffer": shared,
            "max_length": POSITIONS,
            "bytes_per_token": 2 * 4 * WIDTH,
        },
    }
    if adapter:
        pair = {"site": "k", "method": "lora", "down": "down", "up": "up", "in_features": WIDTH, "out_features": WIDTH, "batch": None}
        told["adapters"] = {"fingerprint": "ab" * 32, "inputs": [{**pair, "rank": 0, "dtype": "float32"}]}
    hash_files(folder, **{**told, **changes})
    return folder


def _infos(names: Sequence[str], shape: list[Any]) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": "float32", "shape": shape} for name in names]
