"""Small float models whose matmuls have every form that an update of one matrix meets, and the shapes of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Attention(nn.Module):
    """Three slices of one weight, and a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8, bias=False)

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return self.last(self.attention(query, key, key, need_weights=False)[0])


class Products(nn.Module):
    """addmm and mm with [in, out] weights, the first weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(12))
        self.second = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, torch.addmm(self.bias, x, self.first).relu() @ self.second, self.first)


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 10, 1), nn.ReLU(), nn.Conv2d(10, 4, 1, bias=False))


FORMS: Mapping[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "slices": (Attention, ((3, 5, 8), (3, 5, 8))),
    "[in, out]": (Products, ((7, 8),)),
    "convolution": (convolutions, ((3, 6, 4, 4),)),
}
