"""Mutants of perplexity and of samples from a text: each counts, shifts or cuts something wrongly, and gives a figure all the same."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from mutating import Mutant, killer, mutated, unmutated
from tiny_decoder import logits_of, write_decoder

ROW = np.random.default_rng(4).integers(3, 16, 45)
_SEEN = "[first, row[place.start:place.stop].astype(np.int64)]"
_STARTS = "range(0, tokens - self.room + 1, self.stride)"
_OWN = "start if self.prefix else start + 1"
_SUM = "np.log(np.exp(wide).sum(-1, keepdims=True))"
MUTANTS = {
    "the token itself is predicted": Mutant("perplexity", "seen[counted.start + 1:]", "seen[counted.start:-1]"),
    "a place too early": Mutant("perplexity", "first.size + place.first - place.start - 1", "first.size + place.first - place.start - 2"),
    "the prefix is not seen": Mutant("perplexity", _SEEN, "[0 * first, row[place.start:place.stop]]"),
    "what was counted counts again": Mutant("Cut._window", f"max(seen, {_OWN})", _OWN),
    "the first of each window counts": Mutant("Cut._window", "start + 1", "max(start, 1)"),
    "a window is left out": Mutant("Cut.of_row", "tokens - self.room + 1", "tokens - self.room"),
    "windows too near": Mutant("Cut.of_row", _STARTS, _STARTS.replace("self.stride", "self.stride - 1")),
    "bits for nats": Mutant("log_probabilities", _SUM, _SUM.replace("np.log", "np.log2")),
    "the other way round": Mutant("nearness", "shares = np.exp(theirs)", "shares = np.exp(logs)"),
    "positions begin at one": Mutant("TextModel.logits", "np.arange(row.shape[1])[None]", "1 + np.arange(row.shape[1])[None]"),
    "a part of the rows": Mutant("_parts", "slice(start, start + _ROWS)", "slice(start, start + _ROWS - 1)"),
}


def logs(row: Any, bias: float = 0.0) -> np.ndarray:
    found = logits_of(list(row), bias)
    top = found.max(-1, keepdims=True)
    return found - top - np.log(np.exp(found - top).sum(-1, keepdims=True))


def check_counts(m: Any) -> None:
    with TemporaryDirectory() as place:
        folder = write_decoder(Path(place) / "d")
        for window, stride, prefix in ((15, None, ()), (9, 4, ()), (10, None, (1,)), (10, 3, (1,))):
            room, counted = window - len(prefix), {}
            step = stride or room
            for start in range(0, len(ROW) - room + 1, step):
                seen = [*prefix, *ROW[start : start + room]]
                said = logs(seen)
                for k in range(1, len(seen)):
                    counted.setdefault(start + k - len(prefix), -said[k - 1, seen[k]])
            found = m.perplexity(folder, ROW, window=window, stride=stride, prefix=prefix, providers=["cpu"], threads=1, verify=False)
            assert found.prediction.counted == len(counted)
            mean = np.mean(list(counted.values()))
            assert abs(found.prediction.nll - mean) < 1e-5  # float32 logits against float64; a shift moves it by 0.1


def check_scores(m: Any) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.standard_normal((2, 150, 7)).astype(np.float32)
    targets = rng.integers(0, 7, 150)
    log = [x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True)) for x in (ours, theirs)]
    assert abs(m.score(ours, targets).nll + log[0][np.arange(150), targets].sum()) < 1e-9  # both in float64
    assert abs(m.nearness(ours, theirs).kl - (np.exp(log[1]) * (log[1] - log[0])).sum()) < 1e-9


CHECKS = (check_scores, check_counts)


def test_the_checks_pass_on_the_code_as_it_is() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mistake_is_seen(mutant: Mutant) -> None:
    assert killer(mutated(mutant), CHECKS), "no check noticed"
