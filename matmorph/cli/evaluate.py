"""`matmorph evaluate DIR --text FILE`: how well a written folder's model does, by ONNX Runtime, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from matmorph.cli.output import say, say_json
from matmorph.cli.text import loading
from matmorph.cli.text.files import TextFiles
from matmorph.cli.train import readable_errors
from matmorph.cli.verifying import NoVerify, verifying
from matmorph.cli.working import working
from matmorph.errors import InputError

if TYPE_CHECKING:
    from matmorph.runtime.text_score import TextResult
    from matmorph.text.corpus import Corpus

_HIGHEST = 700.0
"""Its exp is a number."""


def evaluate_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compile wrote.")],
    text: Annotated[Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text, taken as it is: gives a perplexity.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help=".npz or .safetensors keyed by input, and labels: gives a loss.")
    ] = None,
    window: Annotated[int | None, typer.Option("--window", metavar="N", help="Tokens that the model sees at once; 512.")] = None,
    stride: Annotated[int | None, typer.Option("--stride", metavar="N", help="From one window to the next; as many as it holds.")] = None,
    most: Annotated[int | None, typer.Option("--tokens", metavar="N", help="Only the first N tokens of the text.")] = None,
    beside: Annotated[Path | None, typer.Option("--beside", metavar="DIR2", help="A folder to compare with on the same text.")] = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", metavar="DIR3", help="A folder with tokenizer.json.")] = None,
    loss: Annotated[str | None, typer.Option("--loss", metavar="LOSS", help="cross_entropy, causal_lm or mse; by the labels.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="NAME", help="The output that labels are of; logits, or the first.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Samples of --data that are computed at once.")] = 16,
    record: Annotated[bool, typer.Option("--record", help="Keep the figures in run.json of DIR, for `matmorph report`.")] = False,
    provider: loading.Providers = None,
    threads: loading.Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    no_verify: NoVerify = False,
) -> None:
    """Perplexity of a language model on a text, or the loss of any model on data with labels.

    The text is cut into whole windows. --beside compares two folders: mean KL divergence and how often both choose the same token. Needs no
    torch."""
    if (text is None) == (data is None):
        raise InputError("give --text FILE for a perplexity, or --data FILE for a loss" + (", one of them" if text else ""))
    textual = {"--window": window, "--stride": stride, "--tokens": most, "--beside": beside, "--tokenizer": tokenizer}
    _refuse_idle({"--loss": loss, "--output": output} if data is None else textual, "--data" if data is None else "--text")
    verify = verifying(no_verify, folder, *([] if beside is None else [beside]))
    how = {"providers": provider, "threads": threads, "verify": verify}
    if text is not None:
        given = {"window": window, "stride": stride, "beside": beside}
        cut = {name: value for name, value in given.items() if value is not None}
        figures, lines = _of_text(folder, text, tokenizer, most, cut, how, as_json)
    else:
        figures, lines = _of_data(folder, data or folder, {"loss": loss, "output": output, "batch_size": batch_size, **how}, as_json)
    if record:
        _keep(folder, figures)
    if as_json:
        say_json({"folder": str(folder), **figures})
        return
    say("\n".join(lines))


Shown: TypeAlias = tuple[dict[str, Any], list[str]]
"""Figures as they are kept and printed as JSON, and for a person."""


def _refuse_idle(given: Mapping[str, object], wanted: str) -> None:
    """InputError for an option that the other kind of data has no use for."""
    idle = [name for name, value in given.items() if value is not None]
    if idle:
        raise InputError(f"{idle[0]} belongs to {wanted}, which is not given")


def _of_text(
    folder: Path, text: Path, tokenizer: Path | None, most: int | None, cut: dict[str, Any], how: dict[str, Any], quiet: bool
) -> Shown:
    with working(quiet, f"opening {folder}") as show, readable_errors():
        from matmorph.runtime.errors import ArtifactError
        from matmorph.runtime.format.reading import StoredError
        from matmorph.runtime.manifest import artifact_folder
        from matmorph.text.corpus import read_corpus

        if most is not None and most < 2:
            raise InputError(f"--tokens {most}: two tokens are the least of which one can be predicted")
        try:
            tokens = TextFiles.of(artifact_folder(folder), tokenizer, how["verify"]).tokens()
        except StoredError as error:
            raise ArtifactError(str(error)) from error
        show("reading the text", 0, 1)
        corpus = read_corpus(text, tokens, most)
        show("reading the text", 1, 1)
        from matmorph.runtime.text_score import perplexity

        found = perplexity(folder, corpus.ids, prefix=corpus.prefix, progress=lambda done, of: show("windows", done, of), **cut, **how)
    names = [tokens.name(token) for token in corpus.prefix]
    return _text_figures(text, cut.get("beside"), corpus, found), _text_lines(folder, text, cut.get("beside"), names, found)


def _text_figures(text: Path, beside: Path | None, corpus: Corpus, found: TextResult) -> dict[str, Any]:
    mine, other = found.prediction, found.beside
    figures: dict[str, Any] = {
        "text": str(text),
        "window": found.cut.window,
        "stride": found.cut.stride,
        "windows": found.windows,
        "prefix": list(corpus.prefix),
        "tokens": found.tokens,
        "tokens_left": found.left,
        "whole_text": corpus.whole,
        "counted": mine.counted,
        "counts": found.cut.says(),
        "nll": mine.nll,
        "perplexity": _finite(mine.perplexity),
        "accuracy": mine.hits,
    }
    if other is not None:
        theirs = other.prediction
        figures["beside"] = {
            "folder": str(beside),
            "nll": theirs.nll,
            "perplexity": _finite(theirs.perplexity),
            "accuracy": theirs.hits,
            "ratio": _finite(_ratio(found)),
            "kl": _finite(other.kl),
            "agreement": other.agreement,
        }
    return {**figures, "provider": found.provider, "seconds": round(found.seconds, 3)}


def _text_lines(folder: Path, text: Path, beside: Path | None, prefix: list[str], found: TextResult) -> list[str]:
    mine, other, cut = found.prediction, found.beside, found.cut
    lead = f"perplexity {mine.perplexity:.4f} of {folder} on {text}"
    behind = f", each behind {' '.join(prefix)}" if prefix else ""
    left = f"; {found.left:,} tokens at the end are less than a window" if found.left else ""
    lines = [
        lead,
        f"  {mine.nll:.5f} nats per token over {mine.counted:,} tokens; {mine.hits:.1%} of them were the likeliest",
        f"  {found.windows:,} windows of {cut.window}, stride {cut.stride}{behind}: {cut.says()}{left}",
    ]
    if other is not None:
        theirs = other.prediction
        lines += [
            f"beside {beside}: perplexity {theirs.perplexity:.4f}, so {_ratio(found):.4f} x",
            f"  KL divergence from it {other.kl:.5f} nats per token; both have the same likeliest token in {other.agreement:.1%}",
        ]
    return [*lines, f"{found.provider}, {found.seconds:.1f} s, {found.tokens / max(found.seconds, 1e-9):,.0f} tokens/s"]


def _ratio(found: TextResult) -> float:
    """Of the two perplexities."""
    gap = found.prediction.nll - (found.beside.prediction.nll if found.beside is not None else 0.0)
    return math.exp(gap) if gap < _HIGHEST else math.inf


def _finite(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None


def _of_data(folder: Path, data: Path, how: dict[str, Any], quiet: bool) -> Shown:
    with working(quiet, f"opening {folder}") as show, readable_errors():
        from matmorph.runtime.labelled import labelled_loss

        found = labelled_loss(folder, data, progress=lambda done, of: show("batches", done, of), **how)
    figures = {"data": str(data), **asdict(found), "seconds": round(found.seconds, 3)}
    right = "" if found.accuracy is None else f"; {found.accuracy:.2%} of them are the likeliest class"
    lines = [
        f"{found.loss} {found.value:.6f} of {folder} on {data}",
        f"  {found.output} against {found.counted:,} labels of {found.samples:,} samples{right}",
        f"{found.provider}, {found.seconds:.1f} s",
    ]
    return figures, lines


def _keep(folder: Path, figures: dict[str, Any]) -> None:
    """In run.json, which no hash covers. InputError where it cannot be written."""
    from matmorph.runtime.disk.files import write_whole
    from matmorph.runtime.format.artifact import RUN
    from matmorph.runtime.format.evaluations import with_evaluation
    from matmorph.runtime.format.plain import typed
    from matmorph.runtime.format.reading import StoredError, read_json

    path = folder / RUN
    try:
        run = read_json(path, lambda data: typed(data, dict, "the file")) if path.exists() else {}
        write_whole(path, (json.dumps(with_evaluation(run, figures), indent=2) + "\n").encode())
    except StoredError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
