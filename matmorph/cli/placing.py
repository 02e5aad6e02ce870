"""`matmorph verify --target`: where ONNX Runtime would run the nodes of a folder's graphs, read from its list of kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from matmorph.errors import InputError
from matmorph.runtime.targets import TARGETS
from matmorph.runtime.targets.placement import Placement
from matmorph.runtime.targets.target import Target

if TYPE_CHECKING:
    from matmorph.runtime.check import CheckResult


def placing_target(name: str) -> Target:
    """The target of that name. Raises InputError for one that hands nothing back."""
    known = [target.name for target in TARGETS.values() if target.hands_back]
    if name not in known:
        raise InputError(f"--target {name}: only {', '.join(known)} hands nodes back to the CPU", [f"give --target {known[0]}, or none"])
    return TARGETS[name]


def with_placements(result: CheckResult, folder: Path, target: Target) -> tuple[CheckResult, tuple[Placement, ...]]:
    """What a check found, and what is known of the folder's graphs on the target; a matrix product, attention or norm that it hands back is
    a problem. A graph that is not as it was, which the check has named, is not read."""
    found, unread = _placed(folder, target)
    lines = [line for one in found for line in one.lines()]
    problems = [f"{one.graph}: {one.title} would hand back to the CPU {node.line()}" for one in found for node in one.heavy()]
    return replace(result, lines=(*result.lines, *lines), problems=(*result.problems, *problems, *unread)), tuple(found)


def _placed(folder: Path, target: Target) -> tuple[list[Placement], list[str]]:
    """(of each graph that is as it was, what is wrong with one that is and cannot be read)."""
    from matmorph.exporters.onnx.placement import placement_of
    from matmorph.runtime.errors import ArtifactError
    from matmorph.runtime.format.reading import StoredError, reading
    from matmorph.runtime.manifest import open_folder

    found: list[Placement] = []
    unread: list[str] = []
    try:
        manifest, stored = open_folder(folder)
    except ArtifactError:
        return found, unread
    for name in sorted(name for name in manifest.files if name.endswith(".onnx")):
        try:
            path = stored.checked(name)
        except StoredError:
            continue
        try:
            with reading(path):
                found.append(placement_of(path, target))
        except StoredError as error:
            unread.append(str(error))
    return found, unread
