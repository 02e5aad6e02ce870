"""Operators on quantised weights in ONNX Runtime: values against float64 numpy, what stays packed, precisions, targets without a kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import LEVELS, randn, session
from onnx import TensorProto, numpy_helper
from onnxscript import FLOAT
from onnxscript import opset18 as op
from quantised import ROUNDING, Quantised, Weight, codebook, error, expected, uniform
from torch import Tensor, nn

from matmorph.errors import ExportError
from matmorph.exporters.artifact import Artifact, WrittenReport, write_artifact
from matmorph.exporters.onnx.onnx_model import OnnxInfo, export_onnx
from matmorph.exporters.onnx.precision import INT8_TOLERANCE, PARITY_TOLERANCE
from matmorph.exporters.vectors import check_vectors
from matmorph.ir.core import Graph
from matmorph.ir.tracing.trace import trace
from matmorph.runtime import Session
from matmorph.runtime.check import check
from matmorph.runtime.format.artifact import DATA, MODEL
from matmorph.runtime.targets import TARGETS
from matmorph.runtime.targets.kernels import NONE
from matmorph.specs.schema import Export

INT8 = 1e-2  # of the largest result: activations rounded to 8 bits per block (measured 4e-3 to 9e-3)
HALF = 2e-3  # of the largest result: activations, scales and the sum rounded to 11 bits
PACKED = ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized")


class Table(nn.Module):
    """Rows of a quantised table; with `tied` they are multiplied by it again, as in a language model. `layout`: of the gather's codes."""

    def __init__(self, table: Weight, tied: bool = False, layout: str = "blocks") -> None:
        super().__init__()
        for name, part in zip(("codes", "scales", "zero_points"), table.parts, strict=True):
            self.register_buffer(name, part)
        self.width, self.rows, self.bits, self.block = table.numbers
        self.tied, self.layout = tied, layout
        if layout == "cut":
            self.codes = self.codes.reshape(self.rows, -1)[:, : self.width * self.bits // 8].contiguous()

    def forward(self, ids: Tensor) -> Tensor:
        codes = self.codes.reshape(self.rows, -1) if self.layout == "rows" else self.codes
        x = torch.ops.matmorph.gather_nbits(ids, codes, self.scales, self.zero_points, self.width, self.bits, self.block)
        if not self.tied:
            return x
        return torch.ops.matmorph.matmul_nbits(
            x, self.codes, self.scales, self.zero_points, None, *(self.width, self.rows), self.bits, self.block
        )


def product(weight: Weight, x: Tensor, bias: Tensor | None = None) -> Graph:
    return trace(Quantised(weight, bias), {"x": x}, {"x": {0: "batch"}})


def lookup(table: Weight, **how: object) -> Graph:
    return trace(Table(table, **how), {"ids": torch.zeros(2, 3, dtype=torch.int64)}, {"ids": {0: "batch"}})


def exported(graph: Graph, folder: Path, x: Tensor, level: str, **export: object) -> np.ndarray:
    export_onnx(graph, folder, Export(**export))
    running = session(folder / MODEL, level)
    (result,) = running.run(None, {running.get_inputs()[0].name: x.numpy()})
    return result


def optimised(folder: Path) -> onnx.ModelProto:
    """The graph as a session runs it, after ONNX Runtime's own optimisations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


def stored(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the initializers by type."""
    found: dict[str, int] = {}
    for tensor in model.graph.initializer:
        name = TensorProto.DataType.Name(tensor.data_type)
        found[name] = found.get(name, 0) + numpy_helper.to_array(tensor).nbytes
    return found


# (n, k, block): whole blocks; a short last block and odd n; less than one block
@pytest.mark.parametrize(("n", "k", "block"), [(16, 64, 32), (13, 200, 64), (5, 40, 64)])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_products(rng: np.random.Generator, tmp_path: Path, bits: int, level: str, n: int, k: int, block: int) -> None:
    for number, (zeros, shape, bias) in enumerate([(False, (7, k), randn(n)), (True, (2, 3, k), None), (True, (2, 3, k), randn(n))]):
        weight, x = uniform(rng, n, k, bits, block, zeros), randn(*shape)
        for activations, allowed in (("fp32", ROUNDING), ("int8", INT8)):
            (folder := tmp_path / f"{number}-{activations}").mkdir()
            y = exported(product(weight, x, bias), folder, x, level, activations=activations)
            assert error(y, expected(weight, x, bias)) <= allowed


@pytest.mark.parametrize(("n", "k", "block"), [(16, 64, 64), (13, 40, 16), (5, 35, 32)])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("table", ["nf4", "nf3", "nf2"])
def test_codebook_products(rng: np.random.Generator, tmp_path: Path, table: str, level: str, n: int, k: int, block: int) -> None:
    for number, (shape, bias, form) in enumerate([((7, k), randn(n), "rebuild"), ((2, 3, k), None, "packed")]):
        weight, x = codebook(rng, n, k, table, block), randn(*shape)
        (folder := tmp_path / str(number)).mkdir()
        assert error(exported(product(weight, x, bias), folder, x, level, codebook=form), expected(weight, x, bias)) <= ROUNDING


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gathers(rng: np.random.Generator, tmp_path: Path, bits: int, level: str) -> None:
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    for zeros in (False, True):
        for layout, width in (("blocks", 64), ("blocks", 40), ("rows", 64), ("cut", 40)):
            table = uniform(rng, 11, width, bits, 32, zeros)
            (folder := tmp_path / f"{layout}{width}{zeros}").mkdir()
            found = exported(lookup(table, layout=layout), folder, ids, level)
            assert np.array_equal(found, table.dense[ids.numpy()].astype(np.float32))


def test_one_set_of_codes_serves_a_table_and_a_head(rng: np.random.Generator, tmp_path: Path) -> None:
    table, ids = uniform(rng, 600, 64, 4, 32, True), torch.tensor([[0, 599, 3]])
    graph = lookup(table, tied=True, layout="rows")
    y = exported(graph, tmp_path, ids, "optimised")
    rows = table.dense[ids.numpy()]
    assert error(y, rows @ table.dense.T) <= ROUNDING
    codes, scales, zeros = table.parts
    model = onnx.load(tmp_path / MODEL)
    assert stored(model)["UINT8"] == codes.nbytes + zeros.nbytes
    assert (tmp_path / DATA).stat().st_size < codes.nbytes + scales.nbytes + zeros.nbytes + 3 * 4096  # room for aligning
    assert {node.op_type for node in model.graph.node} == {"Reshape", "GatherBlockQuantized", "MatMulNBits"}


def test_file_is_readable(rng: np.random.Generator, tmp_path: Path) -> None:
    """Dotted names, module paths, the operators' own attributes; the bias inside, nothing beside the product."""
    module = nn.Sequential(nn.Identity(), Quantised(uniform(rng, 16, 64, 4, 32, True), randn(16)))
    info = export_onnx(trace(module, (randn(2, 64),), ({0: "batch"},)), tmp_path, Export())
    model = onnx.load(tmp_path / MODEL)
    (node,) = model.graph.node
    assert (node.op_type, node.domain, node.name) == ("MatMulNBits", "com.microsoft", "1/MatMulNBits")
    assert list(node.input)[1:] == ["1.codes", "1.scales", "1.zero_points", "", "1.bias"]
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    assert numbers == {"K": 64, "N": 16, "bits": 4, "block_size": 32, "accuracy_level": 1}
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21, "com.microsoft": 1}
    assert [port.shape for port in info.outputs] == [("batch", 16)]
    assert info.tolerance == PARITY_TOLERANCE["fp32"]


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets(rng: np.random.Generator, tmp_path: Path, opset: int) -> None:
    weight, x = codebook(rng, 6, 40, "nf2", 16), randn(3, 40)
    assert error(exported(product(weight, x), tmp_path, x, "optimised", opset=opset), expected(weight, x)) <= ROUNDING


# what stays packed


@pytest.mark.parametrize("kind", ["u4", "nf4", "gather"])
def test_kernels_keep_codes_packed(rng: np.random.Generator, tmp_path: Path, kind: str) -> None:
    weight = codebook(rng, 64, 128, "nf4", 64) if kind == "nf4" else uniform(rng, 64, 128, 4, 32)
    export_onnx(lookup(weight) if kind == "gather" else product(weight, randn(2, 128)), tmp_path, Export())
    model = optimised(tmp_path)
    codes, scales = weight.parts[:2]
    held = stored(model)
    assert {node.op_type for node in model.graph.node} & set(PACKED)
    assert (held["UINT8"], held["FLOAT"]) == (codes.nbytes, scales.nbytes)


def test_rebuilt_tables_are_dense_in_a_session_and_packed_ones_are_not(rng: np.random.Generator, tmp_path: Path) -> None:
    weight, sizes = codebook(rng, 64, 128, "nf2", 64), {}
    for form in ("rebuild", "packed"):
        (folder := tmp_path / form).mkdir()
        info = export_onnx(product(weight, randn(2, 128)), folder, Export(codebook=form))
        assert [port.name for port in info.inputs] == ["x"]
        assert stored(onnx.load(folder / MODEL))["UINT8"] == weight.parts[0].nbytes
        sizes[form] = stored(optimised(folder))
    assert sizes["rebuild"].get("UINT8", 0) == 0
    assert sizes["rebuild"]["FLOAT"] >= 64 * 128 * 4
    assert sizes["packed"]["UINT8"] == weight.parts[0].nbytes
    assert sizes["packed"]["FLOAT"] <= weight.parts[1].nbytes + 256 * 4 * 4  # and the table of bytes


def test_a_weight_that_is_applied_twice_is_rebuilt_once(rng: np.random.Generator, tmp_path: Path) -> None:
    layer = Quantised(codebook(rng, 16, 16, "nf2", 32))
    export_onnx(trace(nn.Sequential(layer, nn.ReLU(), layer), (randn(2, 16),), ({0: "batch"},)), tmp_path, Export())
    operators = [node.op_type for node in onnx.load(tmp_path / MODEL).graph.node]
    assert {name: operators.count(name) for name in ("Cast", "Gather", "Mul", "Transpose", "MatMul")} == {
        "Cast": 1,
        "Gather": 1,
        "Mul": 1,
        "Transpose": 1,
        "MatMul": 2,
    }


@pytest.mark.parametrize("form", ["rebuild", "packed"])
def test_artefacts_run_without_torch(rng: np.random.Generator, tmp_path: Path, form: str) -> None:
    weight, x = codebook(rng, 6, 64, "nf3", 32), randn(3, 64)
    graph = product(weight, x, randn(6))
    artifact = Artifact(
        graph=graph,
        export=Export(codebook=form),
        version="0.0",
        source_sha256="5" * 64,
        spec="version: 1\n",
        describe=lambda folder, info: WrittenReport({}, ""),
        cases=check_vectors(graph, [x]).cases,
    )
    write_artifact(tmp_path / "out", artifact)
    running = Session(tmp_path / "out", providers="cpu")
    assert [info.name for info in running.inputs] == ["x"]
    assert error(running.run({"x": x.numpy()})["output"], expected(weight, x, randn(6))) <= ROUNDING
    assert check(tmp_path / "out").ok


# precisions and targets


@pytest.mark.parametrize("kind", ["u4", "nf4", "nf2", "gather"])
def test_half_precision(rng: np.random.Generator, tmp_path: Path, kind: str) -> None:
    """Scales and bias follow the activations; a table's rows are float32 again where the graph ends."""
    weight = uniform(rng, 16, 64, 4, 32) if kind in ("u4", "gather") else codebook(rng, 16, 64, kind, 32)
    x = torch.tensor([[1, 2, 15]]) if kind == "gather" else randn(3, 64)
    graph = lookup(weight) if kind == "gather" else product(weight, x, randn(16))
    reference = weight.dense[x.numpy()] if kind == "gather" else expected(weight, x, randn(16))
    assert error(exported(graph, tmp_path, x, "optimised", precision="fp16"), reference) <= HALF
    types = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / MODEL).graph.initializer}
    assert types["codes"] == TensorProto.UINT8
    assert types["scales"] == (TensorProto.FLOAT if kind == "nf2" else TensorProto.FLOAT16)


def test_scales_in_half_precision_serve_float_activations(rng: np.random.Generator, tmp_path: Path) -> None:
    x = randn(3, 64)
    for kind, weight in (
        ("u4", uniform(rng, 16, 64, 4, 32)),
        ("nf4", codebook(rng, 16, 64, "nf4", 32)),
        ("nf2", codebook(rng, 16, 64, "nf2", 32)),
    ):
        codes, scales, *rest = weight.parts
        half = replace(weight, parts=(codes, scales.half(), *rest))
        reference = half(x).numpy()
        for precision in ("fp32", "keep"):
            (folder := tmp_path / f"{kind}{precision}").mkdir()
            assert error(exported(product(half, x), folder, x, "optimised", precision=precision), reference) <= ROUNDING


def test_int8_activations_widen_the_tolerance(rng: np.random.Generator, tmp_path: Path) -> None:
    def info(weight: Weight, name: str) -> OnnxInfo:
        (tmp_path / name).mkdir()
        return export_onnx(product(weight, randn(2, 64)), tmp_path / name, Export(activations="int8"))

    assert info(uniform(rng, 16, 64, 4, 32), "u4").tolerance == INT8_TOLERANCE
    assert info(codebook(rng, 16, 64, "nf4", 32), "nf4").tolerance == PARITY_TOLERANCE["fp32"]


def test_blocks_that_no_kernel_has(rng: np.random.Generator, tmp_path: Path) -> None:
    module = nn.Sequential(Quantised(uniform(rng, 4, 16, 4, 8)))
    with pytest.raises(ExportError, match=r"export\.target cuda has no MatMulNBits with blocks of 8, used in 0") as caught:
        export_onnx(trace(module, (randn(2, 16),)), tmp_path, Export())
    assert "blocks of 16, 32, 64, 128, 256" in str(caught.value.details)
    assert not (tmp_path / DATA).exists()


def test_types_that_no_kernel_has(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = product(codebook(rng, 4, 16, "nf4", 16), randn(2, 16).double())
    with pytest.raises(ExportError, match=r"export\.target cpu has no MatMulBnb4 for float64"):
        export_onnx(graph, tmp_path, Export(target=("cpu",)))
    bfloat = product(uniform(rng, 4, 16, 4, 16), randn(2, 16).bfloat16())
    with pytest.raises(ExportError, match=r"export\.target cpu has no MatMulNBits for bfloat16"):
        export_onnx(bfloat, tmp_path, Export(precision="keep"))


def test_providers_without_the_operator(rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "cuda", replace(TARGETS["cuda"], kernels=lambda: NONE))
    graph = lookup(uniform(rng, 4, 16, 4, 16))
    with pytest.raises(ExportError, match=r"export\.target cuda has no GatherBlockQuantized at all"):
        export_onnx(graph, tmp_path, Export())
    export_onnx(graph, tmp_path, Export(target=("cpu",)))


@pytest.mark.parametrize("kind", ["u4", "nf4", "gather"])
def test_the_cpu_provider_indeed_lacks_what_is_refused(rng: np.random.Generator, tmp_path: Path, kind: str) -> None:
    """bfloat16: exported for CUDA alone, the CPU provider does not take it."""
    weight = codebook(rng, 16, 64, "nf4", 32) if kind == "nf4" else uniform(rng, 16, 64, 4, 32)
    graph = lookup(weight) if kind == "gather" else product(weight, randn(2, 64))
    export_onnx(graph, tmp_path, Export(precision="bf16", target=("cuda",)))
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|Could not find an implementation"):
        session(tmp_path / MODEL)


def test_a_users_translation_comes_first(rng: np.random.Generator, tmp_path: Path) -> None:
    def zeros(x: FLOAT, codes, scales, zero_points, bias, in_features, out_features, bits, block_size) -> FLOAT:
        return op.Mul(op.ReduceSum(x, op.Constant(value_ints=[-1]), keepdims=1), op.Constant(value_floats=[0.0] * out_features))

    graph = product(uniform(rng, 4, 16, 4, 16), randn(2, 16))
    export_onnx(graph, tmp_path, Export(), {torch.ops.matmorph.matmul_nbits: zeros})
    running = session(tmp_path / MODEL)
    assert np.array_equal(running.run(None, {"x": randn(2, 16).numpy()})[0], np.zeros((2, 4), np.float32))
