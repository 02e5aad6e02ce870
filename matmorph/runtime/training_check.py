"""Do the training graphs of a folder compute here what torch's autograd gave where they were made? Part of `check`.

Each case of train_check.npz is run through grad.onnx and eval.onnx: loss, count and gradient. Where training starts, eval.onnx must answer
as model.onnx does, to twice the tolerance: two graphs that sum up in other orders may each be off by that much. apply.onnx, at a learning
rate of zero, must give every parameter back to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from matmorph.runtime.difference import difference
from matmorph.runtime.errors import ArtifactError, SessionError, first_line
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.arrays import read_arrays
from matmorph.runtime.format.cases import TrainingCase, TrainingVectors, read_training_arrays
from matmorph.runtime.format.reading import reading
from matmorph.runtime.format.training import (
    APPLY_MODEL,
    COUNT,
    EVAL_MODEL,
    GRAD_MODEL,
    GRADIENT,
    LOSS,
    LOSS_SCALE,
    THETA,
    TRAIN_CHECK_VECTORS,
    TRAIN_MANIFEST,
    TrainManifest,
)
from matmorph.runtime.manifest import stored_errors
from matmorph.runtime.session import Session, load_session, session_settings
from matmorph.runtime.targets.cpu import CPU
from matmorph.runtime.train_manifest import open_training
from matmorph.runtime.train_values import initial_theta
from matmorph.runtime.whole_call import with_empty_cache

RunGraph = Callable[[Sequence[str], Mapping[str, Array]], list[Array]]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """`lines`: what was checked and the figures. `problems`: what is wrong. `apart`: the largest difference of an output of eval.onnx from
    model.onnx's."""

    lines: tuple[str, ...]
    problems: tuple[str, ...]
    apart: float = 0.0


def is_training_folder(folder: Path) -> bool:
    """Whether training graphs lie in the folder."""
    return (folder / TRAIN_MANIFEST).is_file()


def check_training(folder: Path, model: Session, tolerance: float) -> TrainingResult:
    """Runs every training graph on the provider of `model`, the folder's model.onnx; `tolerance` is its check's."""
    try:
        manifest, stored = open_training(folder, verify=False)  # the files have been looked at before
        theta = initial_theta(stored, manifest)
        vectors, allowed = _vectors(folder / TRAIN_CHECK_VECTORS)
        _refuse_unfit(folder / TRAIN_CHECK_VECTORS, vectors, manifest)
        moved = theta + np.resize(vectors.nudge, len(theta))
        worst, problems = _gradients(_open(folder / GRAD_MODEL, model), vectors, moved, allowed)
        evaluation = _open(folder / EVAL_MODEL, model)
        problems += _losses(evaluation, vectors.cases, moved, allowed)
        apart, differing = _outputs(evaluation, model, vectors.cases, theta, 2 * tolerance)
        problems += differing
        problems += _applied(_open(folder / APPLY_MODEL, model), theta, manifest.states)
    except SessionError as error:
        return TrainingResult((), (str(error),))
    figures = ", ".join(f"{what} {figure:.2e}" for what, figure in worst.items())
    line = f"training: {len(vectors.cases)} cases on {model.provider}, largest differences from autograd: {figures}, allowed {allowed:.3g}"
    return TrainingResult((line,), tuple(problems), apart)


def _vectors(path: Path) -> tuple[TrainingVectors, float]:
    if not path.is_file():
        raise ArtifactError(f"{path}: missing, so no gradient can be checked")
    with stored_errors(), reading(path):
        return read_training_arrays(read_arrays(path))


def _refuse_unfit(path: Path, vectors: TrainingVectors, manifest: TrainManifest) -> None:
    """Entries of a gradient of another length, and cases without an input, can be compared with nothing."""
    if vectors.index.size and not 0 <= int(vectors.index.min()) <= int(vectors.index.max()) < manifest.length:
        raise ArtifactError(f"{path}: index names entries beyond the {manifest.length} of {TRAIN_MANIFEST}")
    names = {info.name for info in manifest.inputs}
    for number, case in enumerate(vectors.cases):
        if not names <= set(case.inputs):
            raise ArtifactError(f"{path}: case {number} lacks the input {sorted(names - set(case.inputs))[0]}")


def _open(path: Path, model: Session) -> RunGraph:
    """Runs a graph of the folder on the provider that `model` runs on."""
    options = session_settings(None, True)
    options.log_severity_level = 3  # inputs with defaults are meant to be inputs
    session = load_session(path, list(dict.fromkeys((model.provider, CPU.provider))), options, lambda line: None)

    def run(outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        try:
            results: list[Array] = session.run(list(outputs), dict(feeds))
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            raise ArtifactError(f"{path}: {model.provider}: {first_line(error)}") from error
        return results

    return run


def _gradients(run: RunGraph, vectors: TrainingVectors, theta: Array, allowed: float) -> tuple[dict[str, float], list[str]]:
    worst = {"loss": 0.0, "grad": 0.0}
    problems: list[str] = []
    scale = np.asarray(vectors.loss_scale, np.float32)
    for number, case in enumerate(vectors.cases):
        loss, count, grad = run([LOSS, COUNT, GRADIENT], {**case.inputs, THETA: theta, LOSS_SCALE: scale})
        if len(grad) != len(theta):
            raise ArtifactError(f"{GRAD_MODEL} gives a gradient of {len(grad)} entries, {TRAIN_MANIFEST} lists {len(theta)} parameters")
        off = np.abs(grad[vectors.index] - case.grad) / case.reference
        for what, figure in (("loss", _relative(float(loss), case.loss)), ("grad", float(off.max()))):
            worst[what] = max(worst[what], figure)
            if not figure <= allowed:  # not `>`: NaN is a failure
                problems.append(f"training case {number}: {what} of {GRAD_MODEL} differs by {figure:.3g}, allowed is {allowed:.3g}")
        if float(count) != case.count:
            problems.append(f"training case {number}: count of {GRAD_MODEL} is {float(count):g}, expected {case.count:g}")
    return worst, problems


def _losses(run: RunGraph, cases: Sequence[TrainingCase], theta: Array, allowed: float) -> list[str]:
    """eval.onnx: the loss of every case."""
    problems = []
    for number, case in enumerate(cases):
        (loss,) = run([LOSS], {**case.inputs, THETA: theta})
        if not _relative(float(loss), case.loss) <= allowed:
            problems.append(f"training case {number}: loss of {EVAL_MODEL} is {float(loss):.6g}, expected {case.loss:.6g}")
    return problems


def _outputs(run: RunGraph, model: Session, cases: Sequence[TrainingCase], theta: Array, allowed: float) -> tuple[float, list[str]]:
    """eval.onnx where training starts: the outputs of model.onnx, but for its cache."""
    worst, problems = 0.0, []
    cache = model.manifest.cache
    presents = {slot.present for slot in cache.slots} if cache is not None else set()
    names = [info.name for info in model.outputs if info.name not in presents]
    for number, case in enumerate(cases):
        given = with_empty_cache(model.manifest, case.inputs)
        expected = model.run({info.name: given[info.name] for info in model.inputs})
        for name, found in zip(names, run(names, {**case.inputs, THETA: theta}), strict=True):
            figure = difference(found, expected[name])
            worst = max(worst, figure)
            if not figure <= allowed:
                problems.append(f"training case {number}: output {name} of {EVAL_MODEL} differs by {figure:.3g}, allowed is {allowed:.3g}")
    return worst, problems


def _applied(run: RunGraph, theta: Array, states: Sequence[str]) -> list[str]:
    """apply.onnx at a learning rate of zero."""
    scalars = {"lr": 0.0, "weight_decay": 0.0, "grad_scale": 1.0, "max_norm": np.inf}
    feeds: dict[str, Array] = {THETA: theta, GRADIENT: np.ones_like(theta), "step": np.asarray(1, np.int64)}
    feeds |= {name: np.zeros_like(theta) for name in states}
    feeds |= {name: np.asarray(value, np.float32) for name, value in scalars.items()}
    after, skipped = run(["theta_next", "skipped"], feeds)
    same = np.array_equal(after, theta) and not bool(skipped)
    return [] if same else [f"{APPLY_MODEL} changes parameters at a learning rate of zero"]


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(1.0, abs(expected))
