"""What `Trainer.fit` keeps count of: where it is, what it did, and how many updates are left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from matmorph.runtime.batches import Batch, Loader, batches_per_epoch
from matmorph.runtime.errors import InputMismatch
from matmorph.runtime.schedules import Schedule


@dataclass(frozen=True, slots=True)
class StepInfo:
    """One update. `step`: its number, from 1; a skipped one is tried again under the same number. `loss`: mean over the `count` elements
    that the update learnt from, in all processes. `grad_norm`: global norm before clipping. `epoch` from 0; `batch`: batches read of it.
    """

    step: int
    loss: float
    count: float
    grad_norm: float
    lr: float
    skipped: bool
    loss_scale: float
    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class RunPosition:
    """Where a run of `fit` is: enough to go on with the very next batch. `updates`: of this run; `loss_sum` and `count`: of this epoch."""

    first_epoch: int
    epoch: int
    batch: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    count: float = 0.0

    def after(self, info: StepInfo, batches: int) -> RunPosition:
        total, count = self.loss_sum + info.loss * info.count, self.count + info.count
        return replace(self, batch=self.batch + batches, updates=self.updates + 1, loss_sum=total, count=count)

    def next_epoch(self) -> RunPosition:
        return RunPosition(self.first_epoch, self.epoch + 1, updates=self.updates)

    @property
    def loss(self) -> float:
        """Mean of this epoch so far."""
        return self.loss_sum / self.count

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class FitPlan:
    """`total`: updates of the run, None where the loader has no length. Raises InputMismatch for numbers that do not work."""

    epochs: int
    accumulate: int
    schedule: Schedule | None
    total: int | None

    def factor(self, update: int) -> float:
        """Of the learning rate."""
        return self.schedule(update, self.total) if self.schedule and self.total else 1.0


def plan_fit(loader: Loader, epochs: int, accumulate: int, schedule: Schedule | None) -> FitPlan:
    """Raises InputMismatch for numbers below 1, and for a schedule with a loader that has no length."""
    for name, value in (("epochs", epochs), ("accumulate", accumulate)):
        if value < 1:
            raise InputMismatch(f"{name} must be 1 or more, got {value}")
    batches = batches_per_epoch(loader)
    if batches is None and schedule:
        raise InputMismatch("a schedule must know how many updates there will be: give a loader with a length (a list, Batches)")
    total = None if batches is None else epochs * -(-batches // accumulate)
    return FitPlan(epochs, accumulate, schedule, total)


def groups(batches: Iterable[Batch], size: int) -> Iterator[tuple[Batch, ...]]:
    """`size` batches at a time; the last group is what is left."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield tuple(group)
            group.clear()
    if group:
        yield tuple(group)
