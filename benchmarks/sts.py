"""Quality of low-rank MiniLM on the STS benchmark (dev): Spearman correlation x 100 of cosine similarity with the human scores.

The encoder's linears keep 80, 60 and 40 % of their parameters, by whitened SVD (calibrated on 512 training sentences) and by plain SVD.
The rewritten model is written as an artefact and run by ONNX Runtime; `--torch` runs the compiled torch module instead.

    python benchmarks/sts.py [--data DIR] [--ratios 80 60 40] [--methods whitened plain] [--torch] [--json]
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import data_folder, finish, parser, tell
from scipy.stats import spearmanr

import matmorph as mm
from matmorph.demo import sentence_vectors
from matmorph.models import Model, minilm, tokenize
from matmorph.runtime import Session

CALIBRATION = 512
BATCH = 64
Array = np.ndarray[Any, Any]
Encoder = Callable[[Mapping[str, Array]], Array]
"""Feeds -> last hidden state."""


def read(path: Path) -> tuple[list[float], list[str], list[str]]:
    """Scores and the two sentences of each pair."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
    return [float(row[4]) for row in rows], [row[5] for row in rows], [row[6] for row in rows]


def spread(items: Sequence[str], number: int) -> list[str]:
    """`number` items at equal distances: the file is ordered by genre."""
    number = min(number, len(items))
    return [items[index * len(items) // number] for index in range(number)]


def calibration(folder: Path, samples: int) -> list[dict[str, torch.Tensor]]:
    _, left, right = read(folder / "sts-train.csv")
    chosen = spread([sentence for pair in zip(left, right, strict=True) for sentence in pair], samples)
    batches = [tokenize(chosen[start : start + 16]) for start in range(0, len(chosen), 16)]
    return [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in batches]


def embed(encoder: Encoder, sentences: Sequence[str]) -> Array:
    """[sentences, width], length 1 each; batches of sentences of like length."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    found: dict[int, Array] = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        feeds = tokenize([sentences[index] for index in chosen])
        found.update(zip(chosen, sentence_vectors(encoder(feeds), feeds["attention_mask"]), strict=True))
    return np.stack([found[index] for index in range(len(sentences))])


def score(encoder: Encoder, data: tuple[list[float], list[str], list[str]]) -> float:
    human, left, right = data
    cosine = (embed(encoder, left) * embed(encoder, right)).sum(axis=1)
    return 100 * float(spearmanr(human, cosine).statistic)


def torch_encoder(module: Any) -> Encoder:
    def run(feeds: Mapping[str, Array]) -> Array:
        with torch.no_grad():
            output = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        hidden: Array = output.last_hidden_state.numpy()
        return hidden

    return run


def spec(ratio: int, method: str) -> dict[str, Any]:
    """The library's low-rank spec at another ratio or without whitening."""
    change = {"low_rank": {"rank": {"ratio": ratio / 100}, "whiten": method == "whitened"}}
    rule = {"name": "blocks", "expect": 36, "rewrite": change}
    return {"version": 1, "name": f"{method}-{ratio}", "extends": ["low-rank-60"], "rules": [rule], "calibration": {"samples": CALIBRATION}}


def measure(model: Model, batches: Any, made: dict[str, Any], data: Any, threads: int, by_torch: bool) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = mm.compile(model.module, made, model.example_inputs, dynamic_shapes=model.dynamic_shapes, calibration=batches)
    with tempfile.TemporaryDirectory() as folder:
        if by_torch:
            encoder = torch_encoder(compiled.module)
        else:
            session = Session(compiled.save(Path(folder) / "out"), "cpu", threads=threads)
            encoder = lambda feeds: session.run(feeds)["last_hidden_state"]  # noqa: E731
        seconds = time.perf_counter() - start
        spearman = score(encoder, data)
    report = compiled.report
    return {
        "model": made["name"],
        "spearman": spearman,
        "parameters": report.totals.parameters[1],
        "worst_output_error": max((row.output_error for row in report.sites if row.output_error is not None), default=None),
        "compile_s": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--data", type=Path, help="folder that holds stsb/ (default: MATMORPH_DATA, else ../shared/data)")
    options_of.add_argument("--ratios", type=int, nargs="+", default=[80, 60, 40])
    options_of.add_argument("--methods", nargs="+", choices=["whitened", "plain"], default=["whitened", "plain"])
    options_of.add_argument("--torch", action="store_true", help="run the compiled torch module instead of ONNX Runtime")
    options = options_of.parse_args(arguments)
    folder = data_folder(options.data, "stsb")
    torch.set_num_threads(options.threads)
    say = tell(options)
    human, left, right = read(folder / "sts-dev.csv")
    pairs, samples = (20, 16) if options.tiny else (len(human), CALIBRATION)
    data = (human[:pairs], left[:pairs], right[:pairs])
    model = minilm()
    batches = calibration(folder, samples)
    dense = sum(parameter.numel() for parameter in model.module.parameters())
    rows: list[dict[str, Any]] = [
        {
            "model": "dense",
            "spearman": score(torch_encoder(model.module), data),
            "parameters": dense,
            "worst_output_error": None,
            "compile_s": 0.0,
        }
    ]
    for method in options.methods:
        for ratio in options.ratios[:1] if options.tiny else options.ratios:
            rows.append(measure(model, batches, spec(ratio, method), data, options.threads, options.torch))
            say(f"{rows[-1]['model']}: {rows[-1]['spearman']:.2f}")
    finish(options, rows, [f"{pairs} pairs; the rewritten models run by {'torch' if options.torch else 'ONNX Runtime'}"])


if __name__ == "__main__":
    main()
