"""Files read with care: what a file says is bounded in size and depth, stays inside its folder, and is unpickled nowhere. Each message
begins with the path.

Nothing that is read decides how much is read: texts have a largest size, JSON a deepest nesting, arrays may not unpack to much more than
lies on the disk. The errors are `StoredError`; the rooms that read turn it into theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from matmorph.runtime.format.plain import ManifestError

T = TypeVar("T")

LARGEST_TEXT = 1 << 28
"""Bytes of a JSON or text file: a report of ten thousand matmuls has a fiftieth of it."""
DEEPEST = 64
"""Tables and lists inside each other; ours have six."""
_CHUNK = 1 << 20
_SETTLED = 2_000_000_000
"""Nanoseconds after which a file that changes again has another time: clocks of file systems tick as slowly as this."""
_DRIVE = re.compile(r"[A-Za-z]:")


class StoredError(Exception):
    """`PATH: what is wrong with the file`."""


def damaged(path: Path, error: BaseException | str) -> NoReturn:
    """Raises StoredError, in one line."""
    text = error if isinstance(error, str) else str(error) or type(error).__name__
    line = " ".join(text.split())[:300]
    raise StoredError(f"{path}: cannot be read: {line}") from (None if isinstance(error, str) else error)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a reader of this file raises, as StoredError: readers of other packages know no common error, and damage reaches all of
    their code. ManifestError keeps its key."""
    try:
        yield
    except StoredError:
        raise
    except ManifestError as error:
        raise StoredError(f"{path}: {error}") from error
    except RecursionError as error:
        raise StoredError(f"{path}: cannot be read: nested too deep") from error
    except Exception as error:
        damaged(path, error)


# ---- text


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """UTF-8. Raises StoredError for a file that is missing, larger, or of something else."""
    _refuse_large(path, largest)
    with reading(path):
        return path.read_text(encoding="utf-8")


def read_bytes(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """All of a small file. Raises StoredError for one that is missing, larger, or of something else."""
    _refuse_large(path, largest)
    with reading(path):
        return path.read_bytes()


def _refuse_large(path: Path, largest: int) -> None:
    if not path.is_file():
        raise StoredError(f"{path}: {'not a file' if path.exists() else 'missing'}")
    with reading(path):
        size = path.stat().st_size
        if size > largest:
            raise StoredError(f"{path}: has {size} bytes, at most {largest} are read")


def read_json(path: Path, read: Callable[[Any], T]) -> T:
    """What `read` makes of the data. Raises StoredError for a file that is no JSON, and for a ManifestError of `read`."""
    return parse_json(read_text(path), path, read)


def parse_json(text: str, path: Path, read: Callable[[Any], T]) -> T:
    """The same of a text; `path` is what errors call it."""
    with reading(path):
        data = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if _deeper_than(data, DEEPEST):
            raise StoredError(f"{path}: cannot be read: nested more than {DEEPEST} deep")
        return read(data)


def entries(data: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every table, at any depth; a list under a key is each of its items. No recursion: files may nest as they like."""
    waiting: list[Any] = [data]
    while waiting:
        here = waiting.pop()
        if isinstance(here, list):
            waiting.extend(here)
            continue
        if not isinstance(here, dict):
            continue
        for key, value in here.items():
            yield str(key), value
            if isinstance(value, dict | list):
                waiting.append(value)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    """A number with a point or an exponent. `1e400` is JSON, but no number that could be written again."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is beyond the largest number")
    return value


def _deeper_than(data: Any, depth: int) -> bool:
    level = [data]
    while level and depth >= 0:
        level = [item for one in level if isinstance(one, dict | list) for item in (one.values() if isinstance(one, dict) else one)]
        level = [item for item in level if isinstance(item, dict | list)]
        depth -= 1
    return bool(level)


# ---- arrays


# ---- names and places


def check_name(name: Any, where: str) -> str:
    """A file's name inside a folder, `/` between folders. Raises ManifestError for one that leads out of it, on any system. `where` says
    the name."""
    text = str(name)
    fine = isinstance(name, str) and "\\" not in text and not _DRIVE.match(text) and text.isprintable()
    if not fine or any(part in ("", ".", "..") for part in text.split("/")):
        raise ManifestError(f"{where}: a file must lie inside the folder")
    return text


def inside(folder: Path, name: str) -> Path:
    """`folder/name`. Raises StoredError where a link on the way leads out of the folder; the shared store of a hub's cache, which is made
    of such links, counts as inside."""
    path = folder / name
    with reading(path):
        real, home = path.resolve(), folder.resolve()
    if real.is_relative_to(home) or any(real.is_relative_to(store) for store in _stores(folder, home)):
        return path
    raise StoredError(f"{path}: is a link that leads out of the folder, to {real}")


def _stores(folder: Path, home: Path) -> Iterator[Path]:
    """`models--x/blobs` for `models--x/snapshots/REVISION` and what lies below it."""
    for place in (folder.absolute(), home):
        for above in (place, *place.parents):
            if above.parent.name == "snapshots" and "--" in above.parent.parent.name:
                yield (above.parent.parent / "blobs").resolve()


# ---- hashes


def sha256(path: Path) -> str:
    """Lower-case hex digest, read in pieces: data files can be larger than memory. OSError as from reading.

    Remembered within a process by path, size and times, so that a folder that is opened again is not read again; a file that changed within
    the last two seconds is read each time, for its next change might leave it the same time.
    """
    found = path.stat()
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < _SETTLED:
        return _hashed(path)
    return _remembered(path.absolute(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=1024)
def _remembered(path: Path, *identity: int) -> str:
    return _hashed(path)


def _hashed(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
