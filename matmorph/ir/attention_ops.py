"""Attention over a key/value cache as one operator: two operators of the torch library `matmorph`, registered when this module is imported.

| operator            | cache                                          | what a token sees                                         |
|---------------------|------------------------------------------------|-----------------------------------------------------------|
| `cached_attention`  | the past, then the new tokens                  | what a mask says of each pair                             |
| `compact_attention` | each row's tokens without gaps, zeros behind   | its row's tokens up to itself, or the last `window` of them |

Both give y and the cache with the new tokens in it. The second is what com.microsoft.GroupQueryAttention computes (its documentation, and
ONNX Runtime 1.31's CPU kernel): `last` is the place of each row's last token, so a row may be shorter than its batch, but pads lie behind
its tokens alone. What it gives for a pad is not defined there, and here it is what the formula gives. No gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

_LIBRARY = torch.ops.matmorph
CACHED, COMPACT = "matmorph.cached_attention.default", "matmorph.compact_attention.default"
FUSED_SLOTS = ((1, 3, 1), (2, 4, 2))
"""Of both operators, for keys and for values: where the new ones and the past are among the arguments, the present among the results."""

Attended = tuple[Tensor, Tensor, Tensor]


def attended(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float, softcap: float = 0.0, sink: Tensor | None = None
) -> Tensor:
    """The definition: softmax(cap(scale q k')) v over the allowed keys, a logit `sink` [N] per head beside them; [B, N, S, E].

    query [B, N, S, D]; key [B, M, T, D], value [B, M, T, E] with N a multiple of M: a head of them for N / M neighbouring queries; allowed
    bool, broadcast to [B, N, S, T]; cap(x) = softcap tanh(x / softcap), or x where softcap is 0. A row that sees nothing is 0.
    """
    groups = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(groups, 1).transpose(-1, -2)) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~allowed, -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.view(1, -1, 1, 1).to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
    weights = torch.nan_to_num(torch.softmax(scores, -1))[..., : key.shape[2]]
    return weights @ value.repeat_interleave(groups, 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, N, S, D] with its first 2 R numbers turned in pairs by angles given as cos and sin [B, S, R]: the pairs are (k, k + R), or
    neighbours where `interleaved`. The rest of a head stays (Su et al., RoFormer, 2021)."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = a * cos - b * sin, b * cos + a * sin
    return torch.cat([torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1), rest], -1)


def _cached(query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor, scale: float) -> Attended:
    """query [B, N, S, D], key and value [B, M, S, D], the past [B, M, P, D]; mask bool, broadcast to [B, N, S, P + S]."""
    keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    return attended(query, keys, values, mask, scale), keys, values


def _cached_types(query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor, scale: float) -> Attended:
    presents = [_longer(past, new.shape[2]) for past, new in ((past_key, key), (past_value, value))]
    return query.new_empty((*query.shape[:3], value.shape[3])), presents[0], presents[1]


def _compact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    last: Tensor,
    mask: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    sink: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
) -> Attended:
    """query [B, S, N*D], key and value [B, S, M*D], the past [B, M, P, D], of which row b holds last[b] + 1 - S tokens (none where the
    mask, [B, total], says that there is nothing but S tokens); last int32 [B]. cos, sin: tables [tokens, R] for `rotated`, by the place of
    a token in its row. window: 0 for all. y [B, S, N*D]."""
    size, length = past_key.shape[3], query.shape[1]
    q, k, v = (x.reshape(*x.shape[:-1], -1, size).transpose(1, 2) for x in (query, key, value))
    total = mask.shape[1]
    start = torch.zeros_like(last) if total == length else last + 1 - length
    places = start.long()[:, None] + torch.arange(length, device=query.device)
    if cos is not None and sin is not None:
        at = places.clamp(0, len(cos) - 1)  # beyond the table there are pads alone
        q, k = (rotated(x, cos[at], sin[at], interleaved) for x in (q, k))
    keys, values = (_inserted(past, new, places, max(past.shape[2], total)) for past, new in ((past_key, k), (past_value, v)))
    columns = torch.arange(keys.shape[2], device=query.device)
    allowed = columns <= places[..., None]
    if window:
        allowed = allowed & (columns > places[..., None] - window)
    y = attended(q, keys, values, allowed[:, None], scale, softcap, sink)
    return y.transpose(1, 2).flatten(2), keys, values


def _inserted(past: Tensor, new: Tensor, places: Tensor, tokens: int) -> Tensor:
    """[B, M, tokens, D]: what stands before the first new token, the new ones at their places, zeros behind."""
    kept = past * (torch.arange(past.shape[2], device=past.device) < places[:, :1])[:, None, :, None]
    whole = torch.cat([kept, past.new_zeros(*past.shape[:2], tokens - past.shape[2], past.shape[3])], 2)
    return whole.scatter(2, places[:, None, :, None].expand_as(new), new)


def _compact_types(query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *rest: Any, **named: Any) -> Attended:
    return torch.empty_like(query), _longer(past_key, key.shape[1]), _longer(past_value, value.shape[1])


def _longer(past: Tensor, by: int) -> Tensor:
    return past.new_empty((*past.shape[:2], past.shape[2] + by, past.shape[3]))


def _register() -> None:
    """Once per process: replacing an operator would leave those who hold it with a dangling one."""
    for name, kernel, fake in (("cached_attention", _cached, _cached_types), ("compact_attention", _compact, _compact_types)):
        if not hasattr(_LIBRARY, name):
            custom_op(f"matmorph::{name}", kernel, mutates_args=()).register_fake(fake)


_register()
