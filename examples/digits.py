"""Handwritten digits: a small ViT that knows 0 to 4 learns 5 to 9, by GLoRA with its search, SparseGrad, LoRA and full fine-tuning.

The data are scikit-learn's (1797 real scans of 8 x 8 pixels, pip install scikit-learn). The ViT is pre-trained here on the classes 0 to 4
with PyTorch; each method then tunes it on 200 images of 5 to 9 with a new head, on ONNX Runtime. 200 other images choose: the learning rate
of each method out of four, the configuration of the search. The table is of the rest, which neither training nor choosing has seen. A
supernet trains longer, because each step reaches one of its configurations; its learning rate is fixed. Everything is done for several
seeds, which divide the images anew: on 400 test images one run says little about a difference of a point.

    python examples/digits.py [--small] [--limit N] [--threads N] [--seed N] [--runs N]

The table has the mean accuracy of the runs, and the lowest and the highest. State: what the optimizer keeps while it trains, parameters,
gradient and two moments, float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import matmorph as mm
from matmorph.folders.after_training import found_spec
from matmorph.runtime import Batches, SearchSettings, Session, Trainer, cosine, search

Arrays = dict[str, np.ndarray]
SIDE, PATCH, CLASSES, BATCH = 8, 2, 5, 32
TRAIN, VALIDATION = 200, 200
LAYERS = {"op": "matmul", "path": "blocks.**"}  # qkv, proj, fc1, fc2 of each layer


@dataclass(frozen=True)
class Sizes:
    """How large everything is; epochs are passes over the 200 images."""

    width: int = 48
    depth: int = 3
    pretrain: int = 40
    epochs: int = 60
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    supernet: int = 300
    population: int = 50
    rounds: int = 8


SMALL = Sizes(width=16, depth=1, pretrain=4, epochs=3, rates=(3e-3,), supernet=4, population=6, rounds=2)


@dataclass(frozen=True)
class Method:
    """A row of the table. `rewrite`: of every matmul of the layers; `lr`: learning rate, None = the best of `Sizes.rates`; `trainable`:
    beside the head; `searched`: a supernet; `calibrated`: what it adds depends on gradients of the training data."""

    name: str
    rewrite: Any
    lr: float | None = None
    trainable: str = "adapters"
    searched: bool = False
    calibrated: bool = False


METHODS = (
    Method("head alone", "keep", trainable="head.**"),
    Method("LoRA, rank 4", {"lora": {"rank": 4, "alpha": 8}}),
    Method("GLoRA, searched", {"glora": {"search": True, "rank": 4}}, lr=5e-3, searched=True),
    Method("SparseGrad, 1 %", {"sparse_grad": {"keep": "1%"}}, calibrated=True),
    Method("full fine-tuning", "keep", trainable="all"),
)


@dataclass(frozen=True)
class Row:
    """What a method came to in one run: accuracy in percent on the test images, seconds of an update, bytes of the state, learning rate;
    `merged`: accuracy of the searched configuration after it was merged and exported."""

    name: str
    accuracy: float
    trainable: int
    step: float
    state: int
    lr: float
    updates: int
    merged: float | None = None


# ---- model and data


class Block(nn.Module):
    """A pre-norm layer: attention of four heads, and an MLP twice as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, width))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 2 x 2 pixels, layers, the mean over patches, a head of five classes."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, width)
        self.places = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = SIDE // PATCH
        x = pixels.view(-1, grid, PATCH, grid, PATCH).transpose(2, 3).reshape(-1, grid * grid, PATCH * PATCH)
        x = self.patches(x) + self.places
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x).mean(1))}


def digits(seed: int) -> tuple[Arrays, Arrays]:
    """(0 to 4, 5 to 9 with labels from 0), each in random order; pixels from 0 to 1."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    pixels, labels = (found.data[order] / 16).astype(np.float32), found.target[order].astype(np.int64)
    halves = (labels < CLASSES, labels >= CLASSES)
    return tuple({"pixels": pixels[half], "labels": labels[half] % CLASSES} for half in halves)  # type: ignore[return-value]


def cut(arrays: Mapping[str, np.ndarray], start: int, stop: int | None) -> Arrays:
    return {name: array[start:stop] for name, array in arrays.items()}


def pretrained(arrays: Arrays, sizes: Sizes, seed: int) -> ViT:
    """The ViT after AdamW on the first five classes, with a new head."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model, head = ViT(sizes.width, sizes.depth), nn.Linear(sizes.width, CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    loader = Batches(arrays, 64, seed=seed)
    for epoch in range(sizes.pretrain):
        for batch in loader.epoch(epoch):
            loss = cross_entropy(model(torch.from_numpy(batch["pixels"]))["logits"], torch.from_numpy(batch["labels"]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.head = head
    return model.eval().requires_grad_(True)


# ---- one method


def right(outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> np.ndarray:
    return outputs["logits"].argmax(-1) == batch["labels"]


def exported(model: ViT, method: Method, train: Arrays, folder: Path) -> mm.Compiled:
    """The model with what the method adds, and its training graphs in `folder`."""
    names = ["head.**"] if method.trainable == "head.**" else [method.trainable] if method.trainable == "all" else ["adapters", "head.**"]
    asked = {
        "loss": "cross_entropy",
        "output": "logits",
        "optimizer": {"adamw": {"lr": 1e-3, "weight_decay": 0.01}},
        "trainable": names,
    }
    spec = {"version": 1, "name": "digits", "rules": [{"name": "layers", "match": LAYERS, "rewrite": method.rewrite}], "train": asked}
    example = {"pixels": torch.from_numpy(train["pixels"][:4])}
    labelled = [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in Batches(train, BATCH)]
    more = {"calibration": labelled * 5} if method.calibrated else {}
    compiled = mm.compile(model, spec, example, {"pixels": {0: "batch"}}, **more)
    compiled.save(folder, train=True)
    return compiled


def tuned(folder: Path, train: Arrays, epochs: int, lr: float, options: argparse.Namespace) -> tuple[Trainer, float]:
    """A Trainer after its training, and the seconds of one update."""
    trainer = Trainer(folder, "cpu", lr=lr, threads=options.threads, seed=options.seed, log=lambda line: None)
    began = time.perf_counter()
    trainer.fit(Batches(train, BATCH, seed=options.seed), epochs, schedule=cosine(warmup=0.1), clip=1.0, progress=False)
    return trainer, (time.perf_counter() - began) / trainer.updates


def best_tuned(folder: Path, train: Arrays, judges: Sequence[Arrays], sizes: Sizes, options: argparse.Namespace) -> tuple[Trainer, float]:
    """The one of all learning rates that is right most often on the validation images; the smaller rate where two are."""
    found = [tuned(folder, train, sizes.epochs, lr, options) for lr in sizes.rates]
    return max(found, key=lambda one: one[0].evaluate(judges, {"accuracy": right})["accuracy"])


def whole(arrays: Arrays) -> list[Arrays]:
    return [dict(batch) for batch in Batches(arrays, 128, shuffle=False)]


def run(method: Method, model: ViT, parts: Sequence[Arrays], sizes: Sizes, options: argparse.Namespace, place: Path) -> Row:
    """Exports, trains, searches where there is a choice, and tests."""
    train, judges, test = parts[0], whole(parts[1]), parts[2]
    folder = place / f"{METHODS.index(method)}"
    compiled = exported(model, method, train, folder)
    if method.lr is None:
        trainer, step = best_tuned(folder, train, judges, sizes, options)
    else:
        trainer, step = tuned(folder, train, sizes.supernet, method.lr, options)
    length, loader = trainer.manifest.length, whole(test)
    row = Row(method.name, 0.0, length, step, 4 * length * (2 + len(trainer.manifest.states)), trainer.lr, trainer.updates)
    if not method.searched:
        return replace(row, accuracy=100 * trainer.evaluate(loader, {"accuracy": right})["accuracy"])
    children = sizes.population // 2
    settings = SearchSettings(
        sizes.population, min(10, sizes.population), children, children, rounds=sizes.rounds, limit=options.limit, seed=options.seed
    )
    result = search(trainer, judges, right, settings, state=place / "search.json")
    print("parameters  accuracy on the validation images: the Pareto front of the search")
    for one in result.pareto:
        print(f"{one.parameters:>10,}  {100 * one.fitness:.1f} %")
    figures = trainer.evaluate(loader, {"accuracy": right}, configuration=result.named)
    after = merged(compiled, trainer, model, result.named, result.best.configuration, test, place)
    others = sum(one.size for one in trainer.manifest.parameters if ".glora." not in one.name)
    return replace(row, accuracy=100 * figures["accuracy"], trainable=result.best.parameters + others, merged=after)


def merged(
    compiled: mm.Compiled, trainer: Trainer, model: ViT, named: Any, configuration: Any, test: Arrays, place: Path
) -> float:  # fmt: skip
    """The found configuration as a spec of its own, compiled from the pre-trained model, merged and exported; its accuracy there."""
    supernet = trainer.supernet
    if supernet is None:
        raise SystemExit("the training graphs are of no supernet")
    spec = found_spec(compiled.spec, compiled.adapters, named)
    example = {"pixels": torch.from_numpy(test["pixels"][:4])}
    found = mm.compile(model, spec, example, {"pixels": {0: "batch"}})
    values = supernet.values(trainer.parameters(), configuration)
    ready = found.load_trained(values)
    plain = ready.merge() if ready.adapters else ready
    plain.save(place / "merged")
    session = Session(place / "merged", "cpu", log=lambda line: None)
    logits = session.run({"pixels": test["pixels"]})["logits"]
    return 100 * float((logits.argmax(-1) == test["labels"]).mean())


# ---- the whole of it


def table(runs: Sequence[Sequence[Row]]) -> str:
    """A line for each method, of its rows in all runs: means, and the range of the accuracy."""
    lines = [f"{'method':<17} {'accuracy':>8} {'range':>12} {'trainable':>10} {'ms a step':>10} {'state KiB':>10} {'updates':>8}  rates"]
    for found in zip(*runs, strict=True):
        scores = [row.accuracy for row in found]
        numbers = f"{mean(scores):>7.1f}% {min(scores):>5.1f}-{max(scores):.1f}% {mean([row.trainable for row in found]):>10,.0f}"
        step, state = 1000 * mean([row.step for row in found]), mean([row.state for row in found]) / 1024
        after = [row.merged for row in found if row.merged is not None]
        note = f"  merged and exported: {mean(after):.1f} %" if after else ""
        rates = ", ".join(f"{row.lr:g}" for row in found)
        lines.append(f"{found[0].name:<17} {numbers} {step:>10.1f} {state:>10.0f} {found[0].updates:>8}  {rates}{note}")
    return "\n".join(lines)


def one_run(sizes: Sizes, seed: int, options: argparse.Namespace) -> list[Row]:
    """Every method on the images as this seed divides them."""
    known, new = digits(seed)
    parts = (cut(new, 0, TRAIN), cut(new, TRAIN, TRAIN + VALIDATION), cut(new, TRAIN + VALIDATION, None))
    print(f"seed {seed}: {len(known['labels'])} of 0 to 4 to pre-train on; {TRAIN} of 5 to 9 to learn, {len(parts[2]['labels'])} for tests")
    model, rows, options = pretrained(known, sizes, seed), [], argparse.Namespace(**{**vars(options), "seed": seed})
    with tempfile.TemporaryDirectory() as place:
        for method in METHODS:
            rows.append(run(method, model, parts, sizes, options, Path(place)))
            print(f"{method.name}: {rows[-1].accuracy:.1f} %", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    try:
        import sklearn  # noqa: F401
    except ImportError:
        print("scikit-learn, which brings the digits, is not installed: pip install scikit-learn", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    runs = [one_run(SMALL if options.small else Sizes(), options.seed + index, options) for index in range(options.runs)]
    print(f"{len(runs)} runs, threads: {options.threads}; {time.perf_counter() - began:.0f} s in all")
    print(table(runs))
    return 0


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="everything tiny: seconds, and no accuracy to speak of")
    parser.add_argument("--limit", type=int, default=4000, metavar="N", help="most parameters of a configuration of GLoRA")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next takes the next number")
    parser.add_argument("--runs", type=positive, default=3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
