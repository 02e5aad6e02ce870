"""One line on stderr that is written over and over; nothing at all where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_PAUSE_S = 0.1


class ProgressLine:
    """`total`: updates of the whole run, None where nobody knows. `show` None: only on a terminal."""

    def __init__(self, total: int | None, show: bool | None = None, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._show = self._stream.isatty() if show is None else show
        self._total, self._began, self._drawn = total, time.monotonic(), float("-inf")
        self._first: int | None = None
        self._width = 0

    def update(self, done: int, epoch: int, epochs: int, loss: float, lr: float) -> None:
        """`done`: updates so far, of this run and of an earlier one that it continues."""
        self._first = done - 1 if self._first is None else self._first
        now = time.monotonic()
        if not self._show or (now - self._drawn < _PAUSE_S and done != self._total):
            return
        self._drawn = now
        rate = (done - self._first) / max(now - self._began, 1e-9)
        line = f"epoch {epoch}/{epochs}  update {done}"
        line += f"/{self._total}" if self._total else ""
        line += f"  loss {loss:.4f}  lr {lr:.3g}  {rate:.1f}/s"
        line += f"  {_clock((self._total - done) / rate)} left" if self._total else ""
        self._stream.write(f"\r{line:<{self._width}}")
        self._stream.flush()
        self._width = len(line)

    def close(self) -> None:
        """Ends the line."""
        if self._show and self._width:
            self._stream.write("\n")
            self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
