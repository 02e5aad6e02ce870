"""`matmorph train DIR`: fine-tunes the training graphs of a folder on ONNX Runtime. No torch is needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from matmorph.cli.output import refuse_file, say, say_json
from matmorph.cli.verifying import NoVerify, verifying
from matmorph.cli.working import drawn, guarded
from matmorph.errors import CheckError, InputError, did_you_mean
from matmorph.runtime.targets import target_names

if TYPE_CHECKING:
    from matmorph.runtime.batches import Loader
    from matmorph.runtime.schedules import Schedule
    from matmorph.runtime.trainer import Metric, Trainer


@dataclass(frozen=True, slots=True)
class EpochRow:
    """One line of the result. `loss`: mean while it was trained; `validation`: figures of the validation data afterwards."""

    epoch: int
    loss: float
    validation: Mapping[str, float] = field(default_factory=dict)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Errors of the runtime as those that the command line prints: training that went wrong ends with 1, wrong input with 2."""
    from matmorph.runtime.errors import SessionError, TrainingError

    try:
        yield
    except TrainingError as error:
        raise CheckError(str(error)) from error
    except SessionError as error:
        raise InputError(str(error)) from error


def train_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with training graphs (of compile --train or export_training).")],
    data: Annotated[
        str, typer.Option("--data", metavar="DATA", help="A .npz or .safetensors file keyed by input and label, or module:loader.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The .safetensors file for the trained parameters.")],
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", help="Times that the data is gone through.")] = 1,
    lr: Annotated[float | None, typer.Option("--lr", metavar="X", help="Learning rate, over that of DIR.")] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", metavar="X", help="Over that of DIR.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Samples of a batch, where DATA is a file.")] = 16,
    accumulate: Annotated[int, typer.Option("--accumulate", metavar="N", help="Batches per update.")] = 1,
    clip: Annotated[float | None, typer.Option("--clip", metavar="X", help="Largest global norm of a gradient.")] = None,
    schedule: Annotated[str, typer.Option("--schedule", metavar="SCHEDULE", help="constant, linear or cosine.")] = "constant",
    warmup: Annotated[float, typer.Option("--warmup", metavar="X", help="Updates, or a share of all of them below 1.")] = 0.0,
    trim: Annotated[str | None, typer.Option("--trim", metavar="INPUT", help="Cut off columns where INPUT is 0 in every row.")] = None,
    validation: Annotated[Path | None, typer.Option("--validation", metavar="FILE", help="Data to evaluate after each epoch.")] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the order of the samples, and of what a supernet trains.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", metavar="FILE", help="Written after each epoch.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="FILE", help="Go on from this checkpoint.")] = None,
    provider: Annotated[list[str] | None, typer.Option("--provider", metavar="PROVIDER", help=f"{target_names()}; repeatable.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads of one operator.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE of --out and --checkpoint where they exist.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    no_verify: NoVerify = False,
) -> None:
    """Train on DATA what DIR was exported to train.

    The trained parameters go into one file, for `matmorph merge`; DIR stays as it is. Needs no torch."""
    refuse_file(out, force, ".safetensors")
    if checkpoint is not None and checkpoint != resume:
        refuse_checkpoint(checkpoint, force)
    settings = {"lr": lr, "weight_decay": weight_decay, "threads": threads, "seed": seed, "verify": verifying(no_verify, folder)}
    began = time.perf_counter()
    with guarded(), readable_errors():
        with drawn(as_json, f"opening {folder}"):  # training has a line of its own
            loader = loader_of(data, batch_size, seed, trim)
            refuse_wrong_labels(folder, loader, data)
            judge = _judge(folder, validation, batch_size, trim)
            trainer = _trainer(folder, resume, provider, {name: value for name, value in settings.items() if value is not None})
        how = {"schedule": schedule_of(schedule, warmup), "accumulate": accumulate, "clip": clip, "checkpoint": checkpoint or resume}
        rows = _fitted(trainer, loader, epochs, judge, how)
        trainer.save_parameters(out, force)
    _show(rows, out, folder, trainer.updates, time.perf_counter() - began, as_json)


def refuse_checkpoint(path: Path, force: bool) -> None:
    """Raises InputError for a file that is there, unless `force`: what an earlier run learnt is not lost by a slip."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, a checkpoint is one file")
    if path.exists() and not force:
        raise InputError(f"{path}: the checkpoint exists", [f"go on from it with --resume {path}, or replace it with --force"])


def loader_of(data: str, batch_size: int, seed: int, trim: str | None) -> Loader:
    """Batches of a file, shuffled, or what a callable gives: a series of batches, or a generator, which is called again for each epoch.

    Raises InputError (the callable) and InputMismatch (the file).
    """
    from matmorph.runtime.batches import load_batches

    if Path(data).suffix in (".npz", ".safetensors") or ":" not in data:
        return load_batches(data, batch_size, seed=seed, transform=_trimming(trim))
    from matmorph.models.resolve import call_named

    found = call_named(data, "batches, dicts of numpy arrays")
    if isinstance(found, Mapping | str | bytes) or not isinstance(found, Iterable):
        raise InputError(f"{data}: gives a {type(found).__name__}, not a series of batches (dicts of numpy arrays)")
    if isinstance(found, Iterator):
        return _Called(lambda: call_named(data, "batches"))
    loader: Loader = found
    return loader


def refuse_wrong_labels(folder: Path, loader: Loader, data: str) -> None:
    """InputMismatch for a class that the model does not have, of all samples of a file before the first of them trains."""
    from matmorph.runtime.batches import Batches
    from matmorph.runtime.labels import check_labels
    from matmorph.runtime.train_manifest import read_train_manifest

    if isinstance(loader, Batches):
        check_labels(read_train_manifest(folder), loader.arrays, data)


@dataclass(frozen=True, slots=True)
class _Called:
    """A generator that can be read once per epoch."""

    call: Callable[[], Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.call())


def _trimming(mask: str | None) -> Any:
    from matmorph.runtime.batches import trim_padding

    return None if mask is None else trim_padding(mask)


def schedule_of(name: str, warmup: float) -> Schedule | None:
    """None = the same rate throughout, which needs no number of updates. Raises InputError for a name that is none, InputMismatch for a
    warm-up that does not work."""
    from matmorph.runtime.schedules import SCHEDULES

    if name not in SCHEDULES:
        raise InputError(f"--schedule {name}: there are {', '.join(SCHEDULES)}{did_you_mean(name, SCHEDULES)}")
    if warmup >= 1 and warmup != int(warmup):
        raise InputError(f"--warmup {warmup}: from 1 on it is a number of updates, and must be whole")
    if name == "constant" and warmup == 0:
        return None
    return SCHEDULES[name](int(warmup) if warmup >= 1 else warmup)


def _trainer(folder: Path, resume: Path | None, provider: list[str] | None, settings: Mapping[str, Any]) -> Trainer:
    from matmorph.runtime.trainer import Trainer

    return Trainer(folder, provider, **settings) if resume is None else Trainer.resume(folder, resume, provider, **settings)


Validator: TypeAlias = "Callable[[Trainer], Mapping[str, float]]"
"""Figures of the validation data with the parameters as they are."""


def _judge(folder: Path, validation: Path | None, batch_size: int, trim: str | None) -> Validator | None:
    if validation is None:
        return None
    from matmorph.runtime.batches import load_batches
    from matmorph.runtime.train_manifest import read_train_manifest

    if read_train_manifest(folder).supernet is not None:
        raise InputError(f"--validation: {folder} trains a supernet, which has no one accuracy; matmorph search judges its configurations")
    loader = load_batches(validation, batch_size, shuffle=False, transform=_trimming(trim))
    refuse_wrong_labels(folder, loader, str(validation))
    metrics = metrics_of(folder)

    def judged(trainer: Trainer) -> Mapping[str, float]:
        figures = trainer.evaluate(loader, metrics)
        return {name: figures[name] for name in ("loss", *metrics)}

    return judged


def metrics_of(folder: Path) -> dict[str, Metric]:
    """Accuracy where the loss judges classes."""
    from matmorph.runtime.train_manifest import read_train_manifest

    manifest = read_train_manifest(folder)
    labels, loss, output = manifest.labels, manifest.loss, manifest.loss.output
    if loss.name != "cross_entropy" or output not in [info.name for info in manifest.outputs] or not labels:
        return {}

    def right(outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        wanted = batch[labels[0].name]
        return (outputs[output].argmax(-1) == wanted)[wanted != loss.ignore_index]

    return {"accuracy": right}


def _fitted(trainer: Trainer, loader: Loader, epochs: int, judge: Validator | None, how: Mapping[str, Any]) -> list[EpochRow]:
    """Trains; a row per epoch. Where a loader does not say how long an epoch is, only the last row has figures of the validation data."""
    from matmorph.runtime.batches import batches_per_epoch

    length = batches_per_epoch(loader)
    figures: dict[int, Mapping[str, float]] = {}
    last = 0

    def watch(at: Trainer, info: Any) -> None:
        nonlocal last
        last = info.epoch
        if judge is not None and info.batch == length:
            figures[info.epoch] = judge(at)

    losses = trainer.fit(loader, epochs, callbacks=[watch], **how)
    if judge is not None and losses and last not in figures:
        figures[last] = judge(trainer)
    first = last - len(losses) + 1
    return [EpochRow(first + k + 1, loss, figures.get(first + k, {})) for k, loss in enumerate(losses)]


def _show(rows: list[EpochRow], out: Path, folder: Path, updates: int, seconds: float, as_json: bool) -> None:
    if as_json:
        result = {"epochs": [asdict(row) for row in rows], "updates": updates, "seconds": round(seconds, 3), "parameters": str(out)}
        say_json(result)
        return
    names = list(dict.fromkeys(name for row in rows for name in row.validation))
    lines = [("epoch", "loss", *(f"validation {name}" for name in names))]
    for row in rows:
        figures = [f"{row.validation[name]:.4f}" if name in row.validation else "" for name in names]
        lines.append((str(row.epoch), f"{row.loss:.4f}", *figures))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        say("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    say(f"{updates} updates in {seconds:.1f} s; wrote {out} (put it into the model with: matmorph merge {folder} --trained {out})")
