"""Codes of 8 bits with one scale per output channel: torch, both forms in ONNX Runtime against float64, and when which is written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import LEVELS, randn, session
from onnx import TensorProto, helper, numpy_helper
from quantised import ROUNDING, Quantised, Weight, channels, error, expected
from torch import Tensor, nn

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.exporters.onnx.rounding import round_uint8, rounds_activations, runs_rounded
from matmorph.exporters.vectors import check_vectors
from matmorph.ir.core import Graph
from matmorph.ir.tracing.trace import trace
from matmorph.passes.linalg.pairs import held_to_pairs, pair_sums, widened_for_pairs
from matmorph.passes.linalg.quantize import Quantizer, quantize
from matmorph.passes.methods import method_table
from matmorph.runtime.check import check
from matmorph.runtime.format.artifact import MODEL
from matmorph.specs.load import load_spec
from matmorph.specs.schema import Export

CPU = {"activations": "int8", "target": ("cpu",)}
CHANNEL = {"quantizer": "uniform", "bits": 8, "block_size": "channel"}


def product(weight: Weight, x: Tensor, bias: Tensor | None = None) -> Graph:
    return trace(Quantised(weight, bias), {"x": x}, {"x": {0: "batch"}})


def exported(graph: Graph, folder: Path, x: Tensor, level: str = "optimised", **export: Any) -> np.ndarray:
    export_onnx(graph, folder, Export(**export))
    return np.asarray(session(folder / MODEL, level).run(None, {"x": x.numpy()})[0])


def rounded(x: np.ndarray) -> np.ndarray:
    """DynamicQuantizeLinear of the ONNX standard and back, in float64 but for the scale, which it defines in float32."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = np.float32(np.float32(np.float32(high) - np.float32(low)) / np.float32(255))
    if scale == 0:
        return x.astype(np.float64)
    zero = np.clip(np.rint(np.float32(-low) / scale), 0, 255)
    codes = np.clip(np.rint(x.astype(np.float32) / scale) + zero, 0, 255)
    return (codes - zero).astype(np.float64) * np.float64(scale)


def test_torch_multiplies_with_what_the_codes_stand_for(rng: np.random.Generator) -> None:
    weight, bias = channels(rng, 7, 13), randn(7)
    x = randn(3, 2, 13)
    assert error(weight(x, bias), expected(weight, x, bias)) <= ROUNDING
    y = randn(4, 7)
    back = torch.ops.matmorph.matmul_nbits_transposed(y, *weight.parts, *weight.numbers)
    assert error(back, y.double().numpy() @ weight.dense) <= ROUNDING
    wide = x.double().requires_grad_()
    weight(wide).sum().backward()
    assert wide.grad is not None
    assert error(wide.grad[0, 0], weight.dense.sum(0)) <= ROUNDING


def test_operands_that_do_not_fit(rng: np.random.Generator) -> None:
    codes, scales, _ = channels(rng, 6, 16).parts
    x, numbers = randn(2, 16), (16, 6, 8, 16)
    run = torch.ops.matmorph.matmul_nbits
    with pytest.raises(ValueError, match="codes with a scale per row have 8 bits, not 4"):
        run(x, codes, scales, None, None, 16, 6, 4, 16)
    with pytest.raises(ValueError, match=re.escape("codes must be int8[6, 16], not int8[6, 1, 16]")):
        run(x, codes[:, None], scales, None, None, *numbers)
    with pytest.raises(ValueError, match=re.escape("codes must be int8[6, 16], not uint8[6, 16]")):
        run(x, codes.view(torch.uint8), scales, None, None, *numbers)
    with pytest.raises(ValueError, match="codes with a scale per row have no zero points"):
        run(x, codes, scales, codes.view(torch.uint8)[:, 0], None, *numbers)


# in ONNX


@pytest.mark.parametrize("level", LEVELS)
def test_products_in_integers(rng: np.random.Generator, tmp_path: Path, level: str) -> None:
    """Exact but for the float32 scales: integers are summed in 32 bits. The oracle rounds x as the standard says."""
    for number, (n, k, shape, bias) in enumerate([(16, 64, (7, 64), randn(16)), (5, 35, (2, 3, 35), None), (3, 8, (4, 8), randn(3))]):
        weight, x = channels(rng, n, k), randn(*shape) + number
        (folder := tmp_path / str(number)).mkdir()
        y = exported(product(weight, x, bias), folder, x, level, **CPU)
        wanted = rounded(x.numpy()) @ weight.dense.T + (0 if bias is None else bias.double().numpy())
        assert error(y, wanted) <= ROUNDING
        assert error(y, expected(weight, x, bias)) > 5e-4  # it does round


@pytest.mark.parametrize("level", LEVELS)
def test_products_in_floats(rng: np.random.Generator, tmp_path: Path, level: str) -> None:
    for number, (n, k, shape, opset) in enumerate([(16, 64, (7, 64), 21), (5, 35, (2, 3, 35), 18), (5, 35, (2, 3, 35), 23)]):
        weight, x, bias = channels(rng, n, k), randn(*shape), randn(n)
        (folder := tmp_path / str(number)).mkdir()
        assert error(exported(product(weight, x, bias), folder, x, level, opset=opset), expected(weight, x, bias)) <= ROUNDING


def test_no_pair_of_codes_can_overflow_16_bits() -> None:
    """On a CPU without VNNI 255 a + 255 b of neighbours a and b is held in 16 bits. Loud rows, pairs of one sign, odd widths."""
    for seed, (n, k) in enumerate([(40, 64), (7, 33), (1, 2), (3, 1)]):
        w = randn(n, k) + 0.1 * seed
        w[0] = 1.0
        w[-1] = -w[-1].abs()
        plain = quantize(w, Quantizer("uniform", 8, -(-k // 8) * 8))
        found = widened_for_pairs(w, plain)
        levels = found.codes.numpy().astype(np.int64) - 128
        padded = np.pad(levels, ((0, 0), (0, k % 2))).reshape(n, -1, 2)
        sums = np.concatenate([np.maximum(padded, 0).sum(-1), np.minimum(padded, 0).sum(-1)])
        assert (255 * sums).max() <= 2**15 - 1
        assert (255 * sums).min() >= -(2**15)
        kept = (found.scales == plain.scales)[:, 0].numpy()
        same = (plain.codes == found.codes).all(1).numpy()
        assert (same == kept).all()
        ratio = float((found.scales / plain.scales).max())
        assert ratio <= 2.01  # both at their largest, and a rounding
        nearest = np.abs(levels * found.scales.numpy().astype(np.float64) - w.numpy())
        assert (nearest <= 0.5001 * np.abs(found.scales.numpy())).all()
        moved = held_to_pairs(replace(plain, codes=plain.codes))
        assert int(pair_sums(moved.codes.short() - 128).max()) <= 128
        changed = (moved.codes != plain.codes).view(n, -1)
        assert int(torch.nn.functional.pad(changed, (0, k % 2)).view(n, -1, 2).sum(-1).max()) <= 1  # one of the two


def test_file_is_readable(rng: np.random.Generator, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Identity(), Quantised(channels(rng, 16, 64), randn(16)))
    info = export_onnx(trace(module, (randn(2, 64),), ({0: "batch"},)), tmp_path, Export(**CPU))
    nodes = {node.op_type: node for node in onnx.load(tmp_path / MODEL).graph.node}
    assert sorted(nodes) == ["DynamicQuantizeLinear", "MatMulIntegerToFloat", "Transpose"]
    assert list(nodes["MatMulIntegerToFloat"].input)[3:] == ["1.scales", nodes["DynamicQuantizeLinear"].output[2], "", "1.bias"]
    assert info.bytes == 16 * 64 + 16 * 4 + 16 * 4


def test_what_a_session_holds(rng: np.random.Generator, tmp_path: Path) -> None:
    """In integers the codes, turned once when it loads, and one operator; in floats the dense weight, made once."""
    for name, export in (("integers", CPU), ("floats", {})):
        (folder := tmp_path / name).mkdir()
        export_onnx(product(channels(rng, 64, 128), randn(2, 128)), folder, Export(**export))
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
        onnxruntime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(folder / "optimised.onnx").graph
        assert max(numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer) == 64 * 128 * (1 if name == "integers" else 4)
        operators = sorted(node.op_type for node in graph.node)
        assert operators == (["DynamicQuantizeMatMul"] if name == "integers" else ["MatMul"])


def test_half_precision_computes_this_product_in_float32(rng: np.random.Generator, tmp_path: Path) -> None:
    weight, x = channels(rng, 16, 64), randn(4, 64)
    y = exported(product(weight, x), tmp_path, x, precision="fp16", **CPU)
    assert error(y, rounded(x.numpy()) @ weight.dense.T) <= 1e-2  # one level of x may differ once x has 11 bits
    (folder := tmp_path / "keep").mkdir()
    export_onnx(trace(Quantised(weight, None), {"x": x.half()}, {"x": {0: "batch"}}), folder, Export(precision="keep", **CPU))
    (y,) = session(folder / MODEL).run(None, {"x": x.half().numpy()})
    assert error(y, rounded(x.half().float().numpy()) @ weight.dense.T) <= 1e-3  # the result has 11 bits


def test_a_target_without_integer_products_gets_floats(rng: np.random.Generator, tmp_path: Path) -> None:
    assert Export(**CPU).integer_products
    assert not Export(activations="int8").integer_products  # cuda is among the targets
    assert not Export(target=("cpu",)).integer_products
    weight, x = channels(rng, 16, 64), randn(4, 64)
    assert error(exported(product(weight, x), tmp_path, x, activations="int8"), expected(weight, x)) <= ROUNDING
    assert {node.op_type for node in onnx.load(tmp_path / MODEL).graph.node} == {"Cast", "Unsqueeze", "Mul", "Transpose", "MatMul"}


# what torch foresees


@pytest.mark.parametrize("case", ["both signs", "positive", "negative", "zeros", "wide"])
def test_rounding_is_that_of_the_standard(case: str) -> None:
    x = {"both signs": randn(5, 9), "positive": randn(5, 9).abs() + 3, "negative": -randn(5, 9).abs() - 3}.get(case, torch.zeros(5, 9))
    if case == "wide":
        x = randn(5, 9) * 10.0 ** torch.arange(-4.0, 5.0)
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 9])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    running = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = running.run(None, {"x": x.numpy()})
    largest = max(float(np.abs(y).max()), 1e-9)
    assert np.abs(round_uint8(x).numpy() - y).max() <= 1e-6 * largest  # the same level
    assert np.abs(round_uint8(x).numpy() - rounded(x.numpy())).max() <= 1e-6 * largest


def test_empty_and_half(rng: np.random.Generator) -> None:
    assert round_uint8(torch.zeros(0, 4)).shape == (0, 4)
    assert round_uint8(randn(3, 4).half()).dtype == torch.float16
    graph = product(channels(rng, 4, 8), randn(2, 8))
    assert rounds_activations(graph, integer=True)
    assert not rounds_activations(graph, integer=False)


def test_torch_foresees_what_the_kernel_does(rng: np.random.Generator, tmp_path: Path) -> None:
    weight, x = channels(rng, 16, 128), randn(7, 128)
    graph = product(weight, x)
    y = exported(graph, tmp_path, x, **CPU)
    (foreseen,) = check_vectors(graph, [x], run=runs_rounded(True)).cases[0].outputs.values()
    assert error(y, foreseen.astype(np.float64)) <= 2 * ROUNDING


# by spec


class Pair(nn.Module):
    """Two matmuls with a residual."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def spec_of(method: str = "quantize", export: Any = None, **settings: Any) -> dict[str, Any]:
    rule = {"name": "all", "match": {"op": "linear"}, "rewrite": {method: {**CHANNEL, **settings}}}
    return {"version": 1, "rules": [rule], "export": {"target": ["cpu"], "activations": "int8"} if export is None else export}


@pytest.mark.parametrize("settings", [{}, {"scale": "search"}, {"rounding": "gptq", "scale": "weighted"}])
def test_compiled_and_saved(tmp_path: Path, settings: dict[str, Any]) -> None:
    model, x = Pair().eval(), randn(16, 24)
    compiled = mm.compile(model, spec_of(**settings), (x,), dynamic_shapes=({0: "batch"},), calibration=[(randn(64, 24),)])
    assert float((compiled(x) - model(x)).detach().norm() / model(x).detach().norm()) < 0.02  # 8 bits: half a step of 1/127 of the largest
    by_path = {row.path: row for row in compiled.report.sites}
    stored = 40 * 24 + 40 * 4
    assert by_path["up"].bytes[1] == stored + (by_path["up"].bytes[0] - 4 * 40 * 24)  # and the bias
    assert all(row.weight_error is not None and row.weight_error < 0.01 for row in compiled.report.sites)
    compiled.save(tmp_path / "out")
    result = check(tmp_path / "out")
    assert result.ok
    assert result.max_difference is not None
    assert result.max_difference <= float(json.loads((tmp_path / "out" / "manifest.json").read_text())["tolerance"])
    found = {node.op_type for node in onnx.load(tmp_path / "out" / MODEL).graph.node}
    assert "MatMulIntegerToFloat" in found


def test_the_plan_says_which_product_and_why() -> None:
    def notes(**export: Any) -> str:
        return "\n".join(mm.plan(Pair().eval(), spec_of(export=export), (randn(2, 24),)).notes)

    assert "cpu: DynamicQuantizeLinear and MatMulIntegerToFloat" in notes(target=["cpu"], activations="int8")
    assert "not multiplied in integers (export.activations is fp32): the session makes the matrix dense" in notes(target=["cpu"])
    said = notes(activations="int8")
    assert "not multiplied in integers (cuda has no such product, and export.target names it): the session makes" in said


def test_blocks_of_8_bits_are_told_of_the_faster_product() -> None:
    plan = mm.plan(Pair().eval(), spec_of(block_size=32), (randn(2, 24),))
    assert any("block_size: channel" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"bits": 4},
            "block_size: channel is for uniform codes of 8 bits, which kernels multiply with one scale per output channel, not for",
        ),
        ({"bits": "auto"}, "block_size: channel is for uniform codes of 8 bits"),
        ({"quantizer": "nf4", "bits": None}, "block_size: channel is for uniform codes of 8 bits"),
        ({"quantizer": "uniform_clipped"}, "not for uniform_clipped"),
        ({"zero_point": True}, "block_size: channel has codes without zero points"),
        ({"block_size": "chanel"}, 'expected one of 16, 32, 64, 128, 256 or channel, got the text "chanel"'),
    ],
)
def test_what_channels_are_not_for(settings: dict[str, Any], message: str) -> None:
    given = {key: value for key, value in {**CHANNEL, **settings}.items() if value is not None}
    with pytest.raises(SpecError, match=re.escape(message)):
        load_spec({"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"quantize": given}}]}, method_table())


def test_tables_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30, bias=False))
    model[1].weight = model[0].weight
    rule = {"match": {"op": ["matmul", "embedding"]}, "rewrite": {"quantize": CHANNEL}}
    (row,) = mm.plan(model.eval(), {"version": 1, "rules": [rule]}, (torch.zeros(1, 3, dtype=torch.int64),)).sites
    assert row.reason == "rows of an embedding table are looked up in blocks only (GatherBlockQuantized): give block_size a number"


@pytest.mark.parametrize("method", ["qlora", "loftq"])
def test_training_beside_such_a_base_and_merging_into_it(tmp_path: Path, method: str) -> None:
    """The gradient passes through the codes as they are (held against float64 when it is saved); merged factors become codes again."""
    spec = spec_of(method, rank=2)
    spec["train"] = {"loss": "mse", "optimizer": {"sgd": {"lr": 0.1}}}
    compiled = mm.compile(Pair().eval(), spec, (randn(6, 24),), dynamic_shapes=({0: "batch"},))
    compiled.save(tmp_path / "out")
    assert check(tmp_path / "out").ok
    operators = [node.op_type for node in onnx.load(tmp_path / "out" / "grad.onnx").graph.node]
    assert operators.count("Cast") >= 3  # up forward, down forward and backward: each made dense for one product alone
    assert "MatMulIntegerToFloat" not in operators
