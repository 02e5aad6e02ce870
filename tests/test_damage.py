"""Specs with any change, and commands that end at any moment (`tests/damage.py` counts many; a few of each here)."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from damage import SLOW_S, Counts, SpecCounts, ended, fuzz_specs, mutate

from matmorph.errors import LONGEST, SpecError, bounded
from matmorph.spec import load_spec
from matmorph.specs.globs import Glob, GlobError

SEEDS = range(20_000, 20_200)
"""Others than those that `python tests/damage.py --specs 10000` takes."""


def test_a_mutated_spec_is_a_spec_or_an_error_with_its_place(tmp_path: Path) -> None:
    found = fuzz_specs(SEEDS, tmp_path)
    assert found.clean, (found, found.placeless, found.raised, found.slow)
    assert found.fine >= 10
    assert found.refused >= 100


@pytest.mark.parametrize("key", ["role", "path", "layer", "op", "block", "use", "in_features"])
@pytest.mark.parametrize("value", ["x" * 300_000, "a b " * 50_000, "9" * 5_000], ids=["word", "words", "digits"])
def test_a_huge_value_is_not_repeated_whole(key: str, value: str) -> None:
    began, said = time.process_time(), f"rules[0].match.{key}"
    try:
        load_spec({"version": 1, "rules": [{"match": {key: value}, "rewrite": "keep"}]})
    except SpecError as error:
        said = str(error)
    assert said.startswith(f"rules[0].match.{key}")
    assert all(
        len(line) <= LONGEST + 20 + len(f"rules[0].match.{key}: ") for line in said.splitlines()
    )  # before and behind the bounded one
    assert time.process_time() - began < SLOW_S


def test_bounded_lines_keep_both_ends() -> None:
    assert bounded("x: no such file") == "x: no such file"
    assert bounded(f"role {'a' * 5000}z is none") == f"role {'a' * 60}...{'a' * 19}z (5,001 characters) is none"
    assert bounded("a b " * 1000).endswith(" ... (4,000 characters)")


def test_a_repeated_double_star_says_what_one_says() -> None:
    names = ["a", "a.b", "x.a", "x.y.a", "x.y.z", "a.x.y.b"]
    for many, one in (("**.**.a", "**.a"), ("a.**.**.**.b", "a.**.b"), ("**.**", "**")):
        assert [Glob(many).matches(name) for name in names] == [Glob(one).matches(name) for name in names]
    began = time.process_time()
    assert not Glob(".".join(["**"] * 200) + ".z.q").matches(".".join("abcdefghijklmnopqrst"))
    assert time.process_time() - began < 0.1  # microseconds; with each of them a choice, more than the age of the universe
    with pytest.raises(GlobError, match=r"a glob of 5,000 characters: at most 4,096 are read"):
        Glob("a" * 5000)


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
