"""`matmorph heal`: what it learns, what it leaves alone, what it refuses. Oracles: torch's AdamW on the loss by its definition, bytes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from healing import TRAIN, WINDOW, artefact, source, text_of

from matmorph.errors import CheckError
from matmorph.folders.open import initializers, reopen
from matmorph.ir.to_torch import to_torch
from matmorph.runtime.format.distillation import Distill
from matmorph.runtime.healing import Course, _Lessons, heal
from matmorph.runtime.teacher import Taught, TextRows, teach
from matmorph.runtime.text_model import TextModel
from matmorph.runtime.trainer import Trainer

CPU = ("--provider", "cpu", "--threads", "1")
SETTINGS = Distill(top=5)
CUT = {"low_rank": {"rank": 4}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("heal") / "model")


@pytest.fixture(scope="module")
def dense(model: Path) -> Path:
    return artefact(model, model.parent / "dense", "keep")


@pytest.fixture(scope="module")
def cut(model: Path) -> Path:
    return artefact(model, model.parent / "cut", CUT, TRAIN)


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    file = model.parent / "text.txt"
    file.write_text(text_of(1600, 7))
    return file


@pytest.fixture(scope="module")
def lessons(dense: Path) -> tuple[TextRows, Taught]:
    ids = np.array(["abcdefghijklmnop".index(letter) for letter in text_of(1200, 5)])
    rows = TextRows.of(ids[:800], ids[800:], (), WINDOW, (20, 8))
    return rows, teach(TextModel(dense, ["cpu"], threads=1, verify=False), "", rows, SETTINGS)


def trainer(folder: Path, **how: Any) -> Trainer:
    return Trainer(folder, ["cpu"], threads=1, verify=False, log=lambda _: None, **how)


@pytest.mark.full
def test_healing_brings_a_cut_model_nearer_to_its_teacher(run: Any, cut: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in cut.iterdir()}
    words = ("--text", text, "--tokens", 1200, "--window", WINDOW, "--eval-tokens", 240, *CPU)
    code, out, err = run("heal", cut, *words, "--teacher", dense, "--out", tmp_path / "out")
    assert code == 0, err
    assert "50 windows of 24 tokens, 33 different ones: the text has no more; 25 updates of 2" in out
    told = json.loads((tmp_path / "out" / "healing.json").read_text())
    assert 0 < told["after"] < 0.6 * told["before"]
    assert told["after"] < 1.8 * told["teacher"]["perplexity"]
    notes = json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"]
    assert any(line.startswith("healed on 1,200 tokens") for line in notes)
    assert {file.name: file.read_bytes() for file in cut.iterdir()} == before
    code, out, err = run("verify", tmp_path / "out")
    assert code == 0, out + err
    # what model.onnx of the new folder says by itself, on the same windows
    judged = text_of(1600, 7)[800:]
    windows = [judged[start : start + WINDOW] for start in range(0, 33 * WINDOW, WINDOW)]
    spread = np.unique(np.linspace(0, 32, 10).round().astype(int))
    (tmp_path / "judged.txt").write_text("".join(windows[k] for k in spread))
    code, out, err = run("evaluate", tmp_path / "out", "--text", tmp_path / "judged.txt", "--window", WINDOW, *CPU, "--json")
    assert abs(json.loads(out)["perplexity"] / told["after"] - 1) < 1e-4  # two float32 graphs of one model


def test_updates_are_those_of_torch(cut: Path, lessons: tuple[TextRows, Taught]) -> None:
    """20 of AdamW, in float64, on the loss word by word."""
    rows, taught = lessons
    learner = trainer(cut, lr=1e-3, weight_decay=0.01)
    batches = list(_Lessons(learner.manifest, rows.learnt, taught.learnt, range(20), rows.first))
    graph = reopen(cut)[0].graph
    module = to_torch(replace(graph, state=graph.used_state())).double()
    named = {name: value for name, value in module.named_parameters() if name in learner.parameters()}
    assert named.keys() == learner.parameters().keys()
    optimizer = torch.optim.AdamW([value.requires_grad_() for value in named.values()], lr=1e-3, weight_decay=0.01)
    for batch in batches:
        found = learner.step(batch)
        given = {name: torch.from_numpy(array) for name, array in batch.items()}
        output = module(**{info.name: given[info.name] for info in learner.manifest.features})
        q = torch.softmax((output if isinstance(output, torch.Tensor) else output["logits"])[0, :-1], -1)
        p, ids = given["teacher_logs"][0, :-1].double().exp(), given["teacher_ids"][0, :-1]
        mine = torch.cat([q.gather(-1, ids), 1 - q.gather(-1, ids).sum(-1, keepdim=True)], -1)
        loss = (p * (p / mine).log()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert abs(found - float(loss.detach())) < 1e-5  # float32 against float64, of a loss of about 1
    for name, array in learner.parameters().items():
        assert np.abs(array - named[name].detach().numpy()).max() < 2e-4  # 1 % of the way that 20 steps of 1e-3 can go


def test_what_worsens_is_not_kept(cut: Path, lessons: tuple[TextRows, Taught]) -> None:
    learner = trainer(cut, lr=3.0)
    start = learner.parameters()
    healing = heal(learner, *lessons, Course(8, warmup=0.0, looks=4))
    assert healing.worsened
    assert len(healing.looks) == 5
    assert all(look.prediction.nll > healing.before.prediction.nll for look in healing.looks[1:])
    for name, array in start.items():
        assert (healing.parameters[name] == array).all()
        assert (learner.parameters()[name] == array).all()


def test_the_best_state_on_the_way_is_kept(cut: Path, lessons: tuple[TextRows, Taught]) -> None:
    learner = trainer(cut)
    healing = heal(learner, *lessons, Course(24, looks=6))
    assert [look.updates for look in healing.looks] == [0, 2, 4, 6, 8, 10, 12]
    assert healing.best.prediction.nll == min(look.prediction.nll for look in healing.looks) < healing.before.prediction.nll
    assert (healing.rows, healing.distinct, healing.tokens) == (24, 20, 24 * WINDOW)
    again = heal(trainer(cut), *lessons, Course(24, looks=6))
    assert [look.prediction for look in again.looks] == [look.prediction for look in healing.looks]


@pytest.mark.full
def test_codes_stay_to_the_byte(run: Any, model: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    train = {"loss": "causal_lm", "trainable": ["adapters"]}  # graphs of the loss are derived
    rewrite = {"loftq": {"quantizer": "uniform", "bits": 2, "block_size": 16, "rank": 2, "zero_point": True}}
    folder = artefact(model, tmp_path / "codes", rewrite, train, {"role": "mlp.*"})
    words = ("--text", text, "--tokens", 960, "--window", WINDOW, "--eval-tokens", 240, "--top", 5, "--lr", 0.01, *CPU)
    code, _, err = run("heal", folder, *words, "--teacher", dense, "--out", tmp_path / "out")
    assert code == 0, err
    before, after = initializers(folder), initializers(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    codes = [name for name in before if before[name].dtype == torch.uint8]
    assert codes
    assert changed
    assert all(before[name].dtype == torch.float32 and ".mlp." in name for name in changed), changed
    code, out, err = run("verify", tmp_path / "out")
    assert code == 0, out + err


@pytest.mark.full
def test_a_pruned_model_and_a_model_by_name(run: Any, model: Path, text: Path, tmp_path: Path) -> None:
    """The weights of a narrower MLP; the teacher is the Hugging Face folder, then the file of its answers."""
    train = {**TRAIN, "trainable": ["**.mlp.**"]}
    folder = artefact(
        model, tmp_path / "narrow", {"transact": {"width": "50%", "score": "weight", "compensate": "none"}}, train, {"block": "mlp"}
    )
    words = ("heal", folder, "--text", text, "--tokens", 960, "--window", WINDOW, "--eval-tokens", 240, *CPU)
    answers = ("--teacher-cache", tmp_path / "answers.safetensors")
    code, out, err = run(*words, "--teacher", model, *answers, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    code, again, err = run(*words, *answers, "--out", tmp_path / "other", "--json")
    assert code == 0, err
    first, second = json.loads(out), json.loads(again)
    assert first["after"] < first["before"]
    assert first["looks"] == second["looks"]


def test_refusals(run: Any, cut: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"ab\0cd")
    (tmp_path / "short.txt").write_text("abcdefghij")
    bare = shutil.copytree(cut, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    out, teacher, size = ("--out", tmp_path / "out"), ("--teacher", dense), ("--window", WINDOW, *CPU)
    for words, message in (
        ((cut, "--text", tmp_path / "empty.txt", *teacher), "is empty: there is no text in it"),
        ((cut, "--text", tmp_path / "binary.txt", *teacher), "is binary, not text"),
        ((cut, "--text", tmp_path / "short.txt", *teacher), "5 tokens to learn from are fewer than one window (24)"),
        ((cut, "--text", text, "--eval-text", tmp_path / "short.txt", *teacher), "10 tokens to judge by are fewer than one window"),
        ((bare, "--text", text, *teacher), "has no tokenizer.json"),
        ((dense, "--text", text, *teacher), "train: {loss: distill, trainable: [factors]}"),
        ((cut, "--text", text), "there is nobody to learn from"),
        ((cut, "--text", text, *teacher, "--tokens", 0), "--tokens is 0"),
        ((cut, "--text", text, *teacher, "--top", 0), "--top must be 1 or more"),
        ((cut, "--text", text, *teacher, "--window", 65), "the model has positions for 64"),
        ((cut, "--text", text, "--teacher-cache", text, *teacher), "cannot be read"),
    ):
        code, _, err = run("heal", *(size if "--window" not in words else CPU), *words, *out)
        assert code == 2, (message, err)
        assert message in err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert "the folder exists" in run("heal", cut, "--text", text, *teacher, *out)[2]


def test_a_teacher_of_other_words_is_refused(run: Any, cut: Path, text: Path, tmp_path: Path) -> None:
    from tiny_decoder import write_decoder

    words = ("--text", text, "--teacher", write_decoder(tmp_path / "other"), "--window", WINDOW, "--tokens", 48, "--eval-tokens", 48, *CPU)
    code, _, err = run("heal", cut, *words, "--out", tmp_path / "out")
    assert code == 2
    assert "the teacher has 23 words" in err
    assert "has 18" in err


def test_an_interruption_leaves_everything_as_it_was(
    run: Any, cut: Path, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("matmorph.runtime.trainer.Trainer.fit", interrupted)
    before = sorted(tmp_path.iterdir())
    words = ("--text", text, "--teacher", dense, "--window", WINDOW, "--tokens", 48, "--eval-tokens", 48, *CPU)
    code, _, err = run("heal", cut, *words, "--out", tmp_path / "out")
    assert code == 130, err
    assert sorted(tmp_path.iterdir()) == before


def test_what_was_learnt_outlives_a_folder_that_is_refused(
    run: Any, cut: Path, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise CheckError("ONNX Runtime does not answer as torch does, so nothing was written")

    monkeypatch.setattr("matmorph.folders.healing.save", refused)
    words = ("--text", text, "--teacher", dense, "--window", WINDOW, "--tokens", 480, "--eval-tokens", 48, *CPU)
    code, _, err = run("heal", cut, *words, "--out", tmp_path / "out")
    kept = tmp_path / "out.learnt.safetensors"
    assert code == 1
    assert f"what was learnt lies in {kept}" in err
    assert not (tmp_path / "out").exists()
    after = trainer(cut)
    before = after.parameters()
    after.load_parameters(kept)
    assert any((array != before[name]).any() for name, array in after.parameters().items())
