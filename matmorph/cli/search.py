"""`matmorph search DIR`: which configuration of a trained supernet is best on validation data, as a spec and as values to start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matmorph.cli.output import say, say_json, write_file
from matmorph.cli.train import loader_of, metrics_of, readable_errors
from matmorph.cli.verifying import NoVerify, verifying
from matmorph.cli.working import drawn, guarded
from matmorph.errors import InputError
from matmorph.runtime.format.artifact import SPEC
from matmorph.runtime.targets import target_names

if TYPE_CHECKING:
    from matmorph.runtime.evolution import Scored, SearchResult, SearchSettings, Watch
    from matmorph.runtime.trainer import Metric, Trainer

STATE, VALUES = "search.json", "values.safetensors"


def search_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with the training graphs of a supernet (search: true).")],
    data: Annotated[str, typer.Option("--data", metavar="DATA", help="Validation data as for `train`; never the test data.")],
    trained: Annotated[Path, typer.Option("--trained", metavar="FILE", help="What `matmorph train DIR` wrote, or a checkpoint.")],
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help=f"The folder for {SPEC}, {VALUES} and {STATE}.")],
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Most parameters that a configuration may have.")] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="accuracy, loss, or module:function that gives a metric.")
    ] = None,
    population: Annotated[int, typer.Option("--population", metavar="N", help="Configurations of a round.")] = 50,
    top: Annotated[int, typer.Option("--top", metavar="N", help="Parents: the best of all rounds.")] = 10,
    mutation: Annotated[int, typer.Option("--mutation", metavar="N", help="Children of one parent.")] = 25,
    crossover: Annotated[int, typer.Option("--crossover", metavar="N", help="Children of two parents.")] = 25,
    rate: Annotated[float, typer.Option("--rate", metavar="X", help="Probability that a mutation changes a word.")] = 0.2,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Rounds.")] = 20,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Samples of a batch, where DATA is a file.")] = 64,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the search.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help=f"Go on from OUT/{STATE}.")] = False,
    provider: Annotated[list[str] | None, typer.Option("--provider", metavar="PROVIDER", help=f"{target_names()}; repeatable.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads of one operator.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew where OUT exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    no_verify: NoVerify = False,
) -> None:
    """Search a trained supernet for its best configuration.

    Evolutionary search on DATA; the result is a plain spec, and values that a model compiled by it starts from."""
    _refuse_out(out, resume, force)
    with guarded(), readable_errors():
        with drawn(as_json, f"opening {folder}"):  # the search has a line of its own
            from matmorph.runtime.batches import Batches
            from matmorph.runtime.evolution import SearchSettings, search
            from matmorph.runtime.manifest import checked_file
            from matmorph.runtime.trainer import Trainer

            settings = SearchSettings(population, top, mutation, crossover, rate, rounds, limit, seed)
            found = loader_of(data, batch_size, 0, None)
            loader = found if not isinstance(found, Batches) else list(found)
            trainer = Trainer(folder, provider, threads=threads, verify=verifying(no_verify, folder))
            spec = folder / SPEC if no_verify or trainer.supernet is None else checked_file(folder, SPEC)
            trainer.load_parameters(trained)
            judge = _metric(folder, metric)
        result = search(trainer, loader, judge, settings, state=out / STATE, resume=resume, watch=None if as_json else _watch(settings))
        _write(folder, spec, out, trainer, result)
    _show(result, out, folder, "fitness" if metric not in (None, "accuracy") or judge is None else "accuracy", as_json)


def _refuse_out(out: Path, resume: bool, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file")
    if resume and not (out / STATE).is_file():
        raise InputError(f"{out / STATE}: there is no search to go on with")
    if out.exists() and any(out.iterdir()) and not (resume or force):
        raise InputError(f"{out}: the folder exists", ["go on with its search with --resume, or begin anew with --force"])


def _metric(folder: Path, name: str | None) -> Metric | None:
    """Accuracy where the loss judges classes and nothing else is asked for; None = minus the loss."""
    if name == "loss":
        return None
    if name is None or name == "accuracy":
        found = metrics_of(folder).get("accuracy")
        if name is not None and found is None:
            raise InputError("--metric accuracy: the loss of these training graphs judges no classes")
        return found
    from matmorph.models.resolve import call_named

    metric: Metric = call_named(name, "a metric: a function of (outputs, batch) that gives an array of figures")
    if not callable(metric):
        raise InputError(f"--metric {name}: gives a {type(metric).__name__}, not a function of (outputs, batch)")
    return metric


def _watch(settings: SearchSettings) -> Watch | None:
    """A line on stderr that is written over, where that is a terminal."""
    import sys

    if not sys.stderr.isatty():
        return None

    def show(number: int, done: int, of: int, best: Scored) -> None:
        line = f"round {number + 1}/{settings.rounds}  {done}/{of}  best {best.fitness:.4f} with {best.parameters:,} parameters"
        sys.stderr.write(f"\r{line:<79}" + ("\n" if done == of and number + 1 == settings.rounds else ""))
        sys.stderr.flush()

    return show


def _write(folder: Path, spec_file: Path, out: Path, trainer: Trainer, result: SearchResult) -> None:
    """The spec of the best configuration, and its values."""
    from matmorph.folders.after_training import found_spec
    from matmorph.ir.adapter import read_adapters
    from matmorph.passes.methods import method_table
    from matmorph.runtime.checkpoint import write_tensors
    from matmorph.runtime.format.training import TRAIN_MANIFEST
    from matmorph.specs.dump import dump_resolved
    from matmorph.specs.load import load_spec

    adapters = read_adapters(trainer.manifest.adapters, str(folder / TRAIN_MANIFEST))
    methods = method_table()
    spec = load_spec(found_spec(load_spec(spec_file, methods), adapters, result.named), methods)
    supernet = trainer.supernet
    if supernet is not None:
        write_tensors(out / VALUES, supernet.values(trainer.parameters(), result.best.configuration), {})
    write_file(out / SPEC, dump_resolved(spec).encode(), force=True)


def _show(result: SearchResult, out: Path, folder: Path, what: str, as_json: bool) -> None:
    if as_json:
        say_json({**_plain(result.best), "configuration": result.named, "pareto": [_plain(one) for one in result.pareto]})
        return
    say(f"{'parameters':>12}  {what:>9}")
    for one in result.pareto:
        say(f"{one.parameters:>12,}  {one.fitness:>9.4f}")
    say(f"{len(result.scored)} configurations judged; best: {what} {result.best.fitness:.4f} with {result.best.parameters:,} parameters")
    say(f"wrote {out / SPEC} (compile it, and start from {out / VALUES}); merge as it is with: ", end="")
    say(f"matmorph merge {folder} --trained FILE --configuration {out / STATE}")


def _plain(one: Scored) -> Mapping[str, Any]:
    return {"fitness": one.fitness, "parameters": one.parameters}
