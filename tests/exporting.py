"""What the tests of exporters share: small graphs, sessions, and the comparison with torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from matmorph.ir.core import Graph
from matmorph.ir.tracing.trace import trace

LEVELS = {
    "plain": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "optimised": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class Mlp(nn.Module):
    """fc1 is [16, 8], fc2 [4, 16]; `scale` is a buffer, `unused` a weight that forward does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 4, bias=False)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x))) * self.scale


def seeded(factory: Any) -> Any:
    """The module in eval mode with the same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return factory().eval()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def mlp_graph() -> Graph:
    return trace(seeded(Mlp), {"x": randn(3, 5, 8)}, {"x": {0: "batch", 1: "seq"}})


def session(path: Path, level: str = "optimised") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = LEVELS[level]
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answers(module: nn.Module, inputs: Any) -> list[np.ndarray]:
    """What torch answers, flat, None left out."""
    with torch.no_grad():
        result = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    return [leaf.detach().numpy() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def feeds(running: onnxruntime.InferenceSession, inputs: Any) -> dict[str, np.ndarray]:
    names = [entry.name for entry in running.get_inputs()]
    given = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
    return {name: given[name].numpy() for name in names}


def difference(actual: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """max |actual - expected| / max(1, max |expected|) over all outputs, in float64."""
    assert [a.shape for a in actual] == [e.shape for e in expected]
    pairs = zip(actual, expected, strict=True)
    return max(float(np.abs(a.astype(np.float64) - e).max() / max(1.0, np.abs(e).max())) for a, e in pairs)
