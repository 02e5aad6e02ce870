"""Do the training graphs of a folder compute here what torch's autograd gave where they were made? Part of `check`.

Each case of train_check.npz is run through grad.onnx and eval.onnx: loss, count and gradient. Where training starts, eval.onnx must answer
as model.onnx does; apply.onnx, at a learning rate of zero, must give every parameter back to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from matmorph.runtime.errors import ArtifactError, SessionError, first_line
from matmorph.runtime.feeds import Array
from matmorph.runtime.session import Session, load_session, session_settings
from matmorph.runtime.targets.cpu import CPU
from matmorph.runtime.train_manifest import APPLY, EVAL, GRAD, TRAIN_MANIFEST, read_train_manifest
from matmorph.runtime.train_values import initial_theta

CHECK = "train_check.npz"
_SHARED = ("nudge", "index", "loss_scale", "tolerance")
_PER_CASE = ("loss", "count", "grad", "reference")

Difference = Callable[[Array, Array], float]
Run = Callable[[Sequence[str], Mapping[str, Array]], list[Array]]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """`lines`: what was checked and the figures. `problems`: what is wrong."""

    lines: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Inputs by name, and what autograd gave for them: see the exporter's train_check.npz."""

    number: int
    inputs: Mapping[str, Array]
    loss: float
    count: float
    grad: Array
    reference: Array


def is_training_folder(folder: Path) -> bool:
    """Whether training graphs lie in the folder."""
    return (folder / TRAIN_MANIFEST).is_file()


def check_training(folder: Path, model: Session, tolerance: float, difference: Difference) -> TrainingResult:
    """Runs every training graph on the provider of `model`, the folder's model.onnx; `tolerance` and `difference` are its check's."""
    try:
        manifest = read_train_manifest(folder)
        theta = initial_theta(folder, manifest)
        shared, cases = _vectors(folder / CHECK)
        moved = theta + np.resize(shared["nudge"], len(theta))
        worst, problems = _gradients(_open(folder / GRAD, model), cases, moved, shared)
        evaluation = _open(folder / EVAL, model)
        problems += _losses(evaluation, cases, moved, float(shared["tolerance"]))
        problems += _outputs(evaluation, model, cases, theta, tolerance, difference)
        problems += _applied(_open(folder / APPLY, model), theta, manifest.states)
    except SessionError as error:
        return TrainingResult((), (str(error),))
    figures = ", ".join(f"{what} {figure:.2e}" for what, figure in worst.items())
    allowed = float(shared["tolerance"])
    line = f"training: {len(cases)} cases on {model.provider}, largest differences from autograd: {figures}, allowed {allowed:.3g}"
    return TrainingResult((line,), tuple(problems))


def _vectors(path: Path) -> tuple[dict[str, Array], list[Case]]:
    """What the cases share, and the cases. A name may hold colons, a number may not."""
    if not path.is_file():
        raise ArtifactError(f"{path}: missing, so no gradient can be checked")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        inputs: dict[int, dict[str, Array]] = {}
        for key in arrays:
            side, _, rest = key.partition(":")
            name, _, number = rest.rpartition(":")
            if side == "input":
                inputs.setdefault(int(number), {})[name] = arrays[key]
        cases = [_case(k, inputs[k], [arrays[f"{what}:{k}"] for what in _PER_CASE]) for k in sorted(inputs)]
        shared = {name: arrays[name] for name in _SHARED}
    except Exception as error:  # zip, header, key and value errors alike
        raise ArtifactError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    if not cases:
        raise ArtifactError(f"{path}: holds no case")
    return shared, cases


def _case(number: int, inputs: Mapping[str, Array], answers: Sequence[Array]) -> Case:
    loss, count, grad, reference = answers
    return Case(number, inputs, float(loss), float(count), grad, reference)


def _open(path: Path, model: Session) -> Run:
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


def _gradients(run: Run, cases: Sequence[Case], theta: Array, shared: Mapping[str, Array]) -> tuple[dict[str, float], list[str]]:
    worst = {"loss": 0.0, "grad": 0.0}
    allowed = float(shared["tolerance"])
    problems: list[str] = []
    for case in cases:
        feeds = {**case.inputs, "theta": theta, "loss_scale": shared["loss_scale"]}
        loss, count, grad = run(["loss", "count", "grad"], feeds)
        if len(grad) != len(theta):
            raise ArtifactError(f"{GRAD} gives a gradient of {len(grad)} entries, {TRAIN_MANIFEST} lists {len(theta)} parameters")
        off = np.abs(grad[shared["index"]] - case.grad) / case.reference
        for what, figure in (("loss", _relative(float(loss), case.loss)), ("grad", float(off.max()))):
            worst[what] = max(worst[what], figure)
            if not figure <= allowed:  # not `>`: NaN is a failure
                problems.append(f"training case {case.number}: {what} of {GRAD} differs by {figure:.3g}, allowed is {allowed:.3g}")
        if float(count) != case.count:
            problems.append(f"training case {case.number}: count of {GRAD} is {float(count):g}, expected {case.count:g}")
    return worst, problems


def _losses(run: Run, cases: Sequence[Case], theta: Array, allowed: float) -> list[str]:
    """eval.onnx: the loss of every case."""
    problems = []
    for case in cases:
        (loss,) = run(["loss"], {**case.inputs, "theta": theta})
        if not _relative(float(loss), case.loss) <= allowed:
            problems.append(f"training case {case.number}: loss of {EVAL} is {float(loss):.6g}, expected {case.loss:.6g}")
    return problems


def _outputs(run: Run, model: Session, cases: Sequence[Case], theta: Array, tolerance: float, difference: Difference) -> list[str]:
    """eval.onnx where training starts: the outputs of model.onnx."""
    problems = []
    names = [info.name for info in model.outputs]
    for case in cases:
        expected = model.run({info.name: case.inputs[info.name] for info in model.inputs})
        for name, found in zip(names, run(names, {**case.inputs, "theta": theta}), strict=True):
            figure = difference(found, expected[name])
            if not figure <= tolerance:
                problems.append(f"training case {case.number}: output {name} of {EVAL} differs by {figure:.3g}, allowed is {tolerance:.3g}")
    return problems


def _applied(run: Run, theta: Array, states: Sequence[str]) -> list[str]:
    """apply.onnx at a learning rate of zero."""
    scalars = {"lr": 0.0, "weight_decay": 0.0, "grad_scale": 1.0, "max_norm": np.inf}
    feeds: dict[str, Array] = {"theta": theta, "grad": np.ones_like(theta), "step": np.asarray(1, np.int64)}
    feeds |= {name: np.zeros_like(theta) for name in states}
    feeds |= {name: np.asarray(value, np.float32) for name, value in scalars.items()}
    after, skipped = run(["theta_next", "skipped"], feeds)
    same = np.array_equal(after, theta) and not bool(skipped)
    return [] if same else [f"{APPLY} changes parameters at a learning rate of zero"]


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(1.0, abs(expected))
