"""Roles by dataflow on small hand-made modules: each case is one rule, or one thing that must not be taken for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace

WIDTH, HEADS, INNER = 8, 2, 12
Step = Callable[..., torch.Tensor]


class Net(nn.Module):
    """A module of named linears, the forward of which is a function of itself and its inputs."""

    def __init__(self, forward: Step, **linears: tuple[int, int]) -> None:
        super().__init__()
        for name, (inner, out) in linears.items():
            self.add_module(name, nn.Linear(inner, out))
        self.step = forward

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.step(self, *inputs)


def roles(net: nn.Module, *inputs: torch.Tensor) -> dict[str, str]:
    return {site.path: site.role for site in find_sites(trace(net, inputs)) if not site.listed}


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 5, WIDTH)), generator=torch.Generator().manual_seed(0))


SQUARE = (WIDTH, WIDTH)
QKVO = dict.fromkeys("qkvo", SQUARE)


def heads(t: torch.Tensor) -> torch.Tensor:
    return t.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def joined(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2).flatten(2)


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return joined(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = heads(q) @ heads(k).transpose(-1, -2) / 2.0
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -1e4)
    return joined(F.dropout(scores.softmax(-1), 0.1, training=False) @ heads(v))


def by_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", heads(q), heads(k)).float().softmax(-1)
    return joined(torch.einsum("bhqk,bhkd->bhqd", weights, heads(v)))


def softcapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.tanh(heads(q) @ heads(k).mT / 30.0) * 30.0
    return joined(torch.matmul(F.softmax(scores + torch.zeros(5, 5), dim=-1, dtype=torch.float32), heads(v)))


SELF = {"q": "attention.q", "k": "attention.k", "v": "attention.v", "o": "attention.o"}


@pytest.mark.parametrize("attend", [fused, eager, by_einsum, softcapped])
def test_self_attention(attend: Step) -> None:
    net = Net(lambda m, h: h + m.o(attend(m.q(h), m.k(h), m.v(h))), **QKVO)
    assert roles(net, x()) == SELF


def test_positions_added_to_queries_and_keys_are_no_cross_attention() -> None:
    positions = x(1, 5, WIDTH)
    net = Net(lambda m, h: h + m.o(fused(m.q(h + positions), m.k(h + positions), m.v(h))), **QKVO)
    assert roles(net, x()) == SELF


def test_keys_of_a_shrunk_copy_are_no_cross_attention() -> None:
    def step(m: nn.Module, h: torch.Tensor) -> torch.Tensor:
        small = F.layer_norm(F.avg_pool1d(h.transpose(1, 2), 2).transpose(1, 2), (WIDTH,))
        return h + m.o(fused(m.q(h), m.k(small), m.v(small)))

    assert roles(Net(step, **QKVO), x()) == SELF


def test_cross_attention_onto_the_result_of_another_part() -> None:
    """The second attention reads queries from a stream that already depends on the memory."""

    def step(m: nn.Module, h: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        memory = m.enter(memory)
        h = h + m.o(fused(m.q(h), m.k(memory), m.v(memory)))
        return h + m.o2(fused(m.q2(h), m.k2(memory), m.v2(memory)))

    net = Net(step, enter=SQUARE, **QKVO, q2=SQUARE, k2=SQUARE, v2=SQUARE, o2=SQUARE)
    names = {f"{part}{number}": f"cross_attention.{part}" for part in "qkvo" for number in ("", "2")}
    assert roles(net, x(), x(2, 4, WIDTH)) == {"enter": "other", **names}


def test_low_rank_queries_and_keys_are_no_cross_attention() -> None:
    def step(m: nn.Module, h: torch.Tensor) -> torch.Tensor:
        normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        small_q, small_kv = m.qa(normed), m.kva(normed)
        return h + m.o(fused(m.q(small_q), *m.kv(small_kv * 2.0).chunk(2, -1)))

    net = Net(step, qa=(WIDTH, 4), kva=(WIDTH, 4), q=(4, WIDTH), kv=(4, 2 * WIDTH), o=SQUARE)
    assert roles(net, x()) == {"qa": "other", "kva": "other", "q": "attention.q", "kv": "attention.kv", "o": "attention.o"}


def test_fused_projections() -> None:
    def qkv(m: nn.Module, h: torch.Tensor) -> torch.Tensor:
        return h + m.o(fused(*m.qkv(h).chunk(3, -1)))

    def kv(m: nn.Module, h: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return h + m.o(fused(m.q(h), *m.kv(memory).split(WIDTH, -1)))

    assert roles(Net(qkv, qkv=(WIDTH, 3 * WIDTH), o=SQUARE), x()) == {"qkv": "attention.qkv", "o": "attention.o"}
    found = roles(Net(kv, q=SQUARE, kv=(WIDTH, 2 * WIDTH), o=SQUARE), x(), x(2, 4, WIDTH))
    assert found == {"q": "cross_attention.q", "kv": "cross_attention.kv", "o": "cross_attention.o"}


def test_gated_attention_and_norm_before_o() -> None:
    def step(m: nn.Module, h: torch.Tensor) -> torch.Tensor:
        mixed = F.layer_norm(fused(m.q(h), m.k(h), m.v(h)), (WIDTH,))
        return h + m.o(mixed * torch.sigmoid(m.gate(h)))

    assert roles(Net(step, **QKVO, gate=SQUARE), x()) == {**SELF, "gate": "other"}


def test_without_o_the_next_matmul_is_not_o() -> None:
    def step(m: nn.Module, h: torch.Tensor) -> torch.Tensor:
        h = h + fused(m.q(h), m.k(h), m.v(h))
        return h + m.down(F.relu(m.up(h)))

    net = Net(step, q=SQUARE, k=SQUARE, v=SQUARE, up=(WIDTH, INNER), down=(INNER, WIDTH))
    assert roles(net, x()) == {"q": "attention.q", "k": "attention.k", "v": "attention.v", "up": "mlp.fc1", "down": "mlp.fc2"}


def test_parallel_attention_and_mlp() -> None:
    net = Net(
        lambda m, h: h + m.o(fused(m.q(h), m.k(h), m.v(h))) + m.b(F.gelu(m.a(h))),
        **QKVO,
        a=(WIDTH, INNER),
        b=(INNER, WIDTH),
    )
    assert roles(net, x()) == {**SELF, "a": "mlp.fc1", "b": "mlp.fc2"}


def eager_gelu(t: torch.Tensor) -> torch.Tensor:
    return 0.5 * t * (1.0 + torch.tanh(0.8 * (t + 0.044715 * torch.pow(t, 3.0))))


@pytest.mark.parametrize("activation", [F.relu, F.gelu, eager_gelu, lambda t: t * torch.sigmoid(1.7 * t), lambda t: F.relu(t).square()])
def test_mlp(activation: Step) -> None:
    net = Net(lambda m, h: h + m.b(F.dropout(activation(m.a(h)), 0.1, False)), a=(WIDTH, INNER), b=(INNER, WIDTH))
    assert roles(net, x()) == {"a": "mlp.fc1", "b": "mlp.fc2"}


@pytest.mark.parametrize("gate", [F.silu, eager_gelu, F.relu, torch.sigmoid])
def test_gated_mlp(gate: Step) -> None:
    net = Net(lambda m, h: h + m.c(gate(m.a(h)) * m.b(h)), a=(WIDTH, INNER), b=(WIDTH, INNER), c=(INNER, WIDTH))
    assert roles(net, x()) == {"a": "mlp.gate", "b": "mlp.up", "c": "mlp.down"}


def halves(t: torch.Tensor) -> torch.Tensor:
    gate, up = t.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("act", [halves, F.glu, lambda t: F.silu(t[..., ::2]) * t[..., 1::2]])
def test_fused_gate(act: Step) -> None:
    net = Net(lambda m, h: h + m.b(act(m.a(h))), a=(WIDTH, 2 * INNER), b=(INNER, WIDTH))
    assert roles(net, x()) == {"a": "mlp.gate_up", "b": "mlp.down"}


def stack(widths: Sequence[int]) -> nn.Module:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def test_chains() -> None:
    """All but the last of a chain are fc1: each feeds an activation. The last is the head, for nothing comes behind it."""
    assert roles(stack([8, 6, 4]), x(3, 8)) == {"0": "mlp.fc1", "2": "head"}
    assert roles(stack([8, 6, 5, 4]), x(3, 8)) == {"0": "mlp.fc1", "2": "mlp.fc1", "4": "head"}
    assert roles(stack([8, 6]), x(3, 8)) == {"0": "other"}


def test_a_chain_has_a_head_for_each_result() -> None:
    def step(m: nn.Module, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.relu(m.a(h))
        return m.first(F.relu(m.b(h))), m.second(h).softmax(-1)

    net = Net(step, a=SQUARE, b=SQUARE, first=(WIDTH, 3), second=(WIDTH, 4))
    assert roles(net, x()) == {"a": "mlp.fc1", "b": "mlp.fc1", "first": "head", "second": "head"}


def test_a_gated_chain_keeps_its_down() -> None:
    net = Net(lambda m, h: m.c(F.silu(m.a(h)) * m.b(h)), a=(WIDTH, INNER), b=(WIDTH, INNER), c=(INNER, WIDTH))
    assert roles(net, x()) == {"a": "mlp.gate", "b": "mlp.up", "c": "mlp.down"}


def test_everything_after_the_last_block_is_head() -> None:
    """Pooler, and an MLP that is not added back; an MLP between two blocks is none."""

    def step(m: nn.Module, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = h + m.o(fused(m.q(h), m.k(h), m.v(h)))
        h = m.leave(F.gelu(m.enter(h)))
        h = h + m.b(F.relu(m.a(h)))
        return m.score(torch.tanh(m.pool(h[:, 0]))), m.second(h)

    net = Net(step, **QKVO, enter=SQUARE, leave=SQUARE, a=SQUARE, b=SQUARE, pool=SQUARE, score=(WIDTH, 3), second=(WIDTH, 4))
    between = {"enter": "mlp.fc1", "leave": "mlp.fc2", "a": "mlp.fc1", "b": "mlp.fc2"}
    assert roles(net, x()) == {**SELF, **between, "pool": "head", "score": "head", "second": "head"}


def test_last_matmul_without_blocks_is_head() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, WIDTH)
            self.out = nn.Linear(WIDTH, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(ids).mean(1))

    assert roles(Bag(), torch.zeros(2, 3, dtype=torch.int64)) == {"table": "embedding", "out": "head"}
    assert roles(Net(lambda m, h: m.fc(h), fc=SQUARE), x()) == {"fc": "other"}  # comes after nothing: the head of nothing


def test_residual_bottleneck_with_a_spatial_convolution_is_no_mlp() -> None:
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduce, self.mix, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 1)
            self.next = nn.Conv2d(8, 4, 1)

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            h = torch.relu(h + self.expand(torch.relu(self.mix(torch.relu(self.reduce(h))))))
            return torch.relu(self.next(h)) * 2

    assert roles(Bottleneck(), x(2, 8, 5, 5)) == {"reduce": "other", "expand": "other", "next": "head"}


class Experts(nn.Module):
    """Every expert on every row, mixed by a router; gate, up and down are stacks of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.a, self.b = nn.Parameter(torch.randn(3, WIDTH, INNER)), nn.Parameter(torch.randn(3, WIDTH, INNER))
        self.c = nn.Parameter(torch.randn(3, INNER, WIDTH))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        rows = h.flatten(0, 1)
        scores, chosen = self.router(rows).softmax(-1).topk(2, -1)
        mixed = torch.bmm(F.silu(rows.unsqueeze(0) @ self.a) * (rows.unsqueeze(0) @ self.b), self.c)
        weights = torch.zeros(rows.shape[0], 3).scatter(1, chosen, scores)
        return h + torch.einsum("enh,ne->nh", mixed, weights).view(h.shape)


def test_experts_all_at_once() -> None:
    assert roles(Experts(), x()) == {"router": "moe.router", "a": "moe.gate", "b": "moe.up", "c": "moe.down"}


def test_picked_experts_with_biases() -> None:
    """A bias that is picked by the router's numbers does not make the router a source of the hidden value."""

    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(WIDTH, 3)
            self.a, self.bias = nn.Parameter(torch.randn(3, WIDTH, INNER)), nn.Parameter(torch.randn(3, INNER))
            self.b = nn.Parameter(torch.randn(3, INNER // 2, WIDTH))

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            rows = h.flatten(0, 1)
            scores, chosen = self.router(rows).softmax(-1).topk(1, -1)
            ids = chosen.flatten()
            hidden = (rows.unsqueeze(1) @ self.a[ids]).squeeze(1) + self.bias[ids]
            gate, up = hidden[:, ::2], hidden[:, 1::2]
            out = ((up + 1) * (gate * torch.sigmoid(1.7 * gate))).unsqueeze(1) @ self.b[ids]
            return h + (out.squeeze(1) * scores).view(h.shape)

    assert roles(Picked(), x()) == {"router": "moe.router", "a": "moe.gate_up", "b": "moe.down"}


def test_a_residual_that_is_no_known_block_is_no_head() -> None:
    """A depthwise convolution inside an MLP (SegFormer) hides its form, but the stream goes on through it."""

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net(lambda m, h: h + m.o(fused(m.q(h), m.k(h), m.v(h))), **QKVO)
            self.a, self.mix, self.b = nn.Linear(WIDTH, INNER), nn.Conv1d(INNER, INNER, 3, padding=1, groups=INNER), nn.Linear(INNER, WIDTH)
            self.score = nn.Linear(WIDTH, 3)

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            h = self.inner(h)
            h = h + self.b(F.gelu(self.mix(self.a(F.layer_norm(h, (WIDTH,))).mT).mT))
            return self.score(h)

    found = roles(Mix(), x())
    assert found == {f"inner.{name}": role for name, role in SELF.items()} | {"a": "other", "b": "other", "score": "head"}


def test_one_weight_has_one_role() -> None:
    """The second application feeds nothing known: it takes the role of the first."""
    net = Net(lambda m, h: torch.stack([h + m.o(fused(m.q(h), m.k(h), m.v(h))), m.q(h.flip(0))]), **QKVO)
    assert roles(net, x()) == SELF


def test_learned_query_pools() -> None:
    query = x(2, 1, WIDTH)
    net = Net(lambda m, h: m.o(fused(query, m.k(h), m.v(h))), k=SQUARE, v=SQUARE, o=SQUARE)
    assert roles(net, x()) == {"k": "attention.k", "v": "attention.v", "o": "attention.o"}
