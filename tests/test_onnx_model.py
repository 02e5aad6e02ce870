"""model.onnx + model.onnx.data: what torch answers, names and axes of the source, each weight once, the same bytes every time."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exporting import LEVELS, Mlp, answers, difference, feeds, mlp_graph, randn, seeded, session
from torch import nn
from zoo import ZOO

from matmorph.errors import ExportError
from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.ir.core import Const, Graph, Node, Origin, Value
from matmorph.ir.tracing.trace import trace
from matmorph.ir.types import TensorType
from matmorph.runtime.format.artifact import DATA, MODEL, TensorInfo
from matmorph.specs.schema import Export

PARITY = 1e-5  # what the project promises in float32; a few hundred roundings of 6e-8


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    model = onnx.load(str(path), load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer}


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "cnn"])
def test_parity_names_and_checker(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    module, example, shapes = entry.build()
    graph = trace(module, example, shapes)
    info = export_onnx(graph, tmp_path, Export())
    for level in LEVELS:
        running = session(tmp_path / MODEL, level)
        for inputs in (example, *entry.more_inputs()):
            assert difference(running.run(None, feeds(running, inputs)), answers(module, inputs)) <= PARITY
    weights = {const.path: const for const in graph.used_state()}
    found = initializers(tmp_path / MODEL)
    assert set(weights) <= set(found)
    for path, const in weights.items():
        assert external(found[path])["location"] == DATA
        assert tuple(found[path].dims) == const.tensor.shape
    inline = {key: tensor for key, tensor in found.items() if key not in weights}
    assert all(not tensor.external_data and len(tensor.raw_data) <= 1024 * 8 for tensor in inline.values())
    assert info.bytes == sum(const.nbytes for const in weights.values())


def test_ports_and_axes(tmp_path: Path) -> None:
    module, example, shapes = ZOO["bert"].build()
    info = export_onnx(trace(module, example, shapes), tmp_path, Export())
    assert info.inputs == (TensorInfo("input_ids", "int64", ("batch", "seq")), TensorInfo("attention_mask", "int64", ("batch", "seq")))
    assert [port.name for port in info.outputs] == ["last_hidden_state", "pooler_output"]
    assert info.outputs[0].shape == ("batch", "seq", 32)
    model = onnx.load(str(tmp_path / MODEL), load_external_data=False)
    symbols = {dim.dim_param for value in (*model.graph.input, *model.graph.output) for dim in value.type.tensor_type.shape.dim}
    assert symbols - {""} == {"batch", "seq"}
    inner = {dim.dim_param for value in model.graph.value_info for dim in value.type.tensor_type.shape.dim}
    assert inner <= {"", "batch", "seq", "batch*seq"}
    assert model.opset_import[0].version == info.opset == 21


def test_derived_axes_are_expressions(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"rows": x.flatten(0, 1), "twice": torch.cat([x, x], 1), "none": None}

    info = export_onnx(trace(Rows(), {"x": randn(3, 5, 2)}, {"x": {0: "batch", 1: "seq"}}), tmp_path, Export())
    assert [(port.name, port.shape) for port in info.outputs] == [("rows", ("batch*seq", 2)), ("twice", ("batch", "2*seq", 2))]
    assert (tmp_path / DATA).stat().st_size == 0


def test_data_file(tmp_path: Path) -> None:
    graph = mlp_graph()
    seen: list[tuple[str, int]] = []
    info = export_onnx(graph, tmp_path, Export(), progress=lambda path, size: seen.append((path, size)))
    data = (tmp_path / DATA).read_bytes()
    assert [path for path, _ in seen] == ["scale", "fc1.weight", "fc1.bias", "fc2.weight"]  # state_dict order; `unused` is not written
    assert info.bytes == sum(size for _, size in seen) == 4 * (8 * 16 + 16 + 4 * 16 + 4)
    for name, entry in info.files.items():
        content = (tmp_path / name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    stored = initializers(tmp_path / MODEL)
    for const in graph.used_state():
        where = external(stored[const.path])
        assert int(where["offset"]) % 64 == 0
        part = data[int(where["offset"]) : int(where["offset"]) + int(where["length"])]
        assert part == const.load().numpy().tobytes()


def test_repetition_gives_the_same_bytes(tmp_path: Path) -> None:
    module, example, shapes = ZOO["gpt2"].build()
    graph = trace(module, example, shapes)
    infos = []
    for name, given in (("a", graph), ("b", graph), ("c", trace(module, example, shapes))):
        (tmp_path / name).mkdir()
        infos.append(export_onnx(given, tmp_path / name, Export()))
    assert infos[0] == infos[1] == infos[2]  # names, sizes and hashes


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    ids = torch.arange(10).reshape(2, 5)
    module = seeded(Tied)
    graph = trace(module, {"ids": ids}, {"ids": {0: "batch", 1: "seq"}})
    info = export_onnx(graph, tmp_path, Export())
    assert info.bytes == 11 * 6 * 4
    assert [name for name in initializers(tmp_path / MODEL) if name.endswith("weight")] == ["table.weight"]
    running = session(tmp_path / MODEL)
    assert difference(running.run(None, {"ids": ids.numpy()}), answers(module, {"ids": ids})) <= PARITY


def test_equal_storage_is_written_once(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    graph = trace(seeded(Two), (randn(2, 6),), ({0: "batch"},))
    first, second = graph.state
    shared = swap(graph, second, replace(second, storage=first.storage, load=first.load))
    info = export_onnx(shared, tmp_path, Export())
    stored = initializers(tmp_path / MODEL)
    assert info.bytes == 6 * 6 * 4
    assert external(stored["a.weight"]) == external(stored["b.weight"])


def swap(graph: Graph, old: Const, new: Const) -> Graph:
    """The graph with one constant in the place of another."""
    nodes = tuple(replace(node, args=tuple(new if arg is old else arg for arg in node.args)) for node in graph.nodes)
    return replace(graph, nodes=nodes, state=tuple(new if const is old else const for const in graph.state))


def factored(graph: Graph) -> Graph:
    """fc2 of `Mlp` as two factors, the way a rewrite leaves it: x @ down [16, 2] @ up [2, 4], each node with its rule and its place."""
    node = next(n for n in graph.nodes if any(isinstance(a, Const) and a.path == "fc2.weight" for a in n.args))
    x, weight = node.args[0], node.args[1]
    left, values, right = torch.linalg.svd(weight.load())
    tensors = {"down": (values.sqrt()[:, None] * right[:4]).T.contiguous(), "up": (left * values.sqrt()).T.contiguous()}
    down, up = (
        Const(f"fc2.low_rank.{k}", TensorType("float32", tuple(t.shape)), lambda t=t: t, (f"fc2.low_rank.{k}",), storage=k, rule="rest")
        for k, t in tensors.items()
    )
    origin = replace(node.origin, rule="rest", location="specs/a.yaml:7")
    middle = Value("middle", TensorType("float32", (*node.output.tensor.shape[:-1], 4)))
    inserted = (
        Node("aten.matmul.default", (x, down), (middle,), {}, origin),
        Node("aten.matmul.default", (middle, up), node.outputs, {}, origin),
    )
    nodes = tuple(new for n in graph.nodes for new in (inserted if n is node else (n,)))
    return replace(graph, nodes=nodes, state=(*(c for c in graph.state if c is not weight), down, up))


def test_factors_stay_two_products_of_the_initializers(tmp_path: Path) -> None:
    info = export_onnx(factored(mlp_graph()), tmp_path, Export())
    model = onnx.load(str(tmp_path / MODEL), load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.name.startswith("fc2/")]
    assert [node.input[1] for node in products] == ["fc2.low_rank.down", "fc2.low_rank.up"]
    for node in products:
        facts = {entry.key: entry.value for entry in node.metadata_props}
        assert facts == {"matmorph.path": "fc2", "matmorph.rule": "rest", "matmorph.origin": "specs/a.yaml:7"}
    assert "fc2.weight" not in initializers(tmp_path / MODEL)
    running, x = session(tmp_path / MODEL), randn(1, 2, 8)
    assert difference(running.run(None, {"x": x.numpy()}), answers(seeded(Mlp), {"x": x})) <= PARITY
    assert [port.name for port in info.outputs] == ["output"]


class Awkward(nn.Module):
    """Results that are an input, a weight, one another, and a constant; an input that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, x: torch.Tensor, idle: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x + self.weight
        return {"y": y, "again": y, "given": x, "table": self.weight, "x": y * 2, "ones": torch.ones(2)}


def test_awkward_results(tmp_path: Path) -> None:
    inputs = {"x": randn(3, 4), "idle": randn(2)}
    module = Awkward()
    info = export_onnx(trace(module, inputs, {"x": {0: "batch"}, "idle": None}), tmp_path, Export())
    assert [port.name for port in info.inputs] == ["x", "idle"]
    assert [port.name for port in info.outputs] == ["y", "again", "given", "table", "x_1", "ones"]  # x is the input's already
    running = session(tmp_path / MODEL)
    assert difference(running.run(None, feeds(running, inputs)), answers(module, inputs)) == 0


def test_input_named_like_a_weight(tmp_path: Path) -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.x

    with pytest.raises(ExportError, match="input x has the name of a weight"):
        export_onnx(trace(Clash(), {"x": randn(2, 4)}), tmp_path, Export())


def test_weights_on_meta_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(4, 3).eval()
        graph = trace(module, (torch.empty(2, 4),))
    with pytest.raises(ExportError, match="weight weight is on the meta device"):
        export_onnx(graph, tmp_path, Export())


def test_opset_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset 24 is not possible"):
        export_onnx(mlp_graph(), tmp_path, Export(opset=24))


def test_one_weight_in_memory_at_a_time(tmp_path: Path) -> None:
    graph = mlp_graph()
    given: list[weakref.ref[torch.Tensor]] = []
    alive: dict[str, int] = {}

    def watched(const: Const) -> Const:
        def load() -> torch.Tensor:
            alive[const.path] = sum(reference() is not None for reference in given)
            tensor = const.load().clone()
            given.append(weakref.ref(tensor))
            return tensor

        return replace(const, load=load)

    for const in graph.used_state():
        graph = swap(graph, const, watched(const))
    export_onnx(graph, tmp_path, Export())
    assert alive == {"scale": 0, "fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 0}  # how many were held when the next was loaded


def test_source_scopes_reach_the_file(tmp_path: Path) -> None:
    graph = mlp_graph()
    assert {Origin} == {type(node.origin) for node in graph.nodes}
    export_onnx(graph, tmp_path, Export())
    model = onnx.load(str(tmp_path / MODEL), load_external_data=False)
    paths = {entry.value for node in model.graph.node for entry in node.metadata_props if entry.key == "matmorph.path"}
    assert paths == {"fc1", "fc2"}
    assert model.producer_name == "matmorph"
    assert b"pkg.torch" not in (tmp_path / MODEL).read_bytes()
    assert b".py" not in (tmp_path / MODEL).read_bytes()  # no stack traces, no paths of this machine
    assert not np.any([node.name.startswith("node_") for node in model.graph.node])


def test_results_that_are_plain_numbers_stay_out_of_the_file(tmp_path: Path) -> None:
    class Counted(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"y": x + 1, "n": 3, "none": None}

    info = export_onnx(trace(Counted().eval(), (randn(2, 3),), ({0: "batch"},)), tmp_path, Export())
    assert [port.name for port in info.outputs] == ["y"]
