"""ExportedProgram to ONNX: equal to torch's own exporter, faster because only what needs it is retraced; and our clean-up."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import onnxruntime
import onnxscript
import pytest
import torch
from exporting import randn, seeded
from onnxscript import FLOAT, opset18
from torch import nn
from torch.export import Dim

from matmorph.errors import ExportError
from matmorph.exporters.onnx.cleanup import clean, name_everything
from matmorph.exporters.onnx.folding import fold
from matmorph.exporters.onnx.lowering import lower
from matmorph.exporters.onnx.onnx_model import skeleton
from matmorph.ir.to_export import to_exported_program
from matmorph.ir.tracing.trace import trace
from matmorph.specs.schema import Export

ROUNDING = 1e-5  # float32 sums of at most 64 terms of size 1, in another order: 64 * 6e-8, and some room for the layers between


def program(module: nn.Module, *inputs: torch.Tensor, batch: bool = True) -> torch.export.ExportedProgram:
    shapes = tuple({0: Dim("batch", min=1)} if batch else None for _ in inputs)
    return torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False).run_decompositions({})


def run(model: ir.Model, *inputs: torch.Tensor) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    running = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return running.run(None, {entry.name: x.numpy() for entry, x in zip(running.get_inputs(), inputs, strict=True)})


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


class Mixed(nn.Module):
    """Type promotion of every kind, and operators without a translation of their own (`__and__`, `logaddexp2`)."""

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mask = (n > 1) & (x[:, 0] > 0)
        promoted = n * 0.5 + x[:, 0].double() + mask
        return promoted, n / 2, torch.logaddexp2(x, x + 1), torch.sqrt(n), x.sum() + n.sum()


def test_promotion_and_local_decomposition_match_torch() -> None:
    x, n = randn(4, 6), torch.tensor([1, 2, 3, 4])
    model = lower(program(Mixed(), x, n))
    for inputs in ((x, n), (randn(1, 6), torch.tensor([5]))):
        for actual, expected in zip(run(model, *inputs), Mixed()(*inputs), strict=True):
            assert actual.dtype == expected.numpy().dtype
            np.testing.assert_allclose(actual, expected.numpy(), rtol=ROUNDING, atol=ROUNDING)


def test_decomposition_tells_operands_of_one_type_apart() -> None:
    """In a program made from a graph, equal types share one fake value."""

    class Between(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            low, high = x > 0, x < 1
            return low & high, torch.min(x * 2, x + 1), low.__or__(~high)

    x = randn(5, 7)
    model = lower(to_exported_program(trace(Between(), (x,), ({0: "batch"},))))
    for actual, expected in zip(run(model, x), Between()(x), strict=True):
        np.testing.assert_array_equal(actual, expected.numpy())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16, eps=1e-12)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


def test_same_numbers_as_the_public_exporter() -> None:
    """The independent way to the same graph: `torch.onnx.export`, which retraces it."""
    module, x = seeded(Block), randn(2, 5, 16)
    ours = run(lower(program(module, x)), x)[0]
    public = torch.onnx.export(program(module, x), opset_version=21, optimize=False, verbose=False)
    theirs = run(public.model, x)[0]
    np.testing.assert_array_equal(ours, theirs)  # the same operators in the same order: the same roundings


@pytest.mark.parametrize("opset", [18, 20, 22, 23])  # 20, 21 and 23 have translations of their own; 21 is everywhere else
def test_every_opset_runs(opset: int) -> None:
    module, x = seeded(Block), randn(2, 5, 16)
    model = lower(program(module, x), opset)
    clean(model)
    assert model.opset_imports[""] == opset
    np.testing.assert_allclose(run(model, x)[0], module(x).detach().numpy(), atol=ROUNDING)


@pytest.mark.parametrize("opset", [17, 24, 0])
def test_opset_out_of_range(opset: int) -> None:
    with pytest.raises(ExportError, match=f"opset {opset} is not possible; export.opset takes 18 to 23"):
        lower(program(nn.Linear(2, 2), randn(2, 2)), opset)


def test_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        lower(program(seeded(Block), randn(2, 5, 16)))
    assert not caplog.records


@torch.library.custom_op("matmorph_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@onnxscript.script(opset18)
def twice_onnx(x: FLOAT) -> FLOAT:
    return opset18.Add(x, x)


@onnxscript.script(opset18)
def unannotated(x):  # type: ignore[no-untyped-def]
    return opset18.Add(x, x)


class Custom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return twice(x) + 1


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Custom()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_unknown_operator_is_named_with_its_module() -> None:
    with pytest.raises(ExportError, match=r"matmorph_tests.twice.default has no ONNX translation, used in inner") as caught:
        lower(program(Outer(), randn(2, 3)))
    assert "onnx_lowerings" in str(caught.value)


@pytest.mark.parametrize("key", [torch.ops.matmorph_tests.twice.default, torch.ops.matmorph_tests.twice])
def test_own_lowering(key: object) -> None:
    x = randn(2, 3)
    model = lower(program(Outer(), x), onnx_lowerings={key: twice_onnx})
    np.testing.assert_array_equal(run(model, x)[0], (x * 2 + 1).numpy())


def test_own_lowering_needs_annotations() -> None:
    with pytest.raises(ExportError, match=r"the translation of matmorph_tests.twice.default has no annotated result"):
        lower(program(Outer(), randn(2, 3)), onnx_lowerings={torch.ops.matmorph_tests.twice: unannotated})


class Eps(nn.Module):
    """What a careless optimiser drops: additions of almost nothing and multiplications by almost one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / (x.abs().sqrt() + 1e-8)) * 0.999999 + 0.0


def test_float_arithmetic_is_never_simplified() -> None:
    model = lower(program(Eps(), randn(2, 3)))
    clean(model)
    assert operators(model) == ["Abs", "Sqrt", "Add", "Div", "Mul", "Add"]
    zero = torch.zeros(1, 3)
    np.testing.assert_array_equal(run(model, zero)[0], np.zeros((1, 3)))  # 0 / 1e-8; without the eps it is NaN


class Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        heads = [layer(x).view(b, s, 3, 4).transpose(1, 2) for layer in (self.a, self.b, self.a)]
        return sum(heads).transpose(1, 2).reshape(b, s, 12)


def test_shape_arithmetic_is_folded_and_shared() -> None:
    graph = trace(seeded(Shapes), {"x": randn(3, 5, 12)}, {"x": {0: "batch", 1: "seq"}})
    model = skeleton(graph, Export())
    found = operators(model)
    assert found.count("Shape") == 2  # one for each dynamic axis
    assert found.count("Concat") == 2  # [batch, seq, 3, 4] for all three views, [batch, seq, 12]
    assert not {"Constant", "Identity", "Cast", "CastLike", "Squeeze"} & set(found)
    assert [name for name in model.graph.initializers if name.endswith("weight")] == ["a.weight", "b.weight"]
    assert found.count("Transpose") == 2 + 3 + 1  # a weight that is applied twice is transposed once


def test_split_needs_no_sequence() -> None:
    class Split(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (*x.split(3, -1), *x.split([1, 6], -1), *x.chunk(2, -1))

    x = randn(2, 7)
    model = lower(program(Split(), x))
    clean(model)
    assert set(operators(model)) == {"Split"}
    for actual, expected in zip(run(model, x), Split()(x), strict=True):
        np.testing.assert_array_equal(actual, expected.numpy())


def test_names_are_unique_and_carry_the_module() -> None:
    graph = trace(seeded(Block), (randn(2, 5, 16),), ({0: "batch", 1: "seq"},))
    model = skeleton(graph, Export())
    names = [str(node.name) for node in model.graph]
    values = [str(value.name) for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)
    assert len({*values, *model.graph.initializers, *(str(v.name) for v in model.graph.inputs)}) == len(values) + len(
        model.graph.initializers
    ) + len(model.graph.inputs)
    assert {"mlp.0/MatMul", "mlp.2/MatMul", "norm/LayerNormalization"} <= set(names)
    assert not [name for name in values if name.startswith("val_")]
    keys = {key for node in model.graph for key in node.metadata_props}
    assert keys == {"matmorph.path"}


def test_cond_is_kept() -> None:
    class Cond(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda t: t * 2.0, lambda t: t - 1.0, (x,))

    x = randn(2, 3)
    model = lower(program(Cond(), x, batch=False))
    clean(model)
    name_everything(model, [str(v.name) for v in (*model.graph.inputs, *model.graph.outputs)])
    assert "If" in operators(model)
    for sign in (1, -1):
        np.testing.assert_array_equal(run(model, x.abs() * sign)[0], Cond()(x.abs() * sign).numpy())


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("Div", [np.array([7, -7]), np.array([2, 2])], {}),  # ONNX truncates, numpy floors
        ("Cast", [np.array([1.9, -1.9], np.float32)], {"to": 7}),
        ("Slice", [np.arange(6), np.array([1]), np.array([-1]), np.array([0]), np.array([2])], {}),
        ("Unsqueeze", [np.array([3, 4]), np.array([0, 2])], {}),
        ("Squeeze", [np.ones((1, 3, 1), np.int64), np.array([-1])], {}),
        ("Reshape", [np.arange(6), np.array([2, -1])], {"allowzero": 0}),
        ("Gather", [np.array([5, 6, 7]), np.array(-1)], {"axis": 0}),
        ("Expand", [np.array([[1], [2]]), np.array([1, 1, 3])], {}),
        ("Concat", [np.array([1]), np.array([2, 3])], {"axis": 0}),
        ("Sqrt", [np.array(0.1, np.float32)], {}),
        ("Mul", [np.array(0.1, np.float32), np.array(3.0, np.float32)], {}),
    ],
)
def test_folding_equals_onnx_runtime(op: str, inputs: list[np.ndarray], attributes: dict[str, int]) -> None:
    values = [
        ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.from_numpy(x.dtype)), shape=ir.Shape(x.shape)) for i, x in enumerate(inputs)
    ]
    node = ir.node(op, values, attributes)
    folded = fold(node, inputs)
    assert folded is not None
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(folded.dtype))
    model = ir.Model(ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 21}, name="g"), ir_version=10)
    expected = run(model, *(torch.from_numpy(np.asarray(x)) for x in inputs))[0]
    assert folded.dtype == expected.dtype
    np.testing.assert_array_equal(folded, expected)


def test_folding_leaves_what_onnx_does_not_define() -> None:
    value = ir.Value(name="x")
    assert fold(ir.node("Cast", [value], {"to": 7}), [np.array([np.nan, 1e30], np.float32)]) is None
    assert fold(ir.node("Div", [value, value]), [np.array([1]), np.array([0])]) is None
    assert fold(ir.node("Expand", [value, value]), [np.array([1]), np.array([2000])]) is None
    assert fold(ir.node("RandomNormal", []), []) is None
