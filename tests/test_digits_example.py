"""examples/digits.py: its data, its model, what it says without scikit-learn, and a small run of all of it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "digits.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_example"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_says_what_is_missing(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert script.main(["--small"]) == 2
    assert capsys.readouterr().err == "scikit-learn, which brings the digits, is not installed: pip install scikit-learn\n"


def test_the_classes_are_divided(script: ModuleType) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, which brings the digits, is not installed")
    known, new = script.digits(0)
    assert len(known["labels"]) + len(new["labels"]) == 1797
    for half in (known, new):
        assert set(half["labels"]) == set(range(5))
        assert half["pixels"].shape == (len(half["labels"]), 64)
        assert half["pixels"].dtype == np.float32
        assert half["pixels"].min() == 0
        assert half["pixels"].max() == 1
    assert len(new["labels"]) > script.TRAIN + script.VALIDATION + 400  # enough to test on


def test_patches_are_squares(script: ModuleType) -> None:
    """A pixel moves the token of its own 2 x 2 square alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = script.ViT(16, 1).eval()
    seen: list[torch.Tensor] = []
    model.patches.register_forward_hook(lambda module, inputs, output: seen.append(output))
    image = torch.zeros(1, 8, 8)
    model(image.reshape(1, 64))
    image[0, 3, 6] = 1  # row 3 and column 6: patch (1, 3)
    model(image.reshape(1, 64))
    moved = (seen[1] - seen[0]).abs().sum(-1)[0]
    assert torch.nonzero(moved).flatten().tolist() == [1 * 4 + 3]


def test_one_row_of_a_small_run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, which brings the digits, is not installed")
    monkeypatch.setattr(script, "METHODS", script.METHODS[:1])
    assert script.main(["--small", "--threads", "1", "--runs", "1"]) == 0
    *_, header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["method", "accuracy", "range", "trainable", "ms", "a", "step", "state", "KiB", "updates", "rates"]
    assert re.fullmatch(r"head alone +[\d.]+% +[\d.]+-[\d.]+% +85 +[\d.]+ +1 +21  0.003", row)  # 16 x 5 + 5 numbers


def test_the_table_is_of_all_runs(script: ModuleType) -> None:
    rows = [script.Row("GLoRA", accuracy, size, 0.002, 2048, 5e-3, 7, merged=accuracy) for accuracy, size in ((90.0, 100), (93.0, 200))]
    _, line = script.table([[row] for row in rows]).splitlines()
    assert line.split("  ")[0] == "GLoRA"
    assert re.fullmatch(r"GLoRA +91.5% +90.0-93.0% +150 +2.0 +2 +7  0.005, 0.005  merged and exported: 91.5 %", line)


@pytest.mark.parametrize("runs", ["0", "-1", "two"])
def test_a_number_of_runs_is_positive(script: ModuleType, runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--runs", runs])
    assert "argument --runs: invalid positive value" in capsys.readouterr().err


@pytest.mark.full
def test_a_small_run(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, which brings the digits, is not installed")
    assert script.main(["--small", "--threads", "1", "--limit", "700", "--runs", "1"]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if re.search(r"\d%\s+[\d,]+", line)]
    assert [line[:17].strip() for line in rows] == [method.name for method in script.METHODS]
    (searched,) = (line for line in rows if line.startswith("GLoRA"))
    accuracy, trainable = re.findall(r"([\d.]+)% +[\d.]+-[\d.]+% +([\d,]+)", searched)[0]
    assert int(trainable.replace(",", "")) <= 700 + 85  # with the head
    assert searched.endswith(f"merged and exported: {accuracy} %")
