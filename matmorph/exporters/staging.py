"""A folder that is written whole or not at all, and never over something of the user's.

Everything goes into a folder with a passing name beside the wanted one, which takes the name at the end, in one step of the file system
where it has such steps. At every moment one whole folder is there: the older one under its name, the new one under it, or, on a file system
without an exchange and for the time of one rename, the older one under a passing name, from which the next run brings it back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from matmorph.errors import InputError, VerifyError
from matmorph.runtime.disk.files import is_full
from matmorph.runtime.disk.locks import abandoned, passing
from matmorph.runtime.disk.naming import OLD, PARTIAL, exchange, free_name, passing_names, take_name, with_ending
from matmorph.runtime.format.artifact import MANIFEST, is_manifest
from matmorph.runtime.format.reading import StoredError, read_json


@dataclass(frozen=True, slots=True)
class FolderKind:
    """What may be replaced where that is asked for: `called` in messages, `test` knows one."""

    called: str
    test: Callable[[Path], bool]

    def replaceable(self, path: Path) -> bool:
        """Whether nothing that matmorph did not write would go with it."""
        return not path.is_symlink() and path.is_dir() and (not any(path.iterdir()) or self.test(path))


def is_artifact(folder: Path) -> bool:
    """Whether the folder has a manifest.json that matmorph wrote."""
    try:
        return read_json(folder / MANIFEST, is_manifest)
    except StoredError:
        return False


ARTIFACT = FolderKind("an artefact", is_artifact)


def refuse_existing(folder: str | Path, force: bool, kind: FolderKind = ARTIFACT) -> None:
    """Raises InputError where `staged_folder` would refuse: worth asking before hours of work.

    An existing folder needs `force`, and even then only an empty one or an earlier one of its kind (an artefact has a manifest.json of
    ours) is replaced. What a killed run left beside it is put right first.
    """
    path = Path(folder)
    tidy(path.absolute(), kind)
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise InputError(f"{path} exists and is not a folder")
    if not force:
        raise InputError(f"{path}: the folder exists", ["choose another folder, or replace it with --force (force=True)"])
    if not kind.replaceable(path):
        raise InputError(
            f"{path} holds something other than {kind.called} and is not replaced, even with --force",
            ["choose another folder, or empty this one yourself"],
        )


def tidy(target: Path, kind: FolderKind = ARTIFACT) -> None:
    """Puts right what killed runs left beside `target`: an older folder that had lost its name gets it again, half-written ones go."""
    for old in passing_names(target, OLD):
        with abandoned(with_ending(old, PARTIAL)) as dead:
            if not dead and os.path.lexists(with_ending(old, PARTIAL)):
                continue  # whoever moved it aside is alive
            with contextlib.suppress(OSError):
                take_name(old, target)
        if os.path.lexists(target) and kind.test(old):
            shutil.rmtree(old, ignore_errors=True)
    for partial in passing_names(target, PARTIAL):
        with abandoned(partial) as dead:
            if dead:
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def staged_folder(folder: str | Path, force: bool = False, kind: FolderKind = ARTIFACT) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well and vanishes when it does not.

    Parent folders are made where they lack. Raises InputError for a folder that exists (see `refuse_existing`), that cannot be written,
    and for a full disk; an older artefact stays as it was in each case. Where something came to that name meanwhile which must not be
    replaced, the new folder stays whole under another one, and InputError says which.
    """
    path = Path(folder)
    refuse_existing(path, force, kind)
    target = path.absolute()
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with passing(target, Path.mkdir) as staging:
            with _gone_if_half(staging):
                yield staging
            rest = _placed(staging, target, path, kind if force else None)
        if rest is not None:
            shutil.rmtree(rest, ignore_errors=True)
    except OSError as error:
        raise InputError(_reason(path, error)) from error
    finally:
        if not os.path.lexists(target):
            for parent in made:
                with contextlib.suppress(OSError):  # something else lies there
                    parent.rmdir()


@contextlib.contextmanager
def _gone_if_half(staging: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _placed(staging: Path, target: Path, shown: Path, replaced: FolderKind | None) -> Path | None:
    """Gives the whole folder its name; the older one that had it, which is to go. OSError: the new folder is gone, nothing else is."""
    try:
        take_name(staging, target)
    except FileExistsError:
        if replaced is None or not replaced.replaceable(target):
            place = _beside(staging, target)
            raise InputError(
                f"{shown} came to be while this ran and is not replaced", [f"the finished folder is whole and lies at {place}"]
            ) from None
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    else:
        return None
    rest = _swapped(staging, target)
    if replaced is not None and not replaced.replaceable(rest):
        place = _beside(rest, target)
        raise InputError(f"{shown} came to be while this ran; what it holds lies at {place} now, and the finished folder at {shown}")
    return rest


def _swapped(staging: Path, target: Path) -> Path:
    """The new folder in the place of the older one; where that lies now."""
    try:
        if exchange(staging, target):
            return staging
        return _moved_aside(staging, target)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _moved_aside(staging: Path, target: Path) -> Path:
    """In two steps; between them the older folder has a passing name, and gets its own back if the second one fails."""
    old = with_ending(staging, OLD)
    try:
        take_name(target, old)
        take_name(staging, target)
    except BaseException:
        if old.exists() and not os.path.lexists(target):
            take_name(old, target)
        raise
    return old


def _beside(folder: Path, target: Path) -> Path:
    """The folder under the first name beside `target` that is free."""
    for place in free_name(target):
        with contextlib.suppress(FileExistsError):
            take_name(folder, place)
            return place
    raise VerifyError(f"no name is free beside {target}")


_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def _reason(folder: Path, error: OSError) -> str:
    if is_full(error.errno):
        return f"{folder} cannot be written: the disk is full ({error.strerror}); nothing was left behind"
    if error.errno in _DENIED:
        return f"{folder} cannot be written: no permission ({error.strerror})"
    return f"{folder} cannot be written: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
