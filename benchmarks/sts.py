"""Quality of a rewritten MiniLM on the STS benchmark (dev): Spearman correlation x 100 of cosine similarity with the human scores.

`low_rank`: the encoder's linears keep 80, 60 and 40 % of their parameters, by whitened SVD (calibrated on 512 training sentences) and by
plain SVD. `quantized`: each quantizer on the same linears, alone, with LoftQ factors (rank 16, 5 iterations) and with whitened ones; u2 is
uniform 2-bit without anything, u2-search has zero points and searched scales. `trains`: the 12 MLP matmuls as tensor trains of 2 and 3
cores (tt-mlp and its like), beside plain low_rank factors with as many parameters. `budgets`: ranks, bits and methods shared out over the
same linears, at 60 and 40 % of their parameters and 12 and 9 % of their bytes, by what the last hidden states feel (the library's specs);
`relative` adds up the relative output error of each matmul instead. `--specs` adds specs by name or path (quantize-u4 takes
the embedding tables too). The rewritten model is written as an artefact and run by ONNX Runtime; `--torch` runs the compiled torch module.

    python benchmarks/sts.py [--data DIR] [--sets low_rank quantized trains budgets] [--specs quantize-u4] [--torch] [--json]
        [--ratios 80 60 40] [--methods whitened plain] [--quantizers nf4 nf2 u2 u2-search] [--forms quantize loftq whitened]
"""

from __future__ import annotations

import argparse
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
from matmorph.cli.demo import sentence_vectors
from matmorph.models.resolve import Model, minilm, tokenize
from matmorph.runtime import Session

CALIBRATION = 512
BATCH = 64
SETS = ["low_rank", "quantized", "trains", "budgets"]
Array = np.ndarray[Any, Any]
Encoder = Callable[[Mapping[str, Array]], Array]
"""Feeds -> last hidden state."""


def read(path: Path) -> tuple[list[float], list[str], list[str]]:
    """Scores and the two sentences of each pair."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
    return [float(row[4]) for row in rows], [row[5] for row in rows], [row[6] for row in rows]


def dev_pairs(folder: Path, tiny: bool) -> tuple[tuple[list[float], list[str], list[str]], int]:
    """(scores and sentences of the pairs to judge by, how many sentences to calibrate on)."""
    human, left, right = read(folder / "sts-dev.csv")
    pairs, samples = (20, 16) if tiny else (len(human), CALIBRATION)
    return (human[:pairs], left[:pairs], right[:pairs]), samples


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


QUANTIZERS: Mapping[str, dict[str, Any]] = {
    "nf4": {"quantizer": "nf4"},
    "nf2": {"quantizer": "nf2"},
    "u2": {"quantizer": "uniform", "bits": 2},
    "u2-search": {"quantizer": "uniform", "bits": 2, "zero_point": True, "scale": "search"},
}
FORMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "quantize": ("quantize", {}),
    "loftq": ("loftq", {"rank": 16, "iterations": 5}),
    "whitened": ("loftq", {"rank": 16, "iterations": 5, "whiten": True}),
}


def quantized_spec(quantizer: str, form: str) -> dict[str, Any]:
    """The encoder's linears, and nothing else, in codes."""
    method, more = FORMS[form]
    match = {"role": ["attention.*", "mlp.*"]}
    rule = {"name": "blocks", "expect": 36, "match": match, "rewrite": {method: {**QUANTIZERS[quantizer], **more}}}
    return {"version": 1, "name": f"{quantizer} {form}", "rules": [rule], "calibration": {"samples": CALIBRATION}}


TRAINS: Mapping[str, dict[str, Any]] = {
    "mlp low_rank": {"low_rank": {"rank": {"ratio": 0.6}}},
    "mlp tt 2 cores": {"tt": {"rank": {"ratio": 0.6}, "cores": 2}},
    "mlp tt 3 cores": {"tt": {"rank": {"ratio": 0.6}, "cores": 3}},
}
"""On the same matmuls, 60 % of their parameters each."""


def train_spec(name: str) -> dict[str, Any]:
    """The library's tt-mlp with another rewrite."""
    return {"version": 1, "name": name, "extends": ["tt-mlp"], "rules": [{"name": "mlp", "expect": 12, "rewrite": TRAINS[name]}]}


BUDGETS: Mapping[str, dict[str, Any]] = {
    "budget-60": {},
    "budget-40": {},
    "any-of-12": {},
    "any-of-9": {},
    "budget-60 relative": {"sensitivity": "none"},
    "budget-40 relative": {"sensitivity": "none"},
}


def budget_spec(name: str) -> dict[str, Any]:
    """A library spec, or one whose errors are relative to each matmul."""
    return {"version": 1, "name": name, "extends": [name.split()[0]], "calibration": {"samples": CALIBRATION, **BUDGETS[name]}}


def named_spec(name: str) -> dict[str, Any]:
    """A library spec, or one in a file, under its own name."""
    return {"version": 1, "name": Path(name).stem, "extends": [name]}


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The specs to measure; of each set only the first with --tiny."""
    low = [spec(ratio, method) for method in options.methods for ratio in options.ratios]
    quantized = [quantized_spec(quantizer, form) for quantizer in options.quantizers for form in options.forms]
    sets = {
        "low_rank": low,
        "quantized": quantized,
        "trains": [train_spec(name) for name in TRAINS],
        "budgets": [budget_spec(name) for name in BUDGETS],
    }
    few = 1 if options.tiny else None
    return [made for name in options.sets for made in sets[name][:few]] + [named_spec(name) for name in options.specs[:few]]


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
        "mb": report.totals.bytes[1] / 1e6,
        "worst_output_error": max((row.output_error for row in report.sites if row.output_error is not None), default=None),
        "compile_s": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--data", type=Path, help="folder that holds stsb/ (default: MATMORPH_DATA, else ../shared/data)")
    options_of.add_argument("--ratios", type=int, nargs="+", default=[80, 60, 40])
    options_of.add_argument("--methods", nargs="+", choices=["whitened", "plain"], default=["whitened", "plain"])
    options_of.add_argument("--sets", nargs="*", choices=SETS, default=SETS)
    options_of.add_argument("--quantizers", nargs="+", choices=list(QUANTIZERS), default=list(QUANTIZERS))
    options_of.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    options_of.add_argument("--specs", nargs="*", default=["quantize-u4"], help="library names or paths")
    options_of.add_argument("--torch", action="store_true", help="run the compiled torch module instead of ONNX Runtime")
    options = options_of.parse_args(arguments)
    folder = data_folder(options.data, "stsb")
    torch.set_num_threads(options.threads)
    say = tell(options)
    data, samples = dev_pairs(folder, options.tiny)
    pairs = len(data[0])
    model = minilm()
    batches = calibration(folder, samples)
    dense = sum(parameter.numel() for parameter in model.module.parameters())
    rows: list[dict[str, Any]] = [
        {
            "model": "dense",
            "spearman": score(torch_encoder(model.module), data),
            "parameters": dense,
            "mb": 4e-6 * dense,
            "worst_output_error": None,
            "compile_s": 0.0,
        }
    ]
    for made in jobs(options):
        rows.append(measure(model, batches, made, data, options.threads, options.torch))
        say(f"{rows[-1]['model']}: {rows[-1]['spearman']:.2f}")
    finish(options, rows, [f"{pairs} pairs; the rewritten models run by {'torch' if options.torch else 'ONNX Runtime'}"])


if __name__ == "__main__":
    main()
