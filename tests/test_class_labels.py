"""Class labels that the model does not have: refused where they enter, with the sample and the label. Oracle: torch, which raises too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import matmorph as mm
from matmorph.cli.main import main
from matmorph.runtime.errors import InputMismatch
from matmorph.runtime.labels import check_labels
from matmorph.runtime.train_manifest import read_train_manifest
from matmorph.runtime.trainer import Trainer

SPEC = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": {"lora": {"rank": 2}}}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of five classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classes") / "out"
    compiled = mm.compile(nn.Sequential(nn.Linear(6, 5)), SPEC, (torch.randn(4, 6),), ({0: "batch"},))
    compiled.export_training(path, loss="cross_entropy")
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of seven tokens, whose first label counts nothing."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokens") / "out"
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7))
    compiled = mm.compile(model, SPEC, (torch.randint(0, 7, (2, 4)),), ({0: "batch", 1: "seq"},))
    compiled.export_training(path, loss="causal_lm")
    return path


def batch(labels: list[int]) -> dict[str, np.ndarray]:
    return {"input": np.ones((len(labels), 6), np.float32), "labels": np.array(labels)}


@pytest.mark.parametrize(("labels", "sample", "label"), [([0, 4, -1, 2], 2, -1), ([5, 0], 0, 5), ([-100, 1, 2**40], 2, 2**40)])
def test_a_class_that_is_none_is_refused(folder: Path, labels: list[int], sample: int, label: int) -> None:
    """It trained class C - 1 for -1 and the state moved; torch raises."""
    with pytest.raises((IndexError, RuntimeError)):
        nn.functional.cross_entropy(torch.zeros(len(labels), 5), torch.tensor(labels))
    trainer = Trainer(folder, "cpu", log=lambda line: None)
    before = trainer.parameters()
    wanted = rf"sample {sample} of the batch has the label {label} \(labels\[{sample}\]\); the model has the classes 0 to 4, and -100 is"
    for call in (lambda: trainer.step(batch(labels)), lambda: trainer.evaluate([batch(labels)]), lambda: trainer.fit([batch(labels)])):
        with pytest.raises(InputMismatch, match=wanted):
            call()
    assert trainer.updates == 0
    assert all(np.array_equal(value, before[name]) for name, value in trainer.parameters().items())


def test_classes_and_the_ignored_label_are_taken(folder: Path) -> None:
    trainer = Trainer(folder, "cpu", log=lambda line: None)
    labels = [0, 4, -100, 2]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))  # the same draw as the fixture's
    logits = model(torch.ones(4, 6)).double().detach()
    # float32 logits of size 1
    assert trainer.step(batch(labels)) == pytest.approx(float(nn.functional.cross_entropy(logits, torch.tensor(labels))), abs=1e-5)
    assert trainer.updates == 1


def test_a_label_that_nothing_predicts_is_not_judged(tokens: Path) -> None:
    trainer = Trainer(tokens, "cpu", log=lambda line: None)
    ids = np.array([[1, 2, 3, 4], [0, 6, 5, 1]])
    first = ids.copy()
    first[:, 0] = 999
    assert np.isfinite(trainer.step({"input": ids, "labels": first}))
    last = ids.copy()
    last[1, 2] = 7
    with pytest.raises(InputMismatch, match=r"sample 1 of the batch has the label 7 \(labels\[1, 2\]\); the model has the classes 0 to 6"):
        trainer.step({"input": ids, "labels": last})


@pytest.mark.parametrize("option", ["--data", "--validation"])
def test_a_file_is_checked_before_the_first_step(folder: Path, tmp_path: Path, option: str, capfd: pytest.CaptureFixture[str]) -> None:
    wrong, right = tmp_path / "wrong.npz", tmp_path / "right.npz"
    np.savez(wrong, **batch([0] * 40 + [5]))
    np.savez(right, **batch([0, 1, 2, 3]))
    given = {"--data": wrong, "--validation": right} if option == "--data" else {"--data": right, "--validation": wrong}
    arguments = [str(item) for pair in given.items() for item in pair]
    out = tmp_path / "trained.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["train", str(folder), *arguments, "--out", str(out), "--provider", "cpu"])
    assert ended.value.code == 2
    assert capfd.readouterr().err.startswith(f"sample 40 of {wrong} has the label 5 (labels[40]); the model has the classes 0 to 4")
    assert not out.exists()


def test_what_is_no_class_is_left_to_other_checks(folder: Path) -> None:
    manifest: Any = read_train_manifest(folder)
    for labels in (np.zeros(0, np.int64), np.array([0.5]), np.array([4], np.uint8)):
        check_labels(manifest, {"labels": labels}, "x")
    with pytest.raises(InputMismatch, match="sample 0 of x has the label 200"):
        check_labels(manifest, {"labels": np.array([200], np.uint8)}, "x")
