"""What the command line prints and writes: text without control characters, files whole and never over what is not to be replaced."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matmorph.errors import InputError
from matmorph.runtime.disk.files import whole_file
from matmorph.runtime.format.printable import printable


def say(text: str, end: str = "\n") -> None:
    """A result or a line beside it, on stdout."""
    print(printable(text), end=end)


def say_now(text: str) -> None:
    """A piece of a result that is still being made, on stdout at once."""
    print(printable(text), end="", flush=True)


def complain(text: str) -> None:
    """Lines on stderr."""
    print(printable(text), file=sys.stderr)


def say_json(data: Any) -> None:
    """The one thing on stdout under --json."""
    print(json.dumps(data, indent=2))


def refuse_file(path: Path, force: bool, ending: str = "") -> None:
    """Raises InputError for a file that is there, unless `force`, and for anything else in its place; before the work, not after it.

    `ending`: what the name must end in.
    """
    if not path.name.endswith(ending):
        raise InputError(f"{path}: trained parameters go into a file that ends in {ending}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, a file is wanted")
    if path.exists() and not force:
        raise InputError(f"{path}: the file exists", ["choose another name, or replace it with --force"])


@contextmanager
def new_file(path: Path, force: bool) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends well. Raises InputError for a place that cannot be written and, without
    `force`, for what came to that name meanwhile."""
    try:
        with whole_file(path, replace=force) as partial:
            yield partial
    except FileExistsError as error:
        raise InputError(f"{path} came to be while this ran and is not replaced") from error
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def write_file(path: Path, data: bytes, force: bool) -> None:
    """Whole or not at all. Raises InputError for a place that cannot be written and, without `force`, for what came to that name."""
    with new_file(path, force) as partial:
        partial.write_bytes(data)
