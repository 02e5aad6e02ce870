"""What a written folder says of itself, read back: the report, the resolved spec, hashes, times, and a Pareto front where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matmorph.errors import InputError
from matmorph.report.model import Report
from matmorph.runtime.format.artifact import MANIFEST, PAGE, PARETO, REPORT, RUN, SPEC, shown
from matmorph.runtime.format.folder import StoredFolder
from matmorph.runtime.format.plain import ManifestError, check_numbers, from_plain, typed
from matmorph.runtime.format.reading import StoredError, read_json, read_text


@dataclass(frozen=True, slots=True)
class Context:
    """What a page shows beside the report. `spec`: the resolved spec as YAML; `source_sha256`: of the source's weights; `files`: name ->
    (sha256, bytes); `run`: run.json; `pareto`: pareto.json. All may be empty."""

    spec: str = ""
    source_sha256: str = ""
    files: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    pareto: Mapping[str, Any] = field(default_factory=dict)


def read_folder(folder: Path, verify: bool = True) -> tuple[Report, Context]:
    """The report of an artefact folder and what goes with it. InputError where there is no report, or one that cannot be read or, with
    `verify`, is not the one that the manifest lists; what else is missing or damaged is left empty (`matmorph verify` judges that)."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not (folder / REPORT).is_file():
        raise InputError(f"{folder}: not an artefact folder ({REPORT} is missing)", ["name a folder that `matmorph compile` wrote"])
    return read_report(listed_file(folder, REPORT, verify)), read_context(folder)


def listed_file(folder: Path, name: str, verify: bool) -> Path:
    """The path of a file, which is as the manifest says, where that says something of it. InputError."""
    stored = StoredFolder(folder, shown(_table(folder / MANIFEST))[1], MANIFEST, verify)
    try:
        return stored.checked(name) if name in stored.files else folder / name
    except StoredError as error:
        raise InputError(str(error)) from error


def read_context(folder: Path) -> Context:
    """What a folder says beside its report. While it is being written it has no run.json, so a page made then does not change with the
    time that it took."""
    source, files = shown(_table(folder / MANIFEST))
    return Context(
        spec=_text(folder / SPEC),
        source_sha256=source,
        files={name: (one.sha256, one.bytes) for name, one in files.items() if name not in (REPORT, PAGE)},  # it cannot hold its own
        run=_table(folder / RUN),
        pareto=_table(folder / PARETO),
    )


def read_report(path: Path) -> Report:
    """report.json as the Report that it was written from. InputError for a file that is none; keys that are not known are left out."""
    try:
        return from_plain(Report, read_json(path, lambda data: data))
    except StoredError as error:
        raise InputError(str(error)) from error
    except ManifestError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except StoredError:
        return ""


def _table(path: Path) -> Mapping[str, Any]:
    try:
        return read_json(path, _checked_table)
    except StoredError:
        return {}


def _checked_table(data: Any) -> Mapping[str, Any]:
    check_numbers(data, "")
    table: Mapping[str, Any] = typed(data, dict, "")
    return table
