"""An artefact folder opened for reading: a file of it is handed out once it is what the manifest says.

`manifest.json` is what everything is held against; `train.json` lists the files of training, and stands in where a folder has no other.
Whoever reads a file of a folder asks `checked` for its path, so that a changed byte is an error where it is read and not a wrong result
(decision V3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from matmorph.runtime.format.artifact import UNHASHED, FileRecord
from matmorph.runtime.format.reading import StoredError, inside, reading, sha256


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """`files`: what `listed_in` says of them. `verify`: False = sizes and hashes are not looked at."""

    path: Path
    files: Mapping[str, FileRecord]
    listed_in: str
    verify: bool = True

    def checked(self, name: str) -> Path:
        """The path of a file, which is there, inside the folder, and as it was written. Raises StoredError, naming it."""
        path = inside(self.path, name)
        if not path.is_file():
            raise StoredError(f"{path}: missing")
        if not self.verify or name in UNHASHED:
            return path
        if name not in self.files:
            raise StoredError(f"{path}: is not listed in {self.listed_in}, so nothing says what it should be")
        fault = changed(path, self.files[name], self.listed_in)
        if fault is not None:
            raise StoredError(f"{path}: was changed: it {fault}")
        return path

    def check_all(self, names: Iterable[str]) -> None:
        """Raises StoredError for the first that is not as it was."""
        for name in names:
            self.checked(name)


def changed(path: Path, record: FileRecord, listed_in: str) -> str | None:
    """What differs from the record, None where nothing does; the size first, which costs nothing. StoredError for an unreadable file."""
    with reading(path):
        size = path.stat().st_size
        if size != record.bytes:
            return f"has {size} bytes, {listed_in} says {record.bytes}"
        return None if sha256(path) == record.sha256 else f"has another sha256 than {listed_in} says"
