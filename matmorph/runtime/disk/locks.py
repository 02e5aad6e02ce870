"""Locks that tell a living process from one that was killed: the system lets go of them however a process ends."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from matmorph.runtime.disk.naming import passing_name

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_HELD = frozenset({errno.EACCES, errno.EAGAIN, errno.EDEADLK})


class Held(Exception):  # noqa: N818 - it names what happened
    """Another process holds it; `who` says which, as far as that is known."""

    def __init__(self, who: str) -> None:
        self.who = who
        super().__init__(who)


@contextmanager
def held(target: Path) -> Iterator[None]:
    """No other process that asks has `target` meanwhile; raises Held where one has it. `.NAME.lock` lies beside it for that long.

    On a file system without locks nothing is held back.
    """
    path = target.with_name(f".{target.name}.lock")
    descriptor = _opened(path)
    try:
        yield
    finally:
        if sys.platform != "win32":  # there an open file keeps its name
            path.unlink(missing_ok=True)
        os.close(descriptor)
        if sys.platform == "win32":
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _opened(path: Path) -> int:
    """The lock's file, open and locked: the one that has the name, which a process that let go may just have taken away."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        if lock(descriptor) is False:
            who = os.read(descriptor, 64).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise Held(who or "another process")
        if same(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)


def lock(descriptor: int) -> bool | None:
    """Whether the open file or folder is this process's from now until it is closed; None where that cannot be known."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # a locked byte cannot be read there, and who it is stands at the front
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def same(descriptor: int, path: Path) -> bool:
    """Whether the name still belongs to what is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


@contextmanager
def passing(target: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """What `make` made beside `target` under a passing name, seen to belong to a living process for the block.

    Not on Windows, where an open file could not take its name: what a killed process left is then not known as such.
    """
    if sys.platform == "win32":
        path = passing_name(target)
        make(path)
        yield path
        return
    path, descriptor = _claimed(target, make)
    try:
        yield path
    finally:
        os.close(descriptor)


def _claimed(target: Path, make: Callable[[Path], object]) -> tuple[Path, int]:
    """Made and locked; anew where another process, tidying up, came between the two."""
    while True:
        path = passing_name(target)
        make(path)
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            if lock(descriptor) is not False and same(descriptor, path):
                return path, descriptor
            os.close(descriptor)


@contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody alive has `path`, which is then this process's for the block; False where that cannot be known."""
    if sys.platform == "win32":
        yield False
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield lock(descriptor) is True and same(descriptor, path)
    finally:
        os.close(descriptor)
