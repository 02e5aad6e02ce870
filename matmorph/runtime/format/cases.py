"""Check vectors: inputs and what torch answers to them, as records and as the arrays of check.npz and train_check.npz."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matmorph.runtime.format.plain import ManifestError

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One call of the model: arrays by input name, and by output name what torch answers (None and plain numbers are left out).
    `compared`: by output name, bool of a shape that broadcasts to it: where the answer is defined. Everywhere, where it names no output."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    compared: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingCase:
    """One call of a training graph: arrays by input name (the model's and labels), and what torch's autograd gives. `grad` holds entries of
    the gradient of loss * loss_scale, `reference` what their differences are relative to."""

    inputs: Mapping[str, Array]
    loss: float
    count: float
    grad: Array
    reference: Array


@dataclass(frozen=True, slots=True, eq=False)
class TrainingVectors:
    """`nudge`, repeated to the length of theta and added to it, is where the cases are computed; `index`: the entries of the gradient that
    they keep; `loss_scale`: what their losses are multiplied by. `felt`: how far torch's own float32 lies off; it is part of the tolerance,
    not of the file."""

    nudge: Array
    index: Array
    loss_scale: float
    cases: tuple[TrainingCase, ...]
    felt: float = 0.0


_SIDES = ("input", "output", "compared")


def case_arrays(cases: Sequence[Case]) -> dict[str, Array]:
    """check.npz: `input:<name>:<k>`, `output:<name>:<k>`, and `compared:<name>:<k>` where an output is not defined everywhere."""
    found: dict[str, Array] = {}
    for number, case in enumerate(cases):
        found |= {f"input:{name}:{number}": array for name, array in case.inputs.items()}
        found |= {f"output:{name}:{number}": array for name, array in case.outputs.items()}
        found |= {f"compared:{name}:{number}": array for name, array in case.compared.items()}
    return found


def read_case_arrays(arrays: Mapping[str, Array]) -> dict[int, Case]:
    """The cases of check.npz by number. ManifestError for a key that is none of `case_arrays`, and where there is no case."""
    found: dict[int, dict[str, dict[str, Array]]] = {}
    for key, array in arrays.items():
        side, name, number = _split(key)
        if side not in _SIDES or not name:
            raise ManifestError(f"unexpected key {key!r:.80}")
        found.setdefault(_number(key, number), {each: {} for each in _SIDES})[side][name] = array
    if not found:
        raise ManifestError("holds no case")
    cases = {number: Case(*(found[number][side] for side in _SIDES)) for number in sorted(found)}
    for at, case in cases.items():
        _refuse_unfitting(at, case)
    return cases


def _refuse_unfitting(number: int, case: Case) -> None:
    """ManifestError where `compared` is no part of its output."""
    for name, places in case.compared.items():
        shape = case.outputs[name].shape if name in case.outputs else None
        fits = shape is not None and places.ndim == len(shape) and all(a in (1, b) for a, b in zip(places.shape, shape, strict=True))
        if not fits or places.dtype.kind != "b":
            raise ManifestError(f"compared:{name}:{number}: expected booleans that broadcast to the output {name}")


def training_arrays(vectors: TrainingVectors, tolerance: float) -> dict[str, Array]:
    """train_check.npz: `input:<name>:<k>`, `loss:<k>`, `count:<k>`, `grad:<k>`, `reference:<k>`, and what all cases share. `tolerance`: of
    the loss relative to max(1, |loss|), of a gradient's entry relative to its reference."""
    found: dict[str, Array] = {
        "nudge": vectors.nudge,
        "index": vectors.index,
        "loss_scale": np.asarray(vectors.loss_scale, np.float32),
        "tolerance": np.asarray(tolerance, np.float64),
    }
    for k, case in enumerate(vectors.cases):
        found |= {f"input:{name}:{k}": array for name, array in case.inputs.items()}
        found |= {f"loss:{k}": np.asarray(case.loss, np.float32), f"count:{k}": np.asarray(case.count, np.float32)}
        found |= {f"grad:{k}": case.grad, f"reference:{k}": case.reference}
    return found


def read_training_arrays(arrays: Mapping[str, Array]) -> tuple[TrainingVectors, float]:
    """(the vectors, their tolerance) of train_check.npz. ManifestError for an array that is missing or does not fit the others, and where
    there is no case."""
    inputs: dict[int, dict[str, Array]] = {}
    for key, array in arrays.items():
        side, name, number = _split(key)
        if side == "input":
            inputs.setdefault(_number(key, number), {})[name] = array
    if not inputs:
        raise ManifestError("holds no case")
    nudge, index = _vector(arrays, "nudge", "f"), _vector(arrays, "index", "iu")
    cases = tuple(
        TrainingCase(
            inputs[k],
            _figure(arrays, f"loss:{k}"),
            _figure(arrays, f"count:{k}"),
            _vector(arrays, f"grad:{k}", "f", len(index)),
            _vector(arrays, f"reference:{k}", "f", len(index)),
        )
        for k in sorted(inputs)
    )
    return TrainingVectors(nudge, index, _figure(arrays, "loss_scale"), cases), _figure(arrays, "tolerance")


def _figure(arrays: Mapping[str, Array], key: str) -> float:
    found = arrays.get(key)
    if found is None or found.shape != () or found.dtype.kind not in "fiu":
        raise ManifestError(f"{key}: expected one number")
    return float(found)


def _vector(arrays: Mapping[str, Array], key: str, kinds: str, length: int | None = None) -> Array:
    found = arrays.get(key)
    if found is None or found.ndim != 1 or found.dtype.kind not in kinds or not len(found) or length not in (None, len(found)):
        raise ManifestError(f"{key}: expected a vector of {length or 'some'} numbers")
    return found


def _split(key: str) -> tuple[str, str, str]:
    """(side, name, number): a name may hold colons itself, a number may not."""
    side, _, rest = key.partition(":")
    name, _, number = rest.rpartition(":")
    return side, name, number


def _number(key: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise ManifestError(f"unexpected key {key!r:.80}")
    return int(text)
