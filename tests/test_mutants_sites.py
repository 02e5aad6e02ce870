"""Mutants of how computed weights and stacks are found: each plants one plausible mistake, and the checks below must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from mutating import Mutant, killer, mutated, unmutated
from test_sites import COMPUTED, LISTED, SHARED, graph_of

from matmorph.ir.evaluate import evaluate

RANDOM = """input %x: float32[batch, 8] "x"
    parameter %w: float32[4, 8] "w"
    %r: float32[4, 8] = aten.rand_like.default(%w)
    %n: float32[4, 8] = aten.add.Tensor(%w, %r)
    %y: float32[batch, 4] = aten.linear.default(%x, %n)
    output %y "y" """

CROSSED = """input %x: float32[batch, 8] "x"
    input %t: float32[batch, 8] "t"
    parameter %a: float32[8, 8] "a"
    parameter %q: float32[8, 8] "q"
    parameter %k: float32[8, 8] "k"
    %m: float32[batch, 8] = aten.linear.default(%x, %a) @":N/left.0:L" layer=0
    %n: float32[batch, 8] = aten.linear.default(%t, %q) @":N/right.0:L" layer=0
    %o: float32[batch, 8] = aten.linear.default(%m, %k) @":N/right.0:L" layer=0
    %n1: float32[batch, 1, 1, 8] = aten.view.default(%n, [3, 1, 1, 8])
    %o1: float32[batch, 1, 1, 8] = aten.view.default(%o, [3, 1, 1, 8])
    %y: float32[batch, 1, 1, 8] = aten.scaled_dot_product_attention.default(%n1, %o1, %o1)
    output %y "y" """


LEARNED = """parameter %q: float32[3, 8] "queries"
    parameter %w: float32[4, 8] "fc.weight"
    input %x: float32[batch, 4] "x"
    %p: float32[3, 4] = aten.linear.default(%q, %w)
    %t: float32[4, 3] = aten.t.default(%p)
    %y: float32[batch, 3] = aten.matmul.default(%x, %t)
    output %y "y" """


def found(m: Any, body: str) -> tuple[Any, Any]:
    graph, _ = graph_of(body)
    return graph, m["matmuls.find_sites"](graph)


def computed(m: Any) -> None:
    for body, expected in COMPUTED.values():
        graph, sites = found(m, body)
        assert [f"{s.path} {len(s.applications)} {' '.join(p.path for p in s.parts)}" for s in sites] == [
            f"{line.split()[0]} {line.split()[4]} {line.partition('= ')[2]}" for line in expected
        ]
        assert [s.blocked for s in sites] == [None] * len(sites)
        inputs = [torch.zeros([3 if not isinstance(d, int) else d for d in value.tensor.shape]) for value in graph.inputs]
        for s in sites:
            made = evaluate(replace(graph, outputs=s.roots), inputs)
            assert made
            assert all(torch.equal(s.const.load(), one) for one in made)


def shared(m: Any) -> None:
    for body, expected in SHARED.values():
        assert [(s.path, s.blocked) for s in found(m, body)[1]] == expected


def listed(m: Any) -> None:
    for body, expected in LISTED.values():
        assert [(s.path, s.form, s.blocked) for s in found(m, body)[1]] == expected


def random(m: Any) -> None:
    assert found(m, RANDOM)[1] == ()


def learned(m: Any) -> None:
    """Queries that go through a projection stay queries."""
    assert [(s.path, s.form) for s in found(m, LEARNED)[1]] == [("fc", "linear"), ("queries", "product")]


def stacks(m: Any) -> None:
    _, sites = found(m, CROSSED)
    assert {(s.path, s.role, s.container, s.stack) for s in sites} == {
        ("a", "other", "left", "encoder"),
        ("q", "cross_attention.q", "right", "decoder"),
        ("k", "cross_attention.kv", "right", "decoder"),
    }


CHECKS: tuple[Callable[[Any], None], ...] = (computed, shared, listed, random, learned, stacks)

MUTANTS = {
    "random numbers are stored ones": Mutant("constants._is_fixed", "may_draw(node.op)", "False"),
    "a weight that is computed again reads its parameter too": Mutant("Constants._weight", "its == key", "other is value"),
    "all expressions of one operator are equal": Mutant("constants._key", "repr(args)", "''"),
    "a masked weight loses its mask": Mutant("Constants._weight", "c in parameters or not others[c]", "c in parameters"),
    "who else reads a parameter is forgotten": Mutant("Constants._other_reader", "node not in nodes", "False"),
    "a result is no reader": Mutant("Constants._other_reader", "const in set(values_in(self.graph.outputs))", "False"),
    "what makes a weight is a site": Mutant("_Walk._read", "node not in self.constants.serving", "True"),
    "what a weight makes of learned inputs is one": Mutant("_Walk._compute", "value in self.applied", "False"),
    "a name is given twice": Mutant(
        "matmuls._named", "unique_name(const.path.removesuffix('.weight'), taken)", "const.path.removesuffix('.weight')"
    ),
    "only what has one size is behind a product": Mutant("_Walk.behind", "{**seen, **self.constants.origins}", "self.constants.origins"),
    "a computed kernel is one part": Mutant(
        "listed._multiplied",
        "sorted(behind.get(value, ()), key=lambda const: const.path)",
        "sorted(behind.get(value, ()), key=lambda const: const.path)[:1]",
    ),
    "groups are none": Mutant("listed._convolution", "groups != 1", "False"),
    "a decoder is its own encoder": Mutant("infer_stacks", "behind - decoders", "decoders"),
    "the queries' stack is the encoder": Mutant("stacks._behind", "container != own", "container == own"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name: str) -> None:
    with mutated(MUTANTS[name]) as m, pytest.raises((AssertionError, KeyError)):
        passes_all(m)


def passes_all(module: Any) -> None:
    for check in CHECKS:
        check(module)


def test_the_code_itself_passes() -> None:
    assert killer(unmutated(MUTANTS.values()), [passes_all]) is None
