"""What is going on, drawn on a terminal or written as lines: phase, block or matmul, rate, time left, memory."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from matmorph.memory import resident, said
from matmorph.runtime.format.printable import printable

EVERY_S = 2.0
"""What takes less says nothing; what takes more, a line each time."""


@dataclass(slots=True)
class Phase:
    """One thing that goes on. `began`: when it was first heard of, with `first` of it done."""

    what: str
    began: float
    first: int = 0
    done: int = 0
    total: int | None = None
    place: str = ""

    def rate(self, now: float) -> float | None:
        """Steps in a second."""
        passed, steps = now - self.began, self.done - self.first
        return steps / passed if passed > 0 and steps > 0 else None

    def left(self, now: float) -> float | None:
        """Seconds, if the rest goes as fast."""
        rate = self.rate(now)
        return None if rate is None or self.total is None else max(self.total - self.done, 0) / rate

    def to_dict(self, now: float) -> dict[str, Any]:
        rate, left = self.rate(now), self.left(now)
        held = resident()
        found = {
            "phase": self.what,
            "at": self.place or None,
            "done": self.done,
            "total": self.total,
            "seconds": round(now - self.began, 1),
            "per_second": None if rate is None else float(f"{rate:.3g}"),
            "seconds_left": None if left is None else round(left, 1),
            "memory_bytes": held,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(slots=True)
class Lines:
    """A `Watcher` that writes a JSON object per line while something takes longer than `EVERY_S`."""

    stream: IO[str]
    phase: Phase
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, what: str, done: int, total: int | None) -> None:
        with self.lock:
            if what != self.phase.what:
                self.phase = Phase(what, time.monotonic(), done)
            self.phase.done, self.phase.total = done, total

    def at(self, what: str, place: str) -> None:
        with self.lock:
            if what == self.phase.what:
                self.phase.place = place

    def write(self) -> None:
        while not self.ended.wait(EVERY_S):
            now = time.monotonic()
            with self.lock:
                if now - self.phase.began < EVERY_S:
                    continue
                line = json.dumps(self.phase.to_dict(now))
            print(line, file=self.stream, flush=True)


@contextmanager
def as_lines(first: str) -> Iterator[Lines]:
    """On stderr, until the block ends."""
    lines = Lines(sys.stderr, Phase(first, time.monotonic()))
    thread = threading.Thread(target=lines.write, name="matmorph-progress", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        lines.ended.set()
        thread.join()


class _Drawn:
    """A `Watcher` that draws bars."""

    def __init__(self, bars: Any, first: str) -> None:
        self._bars = bars
        self._first = first
        self._ended: set[str] = set()
        self._tasks: dict[str, Any] = {first: bars.add_task(printable(first), total=1, place="")}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(printable(what), total=total, place="")
            self._bars.update(self._tasks[self._first], completed=1)
        self._bars.update(self._tasks[what], completed=done, total=total)
        if done == total:
            self._ended.add(what)

    def at(self, what: str, place: str) -> None:
        if what in self._tasks:
            self._bars.update(self._tasks[what], place="" if what in self._ended else printable(place))


@contextmanager
def as_bars(console: Any, first: str) -> Iterator[_Drawn]:
    """Gone when the block ends."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if not speed or (task.total or 0) < 2 else f"{speed:.3g}/s")

    class Memory(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Any) -> Text:
            held = None if task.finished else resident()
            return Text("" if held is None else said(held))

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        Rate(),
        Memory(),
        TextColumn("{task.fields[place]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        yield _Drawn(bars, first)
