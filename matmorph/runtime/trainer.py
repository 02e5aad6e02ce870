"""`Trainer`: fine-tunes a folder's training graphs on ONNX Runtime, numpy in, no torch.

One update at a time: what reads or changes the state waits for what another thread does with it, and a second `fit` is an error.

trainer = Trainer("out-train/", lr=1e-4)
trainer.fit(load_batches("train.npz", 16), epochs=3, schedule=linear(warmup=0.06), clip=1.0, checkpoint="run.safetensors")
print(trainer.evaluate(load_batches("dev.npz", 64, shuffle=False)))
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from matmorph.runtime.batches import Batch, Loader, epoch_batches
from matmorph.runtime.checkpoint import only_writer, read_tensors, write_tensors
from matmorph.runtime.errors import CheckpointError, InputMismatch, TrainingError
from matmorph.runtime.feeds import Array, check_feeds
from matmorph.runtime.fitting import FitPlan, RunPosition, StepInfo, groups, plan_fit
from matmorph.runtime.format.plain import to_plain
from matmorph.runtime.format.training import THETA, TrainManifest
from matmorph.runtime.labels import check_labels
from matmorph.runtime.manifest import stored_errors
from matmorph.runtime.progress import ProgressLine
from matmorph.runtime.providers import Provider
from matmorph.runtime.resuming import OPTIONAL, Settings, State, check_vectors, read_state
from matmorph.runtime.scaling import MAX_SKIPS, initial_scale
from matmorph.runtime.schedules import Schedule
from matmorph.runtime.session import check_dtype, to_stderr
from matmorph.runtime.supernet import Chooser, Configuration, Named, Supernet, supernet_of
from matmorph.runtime.train_graphs import ApplyGraph, EvalGraph, GradGraph, Sessions, StateVectors
from matmorph.runtime.train_manifest import open_training, read_train_manifest
from matmorph.runtime.train_values import Mask, SegmentFactors, flat_factors, flat_mask, initial_theta, named, put_in

AllReduce = Callable[[Array], None]
"""Replaces a float32 vector by its sum over all processes, in place."""
Callback = Callable[["Trainer", StepInfo], bool | None]
"""Called after each update; a true result ends `fit`."""
Metric = Callable[[Mapping[str, Array], Batch], Any]
"""(outputs, batch) -> an array of figures, for instance whether each row was right; `evaluate` gives the mean over all of them."""
_SETTINGS = tuple(entry.name for entry in fields(Settings))


class Trainer:
    """The training graphs of one folder, with their parameters and moments.

    `providers`, `threads`, `log`: as for `Session`. `lr`, `weight_decay`: in place of what the folder was exported with. `clip`: largest
    global norm of the gradient, None = any. `mask`: what trains, see `train_values.Mask`; `segment_lr`, `segment_decay`: factors by
    segment. `loss_scale`: None = dynamic in half precision, else 1. `max_skips`: updates in a row that may be skipped because their
    gradient is not finite (None: 0 in float32, 20 in half precision).

    `all_reduce` makes this one process of several, each with its own part of every batch: it is called once per update with a float32
    vector [n + 2] (gradient times count, count, loss times count) and must replace it by the sum over the processes.

    A supernet (`glora: {search: true}`) trains one configuration per step, drawn from `seed` and the step's number, and leaves all other
    parameters and their moments as they are; `configuration` trains one throughout. `verify=False` leaves out the sizes and hashes of the
    folder's files.

    Raises ArtifactError (folder, train.json or graphs, a file that changed), ProviderError, InputMismatch (a setting that does not work).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        providers: str | Sequence[Provider] | None = None,
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
        clip: float | None = None,
        mask: Mask | None = None,
        segment_lr: SegmentFactors | None = None,
        segment_decay: SegmentFactors | None = None,
        loss_scale: float | None = None,
        max_skips: int | None = None,
        all_reduce: AllReduce | None = None,
        seed: int = 0,
        configuration: Named | None = None,
        threads: int | None = None,
        log: Callable[[str], None] = to_stderr,
        verify: bool = True,
    ) -> None:
        self._alone, self._fitting = threading.RLock(), threading.Lock()
        self._folder = Path(folder)
        self._manifest, stored = open_training(folder, verify)
        with stored_errors():
            stored.check_all(self._manifest.files)
        theta = initial_theta(stored, self._manifest)
        for info in self._manifest.inputs:
            check_dtype(info)
        optimizer = self._manifest.optimizer
        self.lr = _number("lr", optimizer["lr"] if lr is None else lr)
        self.weight_decay = _number("weight_decay", optimizer["weight_decay"] if weight_decay is None else weight_decay)
        self.clip = None if clip is None else _number("clip", clip, positive=True)
        self.max_skips = MAX_SKIPS[self._manifest.precision] if max_skips is None else max_skips
        self._scale = initial_scale(loss_scale, self._manifest.precision)
        self._optional = _optional(self._manifest, mask, segment_lr, segment_decay)
        self.seed, self.configuration = seed, configuration
        self._chooser = Chooser(supernet_of(self._manifest), self._manifest.length, seed, configuration, self._optional.get("mask"))
        self._all_reduce, self._log = all_reduce, log
        self._sessions = Sessions(self._folder, providers, threads, log)
        self._grad = GradGraph(self._sessions, self._manifest)
        self._sessions = replace(self._sessions, log=_silence)  # the first one has said where they run
        self._apply = ApplyGraph(self._sessions, self._manifest, self._optional)
        self._eval: EvalGraph | None = None
        self._vectors = StateVectors((THETA, *self._manifest.states), self._manifest.length, self._grad.device)
        self._vectors.set(THETA, theta)
        self._step = self._skips = self._epochs = 0
        self._position: RunPosition | None = None
        self._saved: tuple[int, Path] | None = None

    @property
    def manifest(self) -> TrainManifest:
        """Everything that train.json says."""
        return self._manifest

    @property
    def supernet(self) -> Supernet | None:
        """What is searched, None where nothing is."""
        return self._chooser.supernet

    @property
    def provider(self) -> str:
        """The execution provider that loaded and comes first, as ONNX Runtime calls it."""
        return self._grad.provider

    @property
    def updates(self) -> int:
        """Updates made so far, skipped ones not counted."""
        return self._step

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by at present before the gradient is taken."""
        return self._scale.value

    def step(self, *batches: Batch) -> float:
        """One update; the mean loss before it. Several batches make one update, as if they were one batch.

        Raises InputMismatch (a batch that does not fit, or without a label that counts), TrainingError (loss or gradient not finite; the
        state is that of the update before), ExecutionError.
        """
        return self._update(batches, self.lr, self.clip).loss

    def fit(
        self,
        loader: Loader,
        epochs: int = 1,
        *,
        schedule: Schedule | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 0,
        progress: bool | None = None,
    ) -> list[float]:
        """Trains for `epochs` epochs of `loader`; the mean loss of each.

        `schedule`: factor of the learning rate per update. `accumulate`: batches per update. `clip`: in place of the Trainer's.
        `checkpoint`: a file that is written after every epoch and every `checkpoint_every` updates. `progress` None: shown on a terminal.
        After `resume` it goes on where the checkpoint was written, if that was within a `fit`; loader and settings must be the same.
        A checkpoint has one writer: CheckpointError where another process trains with the same file.

        Raises what `step` and `save` raise, and InputMismatch for settings and loaders that do not work.
        """
        clip = self.clip if clip is None else _number("clip", clip, positive=True)
        if checkpoint_every and checkpoint is None:
            raise InputMismatch("checkpoint_every needs a checkpoint to write")
        plan = plan_fit(loader, epochs, accumulate, schedule)
        bar = ProgressLine(plan.total, progress)
        run = _Run(loader, plan, clip, tuple(callbacks), None if checkpoint is None else Path(checkpoint), checkpoint_every, bar)
        with self._one_fit():
            return self._fit(run, epochs)

    @contextmanager
    def _one_fit(self) -> Iterator[None]:
        if not self._fitting.acquire(blocking=False):
            raise InputMismatch("this Trainer is in a fit already; one at a time, or a Trainer of its own for each thread")
        try:
            yield
        finally:
            self._fitting.release()

    def _fit(self, run: _Run, epochs: int) -> list[float]:
        position = self._position or RunPosition(self._epochs, self._epochs)
        if position.epoch >= position.first_epoch + epochs:
            self._log(f"nothing left to train: all {epochs} epochs were done when the checkpoint was written")
        losses: list[float] = []
        with ExitStack() as stack:
            stack.callback(run.bar.close)
            if run.checkpoint is not None:
                stack.enter_context(only_writer(run.checkpoint))
            while position.epoch < position.first_epoch + epochs:
                position, stopped = self._epoch(run, position)
                losses.append(position.loss)
                self._position = position = position.next_epoch()
                if run.checkpoint is not None:
                    self.save(run.checkpoint)
                if stopped:
                    break
        self._position, self._epochs = None, position.epoch
        return losses

    def evaluate(
        self, loader: Loader, metrics: Mapping[str, Metric] | None = None, *, configuration: Named | Configuration | None = None
    ) -> dict[str, float]:
        """ "loss" over all batches (their mean, weighted by what each counts), "count", and the mean of each metric's figures.

        `configuration`: of a supernet, by default the one that is trained throughout. Raises InputMismatch for a batch or configuration
        that does not fit, for a supernet without one, and where nothing counts; ExecutionError.
        """
        with self._alone:
            return self._evaluated(loader, metrics or {}, self._chooser.feeds(self._chooser.chosen(configuration)))

    def _evaluated(self, loader: Loader, metrics: Mapping[str, Metric], more: Mapping[str, Array]) -> dict[str, float]:
        if self._eval is None:
            self._eval = EvalGraph(self._sessions, self._manifest)
        total = count = 0.0
        figures: dict[str, list[Array]] = {name: [] for name in metrics}
        for batch in epoch_batches(loader, 0, 0):
            results = self._eval.run(self._vectors.current[THETA], {**self._checked(batch), **more})
            loss, weight = float(results.pop("loss")), float(results.pop("count"))
            if weight > 0:
                total, count = total + loss * weight, count + weight
            for name, metric in metrics.items():
                figures[name].append(np.asarray(metric(results, batch), np.float64).reshape(-1))
        if not count:
            raise InputMismatch("there is nothing to evaluate: the loader gave no batch with a label that counts")
        means = {name: float(np.concatenate(arrays).mean()) for name, arrays in figures.items()}
        return {"loss": total / count, "count": count, **means}

    def parameters(self) -> dict[str, Array]:
        """Copies of the trainable parameters by their names in the compiled module, float32."""
        with self._alone:
            return named(self._manifest, self._vectors.get(THETA))

    def moments(self) -> dict[str, tuple[Array, ...]]:
        """Copies of the optimizer's states of each parameter: (first, second) of AdamW and Adam-atan2, (momentum,) of SGD and Lion."""
        with self._alone:
            pieces = [named(self._manifest, self._vectors.get(state)) for state in self._manifest.states]
        return {one.name: tuple(piece[one.name] for piece in pieces) for one in self._manifest.parameters}

    def load_parameters(self, source: Mapping[str, Array] | str | os.PathLike[str]) -> None:
        """Puts values in, by name or from a .safetensors file or checkpoint; parameters that are not named stay, moments too.

        Raises InputMismatch for a name or shape that is not there, for NaN and infinity; CheckpointError for a file.
        """
        with self._alone:
            self._vectors.set(THETA, put_in(self._manifest, self._vectors.get(THETA), source))

    def save_parameters(self, path: str | os.PathLike[str], replace: bool = True) -> None:
        """Writes `parameters()` to a .safetensors file, with the fingerprints of what they belong to. Raises CheckpointError, with
        `replace` False for a file that is there."""
        with self._alone:
            parameters, about = self.parameters(), {**self._manifest.fingerprints, "step": self._step}
        write_tensors(path, parameters, about, replace)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint: everything that `resume` needs to go on to the bit. Raises CheckpointError; the older file is then whole."""
        with self._alone:
            vectors, about = self._state()
        write_tensors(path, {**vectors, **self._optional}, about)
        self._saved = (about["counts"]["step"], Path(path))

    def _state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """What a checkpoint holds but for the optional inputs: vectors by name, and the rest."""
        vectors = {name: self._vectors.get(name) for name in self._vectors.names}
        about = {
            **self._manifest.fingerprints,
            "optimizer": self._manifest.update_rule,
            "settings": {name: getattr(self, name) for name in _SETTINGS},
            "counts": {"step": self._step, "skips": self._skips, "epochs": self._epochs},
            "loss_scale": self._scale.to_dict(),
            "position": self._position.to_dict() if self._position else None,
        }
        return vectors, about

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        checkpoint: str | os.PathLike[str],
        providers: str | Sequence[Provider] | None = None,
        **settings: Any,
    ) -> Trainer:
        """A Trainer that goes on where `save` was called: parameters, moments, counters, settings, and the place within `fit`.

        `settings`: those of `Trainer`; the ones that are given replace the saved ones. Raises CheckpointError for a file that cannot be
        read or belongs to another base, other parameters or another optimizer, and what `Trainer` raises.
        """
        tensors, about = read_tensors(checkpoint)
        state, manifest = read_state(Path(checkpoint), about), read_train_manifest(folder)
        _check_belongs(Path(checkpoint), state, Path(folder), manifest)
        check_vectors(Path(checkpoint), tensors, manifest)
        saved = {**to_plain(state.settings), **{name: tensors.pop(name) for name in OPTIONAL if name in tensors}}
        trainer = cls(folder, providers, **{**saved, **settings})
        for name, vector in tensors.items():
            trainer._vectors.set(name, vector)
        counts = state.counts
        trainer._step, trainer._skips, trainer._epochs = counts.step, counts.skips, counts.epochs
        trainer._position = state.position
        trainer._saved = (trainer._step, Path(checkpoint))
        if settings.get("loss_scale") is None:
            trainer._scale = state.loss_scale
        return trainer

    def _epoch(self, run: _Run, position: RunPosition) -> tuple[RunPosition, bool]:
        """The rest of an epoch; whether a callback ended it."""
        for group in groups(epoch_batches(run.loader, position.epoch, position.batch), run.plan.accumulate):
            with self._alone:  # a checkpoint that another thread saves has the place that belongs to its state
                info = self._update(group, self.lr * run.plan.factor(position.updates), run.clip)
                self._position = position = position.after(info, len(group))
            run.bar.update(position.updates, position.epoch - position.first_epoch + 1, run.plan.epochs, info.loss, info.lr)
            if run.checkpoint is not None and run.every and position.updates % run.every == 0:
                self.save(run.checkpoint)
            info = replace(info, epoch=position.epoch, batch=position.batch)
            if any([callback(self, info) for callback in run.callbacks]):  # a list: each is called
                return position, True
        if not position.batch:
            raise InputMismatch("the loader gave no batch; a generator can be read only once: give a list, or Batches")
        return position, False

    def _checked(self, batch: Batch) -> dict[str, Array]:
        missing = [str(info) for info in self._manifest.labels if info.name not in batch]
        if missing:
            raise InputMismatch(f"the batch has no labels: the loss {self._manifest.loss.name} needs {'; '.join(missing)}")
        arrays = check_feeds(self._manifest, batch)
        check_labels(self._manifest, arrays, "the batch")
        return arrays

    def _update(self, batches: Sequence[Batch], lr: float, clip: float | None) -> StepInfo:
        """One update of parameters and moments, or none of both. Raises TrainingError."""
        with self._alone:
            return self._updated(batches, lr, clip)

    def _updated(self, batches: Sequence[Batch], lr: float, clip: float | None) -> StepInfo:
        number, scale = self._step + 1, self._scale.value
        chosen = self._chooser.at(number)
        loss, count, divisor = self._gradient(batches, self._chooser.feeds(chosen))
        if not math.isfinite(loss):
            raise TrainingError(f"step {number}: the loss is {loss}; {self._kept()}")
        numbers = {"lr": lr, "weight_decay": self.weight_decay, "grad_scale": 1 / (divisor * scale), "max_norm": clip or math.inf}
        norm, skipped = self._apply.run(self._vectors, self._grad.gradient, number, numbers, self._chooser.mask(chosen))
        self._scale = self._scale.after(skipped)
        self._skips = self._skips + 1 if skipped else 0
        if self._skips > self.max_skips:
            raise TrainingError(
                f"step {number}: the gradient is not finite (norm {norm}), {self._skips} time{'s' if self._skips > 1 else ''} in a row, "
                f"max_skips is {self.max_skips}; {self._kept()}"
            )
        if not skipped:
            self._vectors.flip()
            self._step = number
        return StepInfo(number, loss, count, norm, lr, skipped, scale)

    def _gradient(self, batches: Sequence[Batch], more: Mapping[str, Array]) -> tuple[float, float, float]:
        """(mean loss, count, what the gradient on the device must be divided by). Raises InputMismatch."""
        if not batches:
            raise InputMismatch("step needs a batch")
        theta, scale = self._vectors.current[THETA], self._scale.value
        checked = [{**self._checked(batch), **more} for batch in batches]
        if len(checked) == 1 and self._all_reduce is None:
            loss, count = self._grad.run(theta, checked[0], scale)
            return loss, _counting(count), 1.0
        total = np.zeros(self._manifest.length + 2, np.float32)
        for batch in checked:
            loss, count = self._grad.run(theta, batch, scale)
            if count > 0:  # else the mean is 0 / 0
                with np.errstate(over="ignore", invalid="ignore"):  # of a gradient that is not finite; apply.onnx sees to it
                    total[:-2] += self._grad.gradient.numpy() * np.float32(count)
                total[-2:] += np.float32(count), np.float32(loss * count)
        if self._all_reduce is not None:
            self._all_reduce(total)
        count = _counting(float(total[-2]))
        self._grad.gradient.update_inplace(total[:-2])
        return float(total[-1]) / count, count, count

    def _kept(self) -> str:
        state = f"parameters and moments are those after step {self._step}"
        return f"{state}; the checkpoint of step {self._saved[0]} is kept: {self._saved[1]}" if self._saved else state


@dataclass(frozen=True, slots=True)
class _Run:
    """What a `fit` was asked for; `every`: updates between two checkpoints, 0 = only after epochs."""

    loader: Loader
    plan: FitPlan
    clip: float | None
    callbacks: tuple[Callback, ...]
    checkpoint: Path | None
    every: int
    bar: ProgressLine


def _counting(count: float) -> float:
    if count == 0:
        raise InputMismatch("no label of the batch counts: all are the one that the loss ignores")
    return count


def _number(name: str, value: float, positive: bool = False) -> float:
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise InputMismatch(f"{name} must be a finite number {'above' if positive else 'of at least'} 0, got {value!r}")
    return float(value)


def _optional(
    manifest: TrainManifest, mask: Mask | None, segment_lr: SegmentFactors | None, segment_decay: SegmentFactors | None
) -> dict[str, Array]:
    """The inputs of apply.onnx that have a default, where they are given."""
    factors = {"segment_lr": segment_lr, "segment_decay": segment_decay}
    found = {name: flat_factors(manifest, name, value) for name, value in factors.items() if value is not None}
    return found if mask is None else {"mask": flat_mask(manifest, mask), **found}


def _check_belongs(checkpoint: Path, state: State, folder: Path, manifest: TrainManifest) -> None:
    """Raises CheckpointError, naming what differs."""
    pairs = (
        ("base", "fingerprint", state.fingerprint, manifest.fingerprint),
        ("trainable parameters", "trainable_fingerprint", state.trainable_fingerprint, manifest.trainable_fingerprint),
    )
    for what, key, there, here in pairs:
        if there != here:
            raise CheckpointError(
                f"{checkpoint}: was trained on another model: the {key} of its {what} is {there:.16}, {folder} has {here:.16}"
            )
    given = {key: value for key, value in state.optimizer.items() if key not in _SETTINGS}
    wanted = {key: value for key, value in manifest.update_rule.items() if key not in _SETTINGS}
    differing = [key for key in {**given, **wanted} if given.get(key) != wanted.get(key)][:3]  # there may be one for every tensor
    if differing:
        there, here = (", ".join(f"{key} {table.get(key, 'unset')}" for key in differing) for table in (given, wanted))
        raise CheckpointError(f"{checkpoint}: was trained by another optimizer: {there}; {folder} has {here}")


def _silence(line: str) -> None:
    """The `log` of the sessions after the first."""
