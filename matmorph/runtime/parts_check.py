"""Do the encoder and the decoder of a folder, one after the other, answer as the whole model was seen to answer? Part of `check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matmorph.runtime.difference import case_differences
from matmorph.runtime.errors import ArtifactError, SessionError
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.artifact import Manifest, ModelParts
from matmorph.runtime.format.cases import Case
from matmorph.runtime.providers import Provider
from matmorph.runtime.session import Session


@dataclass(frozen=True, slots=True)
class PartsResult:
    """`lines`: what was checked and the figures. `problems`: what is wrong."""

    lines: tuple[str, ...]
    problems: tuple[str, ...]


def check_parts(
    folder: Path,
    manifest: Manifest,
    parts: ModelParts,
    cases: Sequence[Case],
    providers: str | Sequence[Provider] | None,
) -> PartsResult:
    """Runs each case through the encoder and what that hands over through the decoder. One part is loaded at a time."""
    said: list[str] = []  # the whole model's session has told it
    try:
        read = _answers(Session(folder, providers, verify=False, log=said.append, part="encoder"), [case.inputs for case in cases])
        handed = [{one.taken: answer[one.made] for one in parts.handed if one.made in answer} for answer in read]
        feeds = [{**case.inputs, **given} for case, given in zip(cases, handed, strict=True)]
        written = _answers(Session(folder, providers, verify=False, log=said.append, part="decoder"), feeds)
    except (ArtifactError, SessionError) as error:
        return PartsResult((), (str(error),))
    worst, problems = 0.0, []
    for number, (case, *answers) in enumerate(zip(cases, read, written, strict=True)):
        found = {**answers[0], **answers[1]}
        for name, figure in case_differences(manifest.cache, case, found):
            worst = max(worst, figure)
            if not figure <= manifest.tolerance:  # not `>`: NaN is a failure
                problems.append(f"encoder and decoder, case {number}: {name} differs by {figure:.3g}, allowed is {manifest.tolerance:.3g}")
    line = f"encoder and decoder: {len(cases)} cases, largest difference {worst:.2e}, allowed {manifest.tolerance:.3g}"
    return PartsResult((line,), tuple(problems))


def _answers(session: Session, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Of the inputs that the part takes."""
    names = [info.name for info in session.inputs]
    return [session.run({name: arrays[name] for name in names if name in arrays}) for arrays in feeds]
