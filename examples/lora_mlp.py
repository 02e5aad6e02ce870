"""LoRA beside a small MLP: training graphs, a few steps on ONNX Runtime, and the merged model."""

import numpy as np
import torch

import matmorph as mm
from matmorph.runtime import Trainer

model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 4))
spec = {"version": 1, "name": "lora", "rules": [{"name": "all", "match": {"op": "linear"}, "rewrite": {"lora": {"rank": 4, "alpha": 8}}}]}
compiled = mm.compile(model, spec, (torch.randn(8, 64),), dynamic_shapes=({0: "batch"},))
compiled.export_training("out-train", loss="cross_entropy", optimizer=mm.AdamW(lr=1e-2), force=True)

trainer = Trainer("out-train")  # from here on no torch is needed
rng = np.random.default_rng(0)
batch = {"input": rng.standard_normal((32, 64), dtype=np.float32), "labels": rng.integers(0, 4, 32)}
losses = [trainer.step(batch) for _ in range(20)]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

merged = compiled.merge(trainer.parameters())  # one dense model again
print(merged.module(torch.from_numpy(batch["input"])).shape)
