"""Workers that are processes of this machine (`--workers N`): one thread each, weights read from files that are mapped.

A worker that dies is replaced, and its task is given to the new one; a task that outlives three workers names its site.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import matmorph.errors as errors
from matmorph.errors import MatmorphError, RewriteError, VerifyError
from matmorph.passes.work.task import Task
from matmorph.passes.work.wire import Shelf, pickled, unpickled
from matmorph.passes.work.worker import read_frame, write_frame

TRIES = 3
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from matmorph.passes.work.worker import main; main()"


class Processes:
    """`count` workers, each started when it is first needed."""

    def __init__(self, count: int) -> None:
        self.count: int | None = count
        self._shelf = Shelf()
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._all: list[_Worker] = []
        for _ in range(count):
            self._idle.put(None)

    def do(self, task: Task) -> Any:
        """Raises what the task raises, and RewriteError where workers keep dying over it."""
        with self._shelf.placing() as place:
            request = pickled(task, place)
            ends = []
            for _ in range(TRIES):
                answer, end = self._asked(request)
                if answer is not None:
                    return told(task, *unpickled(answer))
                ends.append(end)
        raise RewriteError(
            f"{task.path}: {TRIES} workers died over it, one after the other ({', '.join(ends)})",
            ["killed workers mostly lack memory: fewer of them (--workers N), or a smaller rule for this matmul"],
        )

    def _asked(self, request: bytes) -> tuple[bytes | None, str]:
        """The answer, or None and how the worker ended."""
        worker = self._idle.get()
        if worker is None:
            worker = _Worker()
            self._all.append(worker)
        answer, end = None, ""
        try:
            answer = worker.answer(request)
            if answer is None:
                end = worker.ended()
        finally:
            self._idle.put(worker if answer is not None else None)
        return answer, end

    @property
    def pids(self) -> list[int]:
        """Of the workers that were started and are still there."""
        return [worker.process.pid for worker in self._all if worker.process.poll() is None]

    def close(self) -> None:
        for worker in self._all:
            worker.close()
        self._shelf.close()


class _Worker:
    def __init__(self) -> None:
        command = [sys.executable, "-P", "-c", _START, json.dumps(sys.path)]
        environment = {**os.environ, **_ONE_THREAD}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def answer(self, request: bytes) -> bytes | None:
        """None where it dies over it."""
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise VerifyError("a worker without pipes")
        try:
            write_frame(stdin, request)
        except OSError:
            return None
        return read_frame(stdout)

    def ended(self) -> str:
        code = self.process.wait()
        with suppress(ValueError):
            return signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"exit code {code}"

    def close(self) -> None:
        """It ends with its input; one that works on is not waited for."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def told(task: Task, how: str, what: Any) -> Any:
    """The result in an answer; what it says was raised is raised."""
    if how == "done":
        return what
    if how == "raised":
        _raise(*what)
    line, trace = what
    raise VerifyError(f"{task.path}: {line}", trace.splitlines())


def _raise(name: str, message: str, details: tuple[str, ...]) -> NoReturn:
    kind = getattr(errors, name, RewriteError)
    found: MatmorphError = kind(message, details=details)
    raise found


@contextmanager
def processes(count: int) -> Iterator[Processes]:
    """Gone, the workers with them, when the block ends."""
    found = Processes(count)
    try:
        yield found
    finally:
        found.close()
