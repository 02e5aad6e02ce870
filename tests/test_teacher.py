"""A teacher's answers: the likeliest words by the definition, text cut into rows, and the file that keeps them. And mutants of all that."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from mutating import Mutant, killer, mutated, unmutated
from tiny_decoder import VOCAB, logits_of, write_decoder

from matmorph.runtime.errors import CheckpointError, InputMismatch
from matmorph.runtime.format.distillation import Distill
from matmorph.runtime.teacher import TextRows, model_sha256, read_taught, teach, write_taught
from matmorph.runtime.text_model import TextModel

SETTINGS = Distill(top=4, temperature=2.0)
SINGLE = 1e-4
"""Of logarithms from float32 logits up to 62, which are off by up to 6e-5 beside float64."""
ROW = np.random.default_rng(2).integers(3, 20, 60)


def rows(prefix: tuple[int, ...] = (1,)) -> TextRows:
    return TextRows.of(ROW[:40], ROW[40:], prefix, 9, (3, 2))


def by_definition(row: Any) -> tuple[np.ndarray, np.ndarray]:
    logits = logits_of(list(row)) / SETTINGS.temperature
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids = np.argsort(-shares, -1)[:, : SETTINGS.top]
    rest = [sum(share for word, share in enumerate(line) if word not in chosen) for line, chosen in zip(shares, ids, strict=True)]
    return ids, np.log(np.concatenate([np.take_along_axis(shares, ids, -1), np.array(rest)[:, None]], -1))


def check_answers(m: Any) -> None:
    with TemporaryDirectory() as place:
        model = TextModel(write_decoder(Path(place) / "d"), ["cpu"], threads=1, verify=False)
        cut = m.TextRows.of(ROW[:40], ROW[40:], (1,), 9, (3, 2))
        found = m.teach(model, "t", cut, SETTINGS)
    total = hits = 0
    for part, answers in ((cut.learnt, found.learnt), (cut.judged, found.judged)):
        for row, ids, logs in zip(part, answers.ids, answers.logs, strict=True):
            expected = by_definition(row)
            assert (ids == expected[0]).all()
            assert np.abs(logs - expected[1]).max() < SINGLE
    for row in cut.judged:
        logits = logits_of(list(row))
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= sum(logs[place - 1, row[place]] for place in range(1, 9))
        hits += sum(logs[place - 1].argmax() == row[place] for place in range(1, 9))
    assert (found.about.counted, found.about.hits, found.about.vocabulary) == (16, hits, VOCAB)
    assert abs(found.about.nll - total) < SINGLE * 16


def check_rows(m: Any) -> None:
    plain = m.TextRows.of(ROW[:40], ROW[40:], (), 8, (9, 9))
    assert plain.learnt.tolist() == ROW[:40].reshape(5, 8).tolist()
    assert plain.judged.tolist() == ROW[40:56].reshape(2, 8).tolist()
    assert (plain.first, plain.prefix) == (1, 0)
    first = m.TextRows.of(ROW[:40], ROW, (1, 2), 7, (3, 3))
    assert first.learnt.tolist() == [[1, 2, *ROW[start : start + 5]] for start in (0, 5, 10)]
    assert first.judged.tolist() == [[1, 2, *ROW[start : start + 5]] for start in (0, 30, 55)]  # 12 windows: the first, the sixth, the last
    assert (first.first, first.prefix) == (2, 2)
    other = m.TextRows.of(ROW[1:41], ROW[40:], (), 8, (9, 9))
    assert plain.sha256 != other.sha256
    assert plain.sha256 == m.TextRows.of(ROW[:40], ROW[40:], (), 8, (9, 9)).sha256


def check_many_rows(m: Any) -> None:
    """More of them than go through at once."""
    logits = 3 * np.random.default_rng(2).standard_normal((70, 9))
    ids, logs = m.likeliest(logits, Distill(top=3, temperature=2.0))
    for row, found, log in zip(logits, ids, logs, strict=True):
        shares = np.exp(row / 2.0) / np.exp(row / 2.0).sum()
        order = sorted(range(9), key=lambda word: -shares[word])
        assert list(found) == order[:3]
        named = [shares[word] for word in order[:3]]
        np.testing.assert_allclose(np.exp(log), [*named, 1 - sum(named)], rtol=1e-6)  # float32 of logarithms


CHECKS = (check_rows, check_many_rows, check_answers)
MUTANTS = {
    "the temperature is forgotten": Mutant("likeliest", "logits[part].astype(np.float64) / settings.temperature", "logits[part]"),
    "the unlikeliest": Mutant("likeliest", "np.argpartition(-found, top - 1, axis=-1)", "np.argpartition(found, top - 1, axis=-1)"),
    "the rest is what is named": Mutant("likeliest", "1 - np.exp(named).sum(-1, keepdims=True)", "np.exp(named).sum(-1, keepdims=True)"),
    "the unlikeliest first": Mutant("likeliest", "-np.take_along_axis(found, chosen, -1)", "np.take_along_axis(found, chosen, -1)"),
    "more rows than are asked for": Mutant("TextRows.of", "parts[0][:most[0]]", "parts[0]"),
    "a first column with nothing before it": Mutant("TextRows.first", "max(1, self.prefix)", "self.prefix"),
    "in no order": Mutant("likeliest", "np.take_along_axis(chosen, order, -1)", "chosen"),
    "judged by itself": Mutant(
        "teach", "score(logits[rows.first - 1:-1], row[rows.first:])", "score(logits[rows.first:], row[rows.first:])"
    ),
    "the prefix is cut from the text": Mutant("TextRows.of", "Cut.of(window, None, prefix).room", "window"),
    "judged at the beginning alone": Mutant("TextRows.of", "parts[1][spread]", "parts[1][: most[1]]"),
    "the hash knows one part": Mutant("TextRows.sha256", "(self.learnt, self.judged)", "(self.judged,)"),
}


def test_the_checks_pass_on_the_code_as_it_is() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mistake_is_seen(mutant: Mutant) -> None:
    assert killer(mutated(mutant), CHECKS), "no check noticed"


def test_a_file_of_answers_is_of_its_text_its_settings_and_its_teacher(tmp_path: Path) -> None:
    folder, file = write_decoder(tmp_path / "d"), tmp_path / "answers.safetensors"
    taught = teach(TextModel(folder, ["cpu"], threads=1), model_sha256(folder), rows(), SETTINGS)
    write_taught(file, taught)
    read = read_taught(file, rows(), SETTINGS, model_sha256(folder))
    assert read.about == taught.about
    assert (read.learnt.ids == taught.learnt.ids).all()
    assert (read.judged.logs == taught.judged.logs).all()
    for given, message in (
        ((rows(()), SETTINGS, None), "answers to other tokens"),
        (
            (rows(), Distill(top=5, temperature=2.0), None),
            "holds answers for top 4 at temperature 2, and top 5 at temperature 2 is asked for",
        ),
        ((rows(), SETTINGS, "0" * 64), "answers of another teacher"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_taught(file, *given)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_taught(file, rows(), SETTINGS, None)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputMismatch, match=r"5 tokens to judge by are fewer than one window \(8\)"):
        TextRows.of(ROW[:40], ROW[:5], (), 8, (9, 9))
    model = TextModel(write_decoder(tmp_path / "d"), ["cpu"], threads=1)
    with pytest.raises(InputMismatch, match=f"distill.top is {VOCAB} and the teacher has {VOCAB} words"):
        teach(model, "", rows(), Distill(top=VOCAB))
