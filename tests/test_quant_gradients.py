"""Gradients through quantised weights in ONNX Runtime: values against float64 numpy and torch, and a session that unpacks one weight at a
time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import LEVELS, randn, session
from quantised import ROUNDING, Quantised, Weight, codebook, error, uniform
from torch import Tensor, nn

from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.ir.core import Graph
from matmorph.ir.tracing.trace import trace
from matmorph.runtime.format.artifact import MODEL
from matmorph.specs.schema import Export

HALF = 2e-3  # of the largest result: dY, scales and the sum rounded to 11 bits
KINDS = ("u2", "u2z", "u4", "u4z", "u4f", "u8", "u8z", "nf4", "nf3", "nf2")
# (n, k, block): whole blocks; a short last block and odd n; odd n * k; less than one block
SIZES = [(16, 64, 32), (13, 200, 64), (5, 35, 16), (3, 10, 32)]


def weight_of(rng: np.random.Generator, kind: str, n: int, k: int, block: int) -> Weight:
    if kind.startswith("u"):
        return uniform(rng, n, k, int(kind[1]), block, "float" if kind.endswith("f") else kind.endswith("z"))
    return codebook(rng, n, k, kind, block)


class Back(nn.Module):
    """dY -> dY W, `times` times over where W is square; with `both` after as many forward products."""

    def __init__(self, *weights: Weight, both: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Quantised(weight) for weight in weights)
        self.both = both

    def forward(self, y: Tensor) -> Tensor:
        if self.both:
            for layer in self.layers:
                y = layer(y)
        for layer in reversed(self.layers):
            parts = [getattr(layer, name) for name in ("codes", "scales", "zero_points")[: layer.count]]
            y = getattr(torch.ops.matmorph, f"{layer.op.__name__}_transposed")(y, *parts, *layer.numbers)
        return y


def back(*weights: Weight, y: Tensor, both: bool = False, static: bool = False) -> Graph:
    axes = {axis: name for axis, name in enumerate(("batch", "seq")[: y.dim() - 1])}
    return trace(Back(*weights, both=both), {"y": y}, None if static else {"y": axes})


def optimised(path: Path) -> onnx.ModelProto:
    """The graph as a default session runs it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(path.parent / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(path.parent / "optimised.onnx")


@pytest.mark.parametrize(("n", "k", "block"), SIZES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_products(rng: np.random.Generator, tmp_path: Path, kind: str, level: str, n: int, k: int, block: int) -> None:
    """In two and three dimensions, traced at one size and run at others."""
    weight = weight_of(rng, kind, n, k, block)
    for example, shapes in ((randn(2, n), [(7, n), (1, n)]), (randn(2, 3, n), [(3, 5, n), (1, 1, n)])):
        export_onnx(back(weight, y=example), tmp_path, Export())
        running = session(tmp_path / MODEL, level)
        assert [entry.name for entry in running.get_inputs()] == ["y"]
        assert running.get_overridable_initializers() == []
        for shape in shapes:
            y = randn(*shape)
            (found,) = running.run(None, {"y": y.numpy()})
            assert error(found, y.double().numpy() @ weight.dense) <= ROUNDING
            assert error(found, Back(weight)(y).double().numpy()) <= 2 * ROUNDING  # torch rounds as often


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["u2z", "u4", "u4z", "u4f", "u8", "nf4", "nf3", "nf2"])
def test_a_session_unpacks_one_weight_at_a_time(rng: np.random.Generator, tmp_path: Path, kind: str, static: bool) -> None:
    """No dense weight among what the session holds, and each is made right before its product, not all at the start."""
    n, count = 64, 3
    weights = [weight_of(rng, kind, n, n, 32) for _ in range(count)]
    export_onnx(back(*weights, y=randn(2, n), both=True, static=static), tmp_path, Export())
    model = optimised(tmp_path / MODEL)
    largest = max(onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
    assert largest <= max(n * n, 256 * 4 * 4)  # codes of 8 bits, or the table of bytes; dense were 4 n n
    operators = [node.op_type.removeprefix("Fused") for node in model.graph.node]  # FusedMatMul takes the Transpose of forward tables
    made = [name for name in operators if name in ("GatherBlockQuantized", "Gather", "MatMul")]
    forward = count if kind in ("nf3", "nf2") else 0
    assert made == ["GatherBlockQuantized" if kind[0] == "u" else "Gather", "MatMul"] * (forward + count)


def test_one_weight_is_unpacked_anew_for_forward_and_backward(rng: np.random.Generator, tmp_path: Path) -> None:
    """Merged, the dense weight of the first layer would live through the whole step."""
    weight = codebook(rng, 32, 32, "nf2", 32)
    export_onnx(back(weight, y=randn(2, 32), both=True), tmp_path, Export())
    operators = [node.op_type for node in optimised(tmp_path / MODEL).graph.node]
    assert operators.count("Gather") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_no_operator_without_a_cuda_kernel(rng: np.random.Generator, tmp_path: Path, kind: str) -> None:
    """Bit operations would be, and a table of bytes says the same."""
    (found,) = export_onnx(back(weight_of(rng, kind, 35, 35, 16), y=randn(2, 35), both=True), tmp_path, Export()).placements
    assert (found.handed, found.sizes, found.unknown) == ((), 0, ())


@pytest.mark.parametrize("kind", ["u4z", "nf4", "nf2"])
def test_half_precision(rng: np.random.Generator, tmp_path: Path, kind: str) -> None:
    weight, y = weight_of(rng, kind, 16, 64, 32), randn(3, 16)
    export_onnx(back(weight, y=y), tmp_path, Export(precision="fp16"))
    (found,) = session(tmp_path / MODEL).run(None, {"y": y.numpy()})
    assert error(found, y.double().numpy() @ weight.dense) <= HALF


def test_equal_bytes(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = back(uniform(rng, 16, 64, 4, 32), y=randn(2, 16))
    written = []
    for _ in range(2):
        export_onnx(graph, tmp_path, Export())
        written.append((tmp_path / MODEL).read_bytes())
    assert written[0] == written[1]
