"""Small modules with what the main families of vision, speech and sequence models are made of, each with an example input.

`PARAMETERS` names what a module multiplies with by itself; what its parts multiply with is read off their classes (`product_parameters`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch._higher_order_ops.map import map as mapped
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from torch.nn.utils import parametrizations, prune

PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention)


def product_parameters(module: nn.Module) -> set[str]:
    """First names of all parameters of two or more axes of modules that multiply, those that their weights are computed from included."""
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    kinds = [child for child in module.modules() if isinstance(child, PRODUCTS) or type(child).__name__ == "Conv1D"]
    return {first[id(parameter)] for child in kinds for parameter in child.parameters() if parameter.dim() > 1}


class Bottleneck(nn.Module):
    """ResNet: a shortcut through a strided 1x1 convolution, groups as ResNeXt has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8)
        self.a, self.b, self.c = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.Conv2d(4, 16, 1)
        self.shortcut, self.fc = nn.Conv2d(8, 16, 1, stride=2), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(self.shortcut(x) + self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.fc(x.mean((2, 3)))


class Inverted(nn.Module):
    """MobileNet and EfficientNet: depthwise between two 1x1 convolutions, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.depth, self.narrow = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 3, 1)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.depth(F.silu(self.widen(x))))
        h = h * torch.sigmoid(self.excite(F.silu(self.squeeze(h.mean((2, 3), keepdim=True)))))
        return x + self.narrow(h)


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.depth, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
        self.a, self.b, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x)
        h = self.b(F.gelu(self.a(self.norm(self.depth(x).permute(0, 2, 3, 1)))))
        return x + (self.scale * h).permute(0, 3, 1, 2)


class Windows(nn.Module):
    """Swin: attention in windows with a table of relative positions, and patches merged."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv, self.proj = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 24), nn.Linear(8, 8)
        self.table, self.merge = nn.Parameter(torch.randn(9, 2)), nn.Linear(32, 16, bias=False)
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None]).permute(1, 2, 0) + 1
        self.register_buffer("index", apart[..., 0] * 3 + apart[..., 1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        windows = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(windows).view(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(4, 4, 2).permute(2, 0, 1)
        mixed = (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        return self.merge(self.proj(mixed.transpose(1, 2).reshape(-1, 4, c)).flatten(1))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token, self.places = (
            nn.Conv2d(3, 8, 4, stride=4),
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(1, 10, 8)),
        )
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.layer(x)[:, 0])


class Mixer(nn.Module):
    """MLP-Mixer: one MLP across tokens, one across channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.a, self.b, self.c, self.d = nn.Linear(9, 6), nn.Linear(6, 9), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.b(F.gelu(self.a(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        return x + self.d(F.gelu(self.c(self.norm(x))))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], **settings: object) -> None:
        super().__init__()
        self.rnn = kind(8, 6, batch_first=True, **settings)
        self.fc = nn.Linear(12 if settings else 6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.rnn(x)[0])


class Cells(nn.Module):
    """Three steps, each with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.plain = nn.LSTMCell(8, 6), nn.GRUCell(6, 6), nn.RNNCell(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, c = x.new_zeros(x.shape[0], 6), x.new_zeros(x.shape[0], 6)
        for k in range(3):
            h, c = self.lstm(x[:, k], (h, c))
        return self.plain(self.gru(h, c))


class Latents(nn.Module):
    """Perceiver and DETR: learned queries, raw and through a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.queries = nn.Parameter(torch.randn(1, 2, 3, 4)), nn.Parameter(torch.randn(3, 8))
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, v = self.kv(x).view(x.shape[0], -1, 2, 8).permute(0, 2, 1, 3).chunk(2, -1)
        q = self.q(F.layer_norm(self.queries, (8,))).view(1, 3, 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q + 0 * x.sum(), k, v) + F.scaled_dot_product_attention(
            self.raw.expand(x.shape[0], -1, -1, -1), k, v
        )


class Bodies(nn.Module):
    """Products inside the sub-graphs of higher-order operators."""

    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no, self.each = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cond(x.sum() > 0, lambda t: t @ self.yes, lambda t: t @ (self.no * 2.0), (x,))
        return mapped(lambda row, w: row @ w, x, self.each)


class Odd(nn.Module):
    """Products in forms that are not rows times a matrix, and a kernel that spreads its input."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.spread = nn.Bilinear(8, 8, 4), nn.ConvTranspose1d(4, 6, 2, stride=2)
        self.first, self.second, self.outer = (nn.Parameter(torch.randn(s)) for s in ((6, 3), (3, 7), (2, 5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.spread(self.bilinear(x, x).transpose(1, 2)).transpose(1, 2)
        h = torch.linalg.multi_dot([h[:, 0], self.first, self.second])
        return torch.einsum("b,oi->boi", h.sum(1), self.outer)


class Behind(nn.Module):
    """Weights that are computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.spectral = parametrizations.weight_norm(nn.Linear(8, 6)), parametrizations.spectral_norm(nn.Linear(6, 6))
        self.turn = parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="cayley")
        self.mask = prune.l1_unstructured(nn.Linear(6, 8), "weight", 0.5)
        self.kernel = parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
        self.scaled, self.unit, self.twice = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))
        self.flat, self.signs, self.maker = nn.Parameter(torch.randn(96)), nn.Parameter(torch.randn(1, 5)), nn.Linear(5, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mask(self.turn(self.spectral(self.norm(x))))
        x = self.kernel(x.transpose(1, 2)).transpose(1, 2)
        x = F.linear(F.linear(x, self.scaled * 0.1), F.normalize(self.unit))
        x = F.linear(x, torch.cat([self.twice, self.twice[:4]]))
        return F.linear(F.linear(x, self.flat.view(8, 12)), self.maker(self.signs).view(8, 8))


def picture() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def series() -> torch.Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


FAMILIES: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "resnet": (Bottleneck, picture),
    "efficientnet": (Inverted, picture),
    "convnext": (ConvNext, picture),
    "swin": (Windows, picture),
    "vit": (Vit, picture),
    "mixer": (Mixer, picture),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), series),
    "gru": (lambda: Recurrent(nn.GRU), series),
    "rnn": (lambda: Recurrent(nn.RNN), series),
    "cells": (Cells, series),
    "latents": (Latents, series),
    "bodies": (Bodies, series),
    "odd": (Odd, series),
    "behind": (Behind, series),
    "compiled": (lambda: torch.compile(nn.DataParallel(Vit()), backend="eager"), picture),  # type: ignore[arg-type, return-value]
}

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "latents": ("raw", "queries"),
    "bodies": ("yes", "no", "each"),
    "odd": ("first", "second", "outer"),
    "behind": ("scaled", "unit", "twice", "signs", "flat"),
}
