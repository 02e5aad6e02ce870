"""Check vectors of training graphs: float64 is what is expected, and float32's own error is what is allowed beyond the fixed bound.

The oracle is the network written out by hand in numpy, float64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import matmorph as mm
from matmorph.compiled import Compiled
from matmorph.exporters.onnx.precision import PARITY_TOLERANCE
from matmorph.exporters.training.training_vectors import TIMES_ROUNDING
from matmorph.runtime.format.training import TRAIN_MANIFEST
from matmorph.runtime.train_manifest import open_training
from matmorph.runtime.train_values import initial_theta


class Cancelling(nn.Module):
    """`far` is added before the activation and taken off behind it: that many times the rounding of float32."""

    def __init__(self, far: float) -> None:
        super().__init__()
        self.far = far
        self.lin = nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.lin(x) + self.far) - self.far)  # the activation keeps the two sums apart


def trained(far: float) -> Compiled:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, x = Cancelling(far).eval(), torch.randn(6, 12)
    spec = {
        "version": 1,
        "rules": [{"name": "low", "match": {"path": "lin"}, "rewrite": {"lora": {"rank": 2, "alpha": 2}}}],
        "train": {"loss": "cross_entropy"},
    }
    return mm.compile(module, spec, (x,), ({0: "batch"},))


def expected(compiled: Compiled, folder: Path, arrays: dict[str, np.ndarray], case: int) -> tuple[float, np.ndarray]:
    """Loss and gradient of loss * scale with respect to theta, in float64 by hand: mean cross entropy over labels that are not ignored."""
    manifest, stored = open_training(folder)
    theta = initial_theta(stored, manifest)
    theta = (theta + np.resize(arrays["nudge"], len(theta))).astype(np.float64)
    state = {name: tensor.double().numpy() for name, tensor in compiled.module.state_dict().items()}
    parts = {}
    for entry in manifest.parameters:
        parts[entry.name] = theta[entry.offset : entry.offset + int(np.prod(entry.shape))].reshape(entry.shape)
    down, up = parts["lin.lora.down"], parts["lin.lora.up"]
    x, labels = arrays[f"input:x:{case}"].astype(np.float64), arrays[f"input:labels:{case}"]
    hidden = x @ state["lin.weight"].T + x @ down @ up  # alpha / rank = 1; every sum is far above zero, so relu and `far` cancel
    logits = hidden @ state["head.weight"].T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    counted = np.flatnonzero(labels >= 0)
    loss = -np.log(p[counted, labels[counted]]).mean()
    d_logits = np.zeros_like(p)
    d_logits[counted] = p[counted] / len(counted)
    d_logits[counted, labels[counted]] -= 1 / len(counted)
    d_hidden = d_logits @ state["head.weight"]
    grads = {"lin.lora.down": x.T @ d_hidden @ up.T, "lin.lora.up": (x @ down).T @ d_hidden}
    flat = np.concatenate([grads[entry.name].reshape(-1) for entry in manifest.parameters])
    return float(loss), flat * float(arrays["loss_scale"])


@pytest.mark.parametrize("far", [4.0, 1e5])
def test_float64_is_expected_and_float32s_own_error_allowed(far: float, tmp_path: Path) -> None:
    compiled = trained(far)
    folder = compiled.save(tmp_path / "out")  # which checks ONNX Runtime against these vectors
    assert (folder / TRAIN_MANIFEST).is_file()
    arrays = dict(np.load(folder / "train_check.npz"))
    cases = sorted(int(key.rsplit(":", 1)[1]) for key in arrays if key.startswith("loss:"))
    assert len(cases) == 3
    for case in cases:
        loss, gradient = expected(compiled, folder, arrays, case)
        assert abs(float(arrays[f"loss:{case}"]) - loss) <= 1e-7 * max(1.0, loss)  # one rounding to float32
        off = np.abs(arrays[f"grad:{case}"] - gradient[arrays["index"]]) / arrays[f"reference:{case}"]
        # float64 loses 5 of its 16 digits to `far`; what is kept is float32
        assert off.max() <= 1e-7
    fixed = PARITY_TOLERANCE["fp32"]
    if far < 100:
        assert float(arrays["tolerance"]) == fixed
    else:
        # sums near 1e5 lie on a grid of 7.8e-3, half of which is the most that a hidden value of about one can be off
        assert fixed < float(arrays["tolerance"]) < TIMES_ROUNDING * 4e-3
