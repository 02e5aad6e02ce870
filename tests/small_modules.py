"""Modules from torch's own parts, for the zoo and for tests of single forms."""

from __future__ import annotations

import torch
from torch import nn


class Cnn(nn.Module):
    """A 3x3 stem, an inverted bottleneck of 1x1 convolutions round a depthwise one, a ConvNeXt-like block, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.reduce = nn.Conv2d(12, 20, 1)
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.project = nn.Conv2d(20, 12, 1, bias=False)
        self.down = nn.Conv2d(12, 16, 1, stride=2)  # strided: a matmul of every second pixel
        self.mix = nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.expand = nn.Conv2d(16, 40, 1)
        self.shrink = nn.Conv2d(40, 16, 1)
        self.classifier = nn.Linear(16, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.project(torch.relu(self.depthwise(torch.relu(self.reduce(x)))))
        x = self.down(x)
        x = x + self.shrink(nn.functional.gelu(self.expand(self.mix(x))))
        return self.classifier(x.mean((2, 3)))


class SelfAttention(nn.Module):
    """`weights`: ask for the attention weights, which takes the path without the fused kernel."""

    def __init__(self, width: int, heads: int, weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.weights = weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


class CrossAttention(nn.Module):
    """Keys and values from one tensor (`joint`) or from two."""

    def __init__(self, width: int, heads: int, joint: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.joint = joint

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.attention(x, memory, memory if self.joint else memory * 2, need_weights=False)[0]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 28), nn.ReLU(), nn.Linear(28, 20), nn.GELU(), nn.Linear(20, 9))


def encoder(width: int, heads: int, inner: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, inner, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
