"""Workers of Ray (`--workers ray`, `--workers ray://HOST:PORT`): tensors go by its object store, and it does a task again whose worker
died.

Ray is an extra (`pip install matmorph[distributed]`); nothing of it is imported before it is asked for. The machines of a cluster need
matmorph in the same version.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from matmorph.errors import InputError, RewriteError
from matmorph.passes.work.processes import TRIES, told
from matmorph.passes.work.task import Task
from matmorph.passes.work.wire import Shared, pickled, raw, unpickled

_PATIENCE_S = 5.0


class RayHands:
    """Of a Ray that is running. `count`: its CPUs."""

    def __init__(self, ray: Any, count: int) -> None:
        self.count: int | None = count
        self._ray = ray
        self._run = ray.remote(num_cpus=1, max_retries=TRIES - 1)(answered)
        # once in the store, however many tasks read it; Ray lets go of what nobody refers to
        self._store = Shared("there", lambda tensor: ray.put(raw(tensor)), lambda reference: None)

    def do(self, task: Task) -> Any:
        """As `Processes.do`."""
        references: list[Any] = []
        with self._store.placing() as put:

            def place(tensor: Tensor) -> Any:
                how, where, dtype, shape = put(tensor)
                if how == "there":
                    references.append(where)
                    where = len(references) - 1
                return how, where, dtype, shape

            try:
                request = pickled(task, place)
                return told(task, *unpickled(self._ray.get(self._run.remote(request, *references))))
            except (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.OutOfMemoryError) as error:
                raise RewriteError(f"{task.path}: {TRIES} workers of Ray died over it ({type(error).__name__})") from error
            except self._ray.exceptions.RayError as error:
                line = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise RewriteError(f"{task.path}: Ray could not do it: {line}") from error


def answered(request: bytes, *arrays: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """In a worker of Ray: what a worker of this machine answers."""
    from matmorph.passes.methods import all_methods
    from matmorph.passes.work.worker import answer_of

    torch.set_num_threads(1)
    return pickled(answer_of(unpickled(request, arrays), all_methods()))


@contextmanager
def ray_hands(address: str) -> Iterator[RayHands]:
    """`address`: "ray" starts one here, "ray://HOST:PORT" is one that runs. InputError where Ray is not installed or does not answer."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--workers ray needs Ray, which is not installed", ["pip install 'matmorph[distributed]'"]) from error
    if address != "ray":
        _refuse_silent(address)
    where = {"address": address} if address != "ray" else {"include_dashboard": False}
    try:
        ray.init(**where, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        count = int(ray.cluster_resources().get("CPU", 0))
    except Exception as error:  # Ray raises what its parts raise
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"--workers {address}: Ray does not start: {line}") from error
    try:
        if not count:
            raise InputError(f"--workers {address}: this Ray has no CPU to work with")
        yield RayHands(ray, count)
    finally:
        ray.shutdown()


def _refuse_silent(address: str) -> None:
    """Ray itself asks for half a minute before it says the same."""
    try:
        found = urlsplit(address)
        host, port = found.hostname, found.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise InputError(f"--workers {address}: an address of Ray is ray://HOST:PORT", ["its client port is 10001 where nobody changed it"])
    try:
        socket.create_connection((host, port), _PATIENCE_S).close()
    except OSError as error:
        raise InputError(f"--workers {address}: nobody answers there ({error.strerror or error})") from error
