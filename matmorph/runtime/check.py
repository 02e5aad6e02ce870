"""Is this artefact whole, and does it compute here what it computed where it was made? `python -m matmorph.runtime.check DIR`.

Files first: each one that the manifest lists must be there with its size and sha256, and nothing else may be. Then the outputs: each case
of check.npz is run and compared, and so is the gradient of each case of train_check.npz where training graphs lie in the folder. Exit code
0: all well; 1: something is not, and it is named; 2: no artefact folder, or wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matmorph.runtime.difference import case_differences
from matmorph.runtime.errors import ArtifactError, SessionError
from matmorph.runtime.format.arrays import read_arrays
from matmorph.runtime.format.artifact import CHECK_VECTORS, MANIFEST, UNHASHED, FileRecord, Manifest
from matmorph.runtime.format.cases import Case, read_case_arrays
from matmorph.runtime.format.folder import changed
from matmorph.runtime.format.printable import printable
from matmorph.runtime.format.reading import StoredError, inside, reading
from matmorph.runtime.manifest import artifact_folder, read_manifest, stored_errors
from matmorph.runtime.parts_check import check_parts
from matmorph.runtime.providers import Provider
from matmorph.runtime.session import Session
from matmorph.runtime.targets import TARGETS
from matmorph.runtime.training_check import check_training, is_training_folder


@dataclass(frozen=True, slots=True)
class CheckResult:
    """`lines`: what was checked and the figures. `problems`: what is wrong, each naming its file or output.

    `max_difference`: the largest difference over all cases and outputs, None where the outputs were not run. `training_apart`: the largest
    of eval.onnx from model.onnx, which may be twice as large.
    """

    lines: tuple[str, ...]
    problems: tuple[str, ...]
    max_difference: float | None = None
    provider: str | None = None
    training_apart: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems


def check(folder: str | os.PathLike[str], providers: str | Sequence[Provider] | None = None) -> CheckResult:
    """Files, then outputs. Raises ArtifactError when the folder is no artefact, ProviderError when a provider cannot be had.

    Outputs are run only when every listed file is as it was: a changed model must not be loaded to find out that it changed.
    """
    path = artifact_folder(folder)
    try:
        manifest = read_manifest(path)
    except ArtifactError as error:
        return CheckResult((), (str(error),))
    damaged = tuple(_damaged_files(path, manifest.files))
    problems = (*damaged, *_extra_files(path, manifest.files))
    if damaged:
        return CheckResult(("outputs: not run, because files are not as they were",), problems)
    files = f"files: {len(manifest.files)} as listed in {MANIFEST}"
    outputs = _check_outputs(path, manifest, providers)
    return replace(outputs, lines=(files, *outputs.lines), problems=(*problems, *outputs.problems))


def _damaged_files(folder: Path, files: Mapping[str, FileRecord]) -> Iterator[str]:
    for name, record in files.items():
        try:
            fault = _fault(folder, name, record)
        except StoredError as error:
            fault = f"unreadable file: {error}"
        if fault:
            yield fault


def _fault(folder: Path, name: str, record: FileRecord) -> str | None:
    path = folder / name
    if not path.exists():
        return f"missing file: {path}"
    inside(folder, name)
    if not path.is_file():
        return f"missing file: {path} is a folder"
    fault = changed(path, record, MANIFEST)
    return None if fault is None else f"changed file: {path} {fault}"


def _extra_files(folder: Path, files: Mapping[str, FileRecord]) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and name not in files and name not in UNHASHED:
            yield f"extra file: {path} is not listed in {MANIFEST}"


def _check_outputs(folder: Path, manifest: Manifest, providers: str | Sequence[Provider] | None) -> CheckResult:
    log: list[str] = []
    try:
        cases = read_cases(folder, manifest)
        session = Session(folder, providers, log=log.append, verify=False)  # it has been, file by file
    except ArtifactError as error:
        return CheckResult(tuple(log), (str(error),))
    worst = 0.0
    problems: list[str] = []
    for number, case in enumerate(cases):
        try:
            actual = session.run(case.inputs)
        except SessionError as error:
            problems.append(f"case {number}: {error}")
            continue
        for name, figure in case_differences(manifest.cache, case, actual):
            worst = max(worst, figure)
            if not figure <= manifest.tolerance:  # not `>`: NaN is a failure
                problems.append(f"case {number}: output {name} differs by {figure:.3g}, allowed is {manifest.tolerance:.3g}")
    log.append(f"outputs: {len(cases)} cases on {session.provider}, largest difference {worst:.2e}, allowed {manifest.tolerance:.3g}")
    if manifest.parts is not None:
        parts = check_parts(folder, manifest, manifest.parts, cases, providers)
        log += parts.lines
        problems += parts.problems
    apart = 0.0
    if is_training_folder(folder):
        training = check_training(folder, session, manifest.tolerance)
        log += training.lines
        problems += training.problems
        apart = training.apart
    return CheckResult(tuple(log), tuple(problems), worst, session.provider, apart)


def read_cases(folder: Path, manifest: Manifest) -> tuple[Case, ...]:
    """The cases of check.npz. Raises ArtifactError when one is not complete."""
    path = folder / CHECK_VECTORS
    if not path.is_file():
        raise ArtifactError(f"{path}: missing, so no output can be checked")
    with stored_errors(), reading(path):
        cases = read_case_arrays(read_arrays(path))
    for number, case in cases.items():
        _refuse_incomplete(path, manifest, number, case)
    return tuple(cases.values())


def _refuse_incomplete(path: Path, manifest: Manifest, number: int, case: Case) -> None:
    for what, infos, arrays in (("input", manifest.inputs, case.inputs), ("output", manifest.outputs, case.outputs)):
        names = {info.name for info in infos}
        if names != set(arrays):
            raise ArtifactError(f"{path}: case {number} does not hold every {what}: differs in {', '.join(sorted(names ^ set(arrays)))}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m matmorph.runtime.check",
        description="Check an artefact folder: its files, and its outputs on this machine's ONNX Runtime.",
    )
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument(
        "--provider", action="append", metavar="NAME", help=f"{', '.join(sorted(TARGETS))}, or ONNX Runtime's name; may be repeated"
    )
    options: Any = parser.parse_args(arguments)
    try:
        result = check(options.folder, options.provider)
    except SessionError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    return tell(result)


def tell(result: Any) -> int:
    """Prints what a `check` found; the exit code."""
    for line in result.lines:
        print(printable(line))
    for problem in result.problems:
        print(printable(problem), file=sys.stderr)
    print("ok" if result.ok else f"failed: {len(result.problems)} problem{'s' if len(result.problems) > 1 else ''}")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
