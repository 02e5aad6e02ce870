"""Healing: what a compressed language model trains is trained to answer as its teacher does, and the best state on other text is kept.

One row of tokens at a time goes through the gradient graph, so that the logits of one row lie in memory, whatever an update learns from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from matmorph.runtime.batches import Batch
from matmorph.runtime.decoder import IDS, MASK, POSITIONS
from matmorph.runtime.errors import ArtifactError, InputMismatch
from matmorph.runtime.feeds import Array
from matmorph.runtime.fitting import StepInfo
from matmorph.runtime.format.distillation import DISTILL, TEACHER_IDS, TEACHER_LOGS
from matmorph.runtime.format.training import TrainManifest
from matmorph.runtime.schedules import Schedule, cosine
from matmorph.runtime.scoring import log_probabilities
from matmorph.runtime.teacher import Answers, Taught, TextRows
from matmorph.runtime.text_score import Prediction
from matmorph.runtime.trainer import Trainer

LABELS = "labels"
_ROWS = 64
"""Of logits that are widened to float64 at once."""


@dataclass(frozen=True, slots=True)
class Course:
    """How it is trained. `rows`: how many go through in all; more than there are come again, each time in another order. `accumulate`: rows
    of an update. `looks`: how often the judged text is looked at on the way. `seed`: of the order."""

    rows: int
    accumulate: int = 2
    clip: float = 1.0
    warmup: float = 0.1
    looks: int = 8
    seed: int = 0

    @property
    def updates(self) -> int:
        return -(-self.rows // self.accumulate)

    @property
    def schedule(self) -> Schedule:
        return cosine(self.warmup)


@dataclass(frozen=True, slots=True)
class Look:
    """The judged text after so many updates. `divergence`: the loss there."""

    updates: int
    prediction: Prediction
    divergence: float


@dataclass(frozen=True, slots=True)
class Healing:
    """`looks`: the first before anything was learnt; `best`: the one whose `parameters`, by name, these are; `teacher`: on the same text.
    `rows`: learnt from, of `distinct` different ones; `tokens`: of the text in them. `seconds`: of learning and looking."""

    looks: tuple[Look, ...]
    best: Look
    teacher: Prediction
    parameters: Mapping[str, Array]
    rows: int
    distinct: int
    tokens: int
    seconds: float

    @property
    def before(self) -> Look:
        return self.looks[0]

    @property
    def worsened(self) -> bool:
        """Whether nothing that was learnt made it better."""
        return self.best.updates == 0


def heal(trainer: Trainer, rows: TextRows, taught: Taught, course: Course, progress: Callable[[int, int], None] | None = None) -> Healing:
    """Trains `trainer`, whose folder has the loss `distill`, and puts the best state into it.

    Raises ArtifactError for a folder with another loss or for a model that takes more than tokens, InputMismatch for a course without a
    row; what `Trainer.fit` raises.
    """
    began = time.perf_counter()
    manifest = trainer.manifest
    _refuse_unfit(manifest)
    if course.rows < 1:
        raise InputMismatch(f"{course.rows} rows to learn from: one is the least")
    judged = _Lessons(manifest, rows.judged, taught.judged, range(len(rows.judged)), rows.first)
    order = _order(len(rows.learnt), course.rows, course.seed)
    lessons = _Lessons(manifest, rows.learnt, taught.learnt, order, rows.first)
    every = max(1, course.updates // course.looks)
    looks = [_look(trainer, judged, rows.first, 0)]
    best, parameters = looks[0], trainer.parameters()

    def watch(at: Trainer, info: StepInfo) -> None:
        nonlocal best, parameters
        done = info.batch // course.accumulate if info.batch % course.accumulate == 0 else course.updates
        if progress is not None:
            progress(done, course.updates)
        if done % every and done != course.updates:
            return
        looks.append(_look(at, judged, rows.first, done))
        if looks[-1].prediction.nll < best.prediction.nll:
            best, parameters = looks[-1], at.parameters()

    how: dict[str, Any] = {"schedule": course.schedule, "accumulate": course.accumulate, "clip": course.clip, "progress": False}
    trainer.fit(lessons, callbacks=[watch], **how)
    trainer.load_parameters(parameters)
    seconds = time.perf_counter() - began
    distinct = min(len(rows.learnt), course.rows)
    tokens = course.rows * (rows.learnt.shape[1] - rows.prefix)
    return Healing(tuple(looks), best, Prediction.of(taught.score), parameters, course.rows, distinct, tokens, seconds)


def _refuse_unfit(manifest: TrainManifest) -> None:
    if manifest.loss.name != DISTILL:
        raise ArtifactError(f"the training graphs have the loss {manifest.loss.name}, and healing needs {DISTILL}")
    unknown = [info.name for info in manifest.features if info.name not in (IDS, MASK, POSITIONS)]
    if unknown:
        raise ArtifactError(f"the model takes {', '.join(unknown)} too, which a text has no value for")


def _order(rows: int, wanted: int, seed: int) -> Sequence[int]:
    """`wanted` numbers of rows: all of them in one order, then in another."""
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(rows) for _ in range(-(-wanted // rows))]
    return [int(row) for row in np.concatenate(rounds)[:wanted]]


@dataclass(frozen=True, slots=True)
class _Lessons:
    """Batches of one row each. `first`: the first column that counts."""

    manifest: TrainManifest
    rows: Array
    answers: Answers
    order: Sequence[int]
    first: int

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._batch, self.order)

    def _batch(self, number: int) -> Batch:
        row = self.rows[number : number + 1]
        labels = row.copy()
        labels[:, : self.first] = self.manifest.loss.ignore_index
        given = {IDS: row, MASK: np.ones_like(row), POSITIONS: np.arange(row.shape[1])[None]}
        logs = next(info.dtype for info in self.manifest.labels if info.name == TEACHER_LOGS)
        return {
            **{info.name: given[info.name] for info in self.manifest.features},
            LABELS: labels,
            TEACHER_IDS: self.answers.ids[number : number + 1].astype(np.int64),
            TEACHER_LOGS: self.answers.logs[number : number + 1].astype(logs),
        }


def _look(trainer: Trainer, judged: _Lessons, first: int, updates: int) -> Look:
    """The judged text with the parameters as they are."""
    output = trainer.manifest.loss.output or ""

    def counted(outputs: Mapping[str, Array], batch: Batch, part: Callable[[Array, Array], Array]) -> Array:
        logits, wanted = outputs[output][0, first - 1 : -1], batch[IDS][0, first:]
        return np.concatenate([part(log_probabilities(logits[k : k + _ROWS]), wanted[k : k + _ROWS]) for k in range(0, len(wanted), _ROWS)])

    found = trainer.evaluate(
        judged,
        {
            "nll": lambda outputs, batch: counted(outputs, batch, lambda logs, wanted: -logs[np.arange(len(wanted)), wanted]),
            "hits": lambda outputs, batch: counted(outputs, batch, lambda logs, wanted: logs.argmax(-1) == wanted),
        },
    )
    nll = found["nll"] if math.isfinite(found["nll"]) else math.inf
    return Look(updates, Prediction(int(found["count"]), nll, found["hits"]), found["loss"])
