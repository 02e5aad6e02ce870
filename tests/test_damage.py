"""Specs with any change, and commands that end at any moment (`tests/damage.py` counts many; a few of each here)."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from damage import Counts, SpecCounts, ended, fuzz_specs, mutate

SEEDS = range(20_000, 20_200)
"""Others than those that `python tests/damage.py --specs 10000` takes."""


def test_a_mutated_spec_is_a_spec_or_an_error_with_its_place(tmp_path: Path) -> None:
    found = fuzz_specs(SEEDS, tmp_path)
    assert found.clean, (found, found.placeless, found.raised, found.slow)
    assert found.fine >= 10
    assert found.refused >= 100


def test_what_a_mutation_makes_follows_from_its_seed() -> None:
    text = "version: 1\nrules:\n  - match: {op: linear}\n    rewrite: keep\n"
    made = [mutate(text, random.Random(seed)) for seed in range(200)]
    assert made == [mutate(text, random.Random(seed)) for seed in range(200)]
    assert len(set(made)) > 150


def test_counts_tell_what_is_wrong() -> None:
    assert Counts().clean
    assert not any(Counts(**{name: 1}).clean for name in ("tracebacks", "internal", "lines", "lost", "half", "left"))
    assert SpecCounts(fine=1, refused=1).clean
    assert not any(SpecCounts(**{name: ["x"]}).clean for name in ("placeless", "raised", "slow"))


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(("number", "codes"), [(signal.SIGKILL, {-signal.SIGKILL, 0}), (signal.SIGINT, {130, 0})])
def test_a_compile_that_is_ended_leaves_whole_folders(number: int, codes: set[int], tmp_path: Path) -> None:
    found = ended(6, number, 1, tmp_path, within=4.0)
    assert found.clean, str(found)
    assert set(found.codes) <= codes
