"""Who works, as the user says it: `--workers N`, `ray` or `ray://HOST:PORT`, and `--work DIR`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matmorph.errors import InputError
from matmorph.ir.core import Graph
from matmorph.passes.methods.protocol import Methods
from matmorph.passes.work.folder import WorkFolder, work_folder
from matmorph.passes.work.hands import Hands, Here
from matmorph.passes.work.processes import processes
from matmorph.passes.work.ray_hands import ray_hands
from matmorph.passes.work.remembering import Remembering

MOST = 1024
"""Processes that nobody means to start."""


def read_workers(given: int | str | None) -> int | str | None:
    """A number of processes, "ray", or an address of Ray. InputError for anything else."""
    if given is None or (isinstance(given, str) and (given == "ray" or given.startswith("ray://"))):
        return given
    number = int(given) if isinstance(given, int) or (given.isascii() and given.isdigit()) else 0
    if isinstance(given, bool) or not 1 <= number <= MOST:
        raise InputError(f"workers are a number of processes, ray, or ray://HOST:PORT, not {given!r:.60}")
    return number


@contextmanager
def hired(workers: int | str | None, methods: Methods) -> Iterator[Hands]:
    """None: this process, one site per thread of torch. InputError as `read_workers`, and where Ray does not answer."""
    found = read_workers(workers)
    if found is None:
        yield Here(methods)
    elif isinstance(found, int):
        with processes(found) as hands:
            yield hands
    else:
        with ray_hands(found) as hands:
            yield hands


@contextmanager
def keeping(folder: Path | None, graph: Graph, model: str, hands: Hands, methods: Methods) -> Iterator[tuple[Hands, WorkFolder | None]]:
    """The hands with a work folder, where one is given. InputError as `work_folder`."""
    if folder is None:
        yield hands, None
        return
    structure = hashlib.sha256("\n".join(f"{const.path} {const.type}" for const in graph.state).encode()).hexdigest()
    with work_folder(folder, model, structure) as work:
        yield Remembering(hands, work, methods), work
