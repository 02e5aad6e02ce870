"""Precision of an export: what runs in half, what stays float32, what a target cannot run, and how far the answers move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exporting import LEVELS, answers, difference, feeds, mlp_graph, randn, seeded, session
from torch import nn
from zoo import ZOO

from matmorph.errors import ExportError
from matmorph.exporters.onnx.onnx_model import export_onnx, skeleton
from matmorph.exporters.onnx.precision import LOWER, PARITY_TOLERANCE, UPPER, check_target, convert, parity_tolerance
from matmorph.ir.tracing.trace import trace
from matmorph.runtime.format.artifact import MODEL
from matmorph.specs.schema import Export

HALF_ROUNDING = 2.0**-11  # of fp16


class Norms(nn.Module):
    """A product, an RMS norm with an eps below what fp16 can hold, a softmax over a mask, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.up = nn.Linear(16, 16)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 16))
        self.down = nn.Linear(16, 4, bias=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.up(self.table(ids))
        x = self.gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12)
        scores = x @ x.transpose(1, 2) + torch.where(mask[:, None, :], 0.0, torch.finfo(torch.float32).min)
        return self.down(scores.softmax(-1) @ x)


INPUTS = {"ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "mask": torch.tensor([[True, True, False], [False, False, False]])}


def norms() -> tuple[nn.Module, object]:
    module = seeded(Norms)
    return module, trace(module, INPUTS, {name: {0: "batch", 1: "seq"} for name in INPUTS})


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {name: value.dtype for name, value in model.graph.initializers.items() if not name.startswith("float")}


def test_half_precision_follows_the_table() -> None:
    model = skeleton(norms()[1], Export(precision="fp16"))
    stored = types(model)
    assert {name for name, dtype in stored.items() if dtype == ir.DataType.FLOAT16} == {
        "table.weight",
        "up.weight",
        "up.bias",
        "down.weight",
    }
    assert stored["gain"] == ir.DataType.FLOAT  # it scales a norm, which stays in float32
    for node in model.graph:
        floats = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)}
        if node.op_type in LOWER:
            assert floats == {ir.DataType.FLOAT16}, node.name
        elif node.op_type in UPPER or node.op_type == "Where":
            assert floats == {ir.DataType.FLOAT}, node.name
        elif node.op_type != "Cast":
            assert len(floats) < 2, node.name
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT]
    casts = [(node.inputs[0], node.attributes["to"].value) for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == len(set(casts))  # one cast for each value


@pytest.mark.parametrize("level", LEVELS)
def test_half_precision_answers(level: str, tmp_path: Path) -> None:
    """The second row is masked out whole: an infinite mask would make it NaN. Error: a dozen roundings of fp16 one after another."""
    module, graph = norms()
    info = export_onnx(graph, tmp_path, Export(precision="fp16"))
    running = session(tmp_path / MODEL, level)
    error = difference(running.run(None, feeds(running, INPUTS)), answers(module, INPUTS))
    assert 0 < error <= 12 * HALF_ROUNDING <= info.tolerance == PARITY_TOLERANCE["fp16"]
    assert [port.dtype for port in (*info.inputs, *info.outputs)] == ["int64", "bool", "float32"]
    assert info.bytes == 2 * (10 * 16 + 16 * 16 + 16 + 16 * 4) + 4 * 16


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_half_precision_of_whole_models(name: str, tmp_path: Path) -> None:
    module, example, shapes = ZOO[name].build()
    info = export_onnx(trace(module, example, shapes), tmp_path, Export(precision="fp16"))
    running = session(tmp_path / MODEL)
    for inputs in (example, *ZOO[name].more_inputs()):
        assert difference(running.run(None, feeds(running, inputs)), answers(module, inputs)) <= info.tolerance


def test_bf16_is_written_for_cuda(tmp_path: Path) -> None:
    info = export_onnx(mlp_graph(), tmp_path, Export(precision="bf16", target=("cuda",)))
    model = onnx.load(str(tmp_path / MODEL))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weight = seeded_weight("fc1.weight")
    assert stored["fc1.weight"].dtype.name == "bfloat16"
    np.testing.assert_array_equal(stored["fc1.weight"].astype(np.float32), weight.bfloat16().float().numpy())
    assert stored["scale"].dtype == np.float32
    assert info.tolerance == PARITY_TOLERANCE["bf16"]


def seeded_weight(path: str) -> torch.Tensor:
    return next(const.load() for const in mlp_graph().state if const.path == path)


def half_model(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x.to(dtype))
            return self.b((y.float().softmax(-1) * 2.5).to(dtype)).float()

    return seeded(Half).to(dtype), randn(2, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_widens_a_half_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """Judged by the same weights in a float32 model, so no rounding of half precision may be left."""
    module, x = half_model(dtype)
    info = export_onnx(trace(module, (x,), ({0: "batch"},)), tmp_path, Export())
    model = onnx.load(str(tmp_path / MODEL))
    assert {onnx.TensorProto.FLOAT} == {t.data_type for t in model.graph.initializer if t.name[:2] in ("a.", "b.")}
    assert not [node.op_type for node in model.graph.node if node.op_type == "Cast"]
    wide = module.float()
    expected = wide.b(wide.a(x).softmax(-1) * 2.5).detach().numpy()
    running = session(tmp_path / MODEL)
    assert difference(running.run(None, feeds(running, (x,))), [expected]) <= 1e-6  # 16 terms of float32
    assert info.tolerance == PARITY_TOLERANCE["fp32"]


def test_keep_writes_the_stored_types(tmp_path: Path) -> None:
    module, x = half_model(torch.float16)
    info = export_onnx(trace(module, (x,), ({0: "batch"},)), tmp_path, Export(precision="keep"))
    assert info.bytes == 2 * (8 * 8 + 8 + 8 * 3 + 3)
    assert info.tolerance == PARITY_TOLERANCE["fp16"]
    running = session(tmp_path / MODEL)
    assert difference(running.run(None, feeds(running, (x,))), answers(module, (x,))) <= 8 * HALF_ROUNDING  # two products


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_of_a_half_model_is_not_widened(precision: str) -> None:
    module, x = half_model(torch.bfloat16)
    model = skeleton(trace(module, (x,), ({0: "batch"},)), Export(precision=precision))
    half = ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16
    assert {dtype for name, dtype in types(model).items()} == {half}


@pytest.mark.parametrize(
    ("precision", "dtypes", "match"),
    [
        ("bf16", ["float32"], "export.precision bf16 does not run on target cpu"),
        ("keep", ["float32", "bfloat16"], r"precision keep \(the model's weights are bfloat16\) does not run on target cpu"),
    ],
)
def test_bf16_on_cpu_is_refused(precision: str, dtypes: list[str], match: str) -> None:
    with pytest.raises(ExportError, match=match) as caught:
        check_target(precision, ("cuda", "cpu"), dtypes)
    assert "export.target" in str(caught.value)
    check_target(precision, ("cuda",), dtypes)


def test_refusal_comes_before_any_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError):
        export_onnx(mlp_graph(), tmp_path, Export(precision="bf16"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtypes", "expected"), [(["float32"], "fp32"), (["float16", "float32"], "fp16"), (["float16", "bfloat16"], "bf16")]
)
def test_tolerance_of_kept_types(dtypes: list[str], expected: str) -> None:
    assert parity_tolerance("keep", dtypes) == PARITY_TOLERANCE[expected]


def test_weight_beyond_fp16_is_named(tmp_path: Path) -> None:
    module = nn.Linear(4, 3).eval()
    module.weight.data[1, 2] = 1e5
    graph = trace(module, (randn(2, 4),), ({0: "batch"},))
    with pytest.raises(ExportError, match="weight weight has values beyond the range of fp16"):
        export_onnx(graph, tmp_path, Export(precision="fp16"))


def test_control_flow_in_half_is_refused() -> None:
    class Cond(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda t: t * 2.0, lambda t: t - 1.0, (x,))

    graph = trace(Cond(), (randn(2, 3),))
    with pytest.raises(ExportError, match="not possible for a model with control flow"):
        skeleton(graph, Export(precision="fp16"))


def test_fp32_leaves_a_float32_model_alone() -> None:
    model = skeleton(norms()[1], Export(precision="keep"))
    before = [(node.op_type, node.name) for node in model.graph]
    convert(model, "fp32")
    assert [(node.op_type, node.name) for node in model.graph] == before
    assert {types(model)[name] for name in ("table.weight", "gain", "down.weight")} == {ir.DataType.FLOAT}


class Various(nn.Module):
    """Operators of which ONNX defines most on no bfloat16 before opset 22, and some never."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.line, self.recurrent, self.slope = nn.ConvTranspose1d(4, 4, 2), nn.GRU(4, 6, batch_first=True), nn.PReLU()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.slope(self.conv(x))
        pooled = nn.functional.max_pool2d(y, 2), nn.functional.avg_pool2d(y, 2), nn.functional.adaptive_avg_pool2d(y, 1)
        curves = (
            torch.nn.functional.elu(y),
            torch.nn.functional.gelu(y),
            torch.nn.functional.softplus(y),
            torch.cumsum(y, 1),
            y.topk(2).values,
        )
        wide = nn.functional.interpolate(y, scale_factor=2.0), self.up(y)
        return (*pooled, *curves, *wide, self.recurrent(self.line(y[:, :, 0]).mT)[0])


@pytest.mark.parametrize(
    ("precision", "opset"), [("bf16", 21), ("fp16", 21), ("keep", 21), pytest.param("bf16", 23, marks=pytest.mark.full)]
)
def test_what_onnx_does_not_define_in_half_precision_computes_in_float32(precision: str, opset: int, tmp_path: Path) -> None:
    """Valid files, by ONNX's own checker within the export; in float16, which the CPU runs, also the right numbers."""
    module, x = seeded(Various), randn(2, 3, 6, 6)
    kept = torch.bfloat16 if precision == "keep" else torch.float32
    graph = trace(module.to(kept), (x.to(kept),), ({0: "batch"},))
    export_onnx(graph, tmp_path, Export(precision=precision, opset=opset, target=("cuda",)))
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert {"Conv", "ConvTranspose"} <= {node.op_type for node in model.graph.node}
    if precision == "fp16":
        for got, wanted in zip(session(tmp_path / "model.onnx").run(None, {"x": x.numpy()}), answers(module, (x,)), strict=True):
            assert difference([got], [wanted]) <= PARITY_TOLERANCE["fp16"]
