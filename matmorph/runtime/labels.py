"""Class labels against the classes that there are, before ONNX Runtime sees them: it takes -1 for the last class without a word.

What counts is checked: not the label that the loss ignores, and of `causal_lm` not the first column, which nothing predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from matmorph.runtime.errors import InputMismatch
from matmorph.runtime.feeds import Array, size_of
from matmorph.runtime.format.distillation import DISTILL
from matmorph.runtime.format.training import TrainManifest

_FIRST_COUNTED: Mapping[str, int] = {"cross_entropy": 0, "causal_lm": 1, DISTILL: 1}
"""Losses over classes, and the column of their labels from which on they are judged."""


def check_labels(manifest: TrainManifest, arrays: Mapping[str, Any], where: str) -> None:
    """Raises InputMismatch for a class that the model does not have, naming the sample and the label; `where`: what the arrays are.

    Arrays that are no whole numbers are left to the check of their type. The number of classes is the last size of the output that the
    loss judges; where it follows from sizes that `arrays` do not tell, only negative labels are refused.
    """
    first = _FIRST_COUNTED.get(manifest.loss.name)
    if first is None:
        return
    classes, ignored = _classes(manifest, arrays), manifest.loss.ignore_index
    for name in (info.name for info in manifest.labels if info.name in arrays):
        labels = np.asarray(arrays[name])
        if labels.dtype.kind in "iu" and labels.ndim >= first:
            _check(name, labels, first, classes, ignored, where)


def _check(name: str, labels: Array, first: int, classes: int | None, ignored: int, where: str) -> None:
    counted = labels[:, first:] if first else labels
    if not counted.size or (counted.min() >= 0 and (classes is None or counted.max() < classes)):
        return
    wrong = (counted != ignored) & ((counted < 0) | (False if classes is None else counted >= classes))
    if not wrong.any():
        return
    place = [int(index) for index in np.argwhere(wrong)[0]] if labels.ndim else []
    place[1:2] = [index + first for index in place[1:2]]
    found = int(labels[tuple(place)])
    there = f"{name}[{', '.join(map(str, place))}]" if place else name
    sample = f"sample {place[0]} of {where}" if place else where
    known = "classes count from 0" if classes is None else f"the model has the classes 0 to {classes - 1}"
    raise InputMismatch(f"{sample} has the label {found} ({there}); {known}, and {ignored} is the label that does not count")


def _classes(manifest: TrainManifest, arrays: Mapping[str, Any]) -> int | None:
    judged = next((info for info in manifest.outputs if info.name == manifest.loss.output), None)
    if judged is None or not judged.shape:
        return None
    last = judged.shape[-1]
    if isinstance(last, int):
        return last
    shapes = [(info.shape, np.shape(arrays[info.name])) for info in manifest.inputs if info.name in arrays]
    sizes = {str(dim): size for dims, shape in shapes for dim, size in zip(dims, shape, strict=False)}
    return size_of(last, sizes)
