"""`.pt2` files are read without running anything that lies in them, whatever member or string is replaced."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import Mark
from torch._export.serde.serialize import serialize

from matmorph.errors import InputError
from matmorph.ir.text.printing import print_graph
from matmorph.ir.tracing.trace import trace
from matmorph.models.exported_file import load_program
from matmorph.models.exported_text import judge_program


class Small(torch.nn.Module):
    """Parameters, a buffer that is saved, one that is not (a constant of the file), and a dynamic axis in a view."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 4)
        self.register_buffer("shift", torch.arange(4.0))
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor, *, bias: torch.Tensor) -> torch.Tensor:
        y = self.fc(x) * self.scale + self.shift + bias
        return y.reshape(y.shape[0] * y.shape[1], 4) + torch.tensor(1.5)


def exported() -> tuple[torch.nn.Module, torch.export.ExportedProgram]:
    torch.manual_seed(0)
    model = Small().eval()
    axes = ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("seq", min=1, max=64)},)
    program = torch.export.export(model, (torch.randn(2, 3, 6),), {"bias": torch.ones(4)}, dynamic_shapes=(*axes, None), strict=False)
    return model, program


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The members of the file, by their whole names."""
    file = tmp_path_factory.mktemp("pt2") / "small.pt2"
    torch.export.save(exported()[1], file)
    return members_of(file)


def members_of(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(file: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file


def old_members() -> dict[str, bytes]:
    """What torch wrote up to 2.7, of this program."""
    parts = serialize(exported()[1])
    return {
        "version": b"8.0",
        "serialized_exported_program.json": parts.exported_program,
        "serialized_state_dict.pt": parts.state_dict,
        "serialized_constants.pt": parts.constants,
        "serialized_example_inputs.pt": parts.example_inputs,
    }


def refusal(file: Path) -> str | None:
    """What is said, None where the program is read all the same."""
    try:
        load_program(file)
    except InputError as error:
        return error.message
    return None


def torch_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


FORMS: dict[str, Callable[[Any], bytes]] = {
    "pickle": pickle.dumps,
    "torch": torch_saved,
    "tuple": lambda mark: torch_saved((((torch.zeros(2),), {}), mark)),
    "old": lambda mark: pickle.dumps({"fc.weight": mark}, protocol=2),
}


def test_programs_come_back_as_they_were_saved(tmp_path: Path, saved: dict[str, bytes]) -> None:
    model, program = exported()
    for name, members in (("new", saved), ("old", old_members())):
        found = load_program(written(tmp_path / f"{name}.pt2", members))
        assert set(found.state_dict) == set(program.state_dict)
        assert all(torch.equal(found.state_dict[key], value) for key, value in program.state_dict.items())
        assert all(isinstance(found.state_dict[key], torch.nn.Parameter) for key in ("fc.weight", "fc.bias"))
        x, bias = torch.randn(5, 7, 6), torch.randn(4)  # sizes that the trace did not see
        assert torch.equal(found.module()(x, bias=bias), model(x, bias=bias))
        assert found.example_inputs is not None
        assert torch.equal(found.example_inputs[1]["bias"], torch.ones(4))
        assert print_graph(trace(found, None)) == print_graph(trace(program, None))


@pytest.mark.parametrize("form", FORMS)
def test_no_member_is_run(tmp_path: Path, saved: dict[str, bytes], form: str) -> None:
    """Each member in turn becomes a pickle that leaves a mark; so do those that this program does not have."""
    mark = tmp_path / "mark"
    root = next(iter(saved)).partition("/")[0]
    absent = (
        *("data/weights/model.pt", "data/constants/model.pt", "data/weights/weight_9", "data/constants/custom_obj_0"),
        *("data/constants/opaque_obj_0", "data/aotinductor/model/x.so", "models/other.json", "extra/x"),
    )
    sets = [(saved, name) for name in (*saved, *(f"{root}/{name}" for name in absent))]
    sets += [(old, name) for old in [old_members()] for name in old]
    refused = 0
    for number, (members, name) in enumerate(sets):
        file = written(tmp_path / f"{number}.pt2", {**members, name: FORMS[form](Mark(mark))})
        message = refusal(file)
        refused += message is not None
        assert message is None or (str(file) in message and "\n" not in message), name
        assert not mark.exists(), f"{name} was run"
    assert refused >= 14, "what does not matter to the program may be anything; weights, inputs and texts may not"


def test_torchs_own_loader_runs_what_is_refused_here(tmp_path: Path, saved: dict[str, bytes]) -> None:
    """The attack is a real one: else the test above would prove nothing."""
    mark = tmp_path / "mark"
    name = next(name for name in saved if "sample_inputs" in name)
    file = written(tmp_path / "x.pt2", {**saved, name: torch_saved((((torch.zeros(2),), {}), Mark(mark)))})
    with pytest.raises(InputError, match=r"data/sample_inputs/model\.pt: holds more than tensors"):
        load_program(file)
    assert not mark.exists()
    with pytest.raises(Exception):  # noqa: B017 - whatever it makes of three example inputs, the mark is there by then
        torch.export.load(file)
    assert mark.exists()


def test_a_pickled_weight_is_refused_by_name(tmp_path: Path, saved: dict[str, bytes]) -> None:
    """`use_pickle` makes torch unpickle without any limit."""
    mark = tmp_path / "mark"
    name = next(name for name in saved if name.endswith("model_weights_config.json"))
    config = json.loads(saved[name])
    config["config"]["fc.weight"]["use_pickle"] = True
    place = config["config"]["fc.weight"]["path_name"]
    data = {**saved, name: json.dumps(config).encode(), name.replace("model_weights_config.json", place): torch_saved(Mark(mark))}
    with pytest.raises(InputError, match=r"weights_config\.json: 'fc\.weight' is pickled"):
        load_program(written(tmp_path / "x.pt2", data))
    assert not mark.exists()


# ---- the program's text


def text_of(saved: dict[str, bytes]) -> dict[str, Any]:
    return json.loads(next(data for name, data in saved.items() if name.endswith("models/model.json")))


def everywhere(data: Any, key: str, value: Any) -> int:
    """Sets every string under the key; how many there were."""
    count = 0
    for entry in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        count += everywhere(entry, key, value)
    if isinstance(data, dict) and isinstance(data.get(key), str):
        data[key] = value
        count += 1
    return count


RUNS = "__import__('pathlib').Path({mark!r}).touch()"
TEXTS: dict[str, tuple[str, str]] = {
    "sizes": ("expr_str", RUNS),
    "sizes, in a call": ("expr_str", "Max(s0, " + RUNS + ")"),
    "sizes, by attribute": ("expr_str", "s0.__class__.__base__"),
    "sizes, endless": ("expr_str", "9**9**9**9"),
    "sizes, shifted": ("expr_str", "LShift(1, 99999999999)"),
    "operator of the system": ("target", "torch.serialization.os.system"),
    "operator that loads a library": ("target", "torch.ops.load_library"),
    "operator that reads a file": ("target", "torch.ops.aten.from_file.default"),
    "operator that writes a file": ("target", "torch.ops.aten.save.default"),
    "operator called later": ("target", "_operator.methodcaller"),
    "operator of nowhere": ("target", "torch.ops.aten.never_there.default"),
    "name": ("name", "x = " + RUNS + "\n    y"),
    "pytree that imports": (
        "in_spec",
        json.dumps(
            [
                1,
                {
                    "type": "collections.defaultdict",
                    "context": {"default_factory_module": "imported", "default_factory_name": "x", "dict_context": []},
                    "children_spec": [],
                },
            ]
        ),
    ),
    "pytree with an enum": ("out_spec", json.dumps([1, {"type": "builtins.list", "context": '{"__enum__": true}', "children_spec": []}])),
    "parameter": ("parameter_name", 'fc.weight"); ' + RUNS + " #"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_no_text_is_run(tmp_path: Path, saved: dict[str, bytes], case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "imported.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    key, value = TEXTS[case]
    data = text_of(saved)
    assert everywhere(data, key, value.replace("{mark!r}", repr(str(mark))))
    name = next(name for name in saved if name.endswith("models/model.json"))
    with pytest.raises(InputError) as caught:
        load_program(written(tmp_path / "x.pt2", {**saved, name: json.dumps(data).encode()}))
    assert f"models/model.json: {key}: " in caught.value.message
    assert not mark.exists()


def test_guards_and_arguments_of_forward(tmp_path: Path, saved: dict[str, bytes]) -> None:
    mark = tmp_path / "mark"
    name = next(name for name in saved if name.endswith("models/model.json"))
    data = text_of(saved)
    data["guards_code"] = [RUNS.replace("{mark!r}", repr(str(mark)))]
    program = load_program(written(tmp_path / "guards.pt2", {**saved, name: json.dumps(data).encode()}))
    program.module()(torch.randn(2, 3, 6), bias=torch.ones(4))
    assert not mark.exists()
    data["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [RUNS.replace("{mark!r}", repr(str(mark)))]
    with pytest.raises(InputError, match="forward_arg_names"):
        load_program(written(tmp_path / "names.pt2", {**saved, name: json.dumps(data).encode()}))


def test_nested_text_is_damage_and_no_crash(tmp_path: Path, saved: dict[str, bytes]) -> None:
    name = next(name for name in saved if name.endswith("models/model.json"))
    for data in (b"[" * 200_000, b'{"graph_module": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, b"", b"{}", b"[1]", b"\xff\x00"):
        with pytest.raises(InputError, match=r"models/model\.json"):
            load_program(written(tmp_path / "x.pt2", {**saved, name: data}))


def test_names_that_are_like_keys_are_no_fault(saved: dict[str, bytes]) -> None:
    data = text_of(saved)
    values = data["graph_module"]["graph"]["tensor_values"]
    values["target"] = values["fqn"] = values["name"] = next(iter(values.values()))
    assert judge_program(data, "x")["guards_code"] == []


def test_damage_says_one_line_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str], saved: dict[str, bytes]) -> None:
    whole = written(tmp_path / "whole.pt2", saved).read_bytes()
    for number, data in enumerate((b"", b"not a program", pickle.dumps([1]), torch_saved([1]), whole[: len(whole) // 2], whole[:-7])):
        file = tmp_path / f"{number}.pt2"
        file.write_bytes(data)
        with pytest.raises(InputError) as caught:
            load_program(file)
        assert str(file) in caught.value.message
        assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")
