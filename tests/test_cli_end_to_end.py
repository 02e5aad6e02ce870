"""Real command lines on a toy model: every command, the artefact they leave, and that failures leave nothing."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from matmorph.cli.main import main
from matmorph.runtime import Session

Run = Callable[..., tuple[int, str, str]]

FACTORY = """
import torch, matmorph

def mlp():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 24))
    batches = [(torch.randn(16, 24),) for _ in range(4)]
    return matmorph.Model(layers, (torch.randn(4, 24),), ({0: "batch"},), calibration=batches)

def with_nan():
    model = mlp()
    with torch.no_grad():
        model.module[2].weight[0, 0] = float("nan")
    return model

class Loop(torch.nn.Module):
    def forward(self, x):
        while x.sum() > 0:
            x = x - 1
        return x

def untraceable():
    return matmorph.Model(Loop(), (torch.randn(4, 24),))
"""

SPEC = """version: 1
name: toy
rules:
  - name: half
    match: {op: linear}
    expect: 2
    rewrite: {low_rank: {rank: 6, whiten: true}}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a factory module and a spec."""
    (tmp_path / "toy_models.py").write_text(FACTORY)
    (tmp_path / "toy.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("toy_models", None)


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return call


def left(place: Path) -> set[str]:
    """What lies in the folder besides what the tests put there."""
    return {path.name for path in place.iterdir()} - {"toy_models.py", "toy.yaml", "__pycache__"}


def test_inspect_plan_and_explain(run: Run, place: Path) -> None:
    code, out, err = run("inspect", "toy_models:mlp")
    assert (code, err) == (0, "")
    assert "48x24" in out
    code, out, err = run("plan", "toy_models:mlp", "--spec", "toy.yaml", "--json")
    assert code == 0
    assert all("phase" in json.loads(line) for line in err.splitlines()), "lines of progress at most"
    plan = json.loads(out)
    assert [(row["path"], row["status"], row["rank"], row["parameters"]) for row in plan["sites"]] == [
        ("0", "rewritten", 6, [1152, 432]),
        ("2", "rewritten", 6, [1152, 432]),
    ]
    code, out, err = run("explain", "toy_models:mlp", "--spec", "toy.yaml", "--node", "2")
    assert (code, err) == (0, "")
    assert "owned by rule half" in out
    code, out, err = run("explain", "toy_models:mlp", "--spec", "toy.yaml", "--node", "3")
    assert (code, out) == (2, "")
    assert err.startswith("the model has no matmul '3'")
    assert left(place) == set()


def test_compile_verify_and_change(run: Run, place: Path) -> None:
    code, out, err = run("compile", "toy_models:mlp", "--spec", "toy.yaml", "--out", "out")
    assert (code, err) == (0, "")
    assert "rewrote 2 of 2 sites" in out
    assert "ONNX Runtime agrees with torch to " in out
    assert left(place) == {"out"}
    assert "toy" in (place / "out" / "report.html").read_text()

    x = np.ones((3, 24), dtype=np.float32)
    assert Session("out", "cpu").run({"input": x})["output"].shape == (3, 24)

    code, out, err = run("verify", "out")
    assert code == 0
    assert out.splitlines()[-1] == "ok"
    assert json.loads(run("verify", "out", "--json")[1])["ok"] is True

    assert run("compile", "toy_models:mlp", "--spec", "toy.yaml", "--out", "out")[0] == 2, "the folder exists"
    assert run("compile", "toy_models:mlp", "--spec", "toy.yaml", "--out", "out", "--force")[0] == 0

    shutil.copy(place / "toy.yaml", place / "out" / "more.yaml")
    code, out, err = run("verify", "out")
    assert code == 1
    assert "more.yaml" in err
    result = json.loads(run("verify", "out", "--json")[1])
    assert result["ok"] is False
    assert "more.yaml" in result["problems"][0]


def test_compile_json_is_report_json(run: Run, place: Path) -> None:
    code, out, err = run("compile", "toy_models:mlp", "--spec", "toy.yaml", "--out", "out", "--json")
    assert code == 0
    assert all("phase" in json.loads(line) for line in err.splitlines()), "lines of progress at most"
    assert json.loads(out)["sites"] == json.loads((place / "out" / "report.json").read_text())["sites"]


def test_verify_without_an_artefact(run: Run, place: Path) -> None:
    assert run("verify", "nowhere") == (2, "", "nowhere: no such folder\n")
    assert run("verify", "nowhere", "--json") == (2, "", "nowhere: no such folder\n")


@pytest.mark.parametrize(
    ("model", "change", "code", "expected"),
    [
        ("mlp", ("rank: 6", "rnak: 6"), 2, "toy.yaml:7:26: rules[0].rewrite.low_rank.rnak: unknown key; did you mean rank?"),
        ("mlp", ("rank: 6", "rank: 0"), 2, "toy.yaml:7:32: rules[0].rewrite.low_rank.rank: "),
        ("mlp", ("expect: 2", "expect: 3"), 2, "toy.yaml:4:5: rules[0].expect: rule half owns 2 sites, expect is 3"),
        ("mlp", ("op: linear", "role: mlp.gate"), 2, "toy.yaml:5:12: rules[0].match: "),
        ("mlp", ("name: toy", "name: toy\nname: toy"), 2, "toy.yaml:3:1: "),
        ("mlp", ("rewrite: {", "rewrite: {{"), 2, "toy.yaml:7:"),
        ("mlp", ("expect: 2", "expect: 2}"), 2, "toy.yaml:"),
        ("mlp", ("name: toy", "name: toy\ntolerance: {weight_error: 0.0001}"), 1, ""),
        ("with_nan", ("", ""), 2, ""),
        ("untraceable", ("", ""), 2, ""),
    ],
)
def test_failures_name_the_place_and_leave_nothing(
    run: Run, place: Path, model: str, change: tuple[str, str], code: int, expected: str
) -> None:
    (place / "toy.yaml").write_text(SPEC.replace(*change, 1))
    done, out, err = run("compile", f"toy_models:{model}", "--spec", "toy.yaml", "--out", "deep/out")
    assert (done, out) == (code, ""), err
    first = err.splitlines()[0]
    assert first.startswith(expected), err
    assert "Traceback" not in err
    assert "internal error" not in err
    assert left(place) == set()


def test_nan_and_untraceable_say_where(run: Run, place: Path) -> None:
    err = run("compile", "toy_models:with_nan", "--spec", "toy.yaml", "--out", "out")[2]
    assert "2.weight" in err
    assert "NaN" in err
    err = run("inspect", "toy_models:untraceable")[2]
    assert "toy_models.py:" in err
    assert "while x.sum() > 0" in err


def test_an_unwritable_place(run: Run, place: Path) -> None:
    (place / "file").write_text("mine")
    code, _, err = run("compile", "toy_models:mlp", "--spec", "toy.yaml", "--out", "file/out")
    assert code == 2
    assert err.startswith("file/out cannot be written")
    assert left(place) == {"file"}


def test_the_example_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (Path(__file__).parent.parent / "examples" / "low_rank_mlp.py").read_text()
    exec(compile(source, "low_rank_mlp.py", "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["0", "2", "under torch", "under ONNX Runtime"]
    assert lines[-1].endswith("(8, 256)")


def test_the_training_example_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (Path(__file__).parent.parent / "examples" / "lora_mlp.py").read_text()
    exec(compile(source, "lora_mlp.py", "exec"), {"__name__": "__main__"})
    first, last = capsys.readouterr().out.splitlines()
    before, after = (float(number) for number in first.removeprefix("loss ").split(" -> "))
    assert after < before / 2  # 20 steps on one batch of 32 noise samples: it is learnt by heart
    assert last == "torch.Size([32, 4])"


LABELLED = """version: 1
name: sparse
rules:
  - name: all
    match: {op: linear}
    rewrite: {sparse_grad: {keep: 10%, steps: 2}}
train: {loss: mse}
"""


def test_labels_in_a_calibration_file(run: Run, place: Path) -> None:
    """A method that reads gradients of a loss takes them; one that reads inputs alone leaves them."""
    (place / "sparse.yaml").write_text(LABELLED)
    rng = np.random.default_rng(0)
    x, labels = (rng.standard_normal((32, 24), dtype=np.float32) for _ in range(2))
    np.savez(place / "labelled.npz", input=x, labels=labels)
    np.savez(place / "plain.npz", input=x)
    np.savez(place / "narrow.npz", input=x, labels=labels[:, :5])
    for spec in ("sparse.yaml", "toy.yaml"):
        code, _, err = run("compile", "toy_models:mlp", "--spec", spec, "--out", spec.split(".")[0], "--calibration", "labelled.npz")
        assert (code, err) == (0, "")
    assert (place / "sparse" / "grad.onnx").is_file()
    for data, said in (
        ("plain.npz", "sparse.yaml:6:15: rule all: sparse_grad takes gradients of a loss, and calibration batch 1 has no labels"),
        ("narrow.npz", "calibration batch 1: axis 1 of input labels must be 24, got 5"),
    ):
        code, out, err = run("compile", "toy_models:mlp", "--spec", "sparse.yaml", "--out", "none", "--calibration", data)
        assert (code, out) == (2, "")
        assert err.splitlines()[0] == said
    assert not (place / "none").exists()
