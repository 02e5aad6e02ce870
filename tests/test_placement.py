"""Where ONNX Runtime would run the nodes of a file: the list of kernels against ONNX Runtime itself, and what is made of it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cuda_stand_in as stand_in
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import randn, seeded
from onnx import TensorProto, helper
from onnxscript import opset21 as op
from torch import nn

import matmorph as mm
from matmorph.cli.main import main
from matmorph.errors import CheckError, ExportError
from matmorph.exporters.onnx.placement import placement
from matmorph.report.reading import read_report
from matmorph.report.table import make_console, print_plan
from matmorph.runtime.format.artifact import file_record
from matmorph.runtime.format.plain import to_plain
from matmorph.runtime.targets.cpu import CPU
from matmorph.runtime.targets.cuda import CUDA
from matmorph.runtime.targets.kernels import read_kernels, shipped
from matmorph.runtime.targets.placement import HEAVY

OPSET = 21
TYPES = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE} | {
    name: getattr(TensorProto, name.upper()) for name in "float16 bfloat16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool".split()
}


def graph_of(nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, str], constants: Sequence[onnx.TensorProto] = (), **more: Any) -> Any:
    """A model of these nodes, whose last values are its outputs."""
    infos = [helper.make_tensor_value_info(name, TYPES[dtype], None) for name, dtype in inputs.items()]
    results = [helper.make_value_info(name, onnx.TypeProto()) for node in nodes for name in node.output if name]
    graph = helper.make_graph(list(nodes), "g", infos, results, list(constants))
    imports = [helper.make_opsetid("", more.pop("opset", OPSET)), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, **more)


def reasons(model: Any) -> dict[str, str]:
    return {one.node: one.reason for one in placement(model, CUDA, "g").handed}


# ---- the list against ONNX Runtime


ATTRIBUTES: Mapping[str, Mapping[str, Any]] = {
    "Cast": {"to": TensorProto.FLOAT},
    "Concat": {"axis": 0},
    "Einsum": {"equation": "i->i"},
    "Gemm": {},
    "LRN": {"size": 3},
    "BitShift": {"direction": "LEFT"},
    "Split": {"num_outputs": 1},
    "GatherElements": {},
    "SplitToSequence": {},
    "DepthToSpace": {"blocksize": 2},
    "SpaceToDepth": {"blocksize": 2},
    "MaxPool": {"kernel_shape": [2]},
    "AveragePool": {"kernel_shape": [2]},
    "LpPool": {"kernel_shape": [2]},
    "RoiAlign": {},
    "CenterCropPad": {},
}
SAMPLE = (
    "Add MatMul Gemm Conv ConvTranspose Einsum LayerNormalization InstanceNormalization BatchNormalization Softmax ReduceMean Pow Sqrt "
    "Where Gather Cast Range BitShift BitwiseAnd Atan Tanh Erf Gelu CumSum TopK NonZero Mod Max Equal And Trilu ScatterND GatherND "
    "QuantizeLinear MatMulInteger LSTM GridSample Resize"
).split()
# fmt: off
SKIPPED = frozenset(
    "If Loop Scan SequenceMap Constant Optional OptionalGetElement OptionalHasElement SequenceConstruct SequenceEmpty ConcatFromSequence "
    "SequenceAt SequenceErase SequenceInsert SequenceLength StringConcat StringSplit StringNormalizer RegexFullMatch TfIdfVectorizer "
    "RandomNormal RandomUniform RandomNormalLike RandomUniformLike Multinomial Bernoulli".split()
)
# fmt: on
"""Operators on other things than tensors of numbers, and those whose type an attribute says."""


def cases(names: Sequence[str], most: int) -> Iterator[tuple[str, onnx.ModelProto, tuple[str | None, ...]]]:
    """(name, model of one node, types of its inputs): of each operator, types that ONNX allows, at most `most` of them."""
    for name in names:
        schema = onnx.defs.get_schema(name, OPSET)
        required = [port.type_str for port in schema.inputs[: max(schema.min_input, 1)]]
        allowed = {one.type_param_str: sorted(numbers(one.allowed_type_strs)) for one in schema.type_constraints}
        names_of = list(dict.fromkeys(port for port in required if port in allowed))
        combinations = itertools.product(*(allowed[one] for one in names_of))
        for number, types in enumerate(itertools.islice(combinations, most)):
            of = dict(zip(names_of, types, strict=True))
            given = [of.get(port) or next(iter(numbers([port])), None) for port in required]
            if None in given or not given:
                break
            inputs = {f"x{k}": str(one) for k, one in enumerate(given)}
            outputs = [f"y{k}" for k in range(max(schema.min_output, 1))]
            node = helper.make_node(name, list(inputs), outputs, f"{name}_{number}", **ATTRIBUTES.get(name, {}))
            yield f"{name}({', '.join(inputs.values())})", graph_of([node], inputs), tuple(given)


def numbers(texts: Any) -> list[str]:
    """tensor(float) and its like as the list writes them."""
    inner = [text.removeprefix("tensor(").removesuffix(")") for text in texts if text.startswith("tensor(")]
    return [name for one in inner if (name := {"float": "float32", "double": "float64"}.get(one, one)) in TYPES]


def all_names() -> list[str]:
    known = {name for domain, name in shipped("cuda").operators if not domain and onnx.defs.has(name) and name not in SKIPPED}
    return sorted(name for name in known if name in ATTRIBUTES or not needs_attributes(name))


def needs_attributes(name: str) -> bool:
    try:
        schema = onnx.defs.get_schema(name, OPSET)
    except onnx.defs.SchemaError:  # a newer operator
        return True
    return schema.deprecated or any(one.required for one in schema.attributes.values())


def session_fails(model: onnx.ModelProto) -> str:
    """Why the CPU provider does not take a model: "" where it does."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return str(error)
    return ""


def cpu_disagreements(names: Sequence[str], most: int) -> tuple[int, list[str]]:
    """How many were compared, and what is other than the list says."""
    compared, wrong = 0, []
    for name, model, _ in cases(names, most):
        error = session_fails(model)
        if error and "NOT_IMPLEMENTED" not in error:
            continue  # not a model at all: its shapes or attributes
        (node,) = model.graph.node
        inferred = onnx.shape_inference.infer_shapes(model)
        types = {info.name: inferred_type(info) for info in (*inferred.graph.input, *inferred.graph.output)}
        missing = CPU.missing("", node.op_type, OPSET, [types[one] for one in node.input], [types[one] for one in node.output])
        compared += 1
        if (missing is not None) != bool(error) and not (missing is not None and is_made_of_others(node.op_type)):
            wrong.append(f"{name}: {missing or 'has a kernel'}, but {error or 'it loads'}")
    return compared, wrong


def inferred_type(info: onnx.ValueInfoProto) -> str | None:
    number = info.type.tensor_type.elem_type
    return next((name for name, one in TYPES.items() if one == number), None)


def is_made_of_others(name: str) -> bool:
    schema: Any = onnx.defs.get_schema(name, OPSET)
    return bool(schema.has_function or schema.has_context_dependent_function)


def test_the_list_agrees_with_the_cpu_of_the_installed_onnx_runtime() -> None:
    """By models of one node, each of which loads or has no kernel."""
    compared, wrong = cpu_disagreements(SAMPLE, 4)
    assert wrong == []
    assert compared > 100


@pytest.mark.full
def test_the_whole_list_agrees_with_the_cpu_of_the_installed_onnx_runtime() -> None:
    compared, wrong = cpu_disagreements(all_names(), 40)
    assert wrong == []
    assert compared > 1000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for CUDA's libraries."""
    if (why := stand_in.obstacle()) is not None:
        pytest.skip(why)
    return stand_in.build(tmp_path_factory.mktemp("libraries"))


def cuda_disagreements(built: Path, folder: Path, names: Sequence[str], most: int) -> tuple[int, list[str]]:
    made = [(name, model) for name, model, _ in cases(names, most)]
    files = [folder / f"{number}.onnx" for number in range(len(made))]
    for file, (_, model) in zip(files, made, strict=True):
        file.write_bytes(model.SerializeToString())
    compared, wrong = 0, []
    for (name, model), placed in zip(made, stand_in.placed(built, files), strict=True):
        if placed.error and "NOT_IMPLEMENTED" not in placed.error:
            continue
        (node,) = model.graph.node
        inferred = onnx.shape_inference.infer_shapes(model)
        types = {info.name: inferred_type(info) for info in (*inferred.graph.input, *inferred.graph.output)}
        missing = CUDA.missing("", node.op_type, OPSET, [types[one] for one in node.input], [types[one] for one in node.output])
        compared += 1
        if (missing is not None) != (node.name in placed.without):
            wrong.append(f"{name}: {missing or 'has a kernel'}, but the provider says otherwise")
    return compared, wrong


def test_the_list_agrees_with_the_cuda_provider(built: Path, tmp_path: Path) -> None:
    """The provider itself says for which nodes it found no kernel; it runs without a GPU as far as that."""
    compared, wrong = cuda_disagreements(built, tmp_path, SAMPLE, 5)
    assert wrong == []
    assert compared > 120


@pytest.mark.full
def test_the_whole_list_agrees_with_the_cuda_provider(built: Path, tmp_path: Path) -> None:
    compared, wrong = cuda_disagreements(built, tmp_path, all_names(), 40)
    assert wrong == []
    assert compared > 1000


# ---- how a node is looked up


LIST = """# made up
ai.onnx F
 1 T S -> T
 9 T S -> T
 13 T S... -> S T
 own 1-9 T=float32
 own 13+ S=int64 T=float16
 own 13+ S=float32 T=float32
 other 1+ T=float64
ai.onnx G
 1 T -> T
"""


@pytest.mark.parametrize(
    ("opset", "inputs", "outputs", "wanted"),
    [
        (1, ["float32", None], ["float32"], None),
        (12, ["float32", "int8"], ["float32"], None),  # version 9 of it, which the range takes in; S has no constraint there
        (12, ["float64", "int8"], ["float64"], "for T float64"),  # another provider's
        (13, ["float32", "float32"], ["float32"], None),
        (20, ["float16", "int64", "float32"], ["int64", "float16"], None),  # the first value of a name counts
        (13, ["float16", "float32"], [], "for S float32, T float16"),  # each is taken, not together
        (13, ["float16", None, "float32"], [], None),  # left out or not known
        (13, [None, None], ["float32", "float32"], None),
        (13, [None, None], ["float32", "float16"], "for S float32, T float16"),
    ],
)
def test_a_kernel_is_found_by_version_and_types(opset: int, inputs: list[Any], outputs: list[Any], wanted: str | None) -> None:
    assert read_kernels(LIST, "own").lacks("", "F", opset, inputs, outputs) == wanted


def test_a_kernel_without_an_end_is_of_one_version() -> None:
    """All that ONNX Runtime knows of it is that it does what the operator did when it was written."""
    newer = LIST.replace(" own 1-9", " 17 T S -> T\n own 1-9")
    assert read_kernels(newer, "own").lacks("", "F", 16, ["float32", "float32"], []) is None
    assert read_kernels(newer, "own").lacks("", "F", 17, ["float32", "float32"], []) == "for version 17 of it"
    assert read_kernels(LIST, "own").lacks("", "G", 1, ["float32"], []) == "at all"
    assert not read_kernels(LIST, "own").knows("", "H")
    with pytest.raises(ValueError, match="after line 2: not a kernel: own 5 T=x"):
        read_kernels("# x\nai.onnx F\n own 5 T=x\n", "own")


def test_half_precision_without_a_cpu_kernel_is_cast() -> None:
    """A MatMul of float16 loads on the CPU, one of bfloat16 does not."""
    for dtype, wanted in (("float16", None), ("bfloat16", "for T bfloat16"), ("float32", None)):
        assert CPU.missing("", "MatMul", OPSET, [dtype] * 2, [dtype]) == wanted
        model = graph_of([helper.make_node("MatMul", ["a", "b"], ["y"])], {"a": dtype, "b": dtype})
        assert bool(session_fails(model)) == (wanted is not None)


def test_each_heavy_operator_is_one_of_onnx_runtime() -> None:
    known = {name for _, name in shipped("cuda").operators}
    assert set(HEAVY) <= known, "a name that is misspelt would never be refused"


# ---- graphs


def if_of(*then: onnx.NodeProto) -> onnx.NodeProto:
    def body(nodes: Sequence[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(list(nodes), "body", [], [helper.make_tensor_value_info(nodes[-1].output[0], TYPES["float32"], None)])

    return helper.make_node(
        "If", ["c"], ["y"], "if", then_branch=body(then), else_branch=body([helper.make_node("Tanh", ["x"], ["n"], "tanh")])
    )


def test_bodies_see_the_types_around_them() -> None:
    model = graph_of([if_of(helper.make_node("Atan", ["x"], ["a"], "atan"))], {"c": "bool", "x": "float32"})
    found = placement(model, CUDA, "g")
    assert [(one.node, one.types) for one in found.handed] == [("atan", ("float32",))]
    assert found.nodes == 3


def test_functions_are_written_out() -> None:
    body = [helper.make_node("Atan", ["v"], ["w"], "inner"), helper.make_node("Tanh", ["w"], ["z"], "tanh")]
    function = helper.make_function("mine", "twice", ["v"], ["z"], body, [helper.make_opsetid("", OPSET)])
    model = graph_of([helper.make_node("twice", ["x"], ["y"], "call", domain="mine")], {"x": "float32"}, functions=[function])
    model.opset_import.append(helper.make_opsetid("mine", 1))
    found = placement(model, CUDA, "g")
    assert [one.operator for one in found.handed] == ["Atan"]
    assert found.unknown == ()


def test_an_operator_that_nobody_has_is_written_out_where_onnx_defines_it() -> None:
    """No provider has Mish for bfloat16, but CUDA has what it is made of."""
    model = graph_of([helper.make_node("Mish", ["x"], ["y"], "mish")], {"x": "bfloat16"}, opset=22)
    assert [one.missing("", "Mish", 22, ["bfloat16"], ["bfloat16"]) for one in (CUDA, CPU)] == ["at all", "at all"]
    found = placement(model, CUDA, "g")
    assert (found.nodes, found.handed) == (3, ()), "Softplus, Tanh, Mul"


def test_what_the_session_computes_when_it_loads_is_not_placed() -> None:
    weight = onnx.numpy_helper.from_array(np.ones(3, np.float32), "w")
    nodes = [helper.make_node("Atan", ["w"], ["v"], "fixed"), helper.make_node("Add", ["v", "x"], ["y"], "add")]
    assert reasons(graph_of(nodes, {"x": "float32"}, [weight])) == {}
    overridden = graph_of(nodes, {"x": "float32", "w": "float32"}, [weight])
    assert reasons(overridden) == {"fixed": "at all"}, "who runs it may give another"
    half = graph_of([helper.make_node("MatMul", ["w", "w"], ["y"], "product")], {}, [onnx.numpy_helper.from_array(np.ones((2, 2)), "w")])
    assert placement(half, CUDA, "g").nodes == 0


def test_sizes_are_counted_apart() -> None:
    """What is computed from shapes is meant for the CPU; what is computed from values in whole numbers is not."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape"),
        helper.make_node("BitwiseAnd", ["s", "s"], ["t"], "of sizes"),
        helper.make_node("BitwiseAnd", ["i", "i"], ["j"], "of values"),
        helper.make_node("BitwiseAnd", ["j", "s"], ["k"], "of both"),
    ]
    found = placement(graph_of(nodes, {"x": "float32", "i": "int64"}), CUDA, "g")
    assert found.sizes == 1
    assert [one.node for one in found.handed] == ["of values", "of both"]
    assert next(found.lines()) == (
        "g: CUDA hands 2 of 4 nodes back to the CPU; 1 more compute sizes there (read from ONNX Runtime's list of kernels, not run)"
    )


def test_a_file_that_does_not_load_at_all() -> None:
    found = placement(graph_of([helper.make_node("Atan", ["x"], ["y"], "atan")], {"x": "float16"}), CUDA, "g")
    assert not found.handed[0].nowhere, "the CPU casts it"
    (one,) = placement(graph_of([helper.make_node("LRN", ["x"], ["y"], "lrn", size=3)], {"x": "bfloat16"}), CUDA, "g").handed
    assert one.nowhere
    assert one.line() == "LRN (lrn): no kernel for T bfloat16, and neither has the CPU: the file does not load"


def test_operators_that_the_list_does_not_have() -> None:
    model = graph_of([helper.make_node("Own", ["x"], ["y"], "own", domain="mine")], {"x": "float32"})
    model.opset_import.append(helper.make_opsetid("mine", 1))
    found = placement(model, CUDA, "g")
    assert (found.handed, found.unknown) == ((), ("mine.Own",))
    assert list(found.lines())[-1] == "nothing is known of mine.Own, which ONNX Runtime's list does not have"


DECLINED = [
    ("ConvTranspose", ["x", "w"], {"pads": [1, 0]}, {"pads": [1, 1]}),
    ("ArgMax", ["x"], {"select_last_index": 1}, {"select_last_index": 0}),
    ("GRU", ["x", "w", "r"], {"linear_before_reset": 0}, {"linear_before_reset": 1}),
    ("GRU", ["x", "w", "r"], {"linear_before_reset": 1, "clip": 1.0}, {"linear_before_reset": 1}),
    ("GRU", ["x", "w", "r"], {}, {"linear_before_reset": 1, "activations": ["Sigmoid", "Tanh"]}),
    ("LSTM", ["x", "w", "r"], {"activations": ["Sigmoid", "Relu", "Tanh"]}, {"activations": ["Sigmoid", "Tanh", "Tanh"]}),
    ("LSTM", ["x", "w", "r"], {"input_forget": 1}, {}),
    ("RNN", ["x", "w", "r"], {"activations": ["Relu"]}, {"activations": ["Tanh"]}),
    ("Cast", ["x"], {"to": TensorProto.STRING}, {"to": TensorProto.INT32}),
]


def test_attributes_that_keep_a_node_off_its_kernel(built: Path, tmp_path: Path) -> None:
    """Each looked up, and asked of the provider itself."""
    files, expected = [], []
    for number, (name, inputs, *settings) in enumerate(DECLINED):
        for wanted, attributes in zip((True, False), settings, strict=True):
            more = {"hidden_size": 4} if name in ("GRU", "LSTM", "RNN") else {}
            node = helper.make_node(name, inputs, ["y"], "it", **{**more, **attributes})
            model = graph_of([node], dict.fromkeys(inputs, "float32"))
            assert bool(reasons(model)) == wanted, (name, attributes)
            files.append(tmp_path / f"{number}{wanted}.onnx")
            files[-1].write_bytes(model.SerializeToString())
            expected.append(wanted)
    found = stand_in.placed(built, files)
    assert [bool(one.declined | one.without) for one in found] == expected


# ---- compile, the report, verify


class Odd(nn.Module):
    """With operators that CUDA has no kernel for: Atan of a result, BitwiseAnd of a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.atan(self.norm(self.a(x)))
        kept = (y > 0).to(torch.int32) & 1
        return torch.where(kept.bool(), y, torch.arange(x.shape[1], device=x.device)[None, :, None].to(y.dtype))


AXES = {"x": {0: "batch", 1: "seq"}}


def spec(**export: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": {"path": "a"}, "rewrite": {"low_rank": {"rank": 2}}}], "export": export}


def norm_of(x: Any) -> Any:
    return op.MeanVarianceNormalization(x, axes=[1])


NORM = {torch.ops.aten.atan.default: norm_of}
"""A translation of a user's, to an operator that CUDA lacks."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled = mm.compile(seeded(Odd), spec(), {"x": randn(2, 5, 8)}, AXES)
    return compiled.save(tmp_path_factory.mktemp("odd") / "out")


def test_the_report_names_each_node(odd: Path) -> None:
    report = json.loads((odd / "report.json").read_text())
    (found,) = report["placements"]
    assert [(one["operator"], one["types"], one["reason"]) for one in found["handed"]] == [
        ("Atan", ["float32"], "at all"),
        ("BitwiseAnd", ["int32", "int32"], "at all"),
    ]
    assert found["source"].startswith("Kernels of ONNX Runtime 1.31.1 ")
    page = (odd / "report.html").read_text()
    assert f"CUDA hands 2 of {found['nodes']} nodes back to the CPU" in page
    assert "Atan (Atan): no kernel at all" in page
    assert read_report(odd / "report.json").placements[0].handed[0].operator == "Atan"


def test_the_exported_file_is_placed_as_the_provider_says(odd: Path, built: Path) -> None:
    """No kernel where it says so, and nothing else on the CPU but what computes sizes."""
    model = onnx.load(odd / "model.onnx", load_external_data=False)
    assert_placed(model, stand_in.placed(built, [odd / "model.onnx"])[0])


def assert_placed(model: onnx.ModelProto, placed: stand_in.Placed) -> None:
    found = placement(model, CUDA, "model.onnx")
    assert placed.error == ""
    assert {one.node for one in found.handed} == placed.without | placed.declined
    whole = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}
    infos = (*model.graph.value_info, *model.graph.output, *model.graph.input)
    types = {info.name: info.type.tensor_type.elem_type for info in infos}
    by_name = {node.name: node for node in model.graph.node}
    moved = placed.on.get("CPUExecutionProvider", frozenset()) - placed.without - placed.declined
    assert all(types[out] in whole for name in moved if name in by_name for out in by_name[name].output)


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_verify_names_each_node(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "verify", odd, "--target", "cuda")
    assert (code, err) == (0, "")
    assert "Atan (Atan): no kernel at all\nBitwiseAnd (BitwiseAnd): no kernel at all\nok\n" in out
    code, out, _ = run(capsys, "verify", odd, "--target", "cuda", "--json")
    assert [one["node"] for one in json.loads(out)["placements"][0]["handed"]] == ["Atan", "BitwiseAnd"]
    assert "placements" not in json.loads(run(capsys, "verify", odd, "--json")[1])
    assert run(capsys, "verify", odd, "--target", "cpu") == (
        2,
        "",
        "--target cpu: only cuda hands nodes back to the CPU\n  give --target cuda, or none\n",
    )


def test_verify_fails_where_a_norm_is_handed_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder whose target is the CPU may hold it."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.atan(self.a(x))

    def atan_and_norm(x: Any) -> Any:
        return op.Add(op.Atan(x), op.Mul(op.MeanVarianceNormalization(x, axes=[1]), op.Constant(value_float=0.0)))

    lowerings = {torch.ops.aten.atan.default: atan_and_norm}
    made = mm.compile(Norm(), spec(target=["cpu"]), (randn(2, 8),), onnx_lowerings=lowerings)
    folder = made.save(tmp_path / "out")
    assert made.report.placements == ()
    code, out, err = run(capsys, "verify", folder, "--target", "cuda")
    assert code == 1
    assert err == "model.onnx: CUDA would hand back to the CPU MeanVarianceNormalization (MeanVarianceNormalization): no kernel at all\n"
    assert "MeanVarianceNormalization (MeanVarianceNormalization): no kernel at all" in out


def test_verify_reads_no_changed_graph(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = shutil.copytree(odd, tmp_path / "changed")
    (changed / "model.onnx").write_bytes(b"\0" * 40)
    code, out, err = run(capsys, "verify", changed, "--target", "cuda")
    assert code == 1
    assert "changed file" in err
    assert "nodes" not in out
    listed = json.loads((changed / "manifest.json").read_text())
    listed["files"]["model.onnx"] = to_plain(file_record(b"\0" * 40))
    (changed / "manifest.json").write_text(json.dumps(listed))
    code, _, err = run(capsys, "verify", changed, "--target", "cuda")
    assert code == 1
    assert f"{changed / 'model.onnx'}: cannot be read" in err


def test_verify_on_a_target_loads_no_torch(odd: Path) -> None:
    run = f"try: main(['verify', {str(odd)!r}, '--target', 'cuda'])\nfinally: print('torch' in sys.modules)"
    code = f"import sys; from matmorph.cli.main import main\n{run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-2:] == ["ok", "False"]


def test_compile_refuses_a_norm_that_cuda_would_hand_back(tmp_path: Path) -> None:
    def save(**export: Any) -> None:
        compiled = mm.compile(seeded(Odd), spec(**export), {"x": randn(2, 5, 8)}, AXES, onnx_lowerings=NORM)
        compiled.save(tmp_path / "out")

    with pytest.raises(ExportError) as caught:
        save()
    assert str(caught.value).splitlines() == [
        "export.target cuda: CUDA would hand MeanVarianceNormalization of float32 back to the CPU (MeanVarianceNormalization in the model "
        "itself): it has no kernel at all",
        "  it has no kernel of MeanVarianceNormalization for any type",
        "  choose another export.precision or export.opset, write the model without it, or leave the target out of export.target",
    ]
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckError, match="does not answer as torch does"):  # it is written, and is no atan
        save(target=["cpu"])


def test_whole_numbers_multiplied_are_no_reason_to_refuse() -> None:
    model = graph_of([helper.make_node("MatMul", ["i", "i"], ["j"], "product")], {"i": "int64"})
    found = placement(model, CUDA, "g")
    assert [one.reason for one in found.handed] == ["for T int64"]
    assert found.heavy() == ()
    double = graph_of([helper.make_node("Einsum", ["i", "i"], ["j"], "product", equation="ij,jk->ik")], {"i": "float64"})
    assert placement(double, CUDA, "g").handed == ()


@pytest.mark.parametrize(("target", "wanted"), [(["cuda", "cpu"], ("CUDA",)), (["cpu"], ())])
def test_a_plan_says_what_it_cannot_know(capsys: pytest.CaptureFixture[str], target: list[str], wanted: tuple[str, ...]) -> None:
    found = mm.plan(seeded(Odd), spec(target=target), {"x": randn(2, 5, 8)}, AXES)
    assert (found.unplaced, found.placements) == (wanted, ())
    print_plan(make_console(), found)
    line = "which nodes CUDA hands back to the CPU is known of a file alone: compile says which\n"
    assert capsys.readouterr().out.endswith(line) == bool(wanted)


# ---- the script that writes the list


PAGE = """## Operators implemented by CPUExecutionProvider

| Op Name | Parameters | OpSet Version | Types Supported |
|---------|------------|---------------|-----------------|
|**Operator Domain:** *ai.onnx*||||
|Abs|*in* X:**T**<br> *out* Y:**T**|13+|**T** = tensor(double), tensor(float)|
|||[6, 12]|**T** = tensor(float)|

## Operators implemented by CUDAExecutionProvider

|**Operator Domain:** *ai.onnx*||||
|ArgMax|*in* data:**T**<br> *out* reduced:**tensor(int64)**|12|**T** = tensor(float16)|
|**Operator Domain:** *com.microsoft*||||
|Own|*in* A:**T1**<br> *in* B:**T2**|1+|**T1** = tensor(float)<br/> **T2** = seq(tensor(int64)), tensor(uint8)|

## Operators implemented by DmlExecutionProvider

|**Operator Domain:** *ai.onnx*||||
|Abs|*in* X:**T**<br> *out* Y:**T**|13+|**T** = tensor(float)|
"""


@pytest.fixture(scope="module")
def script() -> Any:
    spec_of = importlib.util.spec_from_file_location("kernel_table", Path(__file__).parents[1] / "tools" / "kernel_table.py")
    assert spec_of is not None
    assert spec_of.loader is not None
    module = importlib.util.module_from_spec(spec_of)
    sys.modules["kernel_table"] = module
    spec_of.loader.exec_module(module)
    return module


def test_the_list_is_read_off_onnx_runtimes_page(script: Any) -> None:
    known = {
        ("ai.onnx", "Abs"): {6: (["T"], ["T"]), 13: (["T"], ["T"])},
        ("ai.onnx", "ArgMax"): {12: (["T"], ["int64"])},
        ("com.microsoft", "Own"): {1: (["T1", "T2"], ["T1"])},
        ("ai.onnx", "None"): {1: (["T..."], ["T"])},
    }
    text = script.table(script.of_page(PAGE), known, "made up")
    assert text.splitlines() == [
        "# made up",
        "ai.onnx Abs",
        " 6 T -> T",
        " 13 T -> T",
        " cpu 6-12 T=float32",
        " cpu 13+ T=float32,float64",
        "ai.onnx ArgMax",
        " 12 T -> int64",
        " cuda 12-12 T=float16",
        "ai.onnx None",
        " 1 T... -> T",
        "com.microsoft Own",
        " 1 T1 T2 -> T1",
        " cuda 1+ T1=float32 T2=seq(int64),uint8",
    ]
    found = read_kernels(text, "cuda")
    assert found.lacks("com.microsoft", "Own", 1, ["float32", "uint8"], []) is None
    assert found.lacks("", "Abs", 21, ["float32"], []) == found.lacks("", "None", 1, ["float32"], []) == "at all"


def test_kernels_are_merged_where_they_differ_in_one_name(script: Any) -> None:
    """What they take together stays what it was."""
    a, b, c = frozenset("a"), frozenset("b"), frozenset("c")
    kernels = [{"S": a, "T": a}, {"S": a, "T": b}, {"S": b, "T": b}, {"S": c, "T": a | b}]
    merged = script.merged(kernels)
    assert len(merged) < len(kernels)

    def taken(some: Any) -> set[tuple[str, str]]:
        return {(s, t) for one in some for s in one["S"] for t in one["T"]}

    assert taken(merged) == taken(kernels)
