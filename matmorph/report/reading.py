"""What a written folder says of itself, read back: the report, the resolved spec, hashes, times, and a Pareto front where there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from matmorph.errors import InputError
from matmorph.ir.site import Bound, Sample, Spectrum
from matmorph.report.model import Parity, PartRow, Report, SiteRow, Totals
from matmorph.runtime.format.artifact import MANIFEST, PAGE, PARETO, REPORT, RUN, SPEC, shown

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Context:
    """What a page shows beside the report. `spec`: the resolved spec as YAML; `source_sha256`: of the source's weights; `files`: name ->
    (sha256, bytes); `run`: run.json; `pareto`: pareto.json. All may be empty."""

    spec: str = ""
    source_sha256: str = ""
    files: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    pareto: Mapping[str, Any] = field(default_factory=dict)


def read_folder(folder: Path) -> tuple[Report, Context]:
    """The report of an artefact folder and what goes with it. InputError where there is no report, or one that cannot be read; what else
    is missing or damaged is left empty (`matmorph verify` judges that)."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not (folder / REPORT).is_file():
        raise InputError(f"{folder}: not an artefact folder ({REPORT} is missing)", ["name a folder that `matmorph compile` wrote"])
    return read_report(folder / REPORT), read_context(folder)


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
        return _report(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _report(data: Mapping[str, Any]) -> Report:
    parity = data.get("parity")
    return _known(
        Report,
        {
            **data,
            "sites": tuple(_row(row) for row in data["sites"]),
            "totals": _known(Totals, data["totals"]),
            "parity": _known(Parity, parity) if parity else None,
        },
    )


def _row(data: Mapping[str, Any]) -> SiteRow:
    bound, spectrum, sample = data.get("bound"), data.get("spectrum"), data.get("sample")
    return _known(
        SiteRow,
        {
            **data,
            "parts": tuple(_known(PartRow, part) for part in data["parts"]),
            "bound": _known(Bound, bound) if bound else None,
            "spectrum": _known(Spectrum, spectrum) if spectrum else None,
            "sample": _known(Sample, sample) if sample else None,
        },
    )


def _known(kind: type[T], data: Mapping[str, Any]) -> T:
    """A dataclass from plain data, lists as the tuples that they were."""
    names = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items() if name in names})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _table(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
