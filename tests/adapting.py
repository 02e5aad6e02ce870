"""What the tests of adapters share: a small network, its compilation, and numbers for its factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import matmorph as mm

ROUNDING = 2e-6
"""Of a two-layer float32 network, relative to its largest output: roundings of 6e-8 of sums of 24 terms."""
X = torch.randn(9, 24, generator=torch.Generator().manual_seed(0))
U4 = {"quantizer": "uniform", "bits": 4, "block_size": 16}


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        net[0].weight += 0.15  # a mean, which some quantizers keep apart
    return net


def compiled(rewrite: Any, path: str = "**", model: nn.Module | None = None, hf_folder: Path | None = None, **more: Any) -> mm.Compiled:
    spec = {"version": 1, "rules": [{"match": {"path": path}, "force": True, "rewrite": rewrite}], **more}
    return mm.compile(model or network(), spec, (X,), ({0: "batch"},), hf_folder=hf_folder)


def trained(found: mm.Compiled, seed: int = 1) -> dict[str, torch.Tensor]:
    """Numbers for every factor."""
    g = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in found.module.named_parameters()}
    return {name: 0.2 * torch.randn(shapes[name], generator=g) for adapter in found.adapters for name in adapter.consts.values()}


def weights(found: mm.Compiled) -> dict[str, np.ndarray]:
    return {const.path: const.load().double().numpy() for const in found.graph.state}


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())
