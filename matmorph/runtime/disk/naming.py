"""A file or folder takes its name: never over another one, or in exchange with it; in one step where the file system has such a step."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

PARTIAL, OLD = "partial", "old"
"""What something is called before it has its name, and what an older one is called while another takes its name:
`.NAME.TOKEN.partial`, `.NAME.TOKEN.old`."""

_NO_REPLACE, _EXCHANGE = 1, 2  # flags of Linux's renameat2(2)
_HERE = -100  # AT_FDCWD: paths that are not absolute begin at the current folder
_LACKING = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM})
"""What a kernel, a file system or a sandbox without such a step answers; what is really not permitted is said again by the plain one."""
_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR})


def passing_name(target: Path, ending: str = PARTIAL) -> Path:
    """A name beside `target` that nothing has yet."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{ending}")


def with_ending(passing: Path, ending: str) -> Path:
    """The passing name of the same token with another ending."""
    return passing.with_name(f"{passing.name.rpartition('.')[0]}.{ending}")


def passing_names(target: Path, ending: str) -> Iterator[Path]:
    """What lies beside `target` under a passing name; nothing where the folder cannot be read."""
    wanted = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.{ending}")
    try:
        found = sorted(entry.name for entry in os.scandir(target.parent) if wanted.fullmatch(entry.name))
    except OSError:
        return
    yield from (target.with_name(name) for name in found)


def take_name(source: Path, target: Path) -> None:
    """`source` is called `target` from now on. FileExistsError where anything else is called so; both then stay as they are."""
    if _renamed(source, target, _NO_REPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if source.is_dir() or os.name == "nt":
        _rename_folder(source, target)
    else:
        _rename_file(source, target)


def exchange(one: Path, other: Path) -> bool:
    """Each takes the other's name, at once. False where this system has no such step: nothing was done then."""
    return _renamed(one, other, _EXCHANGE)


def free_name(target: Path) -> Iterator[Path]:
    """NAME-2, NAME-3 ...: where something can go whose name is taken."""
    number = 2
    while True:
        yield target.with_name(f"{target.name}-{number}")
        number += 1


def _rename_folder(source: Path, target: Path) -> None:
    """POSIX refuses a name that has anything but an empty folder, Windows any that is taken."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in _TAKEN:
            raise FileExistsError(error.errno, error.strerror, str(target)) from error
        raise


def _rename_file(source: Path, target: Path) -> None:
    """A second name, which is refused where it is taken; then the first one goes. Where files cannot have two, an empty one keeps it."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(source, target)
    else:
        os.unlink(source)


def _renamed(source: Path, target: Path, flag: int) -> bool:
    """By renameat2 with a flag; False where that is lacking."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _LACKING:
        return False
    raise OSError(number, os.strerror(number), str(target))
