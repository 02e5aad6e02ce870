"""The multiple-choice knapsack: against all combinations on small instances, limits to the last unit, what binds, what cannot be held."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matmorph.passes.budget import knapsack as module
from matmorph.passes.budget.knapsack import RESOURCES, Allocation, Candidate, Resource, Unreachable, allocate, smallest

Offers = Sequence[Sequence[Candidate]]


def total(offers: Offers, chosen: Sequence[int], name: Resource) -> int:
    return sum(int(getattr(offer[index], name)) for offer, index in zip(offers, chosen, strict=True))


def best(offers: Offers, limits: dict[Resource, int], together: Sequence[Sequence[int]] = ()) -> float | None:
    """The smallest error of all combinations that hold every limit."""
    found = [
        sum(offer[index].error for offer, index in zip(offers, chosen, strict=True))
        for chosen in product(*(range(len(offer)) for offer in offers))
        if all(total(offers, chosen, name) <= limit for name, limit in limits.items())
        and all(len({offers[s][chosen[s]].label for s in group}) == 1 for group in together)
    ]
    return min(found, default=None)


SIZES = st.one_of(st.integers(0, 30), st.integers(10**6, 10**6 + 50))
ERRORS = st.one_of(st.floats(0, 1, allow_subnormal=False), st.sampled_from([0.0, 1e-9, 0.25, 0.5, 1.0]))


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[list[Candidate]], dict[Resource, int]]:
    count = draw(st.integers(1, 4))
    offers = [
        [Candidate(f"c{k}", draw(ERRORS), draw(SIZES), draw(SIZES), draw(SIZES)) for k in range(draw(st.integers(1, 5)))]
        for _ in range(count)
    ]
    names = draw(st.lists(st.sampled_from(RESOURCES), min_size=1, max_size=3, unique=True))
    low = {name: smallest(offers, name) for name in names}
    high = {name: sum(max(one.takes(name) for one in offer) for offer in offers) for name in names}
    return offers, {name: max(1, draw(st.integers(max(0, low[name] - 1), high[name]))) for name in names}


@settings(deadline=None, max_examples=60)
@given(instances())
def test_it_is_the_best_of_all_combinations(instance: tuple[list[list[Candidate]], dict[Resource, int]]) -> None:
    offers, limits = instance
    wanted, found = best(offers, limits), allocate(offers, limits)
    if wanted is None:
        assert isinstance(found, Unreachable)
        assert found.limiting
        assert all(found.smallest[name] > limits[name] for name in found.limiting if len(found.limiting) < len(limits) or len(limits) == 1)
        assert any(found.smallest[name] > limits[name] for name in limits)
        return
    assert isinstance(found, Allocation)
    assert all(total(offers, found.chosen, name) <= limit for name, limit in limits.items())
    assert found.totals == {name: total(offers, found.chosen, name) for name in RESOURCES}
    # the solver ends within 1e-12 of the largest error (see `_UNITS`); sums of four floats add their rounding
    assert found.objective == pytest.approx(wanted, rel=1e-9, abs=1e-11)
    assert found.gap == 0
    unlimited = sum(min(one.error for one in offer) for offer in offers)
    assert bool(found.binding) == (found.objective > unlimited * (1 + 1e-9))


@settings(deadline=None, max_examples=60)
@given(instances(), st.data())
def test_tied_offers_choose_alike(instance: tuple[list[list[Candidate]], dict[Resource, int]], data: st.DataObject) -> None:
    offers, limits = instance
    members = data.draw(st.lists(st.sampled_from(range(len(offers))), min_size=1, unique=True))
    wanted, found = best(offers, limits, [members]), allocate(offers, limits, [members])
    if wanted is None:
        assert isinstance(found, Unreachable)
        return
    assert isinstance(found, Allocation)
    assert len({offers[s][found.chosen[s]].label for s in members}) == 1
    assert found.objective == pytest.approx(wanted, rel=1e-9, abs=1e-11)  # as above


A = [Candidate("keep", 0.0, 100, 400, 10), Candidate("half", 1.0, 50, 200, 10), Candidate("codes", 2.0, 100, 50, 10)]


def test_every_limit_holds_to_the_last_unit_and_the_one_that_costs_something_binds() -> None:
    found = allocate([A, A], {"parameters": 150})
    assert isinstance(found, Allocation)
    assert (found.objective, found.totals["parameters"], found.binding) == (1.0, 150, ("parameters",))
    found = allocate([A, A], {"parameters": 149, "bytes": 10_000})
    assert isinstance(found, Allocation)
    assert (found.objective, found.totals["parameters"], found.binding) == (2.0, 100, ("parameters",))
    both = allocate([A, A], {"parameters": 150, "bytes": 250})
    assert isinstance(both, Allocation)
    assert ([A[index].label for index in both.chosen], both.totals["bytes"]) in ((["half", "codes"], 250), (["codes", "half"], 250))
    assert both.binding == ("bytes",), "150 parameters can be had for an error of 1, 250 bytes cannot"


def test_a_limit_that_the_best_choice_holds_costs_nothing() -> None:
    found = allocate([A, A], {"parameters": 200, "macs": 20})
    assert found == Allocation((0, 0), 0.0, 0.0, {"parameters": 200, "bytes": 800, "macs": 20}, ())


def test_the_smallest_reachable_size_and_what_limits_it() -> None:
    assert allocate([A, A], {"parameters": 99, "bytes": 10**6}) == Unreachable({"parameters": 100, "bytes": 100}, ("parameters",))
    assert smallest([A, A], "bytes") == 100
    apart = allocate([A, A], {"parameters": 120, "bytes": 120})  # each alone can be held, both cannot
    assert apart == Unreachable({"parameters": 200, "bytes": 100}, ("parameters", "bytes")), "200 / 120 is the least excess, not 250 / 120"


def test_wrong_offers_are_refused() -> None:
    for offers, message in (
        ([A, []], "offer 1 has no candidates"),
        ([[A[0], A[0]]], "offer 0 has a label twice"),
        ([[Candidate("x", float("nan"))]], "negative or not finite"),
        ([[Candidate("x", -0.1)]], "negative or not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(offers, {"bytes": 1})
    with pytest.raises(ValueError, match="tied to others twice"):
        allocate([A, A, A], {"bytes": 900}, [[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="no label in common"):
        allocate([A, [Candidate("other", 0.0)]], {"bytes": 900}, [[0, 1]])


def model_like(sites: int, ranks: int, seed: int) -> list[list[Candidate]]:
    """Falling convex error curves, sizes of BERT-base."""
    g = np.random.default_rng(seed)
    offers = []
    for s in range(sites):
        out, inner = ((768, 768), (768, 768), (3072, 768))[s % 3]
        scale, decay = g.lognormal(0, 1), g.uniform(1, 8)
        full = out * inner // (out + inner)
        found = [Candidate("keep", 0.0, out * inner, 4 * out * inner, out * inner)]
        for k in range(1, ranks + 1):
            taken = (full * k // (ranks + 1)) * (out + inner)
            found.append(Candidate(f"r{k}", float(scale * np.exp(-decay * k / ranks)), taken, 4 * taken, taken))
        offers.append(found)
    return offers


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_a_model_with_three_limits_is_solved_without_a_gap(share: float) -> None:
    offers = model_like(72, 8, 1)
    full = {name: sum(offer[0].takes(name) for offer in offers) for name in RESOURCES}
    limits: dict[Resource, int] = {"parameters": int(share * full["parameters"]), "bytes": int(share * 1.01 * full["bytes"])}
    start = time.perf_counter()
    found = allocate(offers, limits)
    assert isinstance(found, Allocation)
    assert found.gap == 0
    assert all(found.totals[name] <= limit for name, limit in limits.items())
    assert found.totals["parameters"] > 0.99 * limits["parameters"], "a budget is used"
    assert time.perf_counter() - start < 60, "no more than a guard against a search that does not end"
    assert allocate(offers, limits) == found, "the same answer again"


def test_a_rounded_answer_above_the_limit_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver's integrality tolerance may hide a unit too much: such an answer is never given out."""
    real, calls = module._highs, []

    def sloppy(offers: Offers, limits: dict[Resource, int]) -> tuple[tuple[int, ...], float] | None:
        calls.append(limits)
        return ((0, 1), 1.0) if len(calls) == 1 else real(offers, limits)

    monkeypatch.setattr(module, "_highs", sloppy)
    found = allocate([A, A], {"parameters": 149})
    assert isinstance(found, Allocation)
    assert found.totals["parameters"] == 100
    assert found.gap == pytest.approx(0.5), "held against the bound of the looser program"
    assert calls == [{"parameters": 149}, {"parameters": 148}]


def test_what_the_solver_prints_stays_off_stdout(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    milp = module.milp

    def talking(*costs: Any, **program: Any) -> Any:
        os.write(1, b"HighsMipSolverData says something\n")
        return milp(*costs, **program)

    monkeypatch.setattr(module, "milp", talking)
    assert module._solved(np.array([1.0, 2.0]), integrality=np.array([1, 1])).status == 0
    os.write(1, b"a report\n")
    said = capfd.readouterr()
    assert said.out == "a report\n"
    assert said.err == "HighsMipSolverData says something\n"
