"""What a run keeps in a work folder: it goes on after it was ended, to the bit, and takes nobody else's folder."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from working import NAMES, SPECS, compiled, drawn, fingerprint, network

from matmorph.errors import InputError, RewriteError
from matmorph.ir.site import Choice, Statistic
from matmorph.passes.linalg.quantize import Quantizer, quantize
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.rewriting import site_task
from matmorph.passes.statistics import calibrate
from matmorph.passes.work import folder as folders
from matmorph.passes.work.digests import Digests
from matmorph.passes.work.nest import DamagedError, NotANestError, laid_out, put_together, read, taken_apart, written


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the sites that were worked on."""
    found: list[str] = []
    run = site_task.SiteTask.run

    def counted(self: site_task.SiteTask, methods: Any) -> Any:
        found.append(self.path)
        return run(self, methods)

    monkeypatch.setattr(site_task.SiteTask, "run", counted)
    return found


# ---- the written form


def test_a_nest_comes_back_to_the_bit() -> None:
    codes = quantize(drawn(8, 16), Quantizer("uniform", 4, 16))
    numbers = (0.1, float("inf"), -0.0, 1 << 70, None, True, "word")
    given = (codes, Choice(3, ranks=(1, 2)), {"a": [torch.zeros(0, 3), drawn(2).to(torch.bfloat16)]}, Statistic.TAYLOR, numbers, torch.int8)
    back = read(written(given))
    assert repr(back[1:2]) == repr(given[1:2])
    assert back[3:] == given[3:]
    assert str(back[4][2]) == "-0.0"
    assert back[0].quantizer == codes.quantizer
    for one, other in ((back[0].codes, codes.codes), (back[0].scales, codes.scales), (back[2]["a"][1], given[2]["a"][1])):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert back[2]["a"][0].shape == (0, 3)


def test_what_is_read_makes_no_class_of_other_packages() -> None:
    skeleton = {"data": "subprocess:Popen", "fields": {}}
    with pytest.raises(DamagedError, match="subprocess:Popen is of no package"):
        put_together(skeleton, [])
    with pytest.raises(DamagedError):
        put_together({"enum": "matmorph.errors:InputError", "name": "x"}, [])
    with pytest.raises(NotANestError, match="a function"):
        taken_apart((1, lambda: None))


def test_tensors_are_laid_out_alike_wherever_they_come_from() -> None:
    whole = drawn(6, 8)
    stats = SiteStats(whole, 3)
    assert laid_out(stats) is stats, "nothing is copied that lies as it should"
    for view in (whole.T, whole[:, 2:], torch.from_numpy(whole.numpy())[1:]):
        found = laid_out({"a": (view,)})["a"][0]
        assert torch.equal(found, view)
        assert found.is_contiguous()
        assert found.data_ptr() % 64 == 0


@dataclass(frozen=True, slots=True)
class Settings:
    rank: int
    given: Any


def test_a_digest_sees_every_number_and_each_type() -> None:
    digests = Digests()
    different = [
        Settings(1, drawn(2, 3)),
        Settings(2, drawn(2, 3)),
        Settings(1, drawn(3, 2)),
        Settings(1, drawn(2, 3).double()),
        Settings(1, drawn(2, 3) + 0),
        Settings(1, -drawn(2, 3)),
        Settings(1, 1.0),
        Settings(1, 1),
        Settings(1, True),
        Settings(1, "1"),
        Settings(1, (1,)),
        Settings(1, [1]),
    ]
    found = [digests.of(one) for one in different]
    assert found[0] == found[4], "equal numbers"
    assert len(set(found)) == len(found) - 1


# ---- going on


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_a_work_folder_is_the_same_and_is_not_done_twice(name: str, tmp_path: Path, solved: list[str]) -> None:
    plain = fingerprint(compiled(name))
    count = len(solved)
    assert count == 3
    assert fingerprint(compiled(name, work=tmp_path / "w")) == plain
    assert len(solved) == 2 * count
    assert fingerprint(compiled(name, work=tmp_path / "w")) == plain
    assert len(solved) == 2 * count, "all of it was there"


def test_a_calibration_is_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    add = calibrate.add_rows
    monkeypatch.setattr(calibrate, "add_rows", lambda *given: (rows.append(1), add(*given))[1])
    compiled("budget", work=tmp_path)
    before = len(rows)
    assert before
    compiled("budget", work=tmp_path)
    assert len(rows) == before
    compiled("budget", model=network(seed=1), work=tmp_path)
    assert len(rows) > before, "other weights are other statistics"


def test_another_weight_or_setting_is_another_piece(tmp_path: Path, solved: list[str]) -> None:
    compiled(work=tmp_path)
    model = network()
    with torch.no_grad():
        model[4].weight[3, 2] += 1  # type: ignore[index,union-attr,operator]  # a Sequential
    compiled(model=model, work=tmp_path)
    assert solved == ["0", "2", "4", "4"], "what stands before it is as it was"
    compiled("qlora", work=tmp_path)
    assert solved[4:] == ["0", "2", "4"]


class Killed(BaseException):
    """As a process ends: nothing catches it."""


@pytest.mark.parametrize("name", ["budget", pytest.param("sequential", marks=pytest.mark.full)])
def test_a_run_that_ends_at_any_write_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt ends at its second write: before it or behind it."""
    plain = fingerprint(compiled(name))
    write, lock = folders.write_whole, threading.Lock()
    for attempt in range(12):
        left = [2]

        def ending(place: Path, data: bytes, left: list[int] = left, late: bool = attempt % 2 == 1) -> None:
            with lock:  # several sites are worked on at a time, and none of them writes once the process has ended
                left[0] -= 1
                if left[0] < 0 or (left[0] == 0 and not late):
                    raise Killed
                write(place, data)
                if left[0] == 0:
                    raise Killed

        monkeypatch.setattr(folders, "write_whole", ending)
        try:
            assert fingerprint(compiled(name, work=tmp_path / "w")) == plain
        except Killed:
            continue
        break
    else:
        pytest.fail("it never came to an end")
    assert attempt > 1, "it was ended on the way"


def _child(name: str, work: Path, answer: Path) -> int:
    """A process that compiles and writes its fingerprint; forked, so that what is killed is the work and not its imports."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        answer.write_text(fingerprint(compiled(name, work=work)))
        code = 0
    finally:
        os._exit(code)


def _kill_and_go_on(name: str, kills: int, tmp_path: Path) -> None:
    """Every other folder is begun anew once a run came to its end, until so many were killed."""
    plain = fingerprint(compiled(name))
    started = time.monotonic()
    assert fingerprint(compiled(name)) == plain
    whole, draw, done = time.monotonic() - started, random.Random(0), 0
    work, answer = tmp_path / "0", tmp_path / "answer"
    for number in range(20 * kills):
        answer.unlink(missing_ok=True)
        pid = _child(name, work, answer)
        time.sleep(draw.uniform(0.1, 0.9) * whole)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            done += 1
        else:
            assert answer.read_text() == plain
            work = tmp_path / str(number + 1)
        if done == kills:
            break
    else:
        pytest.fail(f"{done} of {kills} runs were killed")
    assert fingerprint(compiled(name, work=work)) == plain


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked")
def test_three_kills_at_random_moments(tmp_path: Path) -> None:
    _kill_and_go_on("budget", 3, tmp_path)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked")
@pytest.mark.parametrize("name", SPECS)
def test_twenty_kills_at_random_moments(name: str, tmp_path: Path) -> None:
    _kill_and_go_on(name, 20, tmp_path)


# ---- folders that are no good


def _of_another_version(path: Path) -> None:
    record = json.loads((path / "work.json").read_text())
    (path / "work.json").write_text(json.dumps({**record, "matmorph": "0.0.1"}))


def _of_another_format(path: Path) -> None:
    record = json.loads((path / "work.json").read_text())
    (path / "work.json").write_text(json.dumps({**record, "format": 9}))


def _with_a_flipped_bit(path: Path) -> None:
    place = next((path / "site").glob("??/*"))
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)


def _cut_short(path: Path) -> None:
    place = next((path / "site").glob("??/*"))
    place.write_bytes(place.read_bytes()[:-7])


def _with_a_record_of_nothing(path: Path) -> None:
    (path / "work.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_of_another_version, r"work of matmorph 0\.0\.1 .*, and this is matmorph"),
        (_of_another_format, "a work folder of format 9, and this matmorph writes format 1"),
        (_with_a_flipped_bit, "is damaged: its content is not what was written"),
        (_cut_short, "is damaged"),
        (_with_a_record_of_nothing, "work.json cannot be read"),
    ],
)
def test_a_spoiled_folder_is_an_error_that_says_so(spoil: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    compiled("parts", work=tmp_path / "w")
    spoil(tmp_path / "w")
    with pytest.raises(InputError, match=said) as caught:
        compiled("parts", work=tmp_path / "w")
    assert caught.value.details, "what to do about it"


def test_another_models_folder_and_foreign_ones_are_refused(tmp_path: Path) -> None:
    compiled("parts", work=tmp_path / "w")
    wider = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 16))
    with pytest.raises(InputError, match="work on another model"):
        compiled("parts", model=wider, work=tmp_path / "w")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"is no work folder: it holds thesis\.tex"):
        compiled("parts", work=foreign)
    with pytest.raises(InputError, match="is no work folder"):
        folders.clean(foreign)
    assert (foreign / "thesis.tex").read_text() == "x"
    with pytest.raises(InputError, match="this is a file"):
        compiled("parts", work=foreign / "thesis.tex")


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with folders.work_folder(tmp_path, "Sequential", "0" * 64):
        assert folders.status(tmp_path).running == f"process {os.getpid()}"
        for asking in (lambda: compiled("parts", work=tmp_path), lambda: folders.clean(tmp_path)):
            with pytest.raises(InputError, match=rf"another run has this work folder \(process {os.getpid()}\)"):
                asking()
    assert folders.status(tmp_path).running == ""


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "Read-only file system")])
def test_a_disk_that_takes_nothing_is_said(number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = folders.write_whole, [3]

    def refusing(place: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number), str(place))
        write(place, data)

    monkeypatch.setattr(folders, "write_whole", refusing)
    with pytest.raises(InputError, match=f"cannot be written: {said}"):
        compiled(work=tmp_path / "w")
    monkeypatch.setattr(folders, "write_whole", write)
    assert fingerprint(compiled(work=tmp_path / "w")) == fingerprint(compiled())


def test_settings_without_a_written_form_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def odd(value: Any, about: Any = None) -> bytes:
        raise NotANestError("a generator")

    compiled("parts", work=tmp_path / "w")
    for kind in ("site", "price"):
        for place in (tmp_path / "w" / kind).glob("??/*"):
            place.unlink()
    monkeypatch.setattr(folders, "written", odd)
    with pytest.raises(RewriteError, match="0: lora, low_rank solves a generator, which has no written form"):
        compiled("parts", work=tmp_path / "w")


# ---- the commands


def test_status_and_clean(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    compiled("budget", work=tmp_path / "w")
    code, out, _ = run("work", "status", tmp_path / "w")
    assert code == 0
    assert "Sequential, by matmorph" in out
    assert "rewritten matmuls: 3 (" in out
    assert "calibrations: 1 (" in out
    code, out, _ = run("work", "status", tmp_path / "w", "--json")
    assert {kind: one["count"] for kind, one in json.loads(out)["finished"].items()}["price"] == 3
    (tmp_path / "w" / "mine.txt").write_text("x")
    code, out, _ = run("work", "clean", tmp_path / "w")
    assert code == 0
    assert "files taken away" in out
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["mine.txt"]
    code, _, err = run("work", "status", tmp_path / "w")
    assert code == 2
    assert "is no work folder: it has no work.json" in err
