"""What is said while something takes long: the phase, where it is, how fast, what is left, and what it holds."""

from __future__ import annotations

import io
import json
import threading
import time
from typing import Any

import pytest
from rich.console import Console
from working import METHODS, samples, spec_and_graph

from matmorph.cli import watching
from matmorph.cli.watching import Lines, Phase, as_bars, as_lines
from matmorph.cli.working import working
from matmorph.memory import peak, resident, said
from matmorph.passes.pipeline import compile_graph
from matmorph.progress import Step, tell


def test_a_phase_says_its_rate_and_what_is_left() -> None:
    phase = Phase("rewriting", 100.0, first=2, done=12, total=32, place="layer.3")
    told = phase.to_dict(105.0)
    assert told.pop("memory_bytes") > 0
    assert told == {
        **{"phase": "rewriting", "at": "layer.3", "done": 12, "total": 32},
        **{"seconds": 5.0, "per_second": 2.0, "seconds_left": 10.0},
    }
    assert Phase("loading", 100.0).to_dict(103.0).keys() == {"phase", "done", "seconds", "memory_bytes"}, "what nobody knows is not there"


def test_lines_come_only_while_something_takes_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(watching, "EVERY_S", 0.05)
    with working(quiet=True, first="loading"):
        pass
    assert capsys.readouterr().err == ""
    with working(quiet=True, first="loading") as show:
        step = Step(show, "rewriting")
        tell(step, "a.b", 1, 4)
        time.sleep(0.3)
    said_lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert said_lines
    assert {(line["phase"], line.get("at"), line["done"], line["total"]) for line in said_lines} == {("rewriting", "a.b", 1, 4)}
    assert not [one for one in threading.enumerate() if one.name == "matmorph-progress"]


def test_a_terminal_shows_phase_place_and_memory() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=160)
    with as_bars(console, "loading") as bars:
        tell(Step(bars, "rewriting"), "encoder.layer.3", 3, 7)
    text = file.getvalue()
    assert all(word in text for word in ("loading", "rewriting", "3/7", "encoder.layer.3", "iB"))


def test_a_callable_of_three_words_still_does() -> None:
    heard: list[tuple[Any, ...]] = []
    tell(Step(lambda *told: heard.append(told), "rewriting"), "a", 1, 2)
    tell(lambda *told: heard.append(told), "a", 1, 2)
    tell(None, "a", 1, 2)
    assert heard == [("rewriting", 1, 2), (1, 2)]


def test_a_compile_says_where_it_is() -> None:
    spec, graph = spec_and_graph("budget")
    places: dict[str, list[str]] = {}

    class Heard:
        def __call__(self, what: str, done: int, total: int | None) -> None:
            pass

        def at(self, what: str, place: str) -> None:
            places.setdefault(what, []).append(place)

    compile_graph(graph, spec, METHODS, "m", calibration=samples(), progress=Heard())
    assert places["decomposing"] == places["rewriting"] == ["0", "2", "4"]
    assert places["calibrating"][0].startswith("block 1 of ")


def test_memory_in_words() -> None:
    assert [said(size) for size in (310 << 20, 5 << 29)] == ["310 MiB", "2.5 GiB"]
    held, most = resident(), peak()
    assert held is None or most is None or 1 << 20 < held <= most + (1 << 20)


def test_lines_follow_the_phase() -> None:
    with as_lines("loading") as lines:
        assert isinstance(lines, Lines)
        lines("calibrating", 0, 10)
        lines.at("rewriting", "not this one")
        assert (lines.phase.what, lines.phase.place) == ("calibrating", "")
