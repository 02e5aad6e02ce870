"""The loss of any model on data with labels: arrays by name, batch by batch, numpy and ONNX Runtime only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from matmorph.runtime.batches import load_batches
from matmorph.runtime.decoder import LOGITS
from matmorph.runtime.errors import ExecutionError, InputMismatch, nearest
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.artifact import Manifest
from matmorph.runtime.providers import Provider
from matmorph.runtime.scoring import Score, score
from matmorph.runtime.session import Session, to_stderr
from matmorph.runtime.whole_call import with_empty_cache

LABELS = "labels"
"""The array that is no input."""
IGNORED = -100
"""The class that does not count, as torch has it."""
CROSS_ENTROPY, CAUSAL_LM, MSE = "cross_entropy", "causal_lm", "mse"


@dataclass(frozen=True, slots=True)
class LabelledResult:
    """`value`: the mean over `counted` labels (nats, or squared differences). `accuracy`: the share of labels that are the likeliest class,
    None where there are no classes."""

    loss: str
    output: str
    value: float
    accuracy: float | None
    counted: int
    samples: int
    provider: str
    seconds: float


def labelled_loss(
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    loss: str | None = None,
    output: str | None = None,
    batch_size: int = 16,
    providers: str | Sequence[Provider] | None = None,
    threads: int | None = None,
    log: Callable[[str], None] = to_stderr,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> LabelledResult:
    """Of the model of `folder` on a .npz or .safetensors file keyed by input, with `labels` beside them; first axis = samples.

    loss: cross_entropy [.., classes] against whole numbers [..], -100 does not count; causal_lm the same, where each place predicts the
    next one's label; mse. None = by the labels: whole numbers are classes (of the next token where the model keeps a cache), others are
    compared.
    output: what the labels are of, None = `logits`, else the first. Raises InputMismatch (file, names, shapes, classes), ArtifactError,
    ExecutionError.
    """
    began = time.perf_counter()
    batches = load_batches(data, batch_size, shuffle=False)
    if LABELS not in batches.arrays:
        raise InputMismatch(f"{Path(data)}: holds {', '.join(batches.arrays)} and no {LABELS}: there is nothing to compare the model with")
    session = Session(folder, providers, threads=threads, log=log, verify=verify)
    named = _output(session.manifest, output)
    wanted = batches.arrays[LABELS]
    kind = _kind(session.manifest, wanted) if loss is None else loss
    if kind not in _LOSSES:
        raise InputMismatch(f"loss {kind}: there are {', '.join(_LOSSES)}{nearest(kind, _LOSSES)}")
    if kind != MSE and wanted.dtype.kind not in "iu":
        raise InputMismatch(f"{LABELS}: {kind} wants whole numbers, got {wanted.dtype}; mse compares others")
    total, samples = Score(), 0
    for number, batch in enumerate(batches):
        feeds = {name: array for name, array in batch.items() if name != LABELS}
        found = session.run(with_empty_cache(session.manifest, feeds))[named]
        total += _LOSSES[kind](found, batch[LABELS], f"batch {number}")
        samples += len(batch[LABELS])
        if progress is not None:
            progress(number + 1, len(batches))
    if not total.counted:
        raise InputMismatch(f"{Path(data)}: no label counts: all of them are {IGNORED}")
    if not np.isfinite(total.nll):
        raise ExecutionError(f"{folder}: the loss is not finite: {named} has values that are not")
    accuracy = None if kind == MSE else total.hits / total.counted
    mean = total.nll / total.counted
    return LabelledResult(kind, named, mean, accuracy, total.counted, samples, session.provider, time.perf_counter() - began)


def _output(manifest: Manifest, asked: str | None) -> str:
    names = [info.name for info in manifest.outputs]
    if asked is not None and asked not in names:
        raise InputMismatch(f"output {asked}: the model gives {', '.join(names)}{nearest(asked, names)}")
    return asked or (LOGITS if LOGITS in names else names[0])


def _kind(manifest: Manifest, labels: Array) -> str:
    if labels.dtype.kind not in "iu":
        return MSE
    return CROSS_ENTROPY if manifest.cache is None else CAUSAL_LM


def _cross_entropy(found: Array, labels: Array, where: str) -> Score:
    if found.shape[:-1] != labels.shape:
        raise InputMismatch(f"{where}: outputs of shape {found.shape} need labels of shape {found.shape[:-1]}, got {labels.shape}")
    classes = found.shape[-1]
    keep = labels != IGNORED
    wrong = labels[keep & ((labels < 0) | (labels >= classes))]
    if wrong.size:
        raise InputMismatch(f"{where}: the label {wrong[0]}; the model has the classes 0 to {classes - 1}, and {IGNORED} does not count")
    return score(found[keep], labels[keep].astype(np.int64))


def _causal_lm(found: Array, labels: Array, where: str) -> Score:
    if found.ndim != 3 or found.shape[:-1] != labels.shape:
        raise InputMismatch(
            f"{where}: causal_lm wants logits [rows, tokens, words] and labels [rows, tokens], got {found.shape} and {labels.shape}"
        )
    return _cross_entropy(found[:, :-1], labels[:, 1:], where)


def _mse(found: Array, labels: Array, where: str) -> Score:
    if found.shape != labels.shape:
        raise InputMismatch(f"{where}: outputs of shape {found.shape} need labels of the same shape, got {labels.shape}")
    return Score(found.size, float(np.square(found.astype(np.float64) - labels.astype(np.float64)).sum()))


_LOSSES: Mapping[str, Callable[[Array, Array, str], Score]] = {CROSS_ENTROPY: _cross_entropy, CAUSAL_LM: _causal_lm, MSE: _mse}
LOSSES = tuple(_LOSSES)
"""Their names."""
