"""Sentiment of film reviews (SST-2): MiniLM with a head of two classes, fine-tuned on ONNX Runtime, beside the same recipe in PyTorch.

Needs the folder of SST-2 with `sst2-train.tsv` and `sst2-dev.tsv` (a header line, then label TAB sentence). Both sides start from the same
numbers and see the same batches in the same order; no dropout on either. Then the adapter is merged, exported, verified, and asked again.

    python examples/sst2.py --data FOLDER [--method lora | loftq-u4 | tt-lora | glora | sparse_grad ...] [--samples N] [--dev N] [--lr X]
                            [--threads N] [--no-peer]

lora: LoRA r8 on the six matmuls of each layer, beside PEFT's. loftq-u4: the same matmuls in 4 bits with LoftQ factors of rank 8, beside
PEFT's LoRA on that base made dense again. tt-lora: tensor-train updates of them, which PEFT does not have, beside the compiled module under
torch's autograd; glora, which scales and shifts the weights by factors of rank 4, as many numbers as LoRA's, likewise. sparse_grad: as many
entries of each weight as LoRA has numbers for it learn at a step; its optimizer has no counterpart in torch. Several methods: one after the
other, and a table of them at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import matmorph as mm
from matmorph.models.resolve import minilm, tokenize
from matmorph.runtime import Session, Trainer, linear
from matmorph.runtime.check import check

Batch = dict[str, np.ndarray]
BATCH, LENGTH, WARMUP, CLIP, WEIGHT_DECAY = 32, 64, 0.06, 1.0, 0.01
LAYERS = {"op": "matmul", "path": "encoder.encoder.**"}  # the six matmuls of each layer
REWRITES: Mapping[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 8, "alpha": 16}},
    "loftq-u4": {"loftq": {"quantizer": "uniform", "bits": 4, "block_size": 32, "rank": 8, "alpha": 16}},
    "tt-lora": {"tt_lora": {"rank": 8, "alpha": 16}},
    "glora": {"glora": {"A": "lora", "B": "lora", "rank": 4}},
}
RULES: Mapping[str, list[dict[str, Any]]] = {
    **{name: [{"name": "adapters", "match": LAYERS, "rewrite": rewrite}] for name, rewrite in REWRITES.items()},
    "sparse_grad": [  # LoRA r8 has 8 (in + out) numbers for a weight
        {"name": "attention", "match": {**LAYERS, "role": "attention.*"}, "rewrite": {"sparse_grad": {"keep": 8 * (384 + 384)}}},
        {"name": "mlp", "match": {**LAYERS, "role": "mlp.*"}, "rewrite": {"sparse_grad": {"keep": 8 * (384 + 1536)}}},
    ],
}
RATES: Mapping[str, float] = {"sparse_grad": 5e-4}
"""Learning rate by method; 2e-3 for the others."""
NO_PEER: Mapping[str, str] = {"sparse_grad": "torch has no optimizer that updates the largest entries alone"}
STEPS = 30  # batches whose gradients make the bases of sparse_grad


class Classifier(nn.Module):
    """MiniLM, the mean over the words of a sentence, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = minilm().module
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
            self.head.bias.zero_()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return {"logits": self.head((hidden * mask).sum(1) / mask.sum(1))}


# ---- data


def read(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [row[1] for row in rows], np.array([int(row[0]) for row in rows])


def chosen(sentences: Sequence[str], labels: np.ndarray, samples: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """`samples` at random, in a random order; all of them where there are no more."""
    order = np.random.default_rng(seed).permutation(len(sentences))[:samples]
    return [sentences[index] for index in order], labels[order]


def batches(sentences: Sequence[str], labels: np.ndarray, seed: int | None = 0, size: int = BATCH) -> list[Batch]:
    """Batches of sentences of like length, padded to their longest; in random order, or by length where there is no seed."""
    tokens = tokenize(sentences, LENGTH)
    lengths = tokens["attention_mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    if seed is not None:
        np.random.default_rng(seed).shuffle(groups)
    return [_batch(tokens, labels, group, int(lengths[group].max())) for group in groups]


def _batch(tokens: Batch, labels: np.ndarray, group: np.ndarray, longest: int) -> Batch:
    cut = {name: np.ascontiguousarray(array[group, :longest]) for name, array in tokens.items()}
    return {**cut, "labels": labels[group].astype(np.int64)}


# ---- the two sides


def accuracy(logits: Callable[[Batch], np.ndarray], data: Sequence[Batch]) -> tuple[float, np.ndarray]:
    """Percent right, and every prediction."""
    predicted = np.concatenate([logits(batch).argmax(-1) for batch in data])
    return 100 * float((predicted == np.concatenate([batch["labels"] for batch in data])).mean()), predicted


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items() if name != "labels"}


def torch_logits(module: nn.Module) -> Callable[[Batch], np.ndarray]:
    def run(batch: Batch) -> np.ndarray:
        with torch.no_grad():
            return module(**tensors(batch))["logits"].numpy()

    return run


def peer(method: str, compiled: mm.Compiled) -> tuple[str, nn.Module]:
    """The same model in PyTorch, from the same numbers; parameters that train are those with requires_grad."""
    if method in ("tt-lora", "glora"):
        module = compiled.module
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(f".{method.replace('-', '_')}." in name or name.startswith("head."))
        return "PyTorch", module
    from peft import LoraConfig, get_peft_model

    ours = compiled.module.state_dict()
    label = next(iter(REWRITES[method]))
    sites = [name.removesuffix(f".{label}.down") for name in ours if name.endswith(f".{label}.down")]
    module = Classifier().eval()
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=[site.removeprefix("encoder.") for site in sites])
    module.encoder = get_peft_model(module.encoder, config)
    layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    dense = dense_bases(compiled) if method == "loftq-u4" else {}
    with torch.no_grad():
        for site in sites:
            layer = layers[site.replace("encoder.", "encoder.base_model.model.", 1)]
            layer.lora_A["default"].weight.copy_(ours[f"{site}.{label}.down"].T)
            layer.lora_B["default"].weight.copy_(ours[f"{site}.{label}.up"].T)
            if site in dense:
                layer.base_layer.weight.copy_(dense[site])
    for parameter in module.head.parameters():
        parameter.requires_grad_(True)
    return "PyTorch + PEFT", module


def dense_bases(compiled: mm.Compiled) -> dict[str, torch.Tensor]:
    """[out, in] of each 4-bit matmul by site: what it makes of the identity."""
    found = {}
    for node in compiled.graph.nodes:
        if node.op == "matmorph.matmul_nbits.default":
            _, codes, scales, zeros, _, features, *rest = node.args
            weights = [None if const is None else const.load() for const in (codes, scales, zeros)]
            dense = torch.ops.matmorph.matmul_nbits(torch.eye(features), *weights, None, features, *rest)
            found[codes.path.removesuffix(".loftq.codes")] = dense.T
    return found


def train_peer(module: nn.Module, data: Sequence[Batch], lr: float) -> float:
    """AdamW with the same schedule, clipping and order; seconds."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = linear(warmup=WARMUP)
    began = time.perf_counter()
    for number, batch in enumerate(data):
        optimizer.param_groups[0]["lr"] = lr * schedule(number, len(data))
        loss = nn.functional.cross_entropy(module(**tensors(batch))["logits"], torch.from_numpy(batch["labels"]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
    return time.perf_counter() - began


# ---- the whole of it


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    files = {name: options.data / f"sst2-{name}.tsv" for name in ("train", "dev")}
    for path in files.values():
        if not path.is_file():
            print(f"{path} is not there: name the folder of SST-2 with --data", file=sys.stderr)
            return 2
    train = batches(*chosen(*read(files["train"]), options.samples))
    dev = batches(*chosen(*read(files["dev"]), options.dev), seed=None, size=64)
    print(f"{sum(len(batch['labels']) for batch in train)} samples to learn from, {sum(len(batch['labels']) for batch in dev)} to judge by")

    rows = [tuned(method, options, train, dev) for method in options.method]
    if len(rows) > 1:
        print("\n".join(table(rows)))
    return 0 if all(row["verified"] for row in rows) else 1


def tuned(method: str, options: argparse.Namespace, train: Sequence[Batch], dev: Sequence[Batch]) -> dict[str, Any]:
    """One method from the untuned model to the merged file; what it took and gave."""
    example = tensors(train[0])
    axes = {0: "batch", 1: "seq"}
    spec = {"version": 1, "name": method, "rules": RULES[method], "train": {"loss": "cross_entropy", "output": "logits"}}
    labelled = [{**tensors(batch), "labels": torch.from_numpy(batch["labels"])} for batch in train[:STEPS]]
    if method == "sparse_grad":
        spec["rules"] = [with_steps(rule, len(labelled)) for rule in RULES[method]]
    began = time.perf_counter()
    shapes = {"input_ids": axes, "attention_mask": axes}
    compiled = mm.compile(Classifier().eval(), spec, example, shapes, calibration=labelled if method == "sparse_grad" else None)
    prepared = time.perf_counter() - began
    lr = options.lr or RATES.get(method, 2e-3)
    with tempfile.TemporaryDirectory() as place:
        compiled.export_training(f"{place}/train", optimizer=mm.AdamW(lr=lr, weight_decay=WEIGHT_DECAY), trainable=["adapters", "head.**"])
        trainer = Trainer(f"{place}/train", threads=options.threads, log=lambda line: None)
        began = time.perf_counter()
        (loss,) = trainer.fit(train, schedule=linear(warmup=WARMUP), clip=CLIP)
        seconds = time.perf_counter() - began
        length, learning = trainer.manifest.length, learning_numbers(Path(place) / "train" / "train.json")
        some = "" if learning == length else f", of which {learning} learn at each step"
        print(f"{method}: {length} trainable numbers{some}, {trainer.updates} updates, mean loss {loss:.4f}")
        ours, predicted = accuracy(trained_logits(trainer), dev)
        print(f"matmorph, ONNX Runtime: dev accuracy {ours:.2f} %, {seconds:.0f} s of training")
        if method in NO_PEER:
            print(f"no peer: {NO_PEER[method]}")
        elif not options.no_peer:
            name, module = peer(method, compiled)
            theirs_seconds = train_peer(module, train, lr)
            theirs, _ = accuracy(torch_logits(module), dev)
            print(f"{name}: dev accuracy {theirs:.2f} %, {theirs_seconds:.0f} s of training; difference {ours - theirs:+.2f} points")
        verified = finish(compiled, trainer, dev, predicted, f"{place}/merged")
    state = 4 * length * (1 + len(trainer.manifest.states)) / 1e6
    row = {"method": method, "learning": learning, "state MB": state, "ms per step": 1e3 * seconds / trainer.updates}
    return {**row, "prepared s": prepared, "accuracy": ours, "verified": verified}


def with_steps(rule: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The rule for no more calibration batches than there are."""
    return {**rule, "rewrite": {"sparse_grad": {**rule["rewrite"]["sparse_grad"], "steps": steps}}}


def learning_numbers(train_json: Path) -> int:
    """How many numbers take part in an update."""
    parameters = json.loads(train_json.read_text(encoding="utf-8"))["parameters"]
    return sum(one.get("keep", math.prod(one["shape"])) for one in parameters)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """`learning`: numbers that take part in an update. `state MB`: parameters and moments. `prepared s`: tracing, bases, rewriting."""
    cells = [list(rows[0]), *([f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells]


def trained_logits(trainer: Trainer) -> Callable[[Batch], np.ndarray]:
    """The outputs of eval.onnx with the parameters as they are."""

    def run(batch: Batch) -> np.ndarray:
        found: list[np.ndarray] = []
        trainer.evaluate([batch], {"logits": lambda outputs, _: found.append(outputs["logits"]) or 0.0})
        return found[0]

    return run


def finish(compiled: mm.Compiled, trainer: Trainer, dev: Sequence[Batch], predicted: np.ndarray, folder: str) -> bool:
    """Merges, exports, verifies, and asks the merged model again; whether all is well. A base in codes is rounded anew by merging, so the
    model that keeps the trained factors beside its codes is asked too."""
    values = trainer.parameters()
    merged = compiled.merge(values)
    worst = max(site.error for site in merged.merged)
    well = asked(merged, f"merged (largest error of a weight {worst:.1e})", dev, predicted, folder)
    if any(site.quantizer is not None for site in merged.merged):
        well &= asked(compiled.load_trained(values), "factors kept beside the codes", dev, predicted, f"{folder}-kept")
    return well


def asked(model: mm.Compiled, what: str, dev: Sequence[Batch], predicted: np.ndarray, folder: str) -> bool:
    """Writes the model, checks the files and compares its predictions; whether the files are well."""
    model.save(folder, train=False)
    result = check(folder)
    session = Session(folder, log=lambda line: None)
    after, again = accuracy(lambda batch: session.run({name: batch[name] for name in ("input_ids", "attention_mask")})["logits"], dev)
    same = int((again == predicted).sum())
    print(f"{what}, exported, {'verified' if result.ok else 'NOT verified'}: ", end="")
    print(f"dev accuracy {after:.2f} %, {same} of {len(predicted)} predictions are the same")
    return result.ok


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--method", choices=list(RULES), nargs="+", default=["lora"])
    parser.add_argument("--samples", type=int, default=1_000_000, metavar="N", help="sentences to learn from, at random")
    parser.add_argument("--dev", type=int, default=1_000_000, metavar="N", help="sentences to judge by")
    parser.add_argument("--lr", type=float, help="default: 2e-3, of sparse_grad 5e-4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peer", action="store_true", help="leave PyTorch out")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
