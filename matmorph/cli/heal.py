"""`matmorph heal DIR --text FILE --teacher DIR2 --out DIR3`: a compressed language model learns to answer as the dense one does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matmorph.cli.output import say, say_json
from matmorph.cli.text import loading
from matmorph.cli.text.files import TextFiles
from matmorph.cli.train import readable_errors
from matmorph.cli.verifying import NoVerify, verifying
from matmorph.cli.working import working
from matmorph.errors import InputError, MatmorphError
from matmorph.progress import Progress

if TYPE_CHECKING:
    from matmorph.folders.job import Job
    from matmorph.runtime.format.distillation import Distill
    from matmorph.runtime.format.training import TrainManifest
    from matmorph.runtime.healing import Course, Healing
    from matmorph.runtime.teacher import Taught, TextRows


def heal_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with training graphs, of a language model.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to learn from, taken as it is.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR2", help="The folder to write; DIR stays as it is.")],
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="DIR3", help="The dense model: a folder of compile, or a model that it takes."),
    ] = None,
    teacher_cache: Annotated[
        Path | None, typer.Option("--teacher-cache", metavar="FILE", help="Its answers: read where the file exists, else written.")
    ] = None,
    most: Annotated[int, typer.Option("--tokens", metavar="N", help="Learn from N tokens; more than there are come again.")] = 100_000,
    eval_text: Annotated[
        Path | None, typer.Option("--eval-text", metavar="FILE2", help="What the result is judged by; the second half of FILE.")
    ] = None,
    eval_tokens: Annotated[int, typer.Option("--eval-tokens", metavar="N", help="Judge by at most N tokens, evenly spread.")] = 8192,
    window: Annotated[int, typer.Option("--window", metavar="N", help="Tokens that the model sees at once.")] = 512,
    lr: Annotated[float | None, typer.Option("--lr", metavar="X", help="Learning rate at its highest, over that of DIR.")] = None,
    accumulate: Annotated[int, typer.Option("--accumulate", metavar="N", help="Windows of an update.")] = 2,
    temperature: Annotated[float | None, typer.Option("--temperature", metavar="X", help="Of both answers, over that of DIR.")] = None,
    top: Annotated[int | None, typer.Option("--top", metavar="N", help="Words of the teacher that are learnt one by one; 64.")] = None,
    next_token: Annotated[
        float | None, typer.Option("--next-token", metavar="X", help="Share of the cross entropy of the next token in the loss; 0.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the order of the windows.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", metavar="DIR4", help="A folder with tokenizer.json.")] = None,
    provider: loading.Providers = None,
    threads: loading.Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR2 where it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    no_verify: NoVerify = False,
) -> None:
    """Teach a compressed language model the dense one's answers.

    What its rewriting made trainable learns. The state that predicts other text best is kept and written as a folder of its own; codes
    stay as they are."""
    from matmorph.exporters.staging import refuse_existing

    refuse_existing(out, force)
    _refuse_numbers({"--tokens": most, "--eval-tokens": eval_tokens, "--accumulate": accumulate, "--window": window})
    if teacher is None and (teacher_cache is None or not teacher_cache.is_file()):
        raise InputError(
            "there is nobody to learn from", ["name the dense model with --teacher, or a file of its answers with --teacher-cache"]
        )
    verify = verifying(no_verify, folder)
    with working(as_json, f"opening {folder}") as show, readable_errors(), tempfile.TemporaryDirectory() as scratch:
        from matmorph.runtime.healing import Course, heal
        from matmorph.runtime.trainer import Trainer

        train = _training(folder)
        settings = _settings(train, {"top": top, "temperature": temperature, "next_token": next_token})
        rows = _rows(folder, (text, eval_text), tokenizer, (most, eval_tokens), window, verify)
        course = Course(max(1, round(most / (window - rows.prefix))), accumulate=accumulate, seed=seed)
        how = {"providers": provider, "threads": threads, "verify": verify}
        _refuse_rows(folder, rows, how)
        taught = _taught(teacher, teacher_cache, rows, settings, Path(scratch), how, show)
        _refuse_other_words(folder, train, taught)
        job, trained = _graphs(folder, train, settings, Path(scratch), verify, show)
        trainer = Trainer(trained, provider, lr=lr, threads=threads, verify=False)
        healing = heal(trainer, rows, taught, course, lambda done, of: show("healing", done, of))
        belongs = trainer.manifest.fingerprints
        del trainer
        from matmorph.folders.healing import told, write_healed

        with _kept(healing, belongs, out):
            write_healed(job, healing.parameters, healing, out, force, show)
    if as_json:
        say_json({"folder": str(out), **told(healing)})
        return
    say("\n".join(_lines(healing, course, rows)))
    say(f"wrote {out} (check it anywhere with: matmorph verify {out})")


def _refuse_numbers(given: dict[str, int]) -> None:
    for name, value in given.items():
        if value < (2 if name == "--window" else 1):
            raise InputError(f"{name} is {value}: it must be {2 if name == '--window' else 1} or more")


def _training(folder: Path) -> TrainManifest:
    """InputError for a folder without training graphs, saying what its spec lacks."""
    from matmorph.runtime.format.training import TRAIN_MANIFEST
    from matmorph.runtime.manifest import artifact_folder
    from matmorph.runtime.train_manifest import read_train_manifest

    if not (artifact_folder(folder) / TRAIN_MANIFEST).is_file():
        raise InputError(
            f"{folder}: has no training graphs, so nothing of it can learn",
            [
                "compile it with this in its spec: train: {loss: distill, trainable: [factors]}",
                "trainable: [adapters] for factors beside codes, [all] or globs over names for a pruned model",
            ],
        )
    return read_train_manifest(folder)


def _settings(train: TrainManifest, given: dict[str, Any]) -> Distill:
    """Those of the folder, with what is given in their place. InputError for numbers that do not work."""
    from dataclasses import replace

    from matmorph.runtime.format.distillation import Distill

    found = replace(train.loss.distill or Distill(), **{name: value for name, value in given.items() if value is not None})
    if found.top < 1 or not 0 < found.temperature < float("inf") or not 0 <= found.next_token <= 1:
        raise InputError("--top must be 1 or more, --temperature above 0, and --next-token from 0 to 1")
    return found


def _rows(
    folder: Path, texts: tuple[Path, Path | None], tokenizer: Path | None, most: tuple[int, int], window: int, verify: bool
) -> TextRows:
    from matmorph.runtime.errors import ArtifactError
    from matmorph.runtime.format.reading import StoredError
    from matmorph.runtime.manifest import artifact_folder
    from matmorph.runtime.teacher import TextRows
    from matmorph.text.corpus import read_corpus

    try:
        tokens = TextFiles.of(artifact_folder(folder), tokenizer, verify).tokens()
    except StoredError as error:
        raise ArtifactError(str(error)) from error
    text, other = texts
    corpus = read_corpus(text, tokens, most[0] + window if other is not None else 2 * max(*most, window))
    half = len(corpus.ids) // 2
    learnt, judged = (corpus.ids[:half], corpus.ids[half:]) if other is None else (corpus.ids, read_corpus(other, tokens).ids)
    room = max(1, window - len(corpus.prefix))
    return TextRows.of(learnt, judged, corpus.prefix, window, (max(1, round(most[0] / room)), max(1, most[1] // room)))


def _refuse_rows(folder: Path, rows: TextRows, how: dict[str, Any]) -> None:
    """Windows and words that the model does not take, and what is no language model."""
    from matmorph.runtime.text_model import TextModel

    TextModel(folder, how["providers"], threads=how["threads"], verify=how["verify"]).refuse(
        rows.learnt.shape[1], int(max(rows.learnt.max(), rows.judged.max()))
    )


def _taught(
    teacher: str | None, cache: Path | None, rows: TextRows, settings: Distill, scratch: Path, how: dict[str, Any], show: Progress
) -> Taught:
    """The teacher's answers, from the file where there is one. InputError, CheckpointError, ArtifactError."""
    from matmorph.runtime.teacher import model_sha256, read_taught, teach, write_taught
    from matmorph.runtime.text_model import TextModel

    ready = cache is not None and cache.is_file()
    if ready and (teacher is None or not _is_artifact(teacher)):
        return read_taught(cache or Path(), rows, settings, None)
    home = Path(teacher or "") if _is_artifact(teacher or "") else _dense(teacher or "", scratch / "teacher", show)
    found = model_sha256(home)
    if ready:
        return read_taught(cache or Path(), rows, settings, found)
    taught = teach(TextModel(home, **how), found, rows, settings, lambda done, of: show("asking the teacher", done, of))
    if cache is not None:
        write_taught(cache, taught)
    return taught


def _is_artifact(name: str) -> bool:
    from matmorph.runtime.format.artifact import MANIFEST

    return (Path(name) / MANIFEST).is_file()


def _dense(model: str, folder: Path, show: Progress) -> Path:
    from matmorph.cli.unchanged import unchanged_folder
    from matmorph.models.resolve import resolve

    return unchanged_folder(resolve(model, cache=False, by_reference=True), folder, show)


def _refuse_other_words(folder: Path, train: TrainManifest, taught: Taught) -> None:
    words = next((info.shape[-1] for info in train.outputs if info.name == train.loss.output), None)
    if isinstance(words, int) and words != taught.about.vocabulary:
        raise InputError(
            f"the teacher has {taught.about.vocabulary} words and {folder} has {words}: a student learns from a model of its own vocabulary"
        )


def _graphs(folder: Path, train: TrainManifest, settings: Distill, scratch: Path, verify: bool, show: Progress) -> tuple[Job, Path]:
    """What will be written, and the folder that is trained until then: its own, or one with graphs of this loss."""
    from matmorph.folders.healing import distilling, healable, write_graphs

    job = healable(folder, train, settings, verify)
    if distilling(train, settings):
        return job, folder
    write_graphs(job, scratch / "graphs", show)
    return job, scratch / "graphs"


@contextmanager
def _kept(healing: Healing, belongs: Mapping[str, str], out: Path) -> Iterator[None]:
    """What was learnt goes beside the folder where that could not be written: it took longer than everything else."""
    try:
        yield
    except MatmorphError as error:
        from matmorph.runtime.checkpoint import write_tensors
        from matmorph.runtime.errors import CheckpointError

        place = out.with_name(f"{out.name}.learnt.safetensors")
        with suppress(CheckpointError):  # a full disk, say: then the first error is the one to read
            write_tensors(place, healing.parameters, belongs)
            error.details = (*error.details, f"what was learnt lies in {place}")
        raise


def _lines(healing: Healing, course: Course, rows: TextRows) -> list[str]:
    from matmorph.folders.healing import note

    again = f", {healing.distinct} different ones: the text has no more" if healing.distinct < healing.rows else ""
    lines = [
        note(healing),
        f"  {healing.rows:,} windows of {rows.learnt.shape[1]} tokens{again}; {course.updates:,} updates of {course.accumulate}, the best "
        f"after {healing.best.updates}",
    ]
    return lines + [
        f"  after {one.updates:>5} updates: perplexity {one.prediction.perplexity:.3f}, divergence from the teacher {one.divergence:.4f}"
        for one in healing.looks
    ]
