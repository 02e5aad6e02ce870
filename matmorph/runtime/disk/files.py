"""A file that is whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from matmorph.runtime.disk.locks import abandoned, passing
from matmorph.runtime.disk.naming import PARTIAL, passing_names, take_name


@contextmanager
def whole_file(target: Path, replace: bool = True) -> Iterator[Path]:
    """An empty file beside `target` to write to, by its name; it takes the name of `target` when the block ends well, and goes otherwise.

    The folder is made where it lacks. `replace` False: FileExistsError where something has come to that name, which stays. What killed
    processes left goes too.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in passing_names(target, PARTIAL):
        with abandoned(left) as ours:
            if ours:
                left.unlink(missing_ok=True)
    with passing(target, _touch) as partial:
        try:
            yield partial
            _flush(partial)
            if replace:
                os.replace(partial, target)
            else:
                take_name(partial, target)
            _flush_folder(target.parent)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write_whole(target: Path, data: bytes, replace: bool = True) -> None:
    """The file with this in it, else as it was. OSError, and FileExistsError as `whole_file`."""
    with whole_file(target, replace) as partial:
        partial.write_bytes(data)


def is_full(number: int | None) -> bool:
    """Whether this error number says that there is no place left: on the disk, for the user, or in one file."""
    return number in _FULL


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def _touch(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """The new name itself must reach the disk too; Windows has no way to ask for that."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
