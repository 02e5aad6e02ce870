"""Sentiment of film reviews (SST-2): MiniLM with a head of two classes, fine-tuned on ONNX Runtime, beside the same recipe in PyTorch.

Needs the folder of SST-2 with `sst2-train.tsv` and `sst2-dev.tsv` (a header line, then label TAB sentence). Both sides start from the same
numbers and see the same batches in the same order; no dropout on either. Then the adapter is merged, exported, verified, and asked again.

    python examples/sst2.py --data FOLDER [--method lora | loftq-u4 | tt-lora] [--samples N] [--dev N] [--lr X] [--threads N] [--no-peer]

lora: LoRA r8 on the six matmuls of each layer, beside PEFT's. loftq-u4: the same matmuls in 4 bits with LoftQ factors of rank 8, beside
PEFT's LoRA on that base made dense again. tt-lora: tensor-train updates of them, which PEFT does not have, beside the compiled module under
torch's autograd.
"""

from __future__ import annotations

import argparse
import csv
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
from matmorph.models import minilm, tokenize
from matmorph.runtime import Session, Trainer, linear
from matmorph.runtime.check import check

Batch = dict[str, np.ndarray]
BATCH, LENGTH, WARMUP, CLIP, WEIGHT_DECAY = 32, 64, 0.06, 1.0, 0.01
LAYERS = {"op": "matmul", "path": "encoder.encoder.**"}  # the six matmuls of each layer
REWRITES: Mapping[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 8, "alpha": 16}},
    "loftq-u4": {"loftq": {"quantizer": "uniform", "bits": 4, "block_size": 32, "rank": 8, "alpha": 16}},
    "tt-lora": {"tt_lora": {"rank": 8, "alpha": 16}},
}


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
    if method == "tt-lora":
        module = compiled.module
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(".tt_lora." in name or name.startswith("head."))
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
    files = {name: options.data / f"sst2-{name}.tsv" for name in ("train", "dev")}
    for path in files.values():
        if not path.is_file():
            print(f"{path} is not there: name the folder of SST-2 with --data", file=sys.stderr)
            return 2
    torch.set_num_threads(options.threads)
    train = batches(*chosen(*read(files["train"]), options.samples))
    dev = batches(*chosen(*read(files["dev"]), options.dev), seed=None, size=64)
    print(f"{sum(len(batch['labels']) for batch in train)} samples to learn from, {sum(len(batch['labels']) for batch in dev)} to judge by")

    example = tensors(train[0])
    axes = {0: "batch", 1: "seq"}
    spec = {"version": 1, "name": options.method, "rules": [{"name": "adapters", "match": LAYERS, "rewrite": REWRITES[options.method]}]}
    compiled = mm.compile(Classifier().eval(), spec, example, {"input_ids": axes, "attention_mask": axes})
    with tempfile.TemporaryDirectory() as place:
        compiled.export_training(
            f"{place}/train",
            loss="cross_entropy",
            output="logits",
            optimizer=mm.AdamW(lr=options.lr, weight_decay=WEIGHT_DECAY),
            trainable=["adapters", "head.**"],
        )
        trainer = Trainer(f"{place}/train", threads=options.threads, log=lambda line: None)
        began = time.perf_counter()
        (loss,) = trainer.fit(train, schedule=linear(warmup=WARMUP), clip=CLIP)
        seconds = time.perf_counter() - began
        print(f"{trainer.manifest.length} trainable numbers, {trainer.updates} updates, mean loss {loss:.4f}")
        ours, predicted = accuracy(trained_logits(trainer), dev)
        print(f"matmorph, ONNX Runtime: dev accuracy {ours:.2f} %, {seconds:.0f} s of training")
        if not options.no_peer:
            name, module = peer(options.method, compiled)
            seconds = train_peer(module, train, options.lr)
            theirs, _ = accuracy(torch_logits(module), dev)
            print(f"{name}: dev accuracy {theirs:.2f} %, {seconds:.0f} s of training; difference {ours - theirs:+.2f} points")
        return finish(compiled, trainer, dev, predicted, f"{place}/merged")


def trained_logits(trainer: Trainer) -> Callable[[Batch], np.ndarray]:
    """The outputs of eval.onnx with the parameters as they are."""

    def run(batch: Batch) -> np.ndarray:
        found: list[np.ndarray] = []
        trainer.evaluate([batch], {"logits": lambda outputs, _: found.append(outputs["logits"]) or 0.0})
        return found[0]

    return run


def finish(compiled: mm.Compiled, trainer: Trainer, dev: Sequence[Batch], predicted: np.ndarray, folder: str) -> int:
    """Merges, exports, verifies, and asks the merged model again."""
    merged = compiled.merge(trainer.parameters())
    merged.save(folder)
    result = check(folder)
    session = Session(folder, log=lambda line: None)
    after, again = accuracy(lambda batch: session.run({name: batch[name] for name in ("input_ids", "attention_mask")})["logits"], dev)
    same = int((again == predicted).sum())
    worst = max(site.error for site in merged.merged)
    print(f"merged (largest error of a weight {worst:.1e}), exported, {'verified' if result.ok else 'NOT verified'}: ", end="")
    print(f"dev accuracy {after:.2f} %, {same} of {len(predicted)} predictions are the same")
    return 0 if result.ok else 1


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--method", choices=list(REWRITES), default="lora")
    parser.add_argument("--samples", type=int, default=1_000_000, metavar="N", help="sentences to learn from, at random")
    parser.add_argument("--dev", type=int, default=1_000_000, metavar="N", help="sentences to judge by")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peer", action="store_true", help="leave PyTorch out")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
