"""`export.adapters: inputs` and `.onnx_adapter` files: one session, several adapters of different rank. Oracle: torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from adapting import ROUNDING, U4, X, compiled, network, trained
from torch import nn
from zoo import ZOO

import matmorph as mm
from matmorph.errors import ExportError, InputError
from matmorph.exporters.adapters import adapter_arrays, serve
from matmorph.passes.methods import all_methods
from matmorph.runtime import Session
from matmorph.runtime.adapters import load_adapter, read_adapter, read_slots, save_adapter
from matmorph.runtime.errors import AdapterError
from matmorph.runtime.format.adapters import Slots

INPUTS = {"export": {"adapters": "inputs", "target": ["cpu"]}}


def slots_of(folder: Path) -> Slots:
    return read_slots(json.loads((folder / "manifest.json").read_text())["adapters"], str(folder))


def far(a: np.ndarray, b: torch.Tensor) -> float:
    return float((torch.tensor(a) - b).abs().max().detach() / b.abs().max().detach())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[mm.Compiled, Path]:
    """LoRA of rank 2 with a scale of 3 on both layers, saved with its adapters as inputs."""
    found = compiled({"lora": {"rank": 2, "alpha": 6}}, **INPUTS)
    return found, found.save(tmp_path_factory.mktemp("served") / "out")


def test_the_default_is_the_base_and_costs_nothing(served: tuple[mm.Compiled, Path]) -> None:
    found, folder = served
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    given = {entry.name: entry for entry in model.graph.input}
    assert list(given) == ["input", "0.lora.down", "0.lora.up", "2.lora.down", "2.lora.up"]
    empty = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer if "lora" in tensor.name}
    assert empty == {"0.lora.down": [24, 0], "0.lora.up": [0, 16], "2.lora.down": [16, 0], "2.lora.up": [0, 8]}
    dims = [dim.dim_param or dim.dim_value for dim in given["0.lora.up"].type.tensor_type.shape.dim]
    assert dims == ["0.lora.rank", 16]
    assert not any(node.op_type == "Mul" for node in model.graph.node)  # the scale is in the factors
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["inputs"]] == ["input"]
    assert [(entry["site"], entry["rank"]) for entry in manifest["adapters"]["inputs"]] == [("0", 0), ("2", 0)]
    session = Session(folder, ["cpu"])
    assert far(session.run({"input": X.numpy()})["output"], network()(X)) < ROUNDING
    assert found.report.parity is not None


def test_one_session_switches_adapters_of_different_rank(served: tuple[mm.Compiled, Path], tmp_path: Path) -> None:
    _, folder = served
    session, feeds = Session(folder, ["cpu"]), {"input": X.numpy()}
    base = session.run(feeds)["output"]
    wanted, loaded = {}, {}
    for rank in (1, 2, 5):
        other = compiled({"lora": {"rank": rank, "alpha": 6}})
        values = trained(other, seed=rank)
        wanted[rank] = other.load_trained(values).module(X)
        path = tmp_path / f"{rank}.onnx_adapter"
        save_adapter(path, adapter_arrays(other.adapters, values, all_methods()), slots_of(folder))
        loaded[rank] = session.load_adapter(path)
        assert loaded[rank].ranks == {"0 lora": rank, "2 lora": rank}
    for rank in (5, 1, 2, 1):
        assert far(session.run(feeds, adapter=loaded[rank])["output"], wanted[rank]) < ROUNDING
        np.testing.assert_array_equal(session.run(feeds)["output"], base)
    session.switch(loaded[2])
    assert far(session.run(feeds)["output"], wanted[2]) < ROUNDING
    assert far(session.run(feeds, adapter=loaded[5])["output"], wanted[5]) < ROUNDING  # for one run
    assert far(session.run(feeds)["output"], wanted[2]) < ROUNDING
    session.switch(None)
    np.testing.assert_array_equal(session.run(feeds)["output"], base)


def test_a_pair_that_a_file_leaves_out_keeps_its_default(served: tuple[mm.Compiled, Path], tmp_path: Path) -> None:
    found, folder = served
    values = trained(found)
    arrays = {name: array for name, array in adapter_arrays(found.adapters, values, all_methods()).items() if name.startswith("0.")}
    save_adapter(tmp_path / "first", arrays, slots_of(folder))
    session = Session(folder, ["cpu"])
    answer = session.run({"input": X.numpy()}, adapter=session.load_adapter(tmp_path / "first"))["output"]
    first = {name: value for name, value in values.items() if name.startswith("0.")}
    assert far(answer, found.load_trained(first).module(X)) < ROUNDING


KINDS: Mapping[str, Any] = {
    "pissa": {"lora": {"rank": 2, "alpha": 4, "init": "pissa"}},
    "tt_lora": {"tt_lora": {"rank": 2, "alpha": 4, "cores": 4}},
    "melora": {"melora": {"rank": 2, "groups": 2, "alpha": 4}},
    "lokr": {"lokr": {"rank": 2, "alpha": 4}},
    "loftq": {"loftq": {**U4, "rank": 2, "alpha": 3}},
    "qlora": {"qlora": {**U4, "rank": 2}},
    "quantize + lora": [{"quantize": U4}, {"lora": {"rank": 2}}],
    "two": [{"lora": {"rank": 2}}, {"tt_lora": {"rank": 2, "cores": 4}}],
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter(name: str, tmp_path: Path) -> None:
    found = compiled(KINDS[name], **INPUTS)
    folder = found.save(tmp_path / "out")
    session, feeds = Session(folder, ["cpu"]), {"input": X.numpy()}
    assert far(session.run(feeds)["output"], found.module(X)) < ROUNDING  # the default is the model before training
    values = trained(found)
    save_adapter(tmp_path / "a", adapter_arrays(found.adapters, values, all_methods()), slots_of(folder))
    answer = session.run(feeds, adapter=session.load_adapter(tmp_path / "a"))["output"]
    assert far(answer, found.load_trained(values).module(X)) < ROUNDING
    own = {entry["rank"] for entry in json.loads((folder / "manifest.json").read_text())["adapters"]["inputs"]}
    assert own == ({2} if name in ("pissa", "loftq") else {0})


@pytest.mark.parametrize("name", ["cnn", *(pytest.param(name, marks=pytest.mark.full) for name in ("mixtral", "gpt2", "bert"))])
def test_every_form_of_a_matmul(name: str, tmp_path: Path) -> None:
    """1x1 convolutions, expert stacks, [in, out] layouts. Tolerance: that of the artefact's own check."""
    model, inputs, shapes = ZOO[name].build()
    rule = {"match": {"op": "matmul"}, "rewrite": {"lora": {"rank": 2, "alpha": 1}}}
    found = mm.compile(model, {"version": 1, "rules": [rule], **INPUTS}, inputs, shapes)
    folder = found.save(tmp_path / "out")
    values = trained(found)
    save_adapter(tmp_path / "a", adapter_arrays(found.adapters, values, all_methods()), slots_of(folder))
    session = Session(folder, ["cpu"])
    ready = found.load_trained(values)
    ready.save(tmp_path / "inline", force=False)
    names = [info.name for info in session.inputs]
    tensors = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
    feeds = {name: tensors[name].numpy() for name in names}
    with torch.no_grad():
        answer = ready.module(**inputs) if isinstance(inputs, dict) else ready.module(*inputs)
    first = answer[0] if not isinstance(answer, torch.Tensor) else answer
    assert far(session.run(feeds, adapter=session.load_adapter(tmp_path / "a"))[session.outputs[0].name], first) < 2e-4


def test_half_precision_takes_half_precision_factors(tmp_path: Path) -> None:
    export = {"export": {"adapters": "inputs", "precision": "fp16", "target": ["cpu"]}}
    found = compiled({"lora": {"rank": 2}}, **export)
    folder = found.save(tmp_path / "out")
    values = trained(found)
    save_adapter(tmp_path / "a", adapter_arrays(found.adapters, values, all_methods()), slots_of(folder))
    assert {array.dtype for array in read_adapter(tmp_path / "a")[0].values()} == {np.dtype("float16")}
    session = Session(folder, ["cpu"])
    answer = session.run({"input": X.numpy()}, adapter=session.load_adapter(tmp_path / "a"))["output"]
    assert far(answer, found.load_trained(values).module(X)) < 5e-3  # fp16: 2^-11 per rounding, a few of them
    export["export"]["precision"] = "bf16"
    export["export"]["target"] = ["cuda"]
    with pytest.raises(ExportError, match="numpy has no bfloat16"):
        compiled({"lora": {"rank": 2}}, **export).save(tmp_path / "other")


# what does not fit


@pytest.fixture
def good(served: tuple[mm.Compiled, Path]) -> tuple[dict[str, np.ndarray], Slots]:
    found, folder = served
    return adapter_arrays(found.adapters, trained(found), all_methods()), slots_of(folder)


def test_an_adapter_of_another_base_is_refused(good: Any, served: tuple[mm.Compiled, Path], tmp_path: Path) -> None:
    net = network()
    with torch.no_grad():
        net[0].bias[0] += 1
    other = compiled({"lora": {"rank": 2, "alpha": 6}}, model=net, **INPUTS).save(tmp_path / "other")
    save_adapter(tmp_path / "a", good[0], slots_of(other))
    session = Session(served[1], ["cpu"])
    with pytest.raises(AdapterError, match=r"a: made for another base \(its fingerprint begins with [0-9a-f]{7}, this model's with"):
        session.load_adapter(tmp_path / "a")
    foreign = Session(other, ["cpu"]).load_adapter(tmp_path / "a")
    for call in (lambda: session.switch(foreign), lambda: session.run({"input": X.numpy()}, adapter=foreign)):
        with pytest.raises(AdapterError, match="made for another base; load it with load_adapter of this session"):
            call()


def test_trained_values_do_not_change_the_base(served: tuple[mm.Compiled, Path], tmp_path: Path) -> None:
    found, folder = served
    again = found.load_trained(trained(found)).save(tmp_path / "trained")
    assert slots_of(again).fingerprint == slots_of(folder).fingerprint
    head = found.load_trained({"2.bias": torch.ones(8)}).save(tmp_path / "head")
    assert slots_of(head).fingerprint != slots_of(folder).fingerprint


@pytest.mark.parametrize(("change", "message"), [
    (lambda a: {**a, "3.lora.up": a["2.lora.up"]}, "the model has no adapter input 3.lora.up; did you mean 2.lora.up"),
    (lambda a: {}, "holds no adapter"),
    (lambda a: {"0.lora.up": a["0.lora.up"]}, "has 0.lora.up without its other factor"),
    (lambda a: {**a, "0.lora.up": a["0.lora.up"][:1]}, r"are \[24, 2\] and \[1, 16\], the model takes \[24, rank\] and \[rank, 16\]"),
    (lambda a: {**a, "0.lora.down": a["0.lora.down"][:9]}, r"are \[9, 2\] and \[2, 16\], the model takes \[24, rank\] and \[rank, 16\]"),
    (lambda a: {**a, "0.lora.up": a["0.lora.up"] * np.nan}, "0.lora.up has NaN or infinity"),
    (lambda a: {**a, "0.lora.up": a["0.lora.up"].astype(np.int64)}, "0.lora.up is int64, the model takes float32"),
])  # fmt: skip
def test_arrays_that_do_not_fit(change: Any, message: str, good: Any, tmp_path: Path) -> None:
    arrays, slots = good
    with pytest.raises(AdapterError, match=message):
        save_adapter(tmp_path / "a", change(arrays), slots)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_adapter(good: Any, served: tuple[mm.Compiled, Path], tmp_path: Path) -> None:
    arrays, slots = good
    with pytest.raises(AdapterError, match="no such file"):
        load_adapter(tmp_path / "none", slots)
    with pytest.raises(AdapterError, match="not a file"):
        load_adapter(tmp_path, slots)
    (tmp_path / "text").write_bytes(b"nothing of the kind")
    with pytest.raises(AdapterError, match=r"not an \.onnx_adapter file"):
        load_adapter(tmp_path / "text", slots)
    foreign = onnxruntime.AdapterFormat()
    foreign.set_adapter_version(7)
    foreign.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    foreign.export_adapter(str(tmp_path / "foreign"))
    with pytest.raises(AdapterError, match="not written by matmorph, or by another version of it"):
        load_adapter(tmp_path / "foreign", slots)
    (tmp_path / "full" / "x").mkdir(parents=True)
    with pytest.raises(AdapterError, match="cannot be written"):
        save_adapter(tmp_path / "full", arrays, slots)
    inline = compiled({"lora": {"rank": 2}}).save(tmp_path / "inline")
    with pytest.raises(AdapterError, match=r"takes no adapters: it was not exported with export\.adapters: inputs"):
        Session(inline, ["cpu"]).load_adapter(tmp_path / "text")


def test_models_without_adapters_cannot_have_them_as_inputs(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"export\.adapters: inputs, and the model has no adapters"):
        compiled({"low_rank": {"rank": 2}}, **INPUTS).save(tmp_path / "out")
    merged = compiled({"lora": {"rank": 2}}, **INPUTS).merge()
    Session(merged.save(tmp_path / "merged"), ["cpu"])
    matrix = compiled({"tt_lora": {"rank": 2, "modes": {"out": [4, 4], "in": [6, 4]}}}, path="0", **INPUTS)
    with pytest.raises(ExportError, match="0: its tensor train has no two-factor form"):
        matrix.save(tmp_path / "matrix")


def test_values_that_do_not_fit_the_matmul(served: tuple[mm.Compiled, Path]) -> None:
    found, _ = served
    values = trained(found)
    with pytest.raises(InputError, match=r"the values lack 0\.lora\.up of the adapter at 0"):
        adapter_arrays(found.adapters, {"0.lora.down": values["0.lora.down"]}, all_methods())
    with pytest.raises(InputError, match=r"0: factors \[24, 2\] and \[3, 16\] do not fit a matmul of 24 inputs and 16 outputs"):
        adapter_arrays(found.adapters, {**values, "0.lora.up": torch.zeros(3, 16)}, all_methods())


def test_the_graph_before_and_after_agree() -> None:
    """Experts and convolutions keep their layout; ranks are those of the defaults."""
    found = compiled({"lora": {"rank": 2, "alpha": 6, "init": "pissa"}})
    result = serve(found.graph, found.adapters, "fp32", all_methods())
    assert [node.op for node in result.graph.nodes].count("aten.mul.Scalar") == 0
    assert {entry.rank for entry in result.inputs} == {2}


def test_switching_needs_no_torch(served: tuple[mm.Compiled, Path], good: Any, tmp_path: Path) -> None:
    _, folder = served
    save_adapter(tmp_path / "a", *good)
    code = (
        "import sys, numpy as np\n"
        "from matmorph.runtime import Session\n"
        f"s = Session({str(folder)!r}, ['cpu'])\n"
        f"a = s.load_adapter({str(tmp_path / 'a')!r})\n"
        "x = {'input': np.ones((2, 24), np.float32)}\n"
        "assert (s.run(x, adapter=a)['output'] != s.run(x)['output']).any()\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_layers_of_one_model_may_differ(tmp_path: Path) -> None:
    """Per-rule ranks: each pair has a rank of its own."""
    net = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    rules = [{"match": {"path": str(k)}, "rewrite": {"lora": {"rank": rank}}} for k, rank in ((0, 2), (2, 5))]
    found = mm.compile(net, {"version": 1, "rules": rules, **INPUTS}, (X,), ({0: "batch"},))
    folder = found.save(tmp_path / "out")
    values = trained(found)
    save_adapter(tmp_path / "a", adapter_arrays(found.adapters, values, all_methods()), slots_of(folder))
    session = Session(folder, ["cpu"])
    adapter = session.load_adapter(tmp_path / "a")
    assert adapter.ranks == {"0 lora": 2, "2 lora": 5}
    assert far(session.run({"input": X.numpy()}, adapter=adapter)["output"], found.load_trained(values).module(X)) < ROUNDING


@pytest.mark.parametrize("kind", ["inputs", "inline"])
@pytest.mark.parametrize("base", [None, {"quantize": {"quantizer": "uniform", "bits": 4, "block_size": 16}}])
def test_rows_and_total_agree_with_the_data_file(kind: str, base: Any, tmp_path: Path) -> None:
    """What is given with a run is in no file: rows, totals and the file itself say the same, and so does the plan of the rows."""
    rewrite = [base, {"lora": {"rank": 2}}] if base else {"lora": {"rank": 2}}
    found = compiled(rewrite, export={"adapters": kind, "target": ["cpu"]})
    folder = found.save(tmp_path / "out")
    saved = json.loads((folder / "report.json").read_text())
    biases = 4 * (16 + 8)
    total = saved["totals"]["bytes"][1]
    assert sum(row["bytes"][1] for row in saved["sites"]) + biases == total
    loaded = onnx.load(folder / "model.onnx")
    held = sum(int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize for tensor in big(loaded))
    assert held == total


def big(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Weights; shape constants and scalars stay in the graph's own file."""
    return [tensor for tensor in model.graph.initializer if any(part in tensor.name for part in ("0.", "2."))]
