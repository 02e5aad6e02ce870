"""Allocation: of what each site offers, the choices with the smallest total error under several limits at once. No graph, no tensors.

The multiple-choice knapsack, minimise sum_s e[s, c(s)] with sum_s r[s, c(s)] <= limit_r for every limited resource r, as a mixed integer
program that HiGHS solves exactly (`scipy.optimize.milp`; branch and bound with cuts). Its proven gap comes back with the answer. Limits are
held in exact integer arithmetic, whatever the solver's tolerances.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd, isfinite
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from matmorph.errors import VerifyError

Resource = Literal["parameters", "bytes", "macs"]
RESOURCES: tuple[Resource, ...] = ("parameters", "bytes", "macs")

_UNITS = 1e6
"""The largest error in the solver's units. HiGHS ends at an absolute gap of 1e-6 in whatever units it is given: here a share of 1e-12."""
_REPAIRS = 20
_CORE = 2
"""Candidates per offer in the first core, on average."""

Floats: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to treat a site (or a block). `error`: what it adds to the objective, in the same units for all; the rest: what it takes.

    Sites that must choose alike choose by equal labels."""

    label: str
    error: float
    parameters: int = 0
    bytes: int = 0
    macs: int = 0

    def takes(self, resource: Resource) -> int:
        return int(getattr(self, resource))


@dataclass(frozen=True, slots=True)
class Allocation:
    """`chosen[s]`: index of the candidate of offer s. `gap`: proven, relative: no other choice within the limits has an objective below
    (1 - gap) times this one. `binding`: the limits that cost something, those with a price in the linear relaxation."""

    chosen: tuple[int, ...]
    objective: float
    gap: float
    totals: Mapping[Resource, int]
    binding: tuple[Resource, ...]


@dataclass(frozen=True, slots=True)
class Unreachable:
    """No choice holds all limits. `smallest`: of each limited resource, the least that any choice takes in total. `limiting`: resources
    whose limit lies below that; all of them where each could be held alone and only their combination cannot, and then `smallest` is what
    the choice takes that exceeds its limits by the smallest factor."""

    smallest: Mapping[Resource, int]
    limiting: tuple[Resource, ...]


Bid = Sequence[Candidate]


def allocate(offers: Sequence[Bid], limits: Mapping[Resource, int], together: Sequence[Sequence[int]] = ()) -> Allocation | Unreachable:
    """One candidate of each offer. `together`: sets of offers that must take candidates of one label (those of every other are left out).

    Deterministic; of candidates that differ in nothing that counts, the first. Raises ValueError for an empty offer, an error that is
    negative or not finite, labels that come twice in one offer, and sets that overlap or have no label in common.
    """
    for index, offer in enumerate(offers):
        _check(index, offer)
    groups = _groups(len(offers), together)
    merged = [_merged([offers[index] for index in group]) for group in groups]
    short = _too_small(merged, limits)
    if short is not None:
        return short
    kept = [_undominated(offer, tuple(limits)) for offer in merged]
    found = _solve([[merged[s][index] for index in few] for s, few in enumerate(kept)], limits)
    if found is None:
        return Unreachable(_nearest(merged, limits), tuple(limits))
    picks = [kept[s][index] for s, index in enumerate(found.chosen)]
    labels = {index: merged[s][picks[s]].label for s, group in enumerate(groups) for index in group}
    chosen = tuple(next(k for k, one in enumerate(offer) if one.label == labels[s]) for s, offer in enumerate(offers))
    taken = [offer[index] for offer, index in zip(offers, chosen, strict=True)]
    objective = sum(one.error for one in taken)
    free = sum(min(one.error for one in offer) for offer in merged)
    binding = (found.priced or tuple(limits)) if objective > free else ()
    return Allocation(chosen, objective, found.gap, {name: sum(one.takes(name) for one in taken) for name in RESOURCES}, binding)


def smallest(offers: Sequence[Bid], resource: Resource) -> int:
    """The least of a resource that any choice takes."""
    return sum(min(one.takes(resource) for one in offer) for offer in offers)


def _check(index: int, offer: Bid) -> None:
    if not offer:
        raise ValueError(f"offer {index} has no candidates")
    if len({one.label for one in offer}) < len(offer):
        raise ValueError(f"offer {index} has a label twice")
    if any(not isfinite(one.error) or one.error < 0 for one in offer):
        raise ValueError(f"offer {index} has an error that is negative or not finite")


def _groups(count: int, together: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Every offer in one group; a lone one is a group by itself."""
    bound = [index for group in together for index in group]
    if len(set(bound)) < len(bound):
        raise ValueError("an offer is tied to others twice")
    return [*(tuple(group) for group in together if group), *((index,) for index in range(count) if index not in set(bound))]


def _merged(offers: Sequence[Bid]) -> list[Candidate]:
    """What several offers add up to under each label that all of them have."""
    if len(offers) == 1:
        return list(offers[0])
    named = [{one.label: one for one in offer} for offer in offers]
    common = [one.label for one in offers[0] if all(one.label in names for names in named)]
    if not common:
        raise ValueError("offers that are tied together have no label in common")

    def total(label: str) -> Candidate:
        parts = [names[label] for names in named]
        return Candidate(label, sum(one.error for one in parts), *(sum(one.takes(name) for one in parts) for name in RESOURCES))

    return [total(label) for label in common]


def _too_small(offers: Sequence[Bid], limits: Mapping[Resource, int]) -> Unreachable | None:
    least = {name: smallest(offers, name) for name in limits}
    limiting = tuple(name for name in limits if least[name] > limits[name])
    return Unreachable(least, limiting) if limiting else None


def _undominated(offer: Bid, resources: Sequence[Resource]) -> list[int]:
    """Candidates that no other one beats or equals in everything that counts; of equals the first."""
    keys = [(one.error, *(one.takes(name) for name in resources)) for one in offer]
    order = sorted(range(len(offer)), key=lambda index: (keys[index], index))
    kept: list[int] = []
    for index in order:
        if not any(all(a <= b for a, b in zip(keys[other], keys[index], strict=True)) for other in kept):
            kept.append(index)
    return sorted(kept)


# the program


@dataclass(frozen=True, slots=True)
class _Solved:
    chosen: tuple[int, ...]
    gap: float
    priced: tuple[Resource, ...] = ()


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """The linear relaxation: its `bound`, what taking candidate k of offer s adds to it at least (`extra[s][k]`), and the limits that have
    a price."""

    bound: float
    extra: tuple[Floats, ...]
    priced: tuple[Resource, ...]


def _solve(offers: Sequence[Bid], limits: Mapping[Resource, int]) -> _Solved | None:
    """None where nothing holds the limits.

    A core of candidates first, those that the relaxation says add little; whatever better answer exists has only candidates whose extra is
    within the distance of the core's answer from the relaxation's bound, so a second core of all of those is proof."""
    free = tuple(min(range(len(offer)), key=lambda index: (offer[index].error, index)) for offer in offers)
    if _excess(offers, free, limits) is None:
        return _Solved(free, 0.0)
    relaxed = _relaxed(offers, limits)
    if relaxed is None:
        return None
    reach = float(np.sort(np.concatenate(relaxed.extra))[min(_CORE * len(offers), sum(map(len, offers))) - 1])
    first = _core(offers, limits, relaxed, reach)
    distance = np.inf if first is None else _objective(offers, first.chosen) - relaxed.bound
    exact = first if first is not None and distance <= reach else _core(offers, limits, relaxed, distance)
    return None if exact is None else replace(exact, priced=relaxed.priced)


def _objective(offers: Sequence[Bid], chosen: Sequence[int]) -> float:
    return sum(offer[index].error for offer, index in zip(offers, chosen, strict=True))


def _core(offers: Sequence[Bid], limits: Mapping[Resource, int], relaxed: _Relaxed, reach: float) -> _Solved | None:
    """The best answer of candidates whose extra is at most `reach` (a little more, for rounding)."""
    kept = [[int(index) for index in np.flatnonzero(extra <= reach * (1 + 1e-6) + 1e-12 * relaxed.bound)] for extra in relaxed.extra]
    found = _exact([[offer[index] for index in few] for offer, few in zip(offers, kept, strict=True)], limits)
    return None if found is None else replace(found, chosen=tuple(few[index] for few, index in zip(kept, found.chosen, strict=True)))


def _exact(offers: Sequence[Bid], limits: Mapping[Resource, int]) -> _Solved | None:
    """A solution is integral only up to the solver's tolerance, and so are its limits: one that lies above a limit once rounded is solved
    again with that much less, and its gap is still that to the first, looser program."""
    bound: float | None = None
    tightened = dict(limits)
    for _ in range(_REPAIRS):
        answer = _highs(offers, tightened)
        if answer is None:
            return None
        chosen, dual = answer
        bound = dual if bound is None else bound
        over = _excess(offers, chosen, limits)
        if over is None:
            return _Solved(chosen, _gap(_objective(offers, chosen), bound))
        tightened = {name: limit - over.get(name, 0) for name, limit in tightened.items()}
    raise VerifyError(f"the solver's answer lies above a limit after {_REPAIRS} repairs")


def _gap(objective: float, bound: float) -> float:
    """(objective - bound) / objective; 0 within the rounding of float64 sums."""
    share = (objective - bound) / objective if objective > 0 else 0.0
    return share if share > 1e-9 else 0.0


def _excess(offers: Sequence[Bid], chosen: Sequence[int], limits: Mapping[Resource, int]) -> dict[Resource, int] | None:
    """By how much each limit is exceeded, None where all hold."""
    taken = [offer[index] for offer, index in zip(offers, chosen, strict=True)]
    over = {name: sum(one.takes(name) for one in taken) - limit for name, limit in limits.items()}
    return {name: more for name, more in over.items() if more > 0} or None


@dataclass(frozen=True, slots=True)
class _Program:
    """minimise costs . x with one x of each offer (`ends`: where offers begin and end) and use @ x <= left."""

    costs: Floats
    scale: float
    ends: Floats
    use: Floats
    left: Floats
    names: tuple[Resource, ...]

    @property
    def one_each(self) -> Any:
        owners = np.repeat(np.arange(len(self.ends) - 1), np.diff(self.ends))
        return csr_array((np.ones(len(owners)), (owners, np.arange(len(owners)))))


def _program(offers: Sequence[Bid], limits: Mapping[Resource, int]) -> _Program:
    """What a candidate takes beyond the least of its offer, and what the limit leaves beyond the least of all, in multiples of the greatest
    common divisor: the smaller the numbers, the less the solver's tolerance is worth."""
    errors = np.array([one.error for offer in offers for one in offer])
    scale = _UNITS / errors.max() if errors.max() > 0 else 1.0
    rows, left, names = [], [], []
    for name, limit in limits.items():
        least = [min(one.takes(name) for one in offer) for offer in offers]
        more = [one.takes(name) - low for offer, low in zip(offers, least, strict=True) for one in offer]
        unit = gcd(*more)
        if unit and sum(more) > limit - sum(least):
            rows.append(np.array(more) / unit)
            left.append((limit - sum(least)) // unit)
            names.append(name)
    ends = np.cumsum([0, *(len(offer) for offer in offers)])
    use = np.array(rows) if rows else np.zeros((0, len(errors)))
    return _Program(errors * scale, scale, ends, use, np.array(left, dtype=np.float64), tuple(names))


def _relaxed(offers: Sequence[Bid], limits: Mapping[Resource, int]) -> _Relaxed | None:
    """By Lagrangian duality: at the prices p >= 0 that the linear program ends with, no answer is below
    sum_s min_k (e + p r)[s, k] - p . limit, and one that takes k at s not below that plus (e + p r)[s, k] less that minimum. So the bounds
    hold whatever the solver's tolerances."""
    program = _program(offers, limits)
    solution = linprog(program.costs, program.use, program.left, program.one_each, np.ones(len(offers)), bounds=(0, None), method="highs")
    if solution.status == 2:
        return None
    if solution.status != 0:
        raise VerifyError(f"HiGHS did not solve the relaxed allocation: {solution.message}")
    prices = np.maximum(0.0, -solution.ineqlin.marginals)
    full = (program.costs + prices @ program.use) / program.scale
    parts = [full[start:end] for start, end in pairwise(program.ends)]
    bound = sum(float(part.min()) for part in parts) - float(prices @ program.left) / program.scale
    priced = tuple(name for name, price in zip(program.names, prices, strict=True) if price > 0)
    return _Relaxed(bound, tuple(part - part.min() for part in parts), priced)


def _highs(offers: Sequence[Bid], limits: Mapping[Resource, int]) -> tuple[tuple[int, ...], float] | None:
    """(choice, proven lower bound of the objective), None where the program has no solution."""
    program = _program(offers, limits)
    rows = [LinearConstraint(program.use, -np.inf, program.left)] if len(program.left) else []
    solution = _solved(
        program.costs,
        integrality=np.ones(len(program.costs), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(program.one_each, 1, 1), *rows],
        options={"mip_rel_gap": 0.0},
    )
    if solution.status == 2:
        return None
    if solution.status != 0 or solution.x is None:
        raise VerifyError(f"HiGHS did not solve the allocation: {solution.message}")
    chosen = tuple(int(np.argmax(solution.x[start:end])) for start, end in pairwise(program.ends))
    return chosen, float(solution.mip_dual_bound) / program.scale


def _solved(costs: Floats, **program: Any) -> Any:
    """`milp`, whose stray lines go to stderr: now and then HiGHS prints one, which must not get into a report on stdout."""
    with _stdout_to_stderr():
        return milp(costs, **program)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """For what native code prints; without effect where the process has no such files."""
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    try:
        sys.stdout.flush()
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _nearest(offers: Sequence[Bid], limits: Mapping[Resource, int]) -> dict[Resource, int]:
    """What the choice takes whose largest (total / limit) is smallest: the program of least t with total_r <= t limit_r."""
    count = sum(len(offer) for offer in offers)
    ends = np.cumsum([0, *(len(offer) for offer in offers)])
    usage = np.array([[one.takes(name) / limits[name] for offer in offers for one in offer] for name in limits])
    within = LinearConstraint(np.hstack([usage, -np.ones((len(limits), 1))]), -np.inf, 0)
    owners = np.repeat(np.arange(len(offers)), np.diff(ends))
    one_each = csr_array((np.ones(count), (owners, np.arange(count))), shape=(len(offers), count + 1))
    solution = _solved(
        np.array([0.0] * count + [1.0]),
        integrality=np.array([1] * count + [0]),
        bounds=Bounds(0, np.array([1.0] * count + [np.inf])),
        constraints=[LinearConstraint(one_each, 1, 1), within],
    )
    if solution.x is None:
        raise VerifyError(f"HiGHS did not solve the allocation: {solution.message}")
    chosen = [int(np.argmax(solution.x[start:end])) for start, end in pairwise(ends)]
    return {name: sum(offer[index].takes(name) for offer, index in zip(offers, chosen, strict=True)) for name in limits}
