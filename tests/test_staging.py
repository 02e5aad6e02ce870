"""How folders and files take their names: whole, by one process, never over what is not to be replaced, at whatever moment it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from matmorph.errors import InputError
from matmorph.exporters import staging
from matmorph.exporters.staging import refuse_existing, staged_folder
from matmorph.runtime.disk import files, naming
from matmorph.runtime.disk.files import whole_file, write_whole
from matmorph.runtime.disk.locks import Held, held
from matmorph.runtime.disk.naming import exchange, passing_name, take_name
from matmorph.runtime.errors import ArtifactError
from matmorph.runtime.format.artifact import MANIFEST
from matmorph.runtime.manifest import artifact_folder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX names and signals")


@pytest.fixture(params=["one step", "two steps"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A system that can exchange names and refuse taken ones, and one that cannot."""
    if request.param == "two steps":
        monkeypatch.setattr(naming, "_renamed", lambda *_: False)
    return str(request.param)


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is an artefact where its manifest says a word of ours."""
    monkeypatch.setattr(staging, "is_manifest", lambda data: data.get("ours") is True)


def fill(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text('{"ours": true}')
    (folder / "weights").write_text(text)


def artefact(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    fill(folder, text)
    return folder


def text_of(folder: Path) -> str:
    assert {path.name for path in folder.iterdir()} == {MANIFEST, "weights"}
    return (folder / "weights").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- names


def test_a_taken_name_is_not_taken_again(system: str, tmp_path: Path) -> None:
    for kind, make in (("file", Path.touch), ("folder", Path.mkdir), ("link", lambda path: path.symlink_to("nowhere"))):
        for other in (Path.touch, Path.mkdir):
            source, target = tmp_path / "source", tmp_path / kind
            other(source)
            make(target)
            with pytest.raises(FileExistsError):
                take_name(source, target)
            assert names(tmp_path) == sorted(["source", kind])
            for path in (source, target):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_a_free_name_is_taken(system: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "source")
    take_name(tmp_path / "source", tmp_path / "target")
    assert names(tmp_path) == ["target"]


def test_files_without_second_names_keep_the_name_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT has no hard links."""

    def none(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(naming, "_renamed", lambda *_: False)
    monkeypatch.setattr(naming.os, "link", none)
    (tmp_path / "source").write_text("new")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError):
        take_name(tmp_path / "source", tmp_path / "mine")
    take_name(tmp_path / "source", tmp_path / "target")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"target": "new", "mine": "mine"}


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2")
def test_linux_exchanges_names(tmp_path: Path) -> None:
    """Else the other branch is all that is tested here."""
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").mkdir()
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


# ---- folders


def write(out: Path, text: str, force: bool = False, meanwhile: Callable[[], object] = lambda: None) -> None:
    with staged_folder(out, force) as folder:
        fill(folder, text)
        meanwhile()


def test_a_folder_that_appears_meanwhile_stays(system: str, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear() -> None:
        out.mkdir()
        (out / "thesis.txt").write_text("years")

    with pytest.raises(InputError) as caught:
        write(out, "new", meanwhile=appear)
    assert str(caught.value).splitlines() == [
        f"{out} came to be while this ran and is not replaced",
        f"  the finished folder is whole and lies at {tmp_path / 'out-2'}",
    ]
    assert names(out) == ["thesis.txt"]
    assert text_of(tmp_path / "out-2") == "new"
    assert names(tmp_path) == ["out", "out-2"]


def test_of_two_runs_neither_is_lost(system: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    artefact(tmp_path / "out-2", "an earlier one")
    with pytest.raises(InputError, match="while this ran"):
        write(out, "second", meanwhile=lambda: write(out, "first"))
    assert [text_of(tmp_path / name) for name in ("out", "out-2", "out-3")] == ["first", "an earlier one", "second"]


@pytest.mark.parametrize("there", [False, True])
def test_force_does_not_reach_what_is_no_artefact(system: str, there: bool, tmp_path: Path) -> None:
    """Neither what appears, nor what an artefact turns into."""
    out = artefact(tmp_path / "out", "old") if there else tmp_path / "out"

    def become() -> None:
        out.mkdir(exist_ok=True)
        (out / MANIFEST).unlink(missing_ok=True)
        (out / "thesis.txt").write_text("years")

    with pytest.raises(InputError, match="while this ran"):
        write(out, "new", force=True, meanwhile=become)
    assert (out / "thesis.txt").read_text() == "years"
    assert text_of(tmp_path / "out-2") == "new"


def test_force_replaces_what_became_an_artefact(system: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "new", force=True, meanwhile=lambda: artefact(out, "of another run"))
    assert text_of(out) == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(5, "broken"), KeyboardInterrupt()])
def test_what_was_there_comes_back_when_the_last_step_fails(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = artefact(tmp_path / "out", "old")

    def fail(source: Path, target: Path) -> None:
        if source.name.endswith(".partial") and not target.exists():
            raise error
        take_name(source, target)

    monkeypatch.setattr(naming, "_renamed", lambda *_: False)
    monkeypatch.setattr(staging, "take_name", fail)
    with pytest.raises((InputError, KeyboardInterrupt)):
        write(out, "new", force=True)
    assert text_of(out) == "old"
    monkeypatch.undo()
    refuse_existing(tmp_path / "other", force=False)


# ---- kills


def steps(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[str]:
    """Patches every call that changes a name or takes a folder away so that the process is killed before the one of that number."""
    seen = 0

    def deadly(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal seen
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for place, name in ((staging, "take_name"), (staging, "exchange"), (staging.shutil, "rmtree"), (naming.os, "rename")):
        monkeypatch.setattr(place, name, deadly(name, getattr(place, name)))
        yield name


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("at", range(1, 9))
def test_a_killed_run_loses_nothing_and_the_next_one_tidies(
    system: str, force: bool, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = artefact(tmp_path / "out", "old") if force else tmp_path / "out"
    child = os.fork()
    if child == 0:
        try:
            list(steps(monkeypatch, at))
            write(out, "new", force)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    there = [path for path in tmp_path.iterdir() if path.name == "out" or path.name.endswith(".old")]
    if force:
        assert any(text_of(path) in ("old", "new") for path in there)
    else:
        assert [text_of(path) for path in there] in ([], ["new"])
    refuse_existing(out, force=True)
    assert names(tmp_path) in ([], ["out"])
    if force:
        assert text_of(out) in ("old", "new")


def test_what_a_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    """And what has another name."""
    out = tmp_path / "out"
    artefact(passing_name(tmp_path / "out.b"), "of another target")
    (tmp_path / ".out.mine.partial").mkdir()
    hear, say = os.pipe()
    child = os.fork()
    if child == 0:
        with staged_folder(out) as folder:
            fill(folder, "new")
            os.write(say, folder.name.encode())
            signal.pause()
    os.close(say)
    working = os.read(hear, 100).decode()
    try:
        refuse_existing(out, force=False)
        assert text_of(tmp_path / working) == "new"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    refuse_existing(out, force=False)
    assert working not in names(tmp_path)
    assert len(names(tmp_path)) == 2


def test_a_reader_is_told_where_the_older_folder_is(tmp_path: Path) -> None:
    old = artefact(passing_name(tmp_path / "out", "old"), "old")
    with pytest.raises(ArtifactError, match=rf"out: no such folder; a run that was killed .* left the older one at {re.escape(str(old))}$"):
        artifact_folder(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"other: no such folder$"):
        artifact_folder(tmp_path / "other")


# ---- files


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "page.html"
    write_whole(target, b"one")

    def half() -> None:
        with whole_file(target) as partial:
            partial.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert target.read_bytes() == b"one"
    write_whole(target, b"two")
    with pytest.raises(FileExistsError):
        write_whole(target, b"three", replace=False)
    assert target.read_bytes() == b"two"
    assert names(target.parent) == ["page.html"]


@pytest.mark.parametrize("step", ["_flush", "_flush_folder"])
def test_a_killed_writer_leaves_what_the_next_one_takes_away(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "page.html"
    target.write_bytes(b"one")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(files, step, lambda _: os.kill(os.getpid(), signal.SIGKILL))
        write_whole(target, b"two")
    os.waitpid(child, 0)
    assert target.read_bytes() in (b"one", b"two")
    write_whole(target, b"three")
    assert names(tmp_path) == ["page.html"]


def test_a_lock_has_one_holder_and_does_not_outlive_it(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from matmorph.runtime.disk.locks import held\n"
        "with held(pathlib.Path(sys.argv[1])): print('have it', flush=True); sys.stdin.read()"
    )
    target = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "have it\n"
        with pytest.raises(Held, match=f"process {other.pid}"), held(target):
            pytest.fail("entered")
        other.kill()
    with held(target):  # the file of the killed one does not stand in the way
        assert names(tmp_path) == [".run.lock"]
    assert names(tmp_path) == []
