"""One line per rule of differentiation: a function of x [batch, seq, 6] and the shapes of its parameters."""

from __future__ import annotations

import torch
from differentiating import WIDTH
from torch import Tensor
from torch.nn import functional

SHAPES = ((3, 4), (1, 7))
P, W, SQUARE, B = (WIDTH,), (5, WIDTH), (WIDTH, WIDTH), (5,)


def heads(x: Tensor) -> Tensor:
    """[batch, 2, seq, 3]"""
    return x.unflatten(-1, (2, 3)).transpose(1, 2)


def attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor, **how: object) -> Tensor:
    projected = (heads(functional.linear(x, weight)) for weight in (q, k, v))
    return functional.scaled_dot_product_attention(*projected, **how).transpose(1, 2).flatten(2)


def few_keys(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Four heads of queries on two of keys and values."""
    query = functional.linear(x, q).unflatten(-1, (4, 3)).transpose(1, 2)
    key, value = (heads(functional.linear(x, weight)) for weight in (k, v))
    return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2).flatten(2)


def visible(x: Tensor) -> Tensor:
    """[batch, 1, seq, seq]: some places hidden, and everything from the second row of each example."""
    seen = (x[..., 0] > -1).unsqueeze(1) & (x[..., 1] > -1).unsqueeze(2)
    first = torch.arange(x.shape[1]) != 1
    return (seen & first.unsqueeze(-1)).unsqueeze(1)


def forbidden(x: Tensor) -> Tensor:
    """The same as numbers, -inf where nothing is seen, finite and differing elsewhere."""
    return torch.where(visible(x), x[..., 2].unsqueeze(1).unsqueeze(1), -torch.inf)


def image(x: Tensor, height: int = 6) -> Tensor:
    """[batch, 4, height, 6] of any sequence length."""
    return x.mean(1, keepdim=True).unsqueeze(1) * torch.linspace(-1, 1, 4 * height, dtype=x.dtype).view(4, height, 1)


def normal(x: Tensor, p: Tensor, b: Tensor) -> Tensor:
    mean, variance = torch.linspace(-1, 1, WIDTH, dtype=x.dtype), torch.linspace(0.5, 2, WIDTH, dtype=x.dtype)
    return functional.batch_norm((x * p).flatten(0, 1), mean, variance, p, b, eps=1e-3)


CASES = {
    "add": (lambda x, p: x + p, P),
    "sub alpha": (lambda x, p: torch.sub(x, p, alpha=3) + torch.add(p, x, alpha=2) * p, P),
    "rsub": (lambda x, p: 2 - (1 - x * p) * p, P),
    "mul": (lambda x, p, q: (x * p) * q, P, (1, 1)),
    "div": (lambda x, p, q: p / (2 + x * x) + (x * p) / (q * q + 1), P, P),
    "square": (lambda x, p: (x * p) ** 2, P),
    "powers": (lambda x, p: (x * p).abs() ** 3 + (p * p) ** 1.5 + x, P),
    "neg abs": (lambda x, p: -(x * p).abs(), P),
    "exp log": (lambda x, p: torch.exp(x * p) + torch.log(p * p + 1), P),
    "roots": (lambda x, p: torch.sqrt(p * p + 1) * x + torch.rsqrt((x * p) ** 2 + 1) + torch.reciprocal(p * p + x * x), P),
    "sin cos": (lambda x, p: torch.sin(x * p) + torch.cos(p) * x, P),
    "tanh sigmoid": (lambda x, p: torch.tanh(x * p) + torch.sigmoid(x * p), P),
    "relu": (lambda x, p: torch.relu(x * p) + x, P),
    "gelu": (lambda x, p: functional.gelu(3 * x * p), P),
    "gelu tanh": (lambda x, p: functional.gelu(3 * x * p, approximate="tanh"), P),
    "silu": (lambda x, p: functional.silu(3 * x * p), P),
    "clamp": (lambda x, p: (x * p).clamp(-0.5, 0.7) + (x * p).clamp(min=0.1) + (x * p).clamp(max=0.2), P),
    "where": (lambda x, p, q: torch.where(x > 0, x * p, q) + torch.where(x > 1, p, 2.0), P, P),
    "masked fill": (lambda x, p: (x * p).masked_fill(x > 0, 0.25), P),
    "signs": (lambda x, p: torch.sign(x * p) * p + torch.floor(x * p) + (x * p).detach(), P),
    "softmax": (lambda x, p: torch.softmax(3 * x * p, -1), P),
    "softmax over seq": (lambda x, p: torch.softmax(3 * x * p, 1), P),
    "log softmax": (lambda x, p: torch.log_softmax(3 * x * p, -1), P),
    "layer norm": (lambda x, p, w, b: functional.layer_norm(x * p, P, w, b, 1e-3), P, P, P),
    "layer norm plain": (lambda x, p: functional.layer_norm(x * p, P), P),
    "batch norm": (normal, P, P),
    "rms norm": (lambda x, p, w: functional.rms_norm(x * p, P, w, 1e-3), P, P),
    "linear": (lambda x, w, b: functional.linear(torch.tanh(functional.linear(x, w, b)), w.t().contiguous()), W, B),
    "linear rows": (lambda x, w, b: functional.linear(x.sum(1), w, b), W, B),
    "linear of a vector": (lambda x, w, p: functional.linear(p, w) * x.sum(), W, P),
    "shared linear": (lambda x, w: functional.linear(functional.linear(x, w) + x, w), SQUARE),
    "matmul": (lambda x, w, u: (x @ w) @ u + x @ w, SQUARE, SQUARE),
    "matmul by vectors": (lambda x, w, p: (x @ w) @ p + (p @ w) @ p + x.sum(-1), SQUARE, P),
    "batched matmul": (lambda x, w: (x @ w) @ x.transpose(1, 2) @ (x * w[0]), SQUARE),
    "broadcast matmul": (lambda x, w: w @ x.transpose(1, 2), SQUARE),
    "addmm": (lambda x, w, b: torch.addmm(b, x.sum(1), w, beta=0.5, alpha=2), SQUARE, P),
    "layout": (lambda x, p: (x * p).reshape(-1, 2, 3).permute(2, 0, 1).transpose(0, 2).flatten() * p[0], P),
    "squeeze": (lambda x, p: (x * p).unsqueeze(1).squeeze(1) + p.unsqueeze(0).unsqueeze(0).squeeze(), P),
    "expand": (lambda x, p: (x * p).unsqueeze(2).expand(-1, -1, 3, -1) * p.expand(3, WIDTH), P),
    "slices": (lambda x, p: torch.cat([(x * p)[:, 1:], (x * p)[:, :1]], 1) * (x * p)[..., 1:2] + (x * p)[..., -2:-1] + p[-1:], P),
    "strided slice": (lambda x, p: (x * p)[..., ::2] * (p * p)[1::2], P),
    "select": (lambda x, p: (x * p)[:, 0] * p[2] + (x * p)[:, -1], P),
    "gather one": (lambda x, p: (x * p).gather(-1, (x[..., :1] > 0).long()), P),
    "gather several": (lambda x, p: (x * p).gather(-1, (x > 0).long()), P),
    "sums": (lambda x, p: (x * p).sum(1) * p + (x * p).sum() + (x * p).sum((0, 1)) + (x * p).sum(-1, keepdim=True).sum(1), P),
    "means": (lambda x, p: (x * p).mean(1, keepdim=True) + (x * p).mean() + (x * p).mean((0, 2)).sum() * p, P),
    "constant along an axis": (lambda x, p: (x.mean(-1, keepdim=True) * p[0] + p).mean((1, 2)), P),
    "cat": (lambda x, p: torch.cat([x * p, x, (x * p)[..., :2]], -1) * p[0], P),
    "cat over seq": (lambda x, p: torch.cat([x * p, x, p.expand(x.shape[0], 2, WIDTH)], 1) * p, P),
    "stack": (lambda x, p: torch.stack([x * p, x, -x * p], 2) * p, P),
    "split": (lambda x, p: (x * p).split(2, -1)[1] * (x * p).split([1, 2, 3], -1)[1] + (x * p).chunk(3, -1)[0], P),
    "unbind": (lambda x, p: (x * p).unflatten(-1, (2, 3)).unbind(2)[1] * p[:3], P),
    "embedding": (lambda x, w: functional.embedding((x[..., 0] > 0).long() + (x[..., 1] > 0), w), W),
    "embedding padded": (lambda x, w: functional.embedding((x[..., 0] > 0).long(), w, padding_idx=0) + w.sum(), W),
    "conv": (lambda x, w, b: functional.conv2d(functional.conv2d(image(x), w, b, padding=1), w, b), (4, 4, 3, 3), (4,)),
    "conv strided": (lambda x, w, v: functional.conv2d(functional.conv2d(image(x), v), w, stride=2, padding=1), (5, 4, 3, 3), (4, 4, 1, 1)),
    "conv dilated": (
        lambda x, w, v: functional.conv2d(functional.conv2d(image(x), v), w, dilation=2, padding="same"),
        (5, 4, 3, 3),
        (4, 4, 1, 1),
    ),
    "conv patches": (lambda x, w, v: functional.conv2d(functional.conv2d(image(x, 7), v), w, stride=(3, 2)), (5, 4, 3, 2), (4, 4, 1, 1)),
    "conv groups": (
        lambda x, w, v: functional.conv2d(functional.conv2d(image(x), v), w, stride=2, padding=1, groups=2),
        (6, 2, 3, 3),
        (4, 4, 1, 1),
    ),
    "conv1d over seq": (
        lambda x, w, v: functional.conv1d(functional.conv1d(x.mT, v, padding=1), w, padding=1, groups=3),
        (6, 2, 3),
        (6, 6, 3),
    ),
    "attention": (attention, SQUARE, SQUARE, SQUARE),
    "attention scaled": (lambda x, *w: attention(x, *w, scale=0.3), SQUARE, SQUARE, SQUARE),
    "attention causal": (lambda x, *w: attention(x, *w, is_causal=True), SQUARE, SQUARE, SQUARE),
    "attention masked": (lambda x, *w: attention(x, *w, attn_mask=visible(x)), SQUARE, SQUARE, SQUARE),
    "attention biased": (
        lambda x, b, *w: attention(x, *w, attn_mask=b * x[..., 0].unsqueeze(1).unsqueeze(1)),
        (2, 1, 1),
        SQUARE,
        SQUARE,
        SQUARE,
    ),
    "attention forbidden": (lambda x, b, *w: attention(x, *w, attn_mask=b + forbidden(x)), (2, 1, 1), SQUARE, SQUARE, SQUARE),
    "attention causal masked": (lambda x, *w: attention(x, *w, attn_mask=visible(x), is_causal=True), SQUARE, SQUARE, SQUARE),
    "attention causal forbidden": (lambda x, *w: attention(x, *w, attn_mask=forbidden(x), is_causal=True), SQUARE, SQUARE, SQUARE),
    "attention few keys": (few_keys, (12, WIDTH), SQUARE, SQUARE),
    # no rule of their own
    "einsum": (lambda x, w: torch.einsum("bsi,oi->bos", x, w), W),
    "index": (lambda x, w: w[(x[..., 0] > 0).long()] + (x @ w.t())[:, torch.tensor([0, 0])].sum(1, keepdim=True)[..., :1], W),
    "maximum": (lambda x, p: torch.maximum(x * p, x.mean(1, keepdim=True)) + torch.minimum(x, p), P),
    "largest": (lambda x, p: (x * p).amax(-1) + (x * p).max(-1).values + torch.logsumexp(x * p, -1), P),
    "cumsum": (lambda x, p: torch.cumsum(x * p, 1), P),
    "activations": (lambda x, p: functional.softplus(x * p) + functional.leaky_relu(x * p) + functional.elu(x * p), P),
    "hard activations": (lambda x, p: functional.hardswish(3 * x * p) + functional.hardsigmoid(3 * x * p) + functional.relu6(9 * x * p), P),
    "glu": (lambda x, p: functional.glu(x * p) + functional.mish(x * p)[..., :3], P),
    "group norm": (lambda x, p, w: functional.group_norm((x * p).transpose(1, 2), 3, w), P, P),
    "spread": (lambda x, p: (x * p).var(-1) + (x * p).std(-1) + torch.linalg.vector_norm(x * p, dim=-1), P),
    "normalize": (lambda x, p: functional.normalize(x * p, dim=-1), P),
    "erf": (lambda x, p: torch.erf(x * p) + torch.lerp(x, x * p, 0.3), P),
    "flip": (lambda x, p: (x * p).flip(-1) + torch.roll(x * p, 1, -1) + (x * p).repeat(1, 1, 2)[..., 3:9], P),
    "max pool": (lambda x, p: functional.max_pool2d(image(x) * p, 2) + functional.max_pool2d(image(x) * p, 3, 2, 1), P),
    "average pool": (lambda x, p: functional.avg_pool2d(image(x) * p, 2) + functional.avg_pool2d(image(x) * p, 3, 2, 1), P),
}
