"""What a teacher answers on rows of tokens: the likeliest words of each place and the rest, from a session or from a file made once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from matmorph.runtime.checkpoint import read_tensors, write_tensors
from matmorph.runtime.errors import CheckpointError, ExecutionError, InputMismatch
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.artifact import DATA, MODEL
from matmorph.runtime.format.distillation import Distill
from matmorph.runtime.format.plain import ManifestError, from_plain
from matmorph.runtime.manifest import open_folder
from matmorph.runtime.scoring import Score, log_probabilities, score
from matmorph.runtime.text_model import TextModel
from matmorph.runtime.windows import Cut

StepProgress = Callable[[int, int], None]
_ROWS = 64
"""Of logits that are widened to float64 at once."""
_LEAST = 1e-12
"""Of the share of all other words, which float64 gives as a difference from 1 where they are as good as excluded."""


@dataclass(frozen=True, slots=True)
class TextRows:
    """int64 [rows, window] each: what is learnt from, and what is judged. `prefix`: columns at the front that belong to no text."""

    learnt: Array
    judged: Array
    prefix: int

    @classmethod
    def of(cls, learnt: Array, judged: Array, prefix: Sequence[int], window: int, most: tuple[int, int]) -> TextRows:
        """Of two rows of ids cut into windows, each behind the prefix: of the first the first `most[0]` windows, of the second at most
        `most[1]` at equal distances. Raises InputMismatch for a window without a token to predict, and where one of them is shorter."""
        room = Cut.of(window, None, prefix).room
        parts = []
        for what, ids in (("to learn from", learnt), ("to judge by", judged)):
            if len(ids) < room:
                raise InputMismatch(f"{len(ids)} tokens {what} are fewer than one window ({room}): give more text, or a smaller window")
            whole = np.asarray(ids[: len(ids) // room * room], np.int64).reshape(-1, room)
            parts.append(np.concatenate([np.broadcast_to(np.array(prefix, np.int64), (len(whole), len(prefix))), whole], axis=1))
        spread = np.unique(np.linspace(0, len(parts[1]) - 1, min(most[1], len(parts[1]))).round().astype(int))
        return cls(parts[0][: most[0]], parts[1][spread], len(prefix))

    @property
    def first(self) -> int:
        """The first column that counts: each that does has one before it."""
        return max(1, self.prefix)

    @property
    def sha256(self) -> str:
        found = hashlib.sha256(f"{self.learnt.shape} {self.judged.shape} {self.prefix}".encode())
        for part in (self.learnt, self.judged):
            found.update(np.ascontiguousarray(part, np.int64).tobytes())
        return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Answers:
    """`ids` int32 [rows, window, top], `logs` float32 [rows, window, top + 1], the last of all other words together."""

    ids: Array
    logs: Array


@dataclass(frozen=True, slots=True)
class About:
    """What answers are of. `teacher`: hash of its model; `rows`: of the tokens; `counted`, `nll` and `hits`: of the teacher itself on what
    is judged, in sum; `vocabulary`: how many words it has."""

    teacher: str
    rows: str
    settings: Distill
    vocabulary: int
    counted: int
    nll: float
    hits: int


@dataclass(frozen=True, slots=True)
class Taught:
    """A teacher's answers on both parts."""

    learnt: Answers
    judged: Answers
    about: About

    @property
    def score(self) -> Score:
        return Score(self.about.counted, self.about.nll, self.about.hits)


def likeliest(logits: Array, settings: Distill) -> tuple[Array, Array]:
    """(ids, logs) of logits [tokens, words], in the order of their likelihood, at the temperature; equal ones in the order of their ids.

    Raises InputMismatch where no word is left for the rest."""
    top = settings.top
    if top >= logits.shape[-1]:
        raise InputMismatch(f"distill.top is {top} and the teacher has {logits.shape[-1]} words: at least one must be left for the rest")
    ids, logs = np.empty((len(logits), top), np.int32), np.empty((len(logits), top + 1), np.float32)
    for start in range(0, len(logits), _ROWS):
        part = slice(start, start + _ROWS)
        found = log_probabilities(logits[part].astype(np.float64) / settings.temperature)
        chosen = np.sort(np.argpartition(-found, top - 1, axis=-1)[:, :top], axis=-1)
        order = np.argsort(-np.take_along_axis(found, chosen, -1), axis=-1, kind="stable")
        ids[part] = np.take_along_axis(chosen, order, -1)
        named = np.take_along_axis(found, ids[part], -1)
        rest = np.maximum(1 - np.exp(named).sum(-1, keepdims=True), _LEAST)
        logs[part] = np.concatenate([named, np.log(rest)], -1)
    return ids, logs


def model_sha256(folder: str | os.PathLike[str]) -> str:
    """Of the model in a folder: its graph and weights, as the manifest lists them. Raises ArtifactError."""
    files = open_folder(folder, verify=False)[0].files
    return hashlib.sha256("".join(f"{name} {files[name].sha256}\n" for name in (MODEL, DATA) if name in files).encode()).hexdigest()


def teach(model: TextModel, sha256: str, rows: TextRows, settings: Distill, progress: StepProgress | None = None) -> Taught:
    """The answers of a model, row by row. Raises InputMismatch for rows that it does not take; ExecutionError."""
    model.refuse(rows.learnt.shape[1], int(max(rows.learnt.max(), rows.judged.max())))
    total, words = Score(), 0
    made: list[Answers] = []
    count = len(rows.learnt) + len(rows.judged)
    for part in (rows.learnt, rows.judged):
        answers = Answers(np.empty((*part.shape, settings.top), np.int32), np.empty((*part.shape, settings.top + 1), np.float32))
        offset = len(rows.learnt) if made else 0
        for number, row in enumerate(part):
            logits = model.logits(row)
            if not (logits < np.inf).all():  # -inf excludes a word; NaN is not less than anything
                raise ExecutionError(f"window {number}: the teacher's logits are not finite")
            answers.ids[number], answers.logs[number] = likeliest(logits, settings)
            words = logits.shape[-1]
            if made:
                total += score(logits[rows.first - 1 : -1], row[rows.first :])
            if progress is not None:
                progress(offset + number + 1, count)
        made.append(answers)
    return Taught(made[0], made[1], About(sha256, rows.sha256, settings, words, total.counted, total.nll, total.hits))


def write_taught(path: Path, taught: Taught) -> None:
    """Raises CheckpointError where the file cannot be written."""
    parts = {"learnt": taught.learnt, "judged": taught.judged}
    tensors = {f"{name}.{what}": getattr(part, what) for name, part in parts.items() for what in ("ids", "logs")}
    write_tensors(path, tensors, {"answers": asdict(taught.about)})


def read_taught(path: Path, rows: TextRows, settings: Distill, teacher: str | None) -> Taught:
    """The answers in a file, which must be of these rows, at these settings, and of the teacher of that hash where one is given.

    Raises CheckpointError, naming what differs."""
    tensors, told = read_tensors(path)
    if "answers" not in told:
        raise CheckpointError(f"{path}: holds no answers of a teacher")
    try:
        about = from_plain(About, told["answers"], "answers")
    except ManifestError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if about.rows != rows.sha256:
        raise CheckpointError(f"{path}: holds answers to other tokens: the text, its part, --tokens or --window differ; name another file")
    if about.settings != settings:
        raise CheckpointError(f"{path}: holds answers for {_named(about.settings)}, and {_named(settings)} is asked for; name another file")
    if teacher is not None and about.teacher != teacher:
        raise CheckpointError(f"{path}: holds the answers of another teacher; name another file")
    parts: dict[str, Any] = {}
    for name, part in (("learnt", rows.learnt), ("judged", rows.judged)):
        found = Answers(*(tensors.get(f"{name}.{what}", np.empty(0)) for what in ("ids", "logs")))
        wanted = (*part.shape, settings.top), (*part.shape, settings.top + 1)
        if (found.ids.shape, found.logs.shape) != wanted or found.ids.dtype != np.int32 or found.logs.dtype != np.float32:
            raise CheckpointError(f"{path}: its answers do not have the shapes that they should")
        if not np.isfinite(found.logs).all() or found.ids.min() < 0 or found.ids.max() >= about.vocabulary:
            raise CheckpointError(f"{path}: its answers are no words with their probabilities")
        parts[name] = found
    return Taught(parts["learnt"], parts["judged"], about)


def _named(settings: Distill) -> str:
    return f"top {settings.top} at temperature {settings.temperature:g}"
