"""The command line. Heavy imports happen inside the commands, so that `matmorph --help` answers at once.

Exit codes: 0 done, 1 a check failed, 2 the input is wrong, 130 interrupted. An error is printed on stderr as plain lines, the first never
wrapped; `--debug` anywhere on the line shows the Python traceback as well. With `--json` stdout holds JSON only.
"""

from __future__ import annotations

import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from matmorph.cli.adapters import adapter_app, merge_command
from matmorph.cli.chat import chat_command
from matmorph.cli.commands import Command, Group
from matmorph.cli.completion import completion_command
from matmorph.cli.evaluate import evaluate_command
from matmorph.cli.generate import generate_command
from matmorph.cli.heal import heal_command
from matmorph.cli.layout import layout_command
from matmorph.cli.output import complain, refuse_file, say, say_json, write_file
from matmorph.cli.report import compare_command, diff_command, report_command
from matmorph.cli.search import search_command
from matmorph.cli.train import readable_errors, train_command
from matmorph.cli.work import work_app
from matmorph.cli.working import step, working
from matmorph.errors import InputError, MatmorphError

if TYPE_CHECKING:
    from matmorph.models.resolve import Model
    from matmorph.passes.budget.pareto import Front
    from matmorph.report.model import Report

INTERRUPTED = 130
INTERRUPTION = "interrupted; nothing is half-written"

app = typer.Typer(
    name="matmorph",
    help="Rewrite the matmuls of a trained torch model by a YAML spec, check the result, export it to ONNX.",
    epilog="MODEL: minilm | smollm2 | a Hugging Face folder | FILE.gguf | package.module:factory | FILE.pt2. "
    "matmorph COMMAND --help says more.",
    cls=Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
specs_app = typer.Typer(help="Library specs, a check, the JSON Schema.", no_args_is_help=True, cls=Group)
app.add_typer(specs_app, name="specs")
app.command(name="generate", cls=Command)(generate_command)
app.command(name="chat", cls=Command)(chat_command)
app.command(name="evaluate", cls=Command, short_help="Perplexity on a text, or loss on data.")(evaluate_command)
app.command(name="train", cls=Command)(train_command)
app.command(name="heal", cls=Command)(heal_command)
app.command(name="search", cls=Command)(search_command)
app.command(name="merge", cls=Command, short_help="Merge adapters into the weights of DIR.")(merge_command)
app.add_typer(adapter_app, name="adapter")
app.add_typer(work_app, name="work")
app.command(name="report", cls=Command, short_help="Draw report.html of DIR anew, with times.")(report_command)
app.command(name="layout", cls=Command, short_help="Write DIR as another runtime wants it.")(layout_command)
app.command(name="compare", cls=Command, short_help="Two folders side by side.")(compare_command)
app.command(name="diff", cls=Command, short_help="The graph around one matmul before and after.")(diff_command)
app.command(name="completion", cls=Command, short_help="Print a completion script for a shell.")(completion_command)

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="minilm, smollm2, a Hugging Face folder, FILE.gguf, package.module:factory or FILE.pt2.")
]
SpecName = Annotated[str, typer.Option("--spec", metavar="SPEC", help="A YAML file, or the name of a library spec.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="Whether a causal language model of a folder keeps its key/value cache.")]
Every = Annotated[bool, typer.Option("--all", help="List every site of a long model.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from matmorph.runtime.format.version import __version__

        say(f"matmorph {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)] = False,
) -> None:
    """Options before the command; `version` is dealt with by its callback."""


@app.command(name="inspect", cls=Command)
def inspect_command(model: ModelName, cache: Cache = True, every: Every = False, as_json: Json = False) -> None:
    """List every matmul site of MODEL.

    Path, role, form, shape, parameters and number of uses."""
    with working(as_json, f"loading {model}") as show:
        from matmorph import api
        from matmorph.models.resolve import resolve
        from matmorph.report.table import print_inspect

        found = resolve(model, cache, by_reference=True)
        with step(show, "tracing"):
            inputs = (found.example_inputs, found.dynamic_shapes)
            report = api.inspect_model(found.module, *inputs, kwargs=found.kwargs, cache=found.cache, weights=found.weights)
    _show(report, as_json, every, print_inspect)


@app.command(cls=Command)
def plan(model: ModelName, spec: SpecName, cache: Cache = True, every: Every = False, as_json: Json = False) -> None:
    """Say what SPEC would do and cost.

    Rows and totals like those of compile, without errors: no weight is read."""
    from matmorph.spec import load_spec

    loaded = load_spec(spec)
    with working(as_json, f"loading {model}") as show:
        from matmorph import api
        from matmorph.models.resolve import resolve
        from matmorph.report.table import print_plan

        found = resolve(model, cache, by_reference=True)
        with step(show, "tracing and planning"):
            inputs = (found.example_inputs, found.dynamic_shapes)
            report = api.plan(found.module, loaded, *inputs, kwargs=found.kwargs, cache=found.cache, weights=found.weights)
    _show(report, as_json, every, print_plan)


@app.command(cls=Command)
def explain(
    model: ModelName,
    spec: SpecName,
    node: Annotated[str, typer.Option("--node", metavar="PATH", help="Path of a site, as `matmorph inspect` prints it.")],
    cache: Cache = True,
    as_json: Json = False,
) -> None:
    """Say why a site is (not) rewritten.

    Each rule in order, condition by condition, with the values that decided."""
    from matmorph.spec import load_spec

    loaded = load_spec(spec)
    with working(as_json, f"loading {model}") as show:
        from matmorph import api
        from matmorph.models.resolve import resolve

        found = resolve(model, cache, by_reference=True)
        with step(show, "tracing"):
            inputs = (found.example_inputs, found.dynamic_shapes)
            explanation = api.explain(found.module, loaded, *inputs, node, kwargs=found.kwargs, cache=found.cache, weights=found.weights)
    if as_json:
        say_json(explanation.to_dict())
    else:
        say("\n".join(explanation.lines()))


@app.command(name="compile", cls=Command)
def compile_command(
    model: ModelName,
    spec: SpecName,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help=".npz or .safetensors keyed by input name, first axis = samples.")
    ] = None,
    calibration_text: Annotated[
        Path | None, typer.Option("--calibration-text", metavar="FILE", help="UTF-8 text for a language model, cut by its own tokenizer.")
    ] = None,
    length: Annotated[int | None, typer.Option("--length", metavar="N", help="Tokens of a sample of that text; 512.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", metavar="N", help="Samples of that text; at most 128.")] = None,
    train: Annotated[
        bool | None, typer.Option("--train/--no-train", help="Write training graphs too; by default where SPEC has train:.")
    ] = None,
    pareto: Annotated[
        int | None, typer.Option("--pareto", metavar="N", help="Also the smallest errors at N sizes: table, pareto.json, pareto.svg.")
    ] = None,
    cache: Cache = True,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="Keep what is finished there; the same command goes on after it was ended.")
    ] = None,
    workers: Annotated[
        str | None, typer.Option("--workers", metavar="N", help="Processes that work on matmuls; or ray, or ray://HOST:PORT.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR where it exists.")] = False,
    every: Every = False,
    as_json: Json = False,
) -> None:
    """Rewrite MODEL by SPEC and write DIR.

    The result is checked against torch on ONNX Runtime first; where a check fails nothing is written."""
    from matmorph.exporters.staging import refuse_existing
    from matmorph.spec import load_spec

    refuse_existing(out, force)
    loaded = load_spec(spec)
    if train and loaded.train is None:
        raise InputError(f"--train: {spec} says nothing of training", ["add to it, for instance: train: {loss: cross_entropy}"])
    _refuse_two_calibrations(calibration, calibration_text, length, samples)
    with working(as_json, f"loading {model}") as show:
        from matmorph import api
        from matmorph.models.resolve import resolve
        from matmorph.passes.budget.pareto import refuse_unswept
        from matmorph.passes.work.hiring import read_workers
        from matmorph.report.table import print_plan

        if pareto is not None:
            refuse_unswept(loaded, pareto)
        read_workers(workers)
        found = resolve(model, cache, by_reference=True)
        batches = _calibration(found, calibration, calibration_text, length, samples)
        compiled = api.compile(
            found.module,
            loaded,
            found.example_inputs,
            found.dynamic_shapes,
            calibration=batches,
            kwargs=found.kwargs,
            cache=found.cache,
            progress=show,
            hf_folder=found.hf_folder,
            work=work,
            workers=workers,
            weights=found.weights,
        )
        front = None if pareto is None else compiled.pareto(pareto)
        folder = compiled.save(out, force=force, train=train, pareto=front)
    _show(compiled.report, as_json, every, print_plan)
    if not as_json:
        if front is not None:
            _print_front(front)
        _print_saved(folder, compiled.report)


@app.command(cls=Command)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compile wrote.")],
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="NAME", help="Also name the nodes that this target hands back to the CPU; it need not be here."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a written folder on this machine.

    Files, hashes, and outputs under this machine's ONNX Runtime; needs no torch."""
    with working(as_json, f"checking {folder}"), readable_errors():
        from matmorph.cli.placing import placing_target, with_placements
        from matmorph.runtime.check import check, tell

        on = None if target is None else placing_target(target)
        result = check(folder)
        result, placements = (result, ()) if on is None else with_placements(result, folder, on)
    if not as_json:
        raise typer.Exit(tell(result))
    say_json({"ok": result.ok, **asdict(result), **({} if on is None else {"placements": [asdict(one) for one in placements]})})
    raise typer.Exit(0 if result.ok else 1)


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write; an earlier demo result is replaced.")] = Path(
        "out"
    ),
    model: Annotated[
        Literal["minilm", "smollm2"], typer.Option("--model", help="The embedded sentence encoder, or the embedded language model.")
    ] = "minilm",
    spec: Annotated[
        str | None,
        typer.Option("--spec", metavar="SPEC", help="A YAML file, or the name of a library spec.  [default: low-rank-60 or llm-u4]"),
    ] = None,
) -> None:
    """Take a real model through everything.

    Compile, export, check, compare with the original."""
    with working(first=f"loading {model}") as show:
        if model == "smollm2":
            from matmorph.cli.demo_language import run_language_demo

            finish = run_language_demo(out, spec or "llm-u4", show)
        else:
            from matmorph.cli.demo import run_demo

            finish = run_demo(out, spec or "low-rank-60", show)
    finish()


@specs_app.command(name="list", cls=Command)
def specs_list(
    long: Annotated[
        bool, typer.Option("--long", help="With what each makes of MiniLM, and of a language model (measured by benchmarks/).")
    ] = False,
) -> None:
    """List the library specs, a line each.

    With --long: what each is, what it makes of MiniLM where it fits, and some of a language model."""
    from matmorph.specs.gallery import (
        dense_language_line,
        dense_line,
        figures,
        figures_line,
        foreign,
        language_figures,
        language_line,
    )
    from matmorph.specs.load import library_names, library_text

    texts = {name: library_text(name) for name in library_names()}
    measured = figures(texts)
    if not long:
        width = max(map(len, texts))
        others = [name for name in texts if foreign(measured.get(name))]
        for name in sorted(texts, key=lambda name: name in others):
            if name == others[0]:
                say("\nfor the models that they name, or with train.output set to what a loss can look at:")
            say(f"{name:<{width}}  {_headline(texts[name])}")
        say("\nmatmorph specs list --long says more, matmorph specs show SPEC everything")
        return
    spoken = language_figures(texts)
    for name, text in texts.items():
        say(name)
        lines = [_about(text), figures_line(measured.get(name)), *([language_line(spoken[name])] if name in spoken else [])]
        say("\n".join(map(_indented, lines)))
    say("\n".join(map(_indented, (dense_line(), dense_language_line()))))


def _indented(text: str) -> str:
    return textwrap.fill(text, width=79, initial_indent="  ", subsequent_indent="  ")


@specs_app.command(name="show", cls=Command)
def specs_show(name: Annotated[str, typer.Argument(metavar="SPEC", help="The name of a library spec.")]) -> None:
    """Print a library spec."""
    from matmorph.specs.load import library_text

    say(library_text(name), end="")


@specs_app.command(name="check", cls=Command)
def specs_check(file: Annotated[str, typer.Argument(metavar="SPEC", help="A YAML file, or the name of a library spec.")]) -> None:
    """Check a spec without a model.

    Syntax, keys, values and `extends`."""
    from matmorph.spec import load_spec

    spec = load_spec(file)
    rules = [rule for stage in spec.stages for rule in stage.rules]
    methods = sorted({use.method for rule in rules for use in rule.rewrite})
    say(f"{file}: fine ({len(rules)} rule{'s' if len(rules) != 1 else ''}; methods: {', '.join(methods) or 'none'})")


@specs_app.command(name="schema", cls=Command)
def specs_schema(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it there, as UTF-8 whatever the shell makes of >.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE where it exists.")] = False,
) -> None:
    """Print the JSON Schema of the language.

    Editors use it for completion."""
    from matmorph.passes.methods import languages
    from matmorph.specs.json_schema import schema_text

    text = schema_text(languages())
    if out is None:
        say(text, end="")
        return
    refuse_file(out, force)
    write_file(out, text.encode(), force)
    say(f"wrote {out}")


# ---- shared by the commands


def _refuse_two_calibrations(arrays: Path | None, text: Path | None, length: int | None, samples: int | None) -> None:
    if arrays is not None and text is not None:
        raise InputError("--calibration and --calibration-text are two ways to say the same: give one of them")
    idle = [name for name, value in (("--length", length), ("--samples", samples)) if value is not None]
    if text is None and idle:
        raise InputError(f"{idle[0]} belongs to --calibration-text, which is not given")


def _calibration(found: Model, arrays: Path | None, text: Path | None, length: int | None, samples: int | None) -> Iterable[Any] | None:
    """What the user names, else what the model came with."""
    if text is not None:
        from matmorph.models.text_batches import text_calibration

        return text_calibration(found, text, length, samples)
    from matmorph.models.resolve import read_calibration

    return found.calibration if arrays is None else read_calibration(arrays, found)


def _about(text: str) -> str:
    """The first sentence of a spec's opening comment, the line for the editor left out."""
    comment = [line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
    words = " ".join(line for line in comment if not line.startswith("yaml-language-server"))
    return words.strip().split(". ")[0].rstrip(".") + "."


def _headline(text: str) -> str:
    """The first clauses of that, without its sources, as far as they say what it is."""
    first, *rest = re.split(r"(?<=[:;]) ", re.sub(r" \([^)]*\)", "", _about(text)))
    return (f"{first} {rest[0]}" if rest and len(first) < 20 else first).rstrip(".:;")


def _show(report: Report, as_json: bool, every: bool, draw: Callable[..., None]) -> None:
    if as_json:
        say_json(report.to_dict())
        return
    from matmorph.report.table import make_console

    draw(make_console(), report, every)


def _print_front(front: Front) -> None:
    from matmorph.report.front import print_front
    from matmorph.report.table import make_console

    print_front(make_console(), front)


def _print_saved(folder: Path, report: Report) -> None:
    from matmorph.report.table import parity_line
    from matmorph.runtime.format.training import TRAIN_MANIFEST
    from matmorph.runtime.train_manifest import read_train_manifest

    for placement in report.placements:
        if placement.handed or placement.unknown:
            say("\n  ".join(placement.lines()))
    if report.parity is not None:
        say(parity_line(report.parity))
    say(f"wrote {folder}{'' if str(folder).endswith('/') else '/'} (check it anywhere with: matmorph verify {folder})")
    if (folder / TRAIN_MANIFEST).is_file():
        training = read_train_manifest(folder)
        how = f"{training.loss.name}, {training.optimizer['name']}"
        names = f"{training.length:,} numbers of {len(training.parameters)} parameters train ({how})"
        say(f"{names}: matmorph train {folder} --data FILE --out FILE.safetensors")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit. `arguments` None = those of the process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        app([word for word in given if word != "--debug"], prog_name="matmorph")
    except MatmorphError as error:
        _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        _fail(INTERRUPTION, INTERRUPTED, debug)
    except SystemExit as end:  # typer's own; it turns an interruption into a code
        if end.code == INTERRUPTED:
            complain(INTERRUPTION)
        raise
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}", InputError.exit_code, debug)
    except Exception as error:
        line = " ".join(str(error).split())
        _fail(f"internal error (a bug in matmorph, not in your input): {type(error).__name__}: {line}\n  --debug shows where", 1, debug)
    sys.exit(0)


def _fail(text: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    complain(text)
    sys.exit(code)
