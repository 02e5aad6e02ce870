"""The front of a budget: the smallest error at each of several sizes, all chosen from the candidates of one compile.

A point is an exact answer of the allocation, so no other choice of candidates is smaller and better at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from matmorph.errors import InputError, SpecError, VerifyError
from matmorph.passes.budget.account import Decision
from matmorph.passes.budget.knapsack import Allocation, Resource, allocate, smallest
from matmorph.passes.budget.offers import describe
from matmorph.specs.schema import Spec


@dataclass(frozen=True, slots=True)
class Point:
    """One budget: `limit` that was set and `total` that is taken of it. `error`: see `Front`. `chosen`: what each open site becomes."""

    limit: int
    total: int
    error: float
    chosen: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {"limit": self.limit, "total": self.total, "error": self.error, "sites": dict(self.chosen)}


@dataclass(frozen=True, slots=True)
class Front:
    """Points from the smallest to the largest. `base`: what 100 % of `resource` is; `of`: "matched" or "model". The error of a point is the
    root of the weighted mean over the open sites of their squared relative errors, of outputs where there were calibration data; the
    weights are those of the allocation. `asked`: budgets that were tried; those that lead to the same choice are one point."""

    resource: Resource
    of: str
    base: int
    points: tuple[Point, ...]
    asked: int

    def share(self, point: Point) -> float:
        """Of `base`; 0 where that is 0."""
        return point.total / self.base if self.base else 0.0

    def to_dict(self) -> dict[str, Any]:
        points = [{**point.to_dict(), "share": self.share(point)} for point in self.points]
        return {"resource": self.resource, "of": self.of, "base": self.base, "asked": self.asked, "points": points}


def refuse_unswept(spec: Spec, points: int) -> None:
    """Before any work: SpecError or InputError for a spec without one budget of one limit to sweep, and for fewer than two points."""
    if points < 2:
        raise InputError(f"a front needs at least 2 budgets, got {points}")
    open_ = [stage for stage in spec.stages if any(rule.is_open for rule in stage.rules)]
    if not open_:
        raise InputError(
            "a front needs something to decide, and no rule of this spec says auto or any_of",
            ["for instance a method with rank: auto, and budget: {parameters: 60%}"],
        )
    if len(open_) > 1:
        raise InputError(f"a front sweeps one budget, and {len(open_)} stages of this spec have one")
    budget = open_[0].budget
    limited = [] if budget is None else [name for name in ("parameters", "bytes", "macs") if getattr(budget, name) is not None]
    if budget is not None and len(limited) > 1:
        raise SpecError(f"a front sweeps one limit, and the budget has {', '.join(limited)}", at=budget.at, keypath="budget")


def sweep(decided: Decision, points: int) -> Front:
    """Limits at equal distances, from the least that can be reached to what the best choice takes where nothing is limited. Limits that
    lead to the same choice make one point."""
    held = decided.account
    (name,) = held.limits
    fixed = held.fixed[name]
    low = smallest(decided.candidates, name)
    high = max(_free(decided, name), low)
    found: dict[tuple[int, ...], Point] = {}
    for number in range(points):
        left = low + (high - low) * number // (points - 1)
        answer = allocate(decided.candidates, {name: left})
        if not isinstance(answer, Allocation):
            raise VerifyError(f"{name} <= {left:,} cannot be held where {low:,} can")
        found.setdefault(answer.chosen, _point(decided, answer, fixed + left, fixed + answer.totals[name]))
    return Front(name, held.budget.of, held.base[name], tuple(found.values()), points)


def _free(decided: Decision, name: Resource) -> int:
    """What the smallest errors take; of equal errors the smallest size."""
    best = (min(offer, key=lambda one: (one.error, one.takes(name))) for offer in decided.candidates)
    return sum(one.takes(name) for one in best)


def _point(decided: Decision, answer: Allocation, limit: int, total: int) -> Point:
    picked = zip(decided.offers, answer.chosen, strict=True)
    chosen = {one.site.path: describe(one.options[index].uses) for one, index in picked}
    return Point(limit, total, _mean(answer.objective, [scale.whole for scale in decided.scales]), chosen)


def _mean(objective: float, weights: Sequence[float]) -> float:
    whole = sum(weights)
    return sqrt(objective / whole) if whole > 0 else 0.0
