"""MiniLM with half of its MLP width: quality on the STS benchmark (dev) and time under ONNX Runtime, over the dense model.

`spearman`: correlation x 100 of cosine similarity with the human scores. `output_error`: |E - E'| / |E| of all sentence vectors.
`plain` slices, `compensated` refits the last matmul of each block, `shots` does so in four steps that score the already pruned model anew
(no training between them). `time_ratio` is of runs in turn, at --batch sentences of --tokens tokens; `over` = time_ratio / mac_ratio, the
MACs being those of all matmuls with weights and of the attentions' own products.

    python benchmarks/prune.py [--data DIR] [--width 50%] [--forms plain compensated shots] [--batch 8] [--tokens 64] [--rounds 15]
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from _common import data_folder, finish, parser, session_options, tell
from scipy.stats import spearmanr
from sts import CALIBRATION, Array, calibration, dev_pairs, embed, torch_encoder

import matmorph as mm
from matmorph.cli.demo import medians
from matmorph.models.resolve import Model, minilm

FORMS: dict[str, dict[str, Any]] = {"plain": {"compensate": "none"}, "compensated": {}, "shots": {"shots": 4}}
HIDDEN, LAYERS = 384, 6


def spec(width: str, form: str) -> dict[str, Any]:
    """The library's transact-50 at another width or in another form."""
    rule = {"name": "mlp", "expect": 12, "rewrite": {"transact": {"width": width, **FORMS[form]}}}
    return {"version": 1, "name": form, "extends": ["transact-50"], "rules": [rule], "calibration": {"samples": CALIBRATION}}


def dense_spec() -> dict[str, Any]:
    return {"version": 1, "name": "dense", "rules": [{"name": "keep", "match": {"op": "matmul"}, "rewrite": "keep"}]}


def feeds_of(model: Model, batch: int, tokens: int) -> dict[str, Array]:
    """A batch without padding for every input of the model."""
    draw = np.random.default_rng(0)
    made = {name: np.ones((batch, tokens), dtype=np.int64) for name in model.example_inputs}
    made["input_ids"] = draw.integers(1000, 20000, (batch, tokens))
    if "token_type_ids" in made:
        made["token_type_ids"] = np.zeros((batch, tokens), dtype=np.int64)
    return made


def macs(report: Any, tokens: int) -> tuple[int, int]:
    """(before, after) per token: all matmuls with weights, and scores and weighted sums over `tokens` keys."""
    own = 2 * tokens * HIDDEN * LAYERS
    return report.totals.macs[0] + own, report.totals.macs[1] + own


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--data", type=Path, help="folder that holds stsb/ (default: MATMORPH_DATA, else ../shared/data)")
    options_of.add_argument("--width", default="50%")
    options_of.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    options_of.add_argument("--batch", type=int, default=8)
    options_of.add_argument("--tokens", type=int, default=64)
    options_of.add_argument("--rounds", type=int, default=15)
    options = options_of.parse_args(arguments)
    folder = data_folder(options.data, "stsb")
    torch.set_num_threads(options.threads)
    say = tell(options)
    data, samples = dev_pairs(folder, options.tiny)
    pairs = len(data[0])
    if options.tiny:
        options.batch, options.tokens, options.rounds = 2, 8, 2
    model = minilm()
    batches = calibration(folder, samples)
    made = {"dense": dense_spec(), **{form: spec(options.width, form) for form in options.forms}}
    vectors: dict[str, Array] = {}
    reports: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        sessions = {}
        for name, one in made.items():
            inputs = {"dynamic_shapes": model.dynamic_shapes, "calibration": None if name == "dense" else batches}
            compiled = mm.compile(model.module, one, model.example_inputs, **inputs)
            saved = compiled.save(Path(place) / name)
            sessions[name] = onnxruntime.InferenceSession(str(saved / "model.onnx"), session_options(options.threads))
            encoder = torch_encoder(compiled.module)
            vectors[name] = np.concatenate([embed(encoder, sentences) for sentences in data[1:]])
            reports[name] = compiled.report
            say(f"{name} ...")
        feeds = feeds_of(model, options.batch, options.tokens)
        seconds = medians({name: partial(session.run, None, feeds) for name, session in sessions.items()}, options.rounds)
    rows = [_row(name, vectors, reports[name], data[0], seconds, options.tokens) for name in made]
    finish(options, rows, [f"{pairs} pairs; {options.batch} x {options.tokens} tokens, ONNX Runtime on CPU"])


def _row(name: str, vectors: dict[str, Array], report: Any, human: list[float], seconds: dict[str, float], tokens: int) -> dict[str, Any]:
    own, dense = vectors[name], vectors["dense"]
    left, right = np.split(own, 2)
    before, after = macs(report, tokens)
    ratio = seconds[name] / seconds["dense"]
    return {
        "model": name,
        "spearman": 100 * float(spearmanr(human, (left * right).sum(axis=1)).statistic),
        "output_error": float(np.linalg.norm(own - dense) / np.linalg.norm(dense)),
        "parameters": report.totals.parameters[1],
        "ms": 1e3 * seconds[name],
        "time_ratio": ratio,
        "mac_ratio": after / before,
        "over": ratio * before / after,
    }


if __name__ == "__main__":
    main()
