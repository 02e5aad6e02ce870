"""Calibration from a text: samples cut from the row of its tokens. Oracle: the package tokenizers on the whole file, cut by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_speaker import LETTERS, tokenizer_text

import matmorph as mm
from matmorph.cli.main import main
from matmorph.errors import InputError
from matmorph.models.resolve import Model
from matmorph.models.text_batches import text_calibration

tokenizers = pytest.importorskip("tokenizers", reason="text needs the package tokenizers")


class Table(torch.nn.Module):
    """A table of words and a product, called as a language model is."""

    def __init__(self, words: int = len(LETTERS), mask: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.nn.Embedding(words, 8), torch.nn.Linear(8, words)
        self.config = type("Config", (), {"max_position_embeddings": 20})()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.table(input_ids) * attention_mask[..., None])
        return logits


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(tokenizer_text())
    (tmp_path / "t.txt").write_text("abc defg hijk lm " * 7)
    return tmp_path


def model(home: Path, **more: Any) -> Model:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return Model(Table(**more), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, hf_folder=home)


def row(home: Path) -> list[int]:
    whole = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json"))
    whole.no_truncation()
    whole.no_padding()
    found: list[int] = whole.encode((home / "t.txt").read_text(), add_special_tokens=False).ids
    return found


def test_samples_are_the_text_cut(home: Path) -> None:
    whole = row(home)
    batches = mm.text_batches(home, home / "t.txt", length=9, samples=7, batch=3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == [whole[9 * k : 9 * k + 9] for k in range(7)]
    assert all((batch["attention_mask"] == 1).all() for batch in batches)
    everything = mm.text_batches(home, home / "t.txt", length=9)
    assert torch.cat([batch["input_ids"] for batch in everything]).flatten().tolist() == whole[: len(whole) // 9 * 9]


def test_what_the_tokenizer_puts_first_stands_before_each_sample(home: Path) -> None:
    spec = json.loads(tokenizer_text())
    whole = row(home)
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (home / "tokenizer.json").write_text(json.dumps(spec))
    found = mm.text_batches(home, home / "t.txt", length=9, samples=2)[0]["input_ids"].tolist()
    assert found == [[1, *whole[:8]], [1, *whole[8:16]]]


def test_a_model_gets_them_as_it_is_called(home: Path) -> None:
    named = text_calibration(model(home), home / "t.txt", 8, 4)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    placed = text_calibration(Model(Table(), (ids, torch.ones_like(ids)), hf_folder=home), home / "t.txt", 8, 4)
    assert isinstance(named[0], dict)
    assert isinstance(placed[0], tuple)
    assert torch.equal(named[0]["input_ids"], placed[0][0])
    spec = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": {"low_rank": {"rank": 4, "whiten": True}}}]}
    found = model(home)
    axes = {0: "b", 1: "s"}
    compiled = mm.compile(found.module, spec, found.example_inputs, {"input_ids": axes, "attention_mask": axes}, named)
    (site,) = [one for one in compiled.report.sites if one.status == "rewritten"]
    assert site.sample is not None
    assert site.sample.fitted + site.sample.judged == 4 * 8  # no token is padding


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"length": 1}, "length is 1: it must be 2 or more"),
        ({"length": 9, "samples": 0}, "samples is 0: it must be 1 or more"),
        ({"length": 9, "samples": 99}, "13 samples of 9; 99 samples were asked for"),
        ({"length": 500}, "0 samples of 500; that is less than one sample"),
    ],
)
def test_sizes_that_do_not_work(home: Path, how: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        mm.text_batches(home, home / "t.txt", **how)


def test_models_and_files_that_do_not_fit(home: Path, tmp_path: Path) -> None:
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    (tmp_path / "none.txt").write_bytes(b"")
    for name, said in (("zero.txt", "is binary"), ("none.txt", "is empty"), ("absent.txt", "no such text file")):
        with pytest.raises(InputError, match=said):
            mm.text_batches(home, tmp_path / name)
    with pytest.raises(InputError, match=r"samples of 512 tokens, and the model has positions for 20"):
        text_calibration(model(home), home / "t.txt")
    with pytest.raises(InputError, match=r"has the token 18, and the model has 10 words: the tokenizer is not this model's"):
        text_calibration(model(home, words=10), home / "t.txt", 8)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(InputError, match="came without a tokenizer"):
        text_calibration(Model(Table(), {"input_ids": ids}), home / "t.txt", 8)
    with pytest.raises(InputError, match="takes pixels too, which a text has no value for"):
        text_calibration(Model(Table(), {"input_ids": ids, "pixels": ids}, hf_folder=home), home / "t.txt", 8)
    (home / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        mm.text_batches(home, home / "t.txt")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--calibration", "a.npz", "--calibration-text", "t.txt"), "give one of them"),
        (("--length", "8"), "--length belongs to --calibration-text, which is not given"),
        (("--calibration-text", "t.txt"), "t.txt: no such text file"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: Any, more: tuple[str, ...], said: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_text())
    (tmp_path / "made.py").write_text(
        "import torch, matmorph as mm\n\n\ndef make():\n    ids = torch.zeros(2, 8, dtype=torch.int64)\n"
        "    return mm.Model(torch.nn.Embedding(9, 4), {'input_ids': ids}, hf_folder='.')\n"
    )
    (tmp_path / "s.yaml").write_text("version: 1\nrules:\n  - match: {op: embedding}\n    rewrite: keep\n")
    with pytest.raises(SystemExit) as ended:
        main(["compile", "made:make", "--spec", "s.yaml", "--out", "out", *more])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
