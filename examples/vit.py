"""A vision transformer: images in, the MLPs narrowed by structural pruning, the rest as it was; the same image sizes, any batch."""

import torch
from transformers import ViTConfig, ViTForImageClassification

import matmorph as mm
from matmorph.runtime import Session

torch.manual_seed(0)
config = ViTConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=8)
model = ViTForImageClassification(config)
images = torch.randn(4, 3, 32, 32)
samples = [{"pixel_values": torch.randn(8, 3, 32, 32)} for _ in range(8)]
spec = {
    "version": 1,
    "name": "narrow-vit",
    "rules": [{"name": "mlp", "match": {"block": "mlp"}, "expect": 6, "rewrite": {"transact": {"width": "50%"}}}],
    "calibration": {"samples": 64},
}

compiled = mm.compile(model, spec, {"pixel_values": images}, dynamic_shapes={"pixel_values": {0: "batch"}}, calibration=samples)
before, after = compiled.report.totals.macs
print(f"MACs per token: {before:,} -> {after:,} ({after / before:.0%})")
session = Session(compiled.save("out-vit", force=True))
for batch in (1, 3):
    logits = session.run({"pixel_values": torch.randn(batch, 3, 32, 32).numpy()})["logits"]
    print(f"{batch} image{'s' if batch > 1 else ''}: logits {logits.shape}")
