"""Tasks that are done elsewhere give the same bits; workers that die are replaced, and named where they keep dying."""

from __future__ import annotations

import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from working import METHODS, NAMES, SPECS, compiled, drawn, fingerprint

from matmorph.errors import InputError, RewriteError, VerifyError
from matmorph.passes.work import hiring
from matmorph.passes.work import processes as room
from matmorph.passes.work.hands import Here
from matmorph.passes.work.hiring import hired, read_workers
from matmorph.passes.work.processes import Processes, told
from matmorph.passes.work.ray_hands import ray_hands
from matmorph.passes.work.wire import Shelf, pickled, unpickled
from matmorph.passes.work.worker import answer_of


class ByWire:
    """Hands of this process that see of a task only what a worker would."""

    count = 1

    def __init__(self, *_: Any) -> None:
        self.shelf = Shelf()
        self.tasks: list[Any] = []

    def do(self, task: Any) -> Any:
        with self.shelf.placing() as place:
            sent = pickled(task, place)
            self.tasks.append(unpickled(sent))
            return told(task, *unpickled(pickled(answer_of(self.tasks[-1], METHODS))))


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_by_wire_comes_out_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fingerprint(compiled(name))
    hands = ByWire()
    monkeypatch.setattr(hiring, "Here", lambda methods: hands)
    assert fingerprint(compiled(name)) == plain
    assert len(hands.tasks) == (6 if name == "budget" else 3)
    assert not list(hands.shelf.folder.iterdir()), "no tensor stays behind"
    hands.shelf.close()
    assert not hands.shelf.folder.exists()


def test_a_tensor_lies_once_on_the_shelf() -> None:
    shelf, large = Shelf(), drawn(200, 200)
    with shelf.placing() as one, shelf.placing() as other:
        sent = [pickled((large, "x"), place) for place in (one, other)]
        assert len(list(shelf.folder.iterdir())) == 1
        for data in sent:
            found, _ = unpickled(data)
            assert torch.equal(found, large)
            assert found.data_ptr() % 64 == 0, "as torch lays it out"
    assert not list(shelf.folder.iterdir())
    shelf.close()


def test_what_a_task_raises_is_raised_here() -> None:
    class Failing:
        path = "a.b"

        def __init__(self, error: Exception) -> None:
            self.error = error

        def run(self, methods: Any) -> Any:
            raise self.error

    with pytest.raises(RewriteError, match="NaN") as caught:
        told(Failing(ValueError()), *answer_of(Failing(RewriteError("NaN", ["here"])), METHODS))  # type: ignore[arg-type]
    assert caught.value.details == ("here",)
    with pytest.raises(VerifyError, match=r"a\.b: KeyError"):
        told(Failing(ValueError()), *answer_of(Failing(KeyError("x")), METHODS))  # type: ignore[arg-type]


def test_a_worker_that_keeps_dying_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are processes that read nothing and end."""
    monkeypatch.setattr(room, "_START", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    hands = Processes(1)
    with pytest.raises(RewriteError, match=r"fc: 3 workers died over it, one after the other \(SIGKILL, SIGKILL, SIGKILL\)"):
        hands.do(types.SimpleNamespace(path="fc"))  # type: ignore[arg-type]
    assert hands.pids == []
    hands.close()


@pytest.mark.parametrize("given", ["0", "-1", "two", "", "1.5", 0, True, "5000", "http://x"])
def test_other_workers_are_refused(given: Any) -> None:
    with pytest.raises(InputError, match="a number of processes, ray, or ray://HOST:PORT"):
        read_workers(given)
    assert [read_workers(one) for one in (None, 3, "3", "ray", "ray://a:1")] == [None, 3, 3, "ray", "ray://a:1"]


def test_without_workers_it_is_this_process() -> None:
    with hired(None, METHODS) as hands:
        assert isinstance(hands, Here)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.full
def test_any_number_of_processes_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    plain = fingerprint(compiled(name))
    for count in (1, 2, 3):
        assert fingerprint(compiled(name, workers=count)) == plain, count
    assert fingerprint(compiled(name, workers=2, work=tmp_path)) == plain


@pytest.mark.full
def test_a_killed_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fingerprint(compiled())
    killed: list[int] = []
    answer = room._Worker.answer

    def dying(self: Any, request: bytes) -> bytes | None:
        if len(killed) < 2:
            killed.append(self.process.pid)
            os.kill(self.process.pid, signal.SIGKILL)
        return answer(self, request)

    monkeypatch.setattr(room._Worker, "answer", dying)
    assert fingerprint(compiled(workers=2)) == plain
    assert len(set(killed)) == 2


# ---- Ray


def _installed_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://127.0.0.1:1", "nobody answers there"),
        ("ray://127.0.0.1", "an address of Ray is ray://HOST:PORT"),
        ("ray://127.0.0.1:port", "an address of Ray is ray://HOST:PORT"),
    ],
)
def test_an_address_that_is_none_or_does_not_answer(address: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed_ray(monkeypatch)
    with pytest.raises(InputError, match=said), ray_hands(address):
        pass


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="not installed") as caught, ray_hands("ray"):
        pass
    assert "matmorph[distributed]" in caught.value.details[0]


@pytest.mark.full
def test_ray_gives_the_same_bits() -> None:
    pytest.importorskip("ray", reason="workers of Ray are an extra: pip install 'matmorph[distributed]'")
    for name in ("loftq", "budget"):
        assert fingerprint(compiled(name, workers="ray")) == fingerprint(compiled(name))
