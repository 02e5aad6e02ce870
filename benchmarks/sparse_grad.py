"""One training step of SparseGrad under ONNX Runtime over full fine-tuning of the same weights, on a BERT of MiniLM's size.

Batches of 16 x 128 tokens, AdamW, equal threads; what trains are the MLP weights. The rotations cost products of weights with square
matrices, twice in each direction, whatever the number of tokens: `predicted` is the ratio of all multiply-accumulates in the two gradient
graphs, `ratio` that of the times of whole steps, and `over` one by the other. `none`: the largest entries without a change of basis;
`fixed`: a mask chosen once. `state_mb`: parameters and moments; `peak_mb`: the largest resident memory of a process of its own, `growth_mb`
what of it came after the imports. The competitors step in turn, with a pause between them.

    python benchmarks/sparse_grad.py [--keep PERCENT] [--batch N] [--seq N] [--repeats N] [--threads N] [--no-memory] [--tiny] [--json]
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import finish, parser, tell
from _train_model import SIZES, TINY, Classifier
from train_step import PAUSE, in_turn, peaks

import matmorph as mm
from matmorph.ir.core import Graph
from matmorph.ir.ops import base_name
from matmorph.ir.training.gradient import gradient_graph
from matmorph.ir.training.losses import Loss
from matmorph.runtime import Trainer

MLP = {"role": ["mlp.*"]}
WEIGHTS = ["bert.encoder.layer.*.intermediate.dense.weight", "bert.encoder.layer.*.output.dense.weight"]
SETTINGS: Mapping[str, dict[str, Any] | None] = {
    "full": None,
    "sparse_grad": {},
    "fixed": {"mask": "fixed"},
    "none": {"basis": "none"},
}
STEPS = 4  # batches of the preliminary phase: which bases it finds does not change what a step costs
_FIRST = {"linear": 0, "mm": 0, "matmul": 0, "bmm": 0, "addmm": 1}
"""Position of the left operand among the arguments of a product."""


def measured(shape: Sequence[Any], sizes: Mapping[str, int]) -> list[int]:
    return [dim if isinstance(dim, int) else int(dim.subs({one: sizes[str(one)] for one in dim.free_symbols})) for dim in shape]


def macs(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Multiply-accumulates of all matrix products of a graph at these sizes of its axes."""
    total = 0
    for node in graph.nodes:
        at = _FIRST.get(base_name(node.op))
        if at is not None:
            left, result = (measured(value.tensor.shape, sizes) for value in (node.args[at], node.output))
            total += left[-1] * math.prod(result)
    return total


def compiled(name: str, model: Classifier, keep: str, data: Sequence[Mapping[str, torch.Tensor]]) -> mm.Compiled:
    settings = SETTINGS[name]
    rewrite: Any = "keep" if settings is None else {"sparse_grad": {"keep": keep, "steps": STEPS, **settings}}
    example = {key: value for key, value in data[0].items() if key != "labels"}
    spec = {
        "version": 1,
        "rules": [{"name": "mlp", "match": MLP, "rewrite": rewrite}],
        "train": {"loss": "cross_entropy", "output": "logits"},
    }
    shapes = {key: {0: "batch", 1: "seq"} for key in example}
    return mm.compile(model, spec, example, shapes, calibration=None if settings is None else data)


def products(found: mm.Compiled, names: Sequence[str], sizes: Mapping[str, int]) -> int:
    consts = {const.path: const for const in found.graph.state}
    return macs(gradient_graph(found.graph, [consts[name] for name in names], Loss("cross_entropy", "logits")), sizes)


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--keep", default="1%", metavar="PERCENT", help="entries of each weight that learn at a step")
    options_of.add_argument("--batch", type=int, default=16)
    options_of.add_argument("--seq", type=int, default=128)
    options_of.add_argument("--repeats", type=int, default=9)
    options_of.add_argument("--no-memory", action="store_true", help="no processes of their own")
    options = options_of.parse_args(arguments)
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("transformers is not installed; it comes with the bench extra")
    say = tell(options)
    torch.manual_seed(0)  # noqa: TID251  (transformers draws from the global generator)
    torch.set_num_threads(options.threads)
    sizes = TINY if options.tiny else SIZES
    batch, seq = (2, 8) if options.tiny else (options.batch, options.seq)
    model, rng = Classifier("first", sizes).eval(), np.random.default_rng(0)
    data = [drawn(rng, sizes["vocab_size"], batch, seq) for _ in range(STEPS)]
    with tempfile.TemporaryDirectory() as place:
        trainers, work = {}, {}
        for name in SETTINGS:
            say(f"{name} ...")
            folder = Path(place) / name
            found = compiled(name, model, options.keep, [{key: torch.as_tensor(value) for key, value in one.items()} for one in data])
            trains = WEIGHTS if name == "full" else ["adapters"]
            found.export_training(folder / "train", optimizer=mm.AdamW(lr=1e-4, weight_decay=0.01), trainable=trains)
            np.savez(folder / "batch.npz", **data[0])
            trainers[name] = Trainer(folder / "train", threads=options.threads, log=lambda line: None)
            work[name] = products(found, list(trainers[name].parameters()), {"batch": batch, "seq": seq})
        steps = {name: (lambda trainer=trainer: trainer.step(data[0])) for name, trainer in trainers.items()}
        times = in_turn(steps, 2 if options.tiny else options.repeats, 0.0 if options.tiny else PAUSE)
        rows = []
        for name, trainer in trainers.items():
            ratio, predicted = times[name] / times["full"], work[name] / work["full"]
            row = {"method": name, "step_ms": times[name], "ratio": ratio, "predicted": predicted, "over": ratio / predicted}
            row |= {"numbers": trainer.manifest.length, "state_mb": 4 * trainer.manifest.length * (1 + len(trainer.manifest.states)) / 1e6}
            memory = (None, None) if options.no_memory else peaks("ort", Path(place) / name, options.threads)
            rows.append({**row, "peak_mb": memory[0], "growth_mb": memory[1]})
    notes = [f"{batch} x {seq} tokens; keep {options.keep} of {trainers['full'].manifest.length} numbers"]
    finish(options, rows, notes)


def drawn(rng: np.random.Generator, vocabulary: int, batch: int, seq: int) -> dict[str, Any]:
    found = {"input_ids": rng.integers(0, vocabulary, (batch, seq)), "labels": rng.integers(0, 2, batch)}
    return {**found, "attention_mask": np.ones((batch, seq), np.int64)}


if __name__ == "__main__":
    main()
