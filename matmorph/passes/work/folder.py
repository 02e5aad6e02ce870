"""A work folder (`--work DIR`): what a run has finished, each piece under the hash of all that it was made from.

    work.json                      the versions that wrote it, and the model that it belongs to
    KIND/HH/HASH.safetensors       one result of a task, or the statistics of one calibration
    tensor/HH/HASH.safetensors     a tensor of those, under the hash of its own numbers; several may share it

Every file takes its name when it is whole and on the disk, so that a run which is killed at any moment leaves only finished pieces. One run
at a time has the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as write_tensors
from torch import Tensor

from matmorph.errors import InputError
from matmorph.ir.mapped import DTYPES, tensor_at
from matmorph.passes.work.digests import Digests, tensor_sha256
from matmorph.passes.work.nest import DamagedError, about, put_together, read, taken_apart, written
from matmorph.runtime.disk.files import is_full, write_whole
from matmorph.runtime.disk.locks import Held, held
from matmorph.runtime.format.version import __version__

FORMAT, RECORD, LOCK = 1, "work.json", ".lock"
SITE, PRICE, STATISTICS, TENSOR = "site", "price", "statistics", "tensor"
KINDS = (SITE, PRICE, STATISTICS, TENSOR)
_ENDING, _LARGE = ".safetensors", 1 << 16
_PAGE = 64


@dataclass(frozen=True, slots=True)
class Record:
    """What `work.json` says. `model`: its name; `sha256`: of its structure, weights not included."""

    matmorph: str
    torch: str
    model: str
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "matmorph": self.matmorph, "torch": self.torch, "model": self.model, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class Status:
    """`counts`, `bytes`: files and their size by kind. `running`: who has the folder now, "" for nobody."""

    record: Record
    counts: Mapping[str, int]
    bytes: Mapping[str, int]
    running: str

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class WorkFolder:
    """An open work folder, which this process has for itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digests = Digests()

    def get(self, kind: str, key: str, packages: Collection[str]) -> Any | None:
        """What was put there; None where nothing was. InputError for a damaged file."""
        place = self._place(kind, key)
        try:
            data = place.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{place} cannot be read: {error.strerror}") from error
        try:
            if about(data).get("sha256") != _content(data):
                raise DamagedError("its content is not what was written")
            return read(data, packages)
        except DamagedError as error:
            raise _damaged(place, error) from error

    def put(self, kind: str, key: str, value: Any, words: Mapping[str, str]) -> None:
        """Whole or not at all. `words`: of it, for people. InputError where the folder cannot be written; NotANestError."""
        plain = written(value, words)
        self._write(self._place(kind, key), written(value, {**words, "sha256": _content(plain)}))

    def get_large(self, kind: str, key: str, packages: Collection[str]) -> Any | None:
        """What `put_large` wrote, its larger tensors mapped from their files: they come into memory as they are read."""
        found = self.get(kind, key, packages)
        if found is None:
            return None
        skeleton, kept = found
        large = {item: self._tensor(item) for item in kept if isinstance(item, str)}
        tensors = [large[item] if isinstance(item, str) else item for item in kept]
        try:
            return put_together(json.loads(skeleton), tensors, packages)
        except DamagedError as error:
            raise _damaged(self._place(kind, key), error) from error

    def put_large(self, kind: str, key: str, value: Any, words: Mapping[str, str]) -> None:
        """One file for each of the larger tensors, one in memory at a time."""
        skeleton, tensors = taken_apart(value)
        kept = [self._kept(tensor) if tensor.numel() * tensor.element_size() > _LARGE else tensor for tensor in tensors]
        self.put(kind, key, (json.dumps(skeleton), kept), words)

    def _kept(self, tensor: Tensor) -> str:
        digest = self._digests.of_tensor(tensor)
        place = self._place(TENSOR, digest)
        if not place.exists():
            self._write(place, _aligned(tensor))
        return digest

    def _tensor(self, digest: str) -> Tensor:
        place = self._place(TENSOR, digest)
        try:
            found = _mapped(place)
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise _damaged(place, error) from error
        if tensor_sha256(found) != digest:
            raise _damaged(place, "its numbers are not those that were written")
        return found

    def _place(self, kind: str, key: str) -> Path:
        return self.path / kind / key[:2] / f"{key}{_ENDING}"

    def _write(self, place: Path, data: bytes) -> None:
        with _writing(self.path):
            write_whole(place, data)


def _content(data: bytes) -> str:
    """Of the tensors and the skeleton: all but the words."""
    size = int.from_bytes(data[:8], "little")
    words = dict(about(data))
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    digest = hashlib.sha256(f"{words.get('nest')} {json.dumps(header, sort_keys=True)}".encode())
    digest.update(memoryview(data)[8 + size :])
    return digest.hexdigest()


def _aligned(tensor: Tensor) -> bytes:
    """A safetensors file whose numbers begin where a kernel likes them to."""
    one = {"0": tensor.detach().cpu().contiguous()}
    start = 8 + int.from_bytes(write_tensors(one, {"pad": ""})[:8], "little")
    return write_tensors(one, {"pad": " " * (-start % _PAGE)})


def _mapped(place: Path) -> Tensor:
    with place.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))["0"]
        return tensor_at(file.fileno(), 8 + size + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _damaged(place: Path, why: object) -> InputError:
    return InputError(f"{place} is damaged: {why}", ["delete the file, and its part is computed again"])


# the folder as a whole


@contextmanager
def work_folder(path: Path, model: str, structure: str) -> Iterator[WorkFolder]:
    """The folder, for this process alone until the block ends; made where it lacks. `model`, `structure`: see `Record`.

    Raises InputError: another version's or another model's folder, a folder of something else, one that another run has or that cannot be
    written.
    """
    _refuse_foreign(path)
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        _claim(path, Record(__version__, torch.__version__, model, structure))
        yield WorkFolder(path)


def status(path: Path) -> Status:
    """InputError for what is no work folder."""
    record = _record(path)
    counts, sizes = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for kind in KINDS:
        for place in _files(path, kind):
            with suppress(FileNotFoundError):  # another run may tidy up
                counts[kind] += 1
                sizes[kind] += place.stat().st_size
    return Status(record, counts, sizes, _holder(path))


def clean(path: Path) -> Status:
    """Takes all that matmorph put there away, and the folder where nothing else is in it; what there was. InputError as `status`, and where
    a run has it."""
    _record(path)
    with _locked(path), _writing(path):
        found = status(path)
        for kind in KINDS:
            for place in _files(path, kind):
                place.unlink(missing_ok=True)
            for folder in (*(path / kind).glob("??"), path / kind):
                with suppress(OSError):  # something else is in it, or it never was
                    folder.rmdir()
        (path / RECORD).unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()
    return found


def _files(path: Path, kind: str) -> Iterator[Path]:
    yield from sorted((path / kind).glob(f"??/*{_ENDING}"))


def _record(path: Path) -> Record:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder" if not path.exists() else f"{path}: a work folder is wanted, this is a file")
    place = path / RECORD
    if not place.is_file():
        raise InputError(f"{path} is no work folder: it has no {RECORD}")
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        words = {name: data[name] for name in ("matmorph", "torch", "model", "sha256")}
        if not isinstance(data["format"], int) or not all(isinstance(word, str) for word in words.values()):
            raise ValueError("a word of it is of another kind")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{place} cannot be read: {error}", ["delete the folder, or name another one"]) from error
    if data["format"] != FORMAT:
        raise InputError(f"{path}: a work folder of format {data['format']}, and this matmorph writes format {FORMAT}", _ELSEWHERE)
    return Record(**words)


_ELSEWHERE = ["give another folder, or empty this one: matmorph work clean DIR"]


def _refuse_foreign(path: Path) -> None:
    """Anything but a work folder, an empty folder, or nothing."""
    if not path.exists() or (path / RECORD).exists():
        return
    if not path.is_dir():
        raise InputError(f"{path}: a work folder is wanted, this is a file")
    try:
        others = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if others:
        raise InputError(f"{path} is no work folder: it holds {others[0]}", ["name an empty folder, or one that is not there yet"])


def _claim(path: Path, wanted: Record) -> None:
    """The record of the folder, written where there is none."""
    if not (path / RECORD).exists():
        with _writing(path):
            write_whole(path / RECORD, (json.dumps(wanted.to_dict(), indent=2) + "\n").encode())
        return
    found = _record(path)
    if (found.matmorph, found.torch) != (wanted.matmorph, wanted.torch):
        theirs, ours = (f"matmorph {one.matmorph} with torch {one.torch}" for one in (found, wanted))
        raise InputError(f"{path}: work of {theirs}, and this is {ours}", _ELSEWHERE)
    if (found.model, found.sha256) != (wanted.model, wanted.sha256):
        raise InputError(f"{path}: work on another model ({found.model}), and this is {wanted.model}", _ELSEWHERE)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """InputError where another process has the folder."""
    manager = held(path / "run")
    try:
        manager.__enter__()
    except Held as error:
        raise InputError(f"{path}: another run has this work folder ({error.who})", ["wait for it, or give another folder"]) from error
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        manager.__exit__(None, None, None)


def _holder(path: Path) -> str:
    """Who has it; a look that takes nothing."""
    place = path / ".run.lock"
    if not place.exists():
        return ""
    try:
        with held(path / "run"):
            return ""
    except Held as error:
        return error.who
    except OSError:
        return ""


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    why = "the disk is full" if is_full(error.errno) else str(error.strerror or error)
    return InputError(f"{path} cannot be written: {why}", ["what is finished is kept: the same command goes on from there"])
