"""Pruning in shots: after each one the narrower model trains on ONNX Runtime, and the next shot scores what became of it."""

from pathlib import Path

import numpy as np
import torch

import matmorph as mm
from matmorph.runtime import Batches, Trainer, linear

FOLDER = Path("out-shot")
FEATURES, WIDTH, TARGET, SHOTS = 24, 96, 8, 3


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(FEATURES)
        self.fc1 = torch.nn.Linear(FEATURES, WIDTH)
        self.fc2 = torch.nn.Linear(WIDTH, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(x))))
        return x + inner


def network(seed: int) -> torch.nn.Module:
    blocks = torch.nn.Sequential(torch.nn.Linear(2, FEATURES), Block(), Block(), torch.nn.LayerNorm(FEATURES), torch.nn.Linear(FEATURES, 3))
    generator = torch.Generator().manual_seed(seed)
    for module in blocks.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            torch.nn.init.zeros_(module.bias)
    return blocks


def spirals(rows: int, seed: int) -> dict[str, np.ndarray]:
    """Points on three arms of a spiral with noise; the label is the arm."""
    rng = np.random.default_rng(seed)
    arm, way = rng.integers(0, 3, rows), rng.random(rows)
    angle = 2 * np.pi * (arm / 3 + 1.5 * way) + 0.1 * rng.standard_normal(rows)
    points = (0.2 + way)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return {"input": points.astype(np.float32), "labels": arm}


train, test = spirals(2048, 0), spirals(1024, 1)


def accuracy(module: torch.nn.Module) -> float:
    with torch.no_grad():
        return float((module(torch.from_numpy(test["input"])).argmax(1).numpy() == test["labels"]).mean())


def compiled(module: torch.nn.Module, rewrite: object) -> mm.Compiled:
    spec = {"version": 1, "name": "shot", "rules": [{"name": "mlp", "match": {"block": "mlp"}, "rewrite": rewrite}]}
    batch = torch.from_numpy(train["input"][:512])
    return mm.compile(module, spec, (batch[:8],), dynamic_shapes=({0: "batch"},), calibration=[(batch,)])


def trained(step: mm.Compiled, epochs: int) -> torch.nn.Module:
    """The model after some epochs of its training graphs; the Trainer itself needs no torch."""
    step.export_training(FOLDER, loss="cross_entropy", optimizer=mm.AdamW(lr=3e-3), trainable=["all"], force=True)
    trainer = Trainer(FOLDER, "cpu")
    trainer.fit(Batches(train, 64, seed=0), epochs, schedule=linear())
    return step.load_trained(trainer.parameters()).module


dense = trained(compiled(network(seed=0), "keep"), epochs=10)
print(f"width {WIDTH}: accuracy {accuracy(dense):.3f}")

model = dense
for width in mm.prune_schedule(WIDTH, TARGET, SHOTS, multiple_of=8):
    shot = compiled(model, {"transact": {"width": width}})
    model = trained(shot, epochs=4)
    print(f"width {width}: accuracy {accuracy(shot.module):.3f}, after training {accuracy(model):.3f}")

once = compiled(dense, {"transact": {"width": TARGET}}).module
print(f"width {TARGET} in one shot, without training: accuracy {accuracy(once):.3f}")
