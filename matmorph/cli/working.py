"""While a command works: progress on the terminal, and whatever the model's own code prints kept out of the results."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

from matmorph.cli.watching import as_bars, as_lines
from matmorph.errors import InputError
from matmorph.progress import Progress, silent


@contextmanager
def working(quiet: bool = False, first: str = "starting") -> Iterator[Progress]:
    """Both `drawn` and `guarded`."""
    with drawn(quiet, first) as show, guarded():
        yield show


@contextmanager
def guarded() -> Iterator[None]:
    """Code of the user's may run: what factories, forward passes and data loaders print goes to stderr, for stdout is for results.

    Raises InputError where such code ends the program.
    """
    with foreign_output():
        try:
            yield
        except SystemExit as error:  # not for them to decide
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename}:{last.lineno}: {last.line}"
            raise InputError(f"code of the model or its data ended the program: SystemExit({error.code!r})", [where]) from error


@contextmanager
def step(show: Progress, what: str) -> Iterator[None]:
    """One thing that is done or not."""
    show(what, 0, 1)
    yield
    show(what, 1, 1)


@contextmanager
def foreign_output() -> Iterator[None]:
    """What anything writes to stdout, by Python or by the system, goes to stderr for the block."""
    with ExitStack() as stack:
        if (number := _descriptor(sys.stdout)) is not None and (other := _descriptor(sys.stderr)) is not None:
            sys.stdout.flush()
            kept = os.dup(number)
            os.dup2(other, number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            stack.callback(sys.stdout.flush)  # what was written to it by name meanwhile
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


def _descriptor(stream: Any) -> int | None:
    """Of a stream of the system's; None where something in this process stands in for one."""
    try:
        found: int = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
    return found


@contextmanager
def drawn(quiet: bool = False, first: str = "starting") -> Iterator[Progress]:
    """Tells how far it is, on stderr where that is a terminal, from the first moment on: `first` is what goes on until something else is
    said. Gone when done. `quiet`, as stdout is for a program: a line of JSON every other second, wherever stderr goes."""
    if quiet:
        with as_lines(first) as lines:
            yield lines
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield silent
        return
    with as_bars(console, first) as bars:
        yield bars
