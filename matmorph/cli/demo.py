"""`matmorph demo`: the embedded sentence encoder through the whole compiler, and what a person would ask next.

Is it smaller, does ONNX Runtime agree with torch, do the sentences still mean the same, is it faster?
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import onnxruntime
from rich.console import Console

from matmorph import api
from matmorph.errors import InputError
from matmorph.exporters.artifact import rewrite_page
from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.exporters.staging import refuse_existing
from matmorph.models.resolve import calibration_sentences, minilm, tokenize
from matmorph.progress import Progress
from matmorph.report.html import html_page
from matmorph.report.reading import read_folder
from matmorph.report.table import make_console, parity_line, print_plan
from matmorph.runtime import Session
from matmorph.runtime.disk.files import write_whole
from matmorph.runtime.format.artifact import MODEL, RUN
from matmorph.runtime.format.cases import Array
from matmorph.specs.schema import Export

Key = TypeVar("Key")

PAIRS = (
    ("A man is playing a guitar on stage.", "Someone performs music in front of an audience."),
    ("The stock market fell sharply today.", "Share prices dropped after the news."),
    ("How do I bake bread at home?", "A recipe for homemade bread."),
    ("The cat sleeps on the sofa.", "Parliament passed the new budget."),
)
TIMING_ROUNDS = 15
TIMING_BATCH = 16
SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians of interleaved runs of one batch, in seconds."""

    dense: float
    rewritten: float
    provider: str


def run_demo(out: Path, spec: str, progress: Progress | None) -> Callable[[], None]:
    """Compile minilm by `spec` into `out` and measure it; returns what prints the result, so that progress bars can end first.

    Replaces `out` only where an earlier demo wrote it. Raises InputError where another thing is there, and what compiling raises.
    """
    replace = refuse_foreign(out)
    loaded = api.load_spec(spec)
    model = minilm()
    inputs = (model.example_inputs, model.dynamic_shapes)
    compiled = api.compile(model.module, loaded, *inputs, calibration=model.calibration, progress=progress, hf_folder=model.hf_folder)
    compiled.save(out, force=replace)
    record(out, {})
    said: list[str] = []
    session = Session(out, log=said.append)
    similarities = [(left, right, *_similarities((left, right), model.module, session)) for left, right in PAIRS]
    timing = _time(compiled, session, out)
    record(out, {"batch": TIMING_BATCH, "dense_s": timing.dense, "rewritten_s": timing.rewritten, "provider": timing.provider})
    rewrite_page(out, html_page(*read_folder(out)))  # now with these times

    def finish() -> None:
        console = make_console()
        print_plan(console, compiled.report)
        for line in said:
            console.print(line)
        if compiled.report.parity is not None:
            console.print(parity_line(compiled.report.parity))
        _print_similarities(console, similarities)
        _print_timing(console, timing)
        print_next(console, out, _next(out))

    return finish


def refuse_foreign(out: Path) -> bool:
    """True where an earlier demo result is to be replaced, False where nothing is there; else InputError."""
    if not out.exists() and not out.is_symlink():
        return False
    try:
        record = json.loads((out / RUN).read_text(encoding="utf-8"))
        earlier = isinstance(record, dict) and "demo" in record
    except (OSError, ValueError, RecursionError):
        earlier = False
    if not earlier:
        raise InputError(f"{out}: exists and is not the result of an earlier demo", ["name another folder: matmorph demo --out DIR"])
    refuse_existing(out, force=True)
    return True


def record(out: Path, figures: Mapping[str, Any]) -> None:
    """Marks the folder as a demo's and keeps its timings, in run.json (which no hash covers)."""
    path = out / RUN
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_whole(path, (json.dumps({**data, "demo": dict(figures)}, indent=2) + "\n").encode())


def sentence_vectors(hidden: Array, mask: Array) -> Array:
    """Mean of the token vectors under the mask, length 1: [batch, seq, width], [batch, seq] -> [batch, width]."""
    weights = mask[..., None].astype(np.float64)
    means = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True))


def _similarities(pair: Sequence[str], module: Any, session: Session) -> tuple[float, float]:
    """Cosine similarity of two sentences by the original under torch and by the rewritten model under ONNX Runtime."""
    import torch

    feeds = tokenize(pair)
    with torch.no_grad():
        dense = module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).last_hidden_state.numpy()
    rewritten = session.run(feeds)["last_hidden_state"]
    vectors = (sentence_vectors(hidden, feeds["attention_mask"]) for hidden in (dense, rewritten))
    first, second = (float(left @ right) for left, right in vectors)
    return first, second


def _time(compiled: Any, session: Session, out: Path) -> Timing:
    """Dense against rewritten on one provider with its default threads, whose idle workers do not spin: those of one session would run on
    the cores that the other one is being timed on."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    rewritten = Session(out, [session.provider], session_options=options)
    feeds = tokenize(calibration_sentences()[:TIMING_BATCH])
    with tempfile.TemporaryDirectory(prefix="matmorph-") as folder:
        export_onnx(compiled.source, Path(folder), Export())
        dense = onnxruntime.InferenceSession(str(Path(folder) / MODEL), sess_options=options, providers=[session.provider])
        seconds = medians({"dense": lambda: dense.run(None, feeds), "rewritten": lambda: rewritten.run(feeds)}, TIMING_ROUNDS)
    return Timing(seconds["dense"], seconds["rewritten"], session.provider)


def medians(runs: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, float]:
    """Seconds of one run each: run in turn, so that a change of load hits all alike; medians over rounds.

    A run of microseconds is repeated until a sample lasts a few milliseconds.
    """
    repeats = {name: _repeats(run) for name, run in runs.items()}
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: median(values) for name, values in seconds.items()}


def _repeats(run: Callable[[], object]) -> int:
    run()  # the first run allocates
    start = time.perf_counter()
    run()
    return max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))


def _print_similarities(console: Console, rows: Sequence[tuple[str, str, float, float]]) -> None:
    console.print("\nsimilarity of sentence pairs (original under torch, rewritten under ONNX Runtime)")
    for left, right, dense, rewritten in rows:
        console.print(f"  {dense:6.3f}  {rewritten:6.3f}  {left} | {right}")


def _print_timing(console: Console, timing: Timing) -> None:
    ratio = timing.rewritten / timing.dense
    console.print(
        f"\ntime of a batch of {TIMING_BATCH} sentences on {timing.provider}: {1e3 * timing.dense:.1f} ms original, "
        f"{1e3 * timing.rewritten:.1f} ms rewritten = {ratio:.2f} x (median of {TIMING_ROUNDS} runs in turn, equal threads)"
    )


def print_next(console: Console, out: Path, commands: Sequence[str]) -> None:
    """Where it lies, and what to try."""
    console.print(f"\nwrote {out}/ (open {out}/report.html)")
    console.print("next:")
    for command in commands:
        console.print(f"  {command}")


def _next(out: Path) -> tuple[str, ...]:
    return (
        f"matmorph verify {out}",
        "matmorph inspect minilm",
        "matmorph specs show low-rank-60",
        "matmorph explain minilm --spec low-rank-60 --node encoder.layer.0.attention.self.query",
    )
