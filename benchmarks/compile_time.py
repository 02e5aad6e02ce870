"""Time of compiling BERT-base against the least that anyone would have to do by hand, in one run and in turn.

ours      matmorph.compile(low_rank, rank 64, plain, all 72 encoder linears) + save: export, check vectors and report included
export    torch.export + torch.onnx.export(optimize=False) of the dense model, written to disk
svd       torch.linalg.svd of the 72 matrices (what a script would call)
solver    matmorph's own truncated solver on the same 72 matrices, rank 64

ratio = ours / (export + svd); ratio_solver = ours / (export + solver).

    python benchmarks/compile_time.py [--rounds 3]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import finish, parser, tell

import matmorph as mm

RANK = 64


def build(tiny: bool) -> Any:
    """BERT-base with random weights: time does not depend on their values."""
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 100}
    return BertModel(BertConfig(**small if tiny else {})).eval()


def encoder_weights(model: Any) -> list[torch.Tensor]:
    return [part.weight.detach() for part in model.encoder.modules() if isinstance(part, torch.nn.Linear)]


def spec(sites: int) -> dict[str, Any]:
    rule = {
        "name": "encoder",
        "match": {"path": "encoder.**"},
        "expect": sites,
        "rewrite": {"low_rank": {"rank": RANK, "whiten": False}},
        "force": True,  # in the toy size 64 does not pay
    }
    return {"version": 1, "name": f"rank-{RANK}", "rules": [rule]}


def steps(model: Any, folder: Path) -> dict[str, Callable[[int], None]]:
    """What is timed, by name; each takes the number of the round, for a folder of its own."""
    ids = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    axes = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"}}
    weights = encoder_weights(model)

    def ours(round_: int) -> None:
        mm.compile(model, spec(len(weights)), inputs, dynamic_shapes=axes).save(folder / f"ours-{round_}")

    def export(round_: int) -> None:
        batch, seq = torch.export.Dim("batch", min=1), torch.export.Dim("seq", min=2, max=model.config.max_position_embeddings)
        program = torch.export.export(model, (), kwargs=inputs, dynamic_shapes={name: {0: batch, 1: seq} for name in inputs}, strict=False)
        out = folder / f"dense-{round_}"
        out.mkdir()
        torch.onnx.export(program, (), str(out / "model.onnx"), dynamo=True, optimize=False, external_data=True, verbose=False)

    def svd(round_: int) -> None:
        for weight in weights:
            torch.linalg.svd(weight, full_matrices=False)

    def solver(round_: int) -> None:
        own_solver(weights)

    return {"ours": ours, "export": export, "svd": svd, "solver": solver}


def own_solver(weights: Sequence[torch.Tensor]) -> None:
    from matmorph.passes.linalg.svd import truncated_svd

    for weight in weights:
        truncated_svd(weight, RANK)


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--rounds", type=int, default=3)
    options = options_of.parse_args(arguments)
    rounds = 1 if options.tiny else options.rounds
    torch.set_num_threads(options.threads)
    model = build(options.tiny)
    say = tell(options)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        timed = steps(model, Path(folder))
        for round_ in range(rounds):
            for name, step in timed.items():
                start = time.perf_counter()
                step(round_)
                seconds.setdefault(name, []).append(time.perf_counter() - start)
                say(f"round {round_ + 1}: {name} {seconds[name][-1]:.1f} s")
    typical = {name: median(values) for name, values in seconds.items()}
    bare, bare_solver = typical["export"] + typical["svd"], typical["export"] + typical["solver"]
    row = {**{f"{name}_s": value for name, value in typical.items()}}
    row |= {"ratio": typical["ours"] / bare, "ratio_solver": typical["ours"] / bare_solver}
    notes = ["ratio = ours / (export + svd), ratio_solver = ours / (export + solver); medians of rounds in turn"]
    finish(options, [row], notes, rounds=seconds)


if __name__ == "__main__":
    main()
