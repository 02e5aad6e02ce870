"""Mutants of what is proved of attention over a cache, and of its operator: each plants one plausible mistake, and a graph whose meaning is
known by its construction must show it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from mutating import Mutant, killer, mutated, real_code, unmutated
from torch import Tensor, nn

import matmorph as mm
from matmorph.ir.attention_ops import COMPACT
from matmorph.ir.core import Graph, Node, Value, mapped_arguments
from matmorph.ir.evaluate import evaluate, run_node

HEADS, FEW, SIZE, WINDOW, PLACES = 2, 1, 16, 3, 32
GQA = "gqa"

MUTANTS = {
    "any window will do": Mutant(
        "mask_proof._agrees", "bool((seen.expand(size[0], -1, size[1], tokens.shape[1]) == wanted).all(-1).all(1)[real].all())", "True"
    ),
    "the window is one too wide": Mutant("mask_proof.expected", "rows - window", "rows - window - 1"),
    "no size near the window": Mutant("mask_proof.proved_window", "_around(numbers)", "()"),
    "the table is off by one place": Mutant("rotary_proof._table", "torch.arange(count)[None]", "torch.arange(count)[None] + 1"),
    "places of one set make a table": Mutant("rotary_proof._table", "_sets(count, random)", "()"),
    "the last token is counted from one": Mutant("_Writer.shared", "self.build('aten.sub.Tensor', tokens, 1)", "tokens"),
    "a cap is not looked for": Mutant("core_proof.proved_formula", "number > 0.001", "number > 1e9"),
    "the operator forgets its window": Mutant("attention_ops._compact", "places[..., None] - window", "places[..., None] - window - 1"),
    "new tokens behind the gap": Mutant(
        "attention_ops._compact",
        "torch.zeros_like(last) if total == length else last + 1 - length",
        "torch.zeros_like(last) + total - length",
    ),
}


class Decoder(nn.Module):
    """One attention over a cache. `relative`: its angles depend on the largest place."""

    def __init__(self, window: int = WINDOW, cap: float = 0.0, relative: bool = False) -> None:
        super().__init__()
        self.window, self.cap, self.relative = window, cap, relative
        self.q, self.kv = nn.Linear(8, HEADS * SIZE, bias=False), nn.Linear(8, 2 * FEW * SIZE, bias=False)

    def turned(self, x: Tensor, places: Tensor) -> Tensor:
        angles = places[..., None].float() * 0.5 ** torch.arange(SIZE // 2)
        if self.relative:
            angles = angles / (1 + places.max() // 8)
        cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angles.cos(), angles.sin()))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, x: Tensor, mask: Tensor, places: Tensor, past: dict[str, Tensor]) -> dict[str, Any]:
        q = self.turned(self.q(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2), places)
        k, v = (part.unflatten(-1, (FEW, SIZE)).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        key, value = torch.cat([past["key"], self.turned(k, places)], 2), torch.cat([past["value"], v], 2)
        columns = torch.arange(mask.shape[1])
        rows = torch.arange(x.shape[1]) + past["key"].shape[2]
        seen = (columns <= rows[:, None]) & (columns > rows[:, None] - self.window) if self.window else columns <= rows[:, None]
        seen = seen & (mask[:, None, None] > 0)
        scores = q @ key.expand(-1, HEADS, -1, -1).transpose(2, 3) * SIZE**-0.5
        scores = torch.tanh(scores / self.cap) * self.cap if self.cap else scores
        weights = torch.softmax(scores + torch.where(seen, 0.0, torch.finfo(torch.float32).min), -1)
        y = (weights @ value.expand(-1, HEADS, -1, -1)).transpose(1, 2).flatten(2)
        return {"y": y, "present": {"key": key, "value": value}}


def call(rows: int, length: int, past: int, mask: Tensor | None = None) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, past + length, dtype=torch.int64) if mask is None else mask
    pair = {part: torch.randn(rows, FEW, past, SIZE, generator=random) for part in ("key", "value")}
    places = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
    return {"x": torch.randn(rows, length, 8, generator=random), "mask": mask, "places": places.contiguous(), "past": pair}


@cache
def graph_of(**how: Any) -> Graph:
    before = {0: "batch", 2: {"name": "past", "min": 0}}
    axes = {"x": {0: "batch", 1: "new"}, "mask": {0: "batch", 1: "past + new"}, "places": {0: "batch", 1: "new"}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mm.trace(Decoder(**how).eval(), call(2, 3, 5), {**axes, "past": {"key": before, "value": before}})


def flat(inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs["x"], inputs["mask"], inputs["places"], inputs["past"]["key"], inputs["past"]["value"]]


def fused(m: Any, **how: Any) -> Any:
    graph = graph_of(**how)
    return m.fuse_attention(graph, graph, GQA, PLACES)


def answers(m: Any, how: dict[str, Any], inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    before = evaluate(graph_of(**how), flat(inputs))[0]
    return before, evaluate(fused(m, **how).graph, flat(inputs), run=partial(ours, m))[0]


def ours(m: Any, node: Node, read: Callable[[Value], Any]) -> tuple[Any, ...]:
    """The operator as it is written here: torch holds the one that was registered first."""
    if node.op != COMPACT:
        return run_node(node, read)
    args, _ = mapped_arguments(node, read)
    found: tuple[Any, ...] = m["attention_ops._compact"](*args)
    return found


def check_what_is_proved(m: Any) -> None:
    said = [outcome.said for outcome in fused(m).outcomes]
    assert said == [f"as one GroupQueryAttention, window {WINDOW}, rotation inside"]
    assert fused(m, window=0, cap=2.0).outcomes[0].said == "as one GroupQueryAttention, scores capped at 2, rotation inside"
    assert fused(m, window=40).outcomes[0].said == "as one GroupQueryAttention, window 40, rotation inside"


def check_angles_that_depend_on_other_places(m: Any) -> None:
    assert fused(m, relative=True).outcomes[0].said.endswith("rotation outside: the angles of a place depend on other places too")


def check_answers(m: Any) -> None:
    """Roundings of float32 in sums of some tens of numbers about 1."""
    for rows, length, past in ((1, 3, 6), (2, 6, 0), (2, 1, 7)):
        before, after = answers(m, {}, call(rows, length, past))
        assert (before - after).abs().max() <= 2e-6


def check_rows_of_different_length(m: Any) -> None:
    """One new token, the second row's past shorter by a gap: without a window it does not see the gap in either graph."""
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 4:7] = 0
    before, after = answers(m, {"window": 0}, call(2, 1, 7, mask))
    assert (before - after).abs().max() <= 2e-6


CHECKS: tuple[Callable[[Any], None], ...] = (
    check_what_is_proved,
    check_angles_that_depend_on_other_places,
    check_answers,
    check_rows_of_different_length,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_proofs(check: Callable[[Any], None]) -> None:
    check(real_code())


@pytest.mark.full
def test_the_checks_pass_on_the_code_as_it_is() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mistake_is_seen(mutant: Mutant) -> None:
    assert killer(mutated(mutant), CHECKS), "no check noticed"
