"""A folder opened to be healed: with training graphs for the loss `distill`, and written anew with what was learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matmorph.exporters.training.prepare_training import TrainRequest
from matmorph.folders.after_training import loaded_job
from matmorph.folders.job import Job
from matmorph.folders.open import reopen, stored_graph
from matmorph.folders.save import save
from matmorph.optimizers import OPTIMIZERS
from matmorph.progress import Progress
from matmorph.runtime.format.artifact import SOURCE_GRAPH
from matmorph.runtime.format.distillation import DISTILL, Distill
from matmorph.runtime.format.training import TrainManifest
from matmorph.runtime.healing import Healing
from matmorph.specs.schema import ParameterSelector

HEALING = "healing.json"
"""Of a healed folder: what was measured on the way."""


def distilling(train: TrainManifest, settings: Distill) -> bool:
    """Whether a folder's own training graphs have this loss already."""
    return train.loss.name == DISTILL and train.loss.distill == settings


def healable(folder: Path, train: TrainManifest, settings: Distill, verify: bool) -> Job:
    """The job of a folder with training graphs, asking for graphs of the loss `distill` over the same parameters. Raises InputError as
    `reopen`."""
    job, _ = reopen(folder, verify)
    told = {key: value for key, value in train.optimizer.items() if key != "name"}
    request = TrainRequest(
        DISTILL,
        output=train.loss.output if train.loss.name in (DISTILL, "causal_lm") else None,
        ignore_index=train.loss.ignore_index,
        optimizer=OPTIMIZERS[train.optimizer["name"]](**told),
        trainable=[ParameterSelector(segment.name) for segment in train.segments],
        frozen=() if job.spec.train is None else job.spec.train.frozen,
        distill=settings,
    )
    return replace(job, source=stored_graph(folder, SOURCE_GRAPH, verify), training=request)


def write_graphs(job: Job, folder: Path, progress: Progress) -> None:
    """The folder that is trained, where the job's own has another loss. Raises what `save` does."""
    save(folder, job, force=False, progress=progress)


def write_healed(job: Job, values: Mapping[str, Any], healing: Healing, folder: Path, force: bool, progress: Progress) -> None:
    """The job with what was learnt in it; the report and the manifest say what that brought. Raises what `save` does."""
    healed = loaded_job(job, values)
    report = replace(healed.report, parity=None, notes=(*healed.report.notes, note(healing)))
    figures = json.dumps(told(healing), indent=2) + "\n"
    save(folder, replace(healed, report=report, more={**healed.more, HEALING: figures.encode()}), force, progress)


def note(healing: Healing) -> str:
    """One line."""
    before, best, teacher = healing.before.prediction, healing.best.prediction, healing.teacher
    tokens = healing.tokens
    if healing.worsened:
        kept = f"healing on {tokens:,} tokens made perplexity no better than {before.perplexity:.3f}, so the weights are as they were"
        return f"{kept} (teacher: {teacher.perplexity:.3f})"
    return (
        f"healed on {tokens:,} tokens in {healing.seconds / 60:.1f} min: perplexity {before.perplexity:.3f} -> {best.perplexity:.3f}, "
        f"{best.perplexity / teacher.perplexity:.3f} x the teacher's {teacher.perplexity:.3f}, on {best.counted:,} tokens of other text"
    )


def told(healing: Healing) -> dict[str, Any]:
    """The same as plain data."""
    looks = [
        {"updates": one.updates, "perplexity": _finite(one.prediction.perplexity), "divergence": one.divergence, **asdict(one.prediction)}
        for one in healing.looks
    ]
    return {
        "tokens": healing.tokens,
        "rows": healing.rows,
        "distinct_rows": healing.distinct,
        "seconds": round(healing.seconds, 1),
        "teacher": {"perplexity": _finite(healing.teacher.perplexity), **asdict(healing.teacher)},
        "before": _finite(healing.before.prediction.perplexity),
        "after": _finite(healing.best.prediction.perplexity),
        "best_updates": healing.best.updates,
        "worsened": healing.worsened,
        "looks": looks,
    }


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None
