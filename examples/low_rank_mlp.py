"""Low-rank factors for a small MLP: compile, look at the report, save, run on ONNX Runtime."""

import torch

import matmorph as mm
from matmorph.runtime import Session

model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
inputs = (torch.randn(8, 256),)
samples = [(torch.randn(16, 256),) for _ in range(16)]
rule = {"name": "half", "match": {"op": "linear"}, "expect": 2, "rewrite": {"low_rank": {"rank": {"ratio": 0.5}, "whiten": True}}}
spec = {"version": 1, "name": "half-mlp", "rules": [rule]}

compiled = mm.compile(model, spec, inputs, dynamic_shapes=({0: "batch"},), calibration=samples)
for row in compiled.report.sites:
    print(f"{row.path}: rank {row.rank}, parameters {row.parameters}, output error {row.output_error:.3f}")
print("under torch:", compiled(*inputs).shape)

folder = compiled.save("out-mlp", force=True)
session = Session(folder)  # needs no torch
print("under ONNX Runtime:", session.run({"input": inputs[0].numpy()})["output"].shape)
