"""`matmorph demo --model smollm2`: the embedded language model through the whole compiler, and what a person would ask next.

Does it still know its language, does it answer the same, is it smaller, is it faster? Three quarters of the embedded sentences calibrate
it, the others judge.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from matmorph import api
from matmorph.cli.demo import print_next, record, refuse_foreign
from matmorph.cli.text.files import TextFiles
from matmorph.cli.text.template import ChatTemplate
from matmorph.cli.text.writing import Answer, written
from matmorph.cli.unchanged import unchanged_folder
from matmorph.models.resolve import calibration_sentences, smollm2
from matmorph.models.text_batches import text_calibration
from matmorph.progress import Progress
from matmorph.report.table import make_console, parity_line, print_plan
from matmorph.runtime import Generator, perplexity
from matmorph.runtime.text_score import TextResult
from matmorph.text.corpus import read_corpus

QUESTION = "What is the capital of France, and why is it famous?"
NEW_TOKENS = 48
WINDOW = 64
"""Tokens of a sample, and of a window that is judged: all that the sentences have room for."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Of the original and of the rewritten model to the same question, greedily."""

    original: Answer
    rewritten: Answer


def run_language_demo(out: Path, spec: str, progress: Progress | None) -> Callable[[], None]:
    """Compile smollm2 by `spec` into `out` and measure it beside the original; returns what prints the result, so that progress bars can
    end first.

    Replaces `out` only where an earlier demo wrote it. Raises InputError where another thing is there or a package is missing, and what
    compiling raises.
    """
    replace = refuse_foreign(out)
    loaded = api.load_spec(spec)
    model = smollm2()
    with tempfile.TemporaryDirectory(prefix="matmorph-") as scratch:
        seen, judged = _texts(Path(scratch))
        batches = text_calibration(model, seen, WINDOW)
        compiled = api.compile(
            model.module,
            loaded,
            model.example_inputs,
            calibration=batches,
            cache=model.cache,
            progress=progress,
            hf_folder=model.hf_folder,
        )
        compiled.save(out, force=replace)
        record(out, {})
        original = unchanged_folder(model, Path(scratch) / "original", progress)
        said: list[str] = []
        corpus = read_corpus(judged, TextFiles.of(out, None, verify=False).tokens())
        score = perplexity(out, corpus.ids, window=WINDOW, prefix=corpus.prefix, beside=original, log=said.append, verify=False)
        answers = Answers(_answer(original), _answer(out))
    record(out, _figures(score, answers))

    def finish() -> None:
        console = make_console()
        print_plan(console, compiled.report)
        if compiled.report.parity is not None:
            console.print(parity_line(compiled.report.parity))
        for line in _lines(score, answers):
            console.print(line, markup=False, highlight=False)
        _print_next(console, out)

    return finish


def _texts(place: Path) -> tuple[Path, Path]:
    """Files of what calibration sees and of what it does not."""
    sentences = calibration_sentences()
    cut = 3 * len(sentences) // 4
    files = place / "seen.txt", place / "judged.txt"
    for file, part in zip(files, (sentences[:cut], sentences[cut:]), strict=True):
        file.write_text("\n".join(part), encoding="utf-8")
    return files


def _answer(folder: Path) -> Answer:
    """Asked as a message where the model has a chat template."""
    files = TextFiles.of(folder, None, verify=False)
    tokens, template = files.tokens(), ChatTemplate.of(files)
    asked = QUESTION if template is None else template.prompt([{"role": "user", "content": QUESTION}])
    ids = tokens.ids(asked, special=template is None)
    generator = Generator(folder, verify=False, log=lambda line: None)
    generator.generate([ids], max_new_tokens=1)  # the first run allocates
    return written(generator, tokens, ids, {"max_new_tokens": NEW_TOKENS}, lambda piece: None)


def _figures(score: TextResult, answers: Answers) -> dict[str, Any]:
    """For run.json."""
    rates = {"original": answers.original.decode_rate, "rewritten": answers.rewritten.decode_rate}
    perplexities = {"rewritten": score.prediction.perplexity}
    if score.beside is not None:
        perplexities["original"] = score.beside.prediction.perplexity
    return {"perplexity": perplexities, "tokens_per_s": rates, "provider": score.provider}


def _lines(score: TextResult, answers: Answers) -> Iterator[str]:
    if score.beside is not None:
        new, old = score.prediction.perplexity, score.beside.prediction.perplexity
        yield (
            f"\nperplexity of {score.prediction.counted} tokens that calibration did not see: {old:.2f} original, {new:.2f} rewritten = "
            f"{new / old:.3f} x; the likeliest word is the same for {score.beside.agreement:.0%}"
        )
    yield f"\n{QUESTION}"
    for name, answer in (("original", answers.original), ("rewritten", answers.rewritten)):
        rate = "" if answer.decode_rate is None else f" ({answer.decode_rate:.1f} tokens/s)"
        yield f"  {name}{rate}: {' '.join(answer.text.split())}"


def _print_next(console: Console, out: Path) -> None:
    print_next(
        console,
        out,
        (
            f"matmorph chat {out}",
            f"matmorph verify {out}",
            f"matmorph evaluate {out} --text FILE",
            "matmorph explain smollm2 --spec llm-u4 --node model.layers.0.mlp.down_proj",
        ),
    )
