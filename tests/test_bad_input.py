"""Wrong input on the command line: one clear line with the place, exit code 2 (1 where a check failed), and nothing left behind."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matmorph.cli.main import main

FACTORY = """
import torch, matmorph

def model(**more):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 16))
    return matmorph.Model(layers, (torch.randn(4, 24),), ({0: "batch"},), **more)

def poisoned(path, value):
    made = model()
    made.module.get_parameter(path).data.view(-1)[3] = value
    return made

def nan_claimed(): return poisoned("2.weight", float("nan"))
def nan_bias(): return poisoned("0.bias", float("nan"))
def infinite(): return poisoned("0.weight", float("-inf"))
def empty(): return model(calibration=[])
def wrong_keys(): return model(calibration=[{"inputs": torch.randn(4, 24)}])
def wrong_width(): return model(calibration=[(torch.randn(4, 23),)])
def no_batches(): return model(calibration=7)
def own_data(): return model(calibration=[(torch.randn(4, 24),)])

class Keyed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(24, 16)
    def forward(self, x):
        return self.fc(x)

def keyed(**more): return matmorph.Model(Keyed(), {"x": torch.randn(4, 24)}, {"x": {0: "batch"}}, **more)
def keyed_wrong_batches(): return keyed(calibration=[{"y": torch.randn(4, 24)}])
def wrong_example(): return matmorph.Model(Keyed(), {"inputs": torch.randn(4, 24)})
def too_many(): return matmorph.Model(Keyed(), (torch.randn(4, 24), torch.randn(4)))
def wrong_shape(): return matmorph.Model(Keyed(), {"x": torch.randn(4, 23)})
def wrong_axes(): return matmorph.Model(Keyed(), {"x": torch.randn(4, 24)}, {"y": {0: "batch"}})
def no_inputs(): return matmorph.Model(Keyed(), {})
def not_a_model(): return Keyed()

class Loop(torch.nn.Module):
    def forward(self, x):
        while x.sum() > 0:
            x = x - 1
        return x

class Number(torch.nn.Module):
    def forward(self, x):
        return x if x.max().item() > 0 else -x

def loop(): return matmorph.Model(Loop(), (torch.randn(4, 24),))
def number(): return matmorph.Model(Number(), (torch.randn(4, 24),))

def two_devices():
    made = model()
    made.module[2].to("meta")
    return made

def on_meta():
    made = model()
    return matmorph.Model(made.module.to("meta"), (made.example_inputs[0].to("meta"),), made.dynamic_shapes)
"""

SPEC = """version: 1
name: bad
rules:
  - name: half
    match: {op: linear}
    expect: 2
    rewrite: {low_rank: {rank: 6}}
"""
WHITE = SPEC.replace("rank: 6", "rank: 6, whiten: true")
KEYED = WHITE.replace("expect: 2", "expect: 1")


@dataclass(frozen=True)
class Done:
    """What one command line did. `first`: the first line on stderr."""

    code: int
    out: str
    err: str

    @property
    def first(self) -> str:
        return self.err.splitlines()[0]


Run = Callable[..., Done]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "bad_models.py").write_text(FACTORY)
    (tmp_path / "s.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("bad_models", None)


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> Done:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        said = capsys.readouterr()
        return Done(int(caught.value.code or 0), said.out, said.err)

    return call


@pytest.fixture
def refused(run: Run, place: Path) -> Run:
    """Compiles into deep/out and holds what every failure must hold: code, plain lines, nothing new anywhere."""

    def call(model: str = "model", *more: str, spec: str = "s.yaml", out: str = "deep/out", code: int = 2) -> Done:
        name = model if ":" in model or "/" in model or "." in model else f"bad_models:{model}"
        before = contents(place)
        done = run("compile", name, "--spec", spec, "--out", out, *more)
        assert (done.code, done.out) == (code, ""), done.err
        assert "Traceback" not in done.err
        assert "internal error" not in done.err
        assert "\x1b" not in done.err
        assert all(line.startswith("  ") for line in done.err.splitlines()[1:])
        assert contents(place) == before
        return done

    return call


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def write(place: Path, *changes: tuple[str, str], text: str = SPEC, name: str = "s.yaml") -> None:
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (place / name).write_text(text)


# ---- specs


def test_the_spec_is_fine_before_it_is_spoilt(run: Run, place: Path) -> None:
    done = run("compile", "bad_models:model", "--spec", "s.yaml", "--out", "out")
    assert (done.code, done.err) == (0, "")
    assert (place / "out" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("expect: 2", "expect: [2"), r"s\.yaml:7:\d+: .+"),
        (("name: bad", "name: bad\n\tx: 1"), r"s\.yaml:3:1: .+"),
        (("rank: 6", "rnak: 6"), r"s\.yaml:7:26: rules\[0\]\.rewrite\.low_rank\.rnak: unknown key; did you mean rank\?"),
        (("expect: 2", "expct: 2"), r"s\.yaml:6:5: rules\[0\]\.expct: unknown key; did you mean expect\?"),
        (("rules:", "rule:"), r"s\.yaml:3:1: rule: unknown key; did you mean rules\?"),
        (("{op: linear}", "{op: liner}"), r"s\.yaml:5:17: rules\[0\]\.match\.op: .*did you mean linear\?"),
        (("{op: linear}", "{role: mlp.fc3}"), r"s\.yaml:5:19: rules\[0\]\.match\.role: .*did you mean mlp\.fc[12]\?"),
        (("low_rank:", "low_rnk:"), r"s\.yaml:7:15: rules\[0\]\.rewrite\.low_rnk: .*did you mean low_rank\?"),
        (("name: bad", "name: bad\nname: worse"), r"s\.yaml:3:1: name: .*(twice|duplicate).*"),
        (("expect: 2", "expect: two"), r"s\.yaml:6:13: rules\[0\]\.expect: .+"),
        (("rank: 6", "rank: six"), r"s\.yaml:7:32: rules\[0\]\.rewrite\.low_rank\.rank: .+"),
        (("rank: 6", "rank: [6]"), r"s\.yaml:7:32: rules\[0\]\.rewrite\.low_rank\.rank: .+"),
        (("rank: 6", "rank: 0"), r"s\.yaml:7:32: rules\[0\]\.rewrite\.low_rank\.rank: .+"),
        (("rank: 6", "rank: -4"), r"s\.yaml:7:32: rules\[0\]\.rewrite\.low_rank\.rank: .+"),
        (("rank: 6", "rank: {energy: 0}"), r"s\.yaml:7:41: rules\[0\]\.rewrite\.low_rank\.rank\.energy: .+"),
        (("rank: 6", "rank: {energy: 1.5}"), r"s\.yaml:7:41: rules\[0\]\.rewrite\.low_rank\.rank\.energy: .+"),
        (("rank: 6", "rank: 25"), r"s\.yaml:7:15: .*rule half: rank 25 is above min\(in, out\) of every matched site; .* is 24 \(0\)"),
        (("rank: 6", "rank: auto"), r"s\.yaml:7:32: rules\[0\]\.rewrite\.low_rank\.rank: auto needs a budget.*"),
        (("{op: linear}", "{role: mlp.gate}"), r"s\.yaml:5:12: rules\[0\]\.match: rule half matches no matmul \(expect is 2\)"),
        (("expect: 2", "expect: 3"), r"s\.yaml:[46]:\d+: rules\[0\]\.expect: rule half owns 2 sites, expect is 3"),
        (("{op: linear}", '{pattern: "a = matmul(("}'), r"s\.yaml:5:\d+: rules\[0\]\.match\.pattern: .+"),
        (("{op: linear}", '{pattern: "h = gelu(x)"}'), r"s\.yaml:5:\d+: rules\[0\]\.match\.pattern: .+"),
        (("name: bad", "name: bad\nextends: [s.yaml]"), r"s\.yaml:3:\d+: extends\S*: .*s\.yaml.*"),
        (("name: bad", "name: bad\nextends: [low-rnk-60]"), r"s\.yaml:3:11: extends\S*: .*did you mean low-rank-60\?"),
        (("name: bad", "name: bad\ntolerance: {output_error: 0.1}"), r"s\.yaml:3:12: tolerance\.output_error: .*needs calibration data.*"),
        (("rank: 6", "rank: 6, whiten: true"), r"s\.yaml:7:15: .*rule half: low_rank needs calibration data .*"),
        (("version: 1", "version: 2"), r"s\.yaml:1:10: version: .+"),
        (("name: bad", "name: bad\nbudget: {bytes: 40%}"), r"s\.yaml:3:1: budget: nothing to decide.*"),
        (("name: bad", "name: bad\ncalibration: {sensitivity: fisher}"), r"s\.yaml:3:28: calibration\.sensitivity: fisher is made of.*"),
        (("name: bad", "name: bad\nstrict: true\ntolerance: !!python/object:os.system {}"), r"s\.yaml:4:12: .+"),
    ],
)  # fmt: skip
def test_a_spec_that_is_wrong(refused: Run, place: Path, change: tuple[str, str], line: str) -> None:
    write(place, change)
    assert re.fullmatch(line, refused().first), refused().first


def test_a_budget_that_cannot_be_met(refused: Run, place: Path) -> None:
    write(place, ("name: bad", "name: bad\nbudget: {parameters: 1}"), ("rank: 6", "rank: auto"))
    done = refused()
    assert re.fullmatch(
        r"s\.yaml:3:9: budget: the budget cannot be met: the smallest that can be reached is [0-9,]+ parameters .*", done.first
    )
    assert "limit: parameters <= 1 (the model)" in done.err


def test_a_spec_that_is_not_there(refused: Run) -> None:
    assert re.fullmatch(r"nowhere/s\.yaml: .*no such file.*", refused(spec="nowhere/s.yaml").first)
    assert "did you mean low-rank-60?" in refused(spec="low-rank-6").err


def test_extends_in_a_circle(refused: Run, place: Path) -> None:
    write(place, ("name: bad", "name: bad\nextends: [b.yaml]"))
    write(place, ("name: bad", "name: bad\nextends: [s.yaml]"), name="b.yaml")
    done = refused()
    assert re.match(r"b\.yaml:3:\d+: extends", done.first)
    assert "s.yaml" in done.first


def test_a_dead_rule_says_what_there_is(refused: Run, place: Path) -> None:
    write(place, ("{op: linear}", "{role: mlp.gate, layer: 7}"))
    assert "roles here: mlp.fc1, head" in refused().err
    write(place, ("{op: linear}", "{path: 3}"))
    assert "nearest paths: " in refused().err


def test_strict_names_the_site(refused: Run, place: Path) -> None:
    write(place, ("rank: 6", "rank: 20"), ("name: bad", "name: bad\nstrict: true"))
    assert re.fullmatch(
        r"s\.yaml:5:\d+: strict: rule half cannot rewrite 0: rank 20 .*|s\.yaml:5:\d+: strict: rule half cannot rewrite \d: .+",
        refused().first,
    )


def test_a_tolerance_that_does_not_hold_is_a_failed_check(refused: Run, place: Path) -> None:
    write(place, ("name: bad", "name: bad\ntolerance: {weight_error: 0.001}"))
    done = refused(code=1)
    assert re.fullmatch(r"[02]: weight_error 0\.\d+ exceeds 0\.001", done.first)
    assert "limit at s.yaml:3:12" in done.err


# ---- models


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("nowhere/model", r"nowhere/model: no such folder .*"),
        ("nowhere.pt2", r"nowhere\.pt2: no such file"),
        ("no_module:model", r"no_module:model: no module named no_module .*"),
        ("bad_models:modle", r"bad_models:modle: bad_models has no modle; did you mean model\?"),
        ("not_a_model", r"bad_models:not_a_model: not_a_model\(\) returned a Keyed, not a matmorph\.Model"),
        ("loop", r"the model cannot be traced: .+"),
        ("wrong_example", r"the example inputs do not fit the model: .+"),
        ("too_many", r"the example inputs do not fit the model: .+"),
        ("wrong_axes", r".*dynamic_shapes.*"),
        ("no_inputs", r"example inputs given as a dict must be non-empty and keyed by argument name"),
        ("two_devices", r"the model's parameters are on 2 devices; move them to one with model\.to\(\.\.\.\)"),
        ("on_meta", r"the model is on the meta device and has no weights: it can be planned, not compiled"),
        ("nan_claimed", r"2\.weight: 1 of 768 entries are NaN or infinite"),
        ("nan_bias", r"0\.bias: 1 of 48 entries are NaN or infinite"),
        ("infinite", r"0\.weight: 1 of 1152 entries are NaN or infinite"),
    ],
)  # fmt: skip
def test_a_model_that_is_wrong(refused: Run, model: str, line: str) -> None:
    done = refused(model)
    assert re.fullmatch(line, done.first), done.err


@pytest.mark.parametrize(("model", "source"), [("loop", "while x.sum() > 0:"), ("number", "return x if x.max().item() > 0 else -x")])
def test_what_cannot_be_traced_says_where_why_and_what_to_change(refused: Run, place: Path, model: str, source: str) -> None:
    done = refused(model)
    assert (
        f"bad_models.py:{FACTORY.splitlines().index(next(line for line in FACTORY.splitlines() if source in line)) + 1}: {source}"
        in done.err
    )
    assert "what to change: " in done.err


def test_an_example_of_the_wrong_shape(refused: Run) -> None:
    done = refused("wrong_shape")
    assert done.first.startswith("the model cannot be traced: ")
    assert "return self.fc(x)" in done.err
    assert "what to change: " in done.err
    assert "example inputs" in done.err


def test_devices_are_named(refused: Run) -> None:
    err = refused("two_devices").err
    assert "0.weight is on cpu" in err
    assert "2.weight is on meta" in err


# ---- calibration


@pytest.mark.parametrize(
    ("model", "text", "line"),
    [
        ("empty", WHITE, r"the calibration data yields nothing: .+"),
        ("wrong_keys", WHITE, r"calibration batch 1: .+"),
        ("wrong_width", WHITE, r"calibration batch 1: axis 1 of input input must be 24, got 23"),
        ("no_batches", WHITE, r"calibration must be an iterable of batches, each like the example inputs; got int"),
        ("keyed_wrong_batches", KEYED, r"calibration batch 1: no input is named y; the inputs are x"),
    ],
)
def test_calibration_that_is_wrong(refused: Run, place: Path, model: str, text: str, line: str) -> None:
    (place / "s.yaml").write_text(text)
    done = refused(model)
    assert re.fullmatch(line, done.first), done.err


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"y": np.ones((3, 24), np.float32)}, r"c\.npz: keys y do not name the model's inputs x"),
        ({"x": np.ones((0, 24), np.float32)}, r"c\.npz: holds no samples"),
        ({"x": np.ones((3, 24, 1), np.float32)}, r"c\.npz: x has 3 axes, the model's input has 2 \(the first = samples\)"),
        ({"x": np.ones((3, 23), np.float32)}, r"calibration batch 1: axis 1 of input x must be 24, got 23"),
        ({"x": np.full((3, 24), np.nan, np.float32)}, r"the calibration data makes NaN or infinity at the input of fc"),
    ],
)
def test_a_calibration_file_that_is_wrong(refused: Run, place: Path, arrays: Any, line: str) -> None:
    (place / "s.yaml").write_text(KEYED)
    np.savez(place / "c.npz", **arrays)
    done = refused("keyed", "--calibration", "c.npz")
    assert re.fullmatch(line, done.first), done.err


def test_a_calibration_file_that_is_not_there(refused: Run) -> None:
    assert refused("keyed", "--calibration", "none.npz").first == "none.npz: no such calibration file"


# ---- folders


def test_a_folder_that_exists(refused: Run, place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "file").write_text("mine")
    done = refused(out="mine")
    assert done.first == "mine: the folder exists"
    assert "--force" in done.err
    assert "holds something other than an artefact" in refused("model", "--force", out="mine").first


def test_a_place_below_a_file(refused: Run, place: Path) -> None:
    (place / "file").write_text("mine")
    assert refused(out="file/out").first.startswith("file/out cannot be written")
    assert refused(out="file").first == "file exists and is not a folder"


@pytest.mark.parametrize("name", ["model.onnx", "check.npz", "report.json"])
def test_a_full_disk(refused: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(path: Path, data: Any) -> int:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return right(path, data)

    right = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    assert refused().first == "deep/out cannot be written: the disk is full (No space left on device); nothing was left behind"


def test_a_disk_that_fills_up_under_the_weights(refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matmorph.exporters.data_file.DataFile._write", full)
    assert refused().first.startswith("deep/out cannot be written: the disk is full")


def test_an_older_artefact_survives(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("compile", "bad_models:model", "--spec", "s.yaml", "--out", "out").code == 0
    before = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    write(place, ("name: bad", "name: bad\ntolerance: {weight_error: 0.001}"))
    assert run("compile", "bad_models:model", "--spec", "s.yaml", "--out", "out", "--force").code == 1
    assert {path.name: path.read_bytes() for path in (place / "out").iterdir()} == before


# ---- the other commands say the same


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (("plan", "bad_models:model", "--spec", "low-rnk"), r"no library spec is called 'low-rnk'; did you mean low-rank-\d\d\?"),
        (("inspect", "bad_models:loop"), r"the model cannot be traced: .+"),
        (("explain", "bad_models:model", "--spec", "s.yaml", "--node", "1"), r"the model has no matmul '1'.*"),
        (("specs", "check", "nowhere.yaml"), r"nowhere\.yaml: .*no such file.*"),
        (("verify", "nowhere"), r"nowhere: no such folder"),
    ],
)  # fmt: skip
def test_other_commands(run: Run, place: Path, command: tuple[str, ...], line: str) -> None:
    before = contents(place)
    done = run(*command)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(line, done.first), done.err
    assert contents(place) == before
