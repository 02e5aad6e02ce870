"""Projections joined in the file. Oracle: ONNX Runtime on the file with the three apart; the same codes give the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from matmorph.exporters.data_file import data_file
from matmorph.exporters.onnx.joined import join_projections, joined_name
from matmorph.ir.core import Const
from matmorph.ir.types import TensorType, dtype_name

WIDTH, HEAD, QUERIES, KEYS, BLOCK = 32, 16, 2, 1, 16
PARTS = ("q", "k", "v")
FLOAT = ir.DataType.FLOAT


def const(name: str, array: np.ndarray) -> Const:
    tensor = torch.from_numpy(array)
    kind = TensorType(dtype_name(tensor.dtype), tuple(tensor.shape))
    return Const(name, kind, load=lambda: tensor, names=(name,))


def weights() -> dict[str, Const]:
    """Codes, scales, zero points and biases of three projections."""
    rng, found = np.random.default_rng(0), {}
    for part in PARTS:
        rows = HEAD * (QUERIES if part == "q" else KEYS)
        arrays = {
            "codes": rng.integers(0, 256, (rows, WIDTH // BLOCK, BLOCK // 2), dtype=np.uint8),
            "scales": rng.uniform(0.01, 0.1, (rows, WIDTH // BLOCK)).astype(np.float32),
            "zero_points": rng.integers(0, 256, (rows, 1), dtype=np.uint8),
            "bias": rng.standard_normal(rows).astype(np.float32),
        }
        found |= {f"attention.{part}.{name}": const(f"attention.{part}.{name}", array) for name, array in arrays.items()}
    return found


def port(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def decoder(consts: dict[str, Const], block: tuple[int, ...] = (BLOCK, BLOCK, BLOCK)) -> ir.Model:
    """Three products of x and an attention over them."""
    x, length, total = port("x", FLOAT, 1, "s", WIDTH), port("length", ir.DataType.INT32, 1), port("total", ir.DataType.INT32, 1)
    past = [port(f"past_{name}", FLOAT, 1, KEYS, "p", HEAD) for name in ("k", "v")]
    held = {
        name: port(name, ir.DataType.UINT8 if one.tensor.dtype == "uint8" else FLOAT, *map(int, one.tensor.shape))
        for name, one in consts.items()
    }
    products = []
    for part, size in zip(PARTS, block, strict=True):
        codes, scales, zeros, bias = (held[f"attention.{part}.{name}"] for name in ("codes", "scales", "zero_points", "bias"))
        assert codes.shape is not None
        numbers = {"K": WIDTH, "N": codes.shape[0], "bits": 4, "block_size": size}
        products.append(ir.node("MatMulNBits", [x, codes, scales, zeros, None, bias], numbers, domain="com.microsoft"))
        products[-1].outputs[0].type = ir.TensorType(FLOAT)
    inputs = [*(node.outputs[0] for node in products), *past, length, total]
    outputs = [port("y", FLOAT, 1, "s", QUERIES * HEAD), *(port(f"present_{name}", FLOAT, 1, KEYS, "t", HEAD) for name in ("k", "v"))]
    attention = ir.node(
        "GroupQueryAttention", inputs, {"num_heads": QUERIES, "kv_num_heads": KEYS}, domain="com.microsoft", outputs=outputs
    )
    graph = ir.Graph(
        [x, *past, length, total],
        outputs,
        nodes=[*products, attention],
        initializers=list(held.values()),
        opset_imports={"": 21, "com.microsoft": 1},
        name="main",
    )
    for number, node in enumerate(products):
        node.outputs[0].name = f"product_{number}"
    return ir.Model(graph, ir_version=10)


def ran(model: ir.Model, joined: dict[str, tuple[str, ...]], consts: dict[str, Const], folder: Path) -> list[Any]:
    folder.mkdir()
    with data_file(folder) as data:
        made = [(value, tuple(consts[part] for part in joined.get(name, (name,)))) for name, value in model.graph.initializers.items()]
        total = data.attach(made)
    assert total == sum(one.nbytes for one in consts.values())  # each weight once
    (folder / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    past = {f"past_{name}": rng.standard_normal((1, KEYS, 5, HEAD), dtype=np.float32) for name in ("k", "v")}
    sizes = {"length": np.asarray([7], np.int32), "total": np.asarray([8], np.int32)}
    return list(session.run(None, {"x": rng.standard_normal((1, 3, WIDTH), dtype=np.float32), **past, **sizes}))


def test_joined_rows_give_the_same_bits(tmp_path: Path) -> None:
    consts = weights()
    apart, together = decoder(consts), decoder(consts)
    joined = join_projections(together)
    assert joined == {
        f"attention.{{q,k,v}}.{name}": tuple(f"attention.{part}.{name}" for part in PARTS)
        for name in ("codes", "scales", "zero_points", "bias")
    }
    assert [node.op_type for node in together.graph] == ["MatMulNBits", "GroupQueryAttention"]
    assert list(together.graph.initializers) == list(joined)
    pairs = zip(ran(apart, {}, consts, tmp_path / "a"), ran(together, joined, consts, tmp_path / "b"), strict=True)
    for wanted, found in pairs:
        np.testing.assert_array_equal(found, wanted)


def changed(model: ir.Model, how: str) -> ir.Model:
    """A graph in which the three may not be one."""
    graph = model.graph
    first, second, _, attention = graph
    if how == "a result that is read elsewhere":
        graph.append(ir.node("Neg", [first.outputs[0]]))
    elif how == "a weight that is read elsewhere":
        graph.append(ir.node("Neg", [second.inputs[2]]))
    elif how == "another value":
        copy = ir.node("Identity", [second.inputs[0]])
        graph.insert_before(second, copy)
        second.replace_input_with(0, copy.outputs[0])
    elif how == "an adapter beside one":
        added = ir.node("Add", [first.outputs[0], first.outputs[0]])
        graph.insert_before(attention, added)
        attention.replace_input_with(0, added.outputs[0])
    elif how == "no bias in one":
        second.replace_input_with(5, None)
    elif how == "a weight that is an input":
        graph.inputs.append(graph.initializers["attention.v.scales"])
    return model


CHANGES = (
    "a result that is read elsewhere",
    "a weight that is read elsewhere",
    "another value",
    "an adapter beside one",
    "no bias in one",
    "a weight that is an input",
)


@pytest.mark.parametrize("how", CHANGES)
def test_others_stay_apart(how: str) -> None:
    model = changed(decoder(weights()), how)
    before = [node.op_type for node in model.graph]
    assert join_projections(model) == {}
    assert [node.op_type for node in model.graph] == before


def test_products_of_other_blocks_stay_apart() -> None:
    assert join_projections(decoder(weights(), (BLOCK, BLOCK, 32))) == {}


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (("l.0.q.weight", "l.0.k.weight", "l.0.v.weight"), "l.0.{q,k,v}.weight"),
        (("l.q.proj.codes", "l.k.proj.codes", "l.v.proj.codes"), "l.{q,k,v}.proj.codes"),
        (("a", "b", "c"), "{a,b,c}"),
        (("l.q.a.w", "l.w"), "l.{q.a.w,w}"),
    ],
)
def test_a_joined_weight_is_called_by_its_parts(names: tuple[str, ...], name: str) -> None:
    assert joined_name(names) == name
