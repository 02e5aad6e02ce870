"""One plain ONNX Runtime session, three adapters of different rank, switched from run to run.

Three tasks on the same inputs are learnt by LoRA of rank 2, 4 and 8 beside one frozen base; each adapter is a small file. At the end only
onnxruntime and numpy are at work: the base is loaded once, and every run names the adapter it wants.
"""

import numpy as np
import onnxruntime
import torch

import matmorph as mm
from matmorph.runtime import Trainer

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 2))
x = np.random.default_rng(0).standard_normal((256, 16), dtype=np.float32)
TASKS = {"sign": (2, x[:, 0] > 0), "sum": (4, x.sum(axis=1) > 0), "product": (8, x[:, 0] * x[:, 1] > 0)}


def compiled(rank: int) -> mm.Compiled:
    rule = {"name": "all", "match": {"op": "linear"}, "rewrite": {"lora": {"rank": rank, "alpha": 2 * rank}}}
    spec = {"version": 1, "name": "lora", "rules": [rule], "export": {"adapters": "inputs"}}
    return mm.compile(base, spec, (torch.randn(4, 16),), dynamic_shapes=({0: "batch"},))


for task, (rank, wanted) in TASKS.items():
    model = compiled(rank)
    model.export_training("out-adapter-train", loss="cross_entropy", optimizer=mm.AdamW(lr=2e-2), force=True)
    trainer = Trainer("out-adapter-train")
    batch = {"input": x, "labels": wanted.astype(np.int64)}
    losses = [trainer.step(batch) for _ in range(150)]
    model.save_adapter(f"{task}.onnx_adapter", trainer.parameters())
    print(f"{task}: rank {rank}, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
compiled(1).save("out-adapters", force=True)  # the base alone: the adapter inputs have rank 0 until one is named

settings = onnxruntime.SessionOptions()
settings.log_severity_level = 3  # a warning for each input that has a default
session = onnxruntime.InferenceSession("out-adapters/model.onnx", settings, providers=["CPUExecutionProvider"])
for task, (_, wanted) in TASKS.items():
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(f"{task}.onnx_adapter")
    options.add_active_adapter(adapter)
    right = {
        name: float((session.run(None, {"input": x}, chosen)[0].argmax(axis=1) == wanted).mean())
        for name, chosen in (("base", None), (task, options))
    }
    print(f"{task}: accuracy {right['base']:.2f} without, {right[task]:.2f} with its adapter")
