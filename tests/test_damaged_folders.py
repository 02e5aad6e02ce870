"""Damage is an error of the file, whatever the file and whatever reads it: see `damaged_folders`, which runs any number of seeds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import damaged_folders
import numpy as np
import pytest

resource = pytest.importorskip("resource", reason="limits of a process are POSIX's")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("damaged") / "whole"
    place.mkdir()
    damaged_folders.build(place)
    return place


def run_seeds(home: Path, tmp_path: Path, seeds: range, readers: int) -> list[damaged_folders.Result]:
    return [result for seed in seeds for result in damaged_folders.one(seed, home, tmp_path / str(seed), readers)]


def test_thirty_damaged_homes(home: Path, tmp_path: Path) -> None:
    results = run_seeds(home, tmp_path, range(30), 1)
    assert [result for result in results if result.fault is not None] == []
    assert sum(result.code in (1, 2) for result in results) > len(results) // 4, "damage is met"


@pytest.mark.full
def test_three_hundred_damaged_homes(home: Path, tmp_path: Path) -> None:
    results = run_seeds(home, tmp_path, range(1000, 1300), 3)
    assert [result for result in results if result.fault is not None] == []


@pytest.mark.full
def test_an_undamaged_home_is_read_by_all(home: Path, tmp_path: Path) -> None:
    """Else the seeds would prove nothing: every reader works, and ends with 0."""
    copy = Path(shutil.copytree(home, tmp_path / "home"))
    for name, read in damaged_folders.readers(copy).items():
        (copy / "out").mkdir()
        outcome = read()
        assert outcome.code == 0, f"{name}: {outcome.said}"
        shutil.rmtree(copy / "out")


def test_a_fault_is_seen(home: Path) -> None:
    """Each kind of fault that a run is searched for."""
    seen = {
        "internal error": damaged_folders.Outcome(1, "internal error (a bug in matmorph, not in your input): x"),
        "Traceback": damaged_folders.Outcome(2, "Traceback (most recent call last):"),
        "another error": damaged_folders.python(lambda: 1 / 0),
        "nothing was said": damaged_folders.Outcome(2, ""),
    }
    assert {name: damaged_folders.fault_of(outcome, home) for name, outcome in seen.items()} == {name: name for name in seen}
    assert damaged_folders.fault_of(damaged_folders.Outcome(2, "x.json: missing"), home) is None


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FEW = ("adapter from-peft", "adapter unmerge", "report", "train")
MORE = ("adapter save", "adapter to-peft", "compare", "diff --node", "merge")
WRITES = (*FEW, *(pytest.param(name, marks=pytest.mark.full) for name in MORE))


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_leaves_nothing(home: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(home, tmp_path / "home"))
    (copy / "out").mkdir()
    read = damaged_folders.readers(copy)[name]
    with largest_file(100):
        outcome = read()
    assert outcome.code == 2, outcome.said
    assert "internal error" not in outcome.said
    assert "cannot be written" in outcome.said or "File too large" in outcome.said
    assert list((copy / "out").iterdir()) == []
    assert read().code == 0


def test_a_pickle_among_the_arrays_is_not_run(home: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(home, tmp_path / "home"))
    (copy / "out").mkdir()
    arrays = dict(np.load(copy / "data.npz"))
    np.savez(copy / "data.npz", **{**arrays, "labels": np.asarray([damaged_folders.Mark(copy / damaged_folders.MARK)], object)})
    outcome = damaged_folders.readers(copy)["train"]()
    assert outcome.code == 2
    assert f"{copy / 'data.npz'}: cannot be read" in outcome.said
    assert not (copy / damaged_folders.MARK).exists()


def test_a_weight_that_says_it_is_text_is_refused(tmp_path: Path) -> None:
    """Its bytes would be taken for addresses of Python objects."""
    import onnx

    from matmorph.errors import InputError
    from matmorph.folders.open import _mapped

    (tmp_path / "model.onnx.data").write_bytes(bytes(range(1, 65)))
    tensor = onnx.TensorProto(name="w", dims=[4], data_type=onnx.TensorProto.STRING, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", "32")):
        tensor.external_data.add(key=key, value=value)
    with pytest.raises(InputError, match=r"model\.onnx: 'w': is text, which no weight is"):
        _mapped(tensor, tmp_path / "model.onnx.data")
