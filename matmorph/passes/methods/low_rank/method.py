"""low_rank: W [out, in] becomes two factors, y = (x @ down) @ up + bias.

Plain, they are the truncated SVD: the smallest |W - W'|_F of any matrix of that rank (Eckart and Young 1936). Whitened, they make the
smallest output error on the calibration data (SVD-LLM, arXiv 2403.07378; see `linalg.whiten`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, log10, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from matmorph.errors import RewriteError
from matmorph.ir.core import Value
from matmorph.ir.site import Bound, Choice, Cost, Fragment, Reject, Site, Spectrum, Statistic
from matmorph.passes.linalg.contraction import vector_train
from matmorph.passes.linalg.contraction_cost import plan_contraction, planning_target
from matmorph.passes.linalg.curves import directions
from matmorph.passes.linalg.svd import (
    Truncated,
    rank_for_energy,
    rank_for_error,
    singular_values,
    truncated_svd,
)
from matmorph.passes.linalg.whiten import Whitening, project, weighted, whitening_factor
from matmorph.passes.methods.low_rank.settings import LowRankLanguage, LowRankSpec
from matmorph.passes.methods.protocol import Error, FragmentBuilder, ReplaceMethod, SiteStats
from matmorph.passes.methods.weights import FLOATS, curve_errors, rank_beyond, readable, stored, weighting_of, whitening_of, widened
from matmorph.specs.schema import Export, Rank


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """The factors in the weight's own type, `down` [.., in, rank] and `up` [.., rank, out], and what is to be said of them."""

    down: Tensor
    up: Tensor
    rank: int
    bound: Bound | None
    spectrum: Spectrum
    notes: tuple[str, ...]


class LowRank(LowRankLanguage, ReplaceMethod):
    """Truncated SVD or activation-whitened SVD of one matmul."""

    code: ClassVar[str | None] = "LR"
    colour: ClassVar[int | None] = 0

    def needs(self, spec: LowRankSpec) -> frozenset[Statistic]:
        return frozenset({Statistic.INPUT_SECOND_MOMENT}) if spec.whiten else frozenset()

    def check(self, site: Site, spec: LowRankSpec) -> Reject | None:
        full = min(site.in_features, site.out_features)
        guards = (
            (site.blocked is not None, site.blocked or ""),
            (site.form == "embedding", "low_rank serves matmuls, this is an embedding table"),
            (bool(site.gathers), "the weight is also read as an embedding table; low_rank serves only the matmul: use untie: true"),
            (site.const.tensor.dtype not in FLOATS, f"low_rank needs a floating-point weight, this one is {site.const.tensor.dtype}"),
            (spec.rank.kind == "fixed" and int(spec.rank.value or 0) > full, f"rank {spec.rank.value} is above min(in, out) = {full}"),
        )
        return next((Reject(reason) for fails, reason in guards if fails), None)

    def impossible(self, sites: Sequence[Site], spec: LowRankSpec) -> str | None:
        return rank_beyond(sites, spec.rank)

    def choices(self, site: Site, spec: LowRankSpec) -> Iterable[Choice]:
        """One: the rank, or for `energy` and `error` its upper limit, since the weight decides. Under `auto` `RANKS` even steps up to the
        rank that saves nothing, rounded down to the multiple (8 where none is given and the matrix has ranks for that)."""
        if spec.rank.kind == "auto":
            return [Choice(rank) for rank in _steps(spec.rank, site)]
        if spec.rank.kind in _FROM_DATA:
            return [Choice(_within(spec.rank, site, min(site.in_features, site.out_features)), at_most=True)]
        return [Choice(_within(spec.rank, site, _wanted(spec.rank, site)))]

    def cost(self, site: Site, spec: LowRankSpec, choice: Choice) -> Cost:
        per_row = (site.in_features + site.out_features) * (choice.rank or 0)
        parameters = per_row * (site.batch or 1)
        return Cost(parameters, parameters * site.const.tensor.torch_dtype.itemsize, per_row * len(site.applications))

    def times(self, site: Site, spec: LowRankSpec, choice: Choice, export: Export) -> tuple[tuple[int, float], ...]:
        """As a train of two cores, x @ down @ up."""
        if site.batch is not None:
            return ()
        train = vector_train((site.in_features, site.out_features), 1, (1, choice.rank or 1, 1))
        found = plan_contraction(train, export.tokens, planning_target(export.target), True)
        return tuple(zip(export.tokens, found.ratios, strict=True))

    def errors(self, site: Site, spec: LowRankSpec, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        """Weight errors and, with statistics, output errors of all ranks, from one decomposition (see `linalg.curves`)."""
        w = readable(site, site.weight())
        whitening, weighting = _whitening(site, spec, stats), weighting_of(site, stats)
        factor = None if whitening is None else whitening.factor
        errors = curve_errors(directions(w, factor, weighting if spec.whiten else None), stats, weighting)
        return [errors[min(choice.rank or 0, len(errors) - 1)] for choice in choices]

    def solve(self, site: Site, spec: LowRankSpec, choice: Choice, stats: SiteStats | None, weight: Tensor, seed: int) -> Cut:
        """The truncated SVD. Raises RewriteError as `build`."""
        w = readable(site, weight)
        whitening, weighting = _whitening(site, spec, stats), weighting_of(site, stats) if spec.whiten else None
        objective = _objective(w, whitening, weighting)
        rank = _rank(site, spec, choice, objective)
        found = truncated_svd(objective, rank, solver=spec.solver, seed=seed)
        down, up = (stored(site, factor) for factor in project(w, found.u.to(w.dtype), weighting))
        return Cut(
            down,
            up,
            rank,
            None if weighting is not None else _sharper(w, rank, whitening, stats) or _bound(w, objective, found.optimum, whitening),
            _spectrum(found.spectrum, rank, _seen(whitening, weighting), min(site.in_features, site.out_features)),
            (*(whitening.notes if whitening else ()), *_solver_note(found)),
        )

    def build(self, site: Site, spec: LowRankSpec, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        """Raises RewriteError for NaN or infinity in the weight (named), or factors that leave the range of the stored type."""
        found = b.solution or self.solve(site, spec, choice, stats, b.weight(), b.seed)
        factors = {"down": found.down, "up": found.up}
        down, up = (b.const(name, factor) for name, factor in factors.items())

        def body(rows: Value) -> Value:
            return b.matmul(b.matmul(rows, down, name="down"), up, name="up")

        return b.fragment(
            body,
            [down, up],
            lambda: self.merge(factors)[0],
            choice=Choice(found.rank),
            bound=found.bound,
            spectrum=found.spectrum,
            notes=found.notes,
        )

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """W' [.., out, in] = (down @ up)^T in float32 or better; the bias is not low_rank's."""
        return (widened(parts["down"]) @ widened(parts["up"])).transpose(-2, -1), None


RANKS = 16
_EVEN = 8


def _steps(rank: Rank, site: Site) -> list[int]:
    """Ascending; at least one rank, also where `min` and `max` leave none of the even steps."""
    pays = max(site.in_features * site.out_features // (site.in_features + site.out_features), 1)
    even = rank if rank.multiple_of > 1 or pays < RANKS * _EVEN else replace(rank, multiple_of=_EVEN)
    return sorted({_within(even, site, -(-pays * step // RANKS)) for step in range(1, RANKS + 1)})


_FROM_DATA = {"energy": rank_for_energy, "error": rank_for_error}


def _wanted(rank: Rank, site: Site) -> int:
    """A rank that shapes decide; `ratio` is the share of in * out parameters that the factors may take."""
    value = float(rank.value or 0)
    if rank.kind == "fixed":
        return int(value)
    if rank.kind == "ratio":
        return floor(value * site.in_features * site.out_features / (site.in_features + site.out_features))
    raise RewriteError(f"{site.path}: rank {rank.kind} is left to the budget, which has not decided it")


def _within(rank: Rank, site: Site, wanted: int) -> int:
    """Into multiple_of, min, max and 1..min(in, out). `ratio` is a promise of size and rounds down to the multiple, `energy` and `error`
    are promises of accuracy and round up."""
    full = min(site.in_features, site.out_features)
    step = rank.multiple_of
    rounded = -(-wanted // step) * step if rank.kind in _FROM_DATA else max(wanted // step, 1) * step
    return min(max(rounded, rank.min), rank.max or full, full)


def _rank(site: Site, spec: LowRankSpec, choice: Choice, objective: Tensor) -> int:
    if not choice.at_most:
        return choice.rank or 1
    wanted = _FROM_DATA[spec.rank.kind](singular_values(objective), float(spec.rank.value or 0))
    return _within(spec.rank, site, wanted)


def _whitening(site: Site, spec: LowRankSpec, stats: SiteStats | None) -> Whitening | None:
    return whitening_of(site, "low_rank", stats, spec.damping) if spec.whiten else None


def _objective(w: Tensor, whitening: Whitening | None, weighting: Tensor | None) -> Tensor:
    """The matrix whose truncated SVD is wanted: W, or W L or C^T W L in float64."""
    return w if whitening is None else weighted(w.double(), weighting) @ whitening.factor


def _solver_note(found: Truncated) -> tuple[str, ...]:
    """Said only where the solver is not exact: how far from the smallest error it can be."""
    return (f"{found.solver} solver: proven within {found.guard - 1:.2%} of the smallest error",) if found.solver == "randomized" else ()


POINTS = 48
"""Singular values of one site that a report keeps: what a drawing can show."""


def _seen(whitening: Whitening | None, weighting: Tensor | None) -> Literal["W", "W L", "C^T W L"]:
    return "W" if whitening is None else "W L" if weighting is None else "C^T W L"


def _spectrum(values: Tensor, rank: int, of: Literal["W", "W L", "C^T W L"], size: int) -> Spectrum:
    """Every value of a short spectrum; of a long one even steps, ever wider ones from both ends, where spectra bend, and the chosen rank.
    Five digits: the rest is rounding."""
    known, third = len(values), POINTS // 3
    wider = torch.logspace(0, log10(known), third).round().int().tolist()
    steps = {*wider, *(known + 1 - step for step in wider), *torch.linspace(1, known, third - 1).round().int().tolist(), rank}
    at = tuple(sorted(steps)) if known > POINTS else tuple(range(1, known + 1))
    return Spectrum(of, size, at, tuple(float(f"{float(values[number - 1]):.4e}") for number in at))


_SHARP_SIDE = 1024
_BARELY = 1e-10


def _sharper(w: Tensor, rank: int, whitening: Whitening | None, stats: SiteStats | None) -> Bound | None:
    """The bound by the singular values of W L with next to no damping: what a sample of few rows has been shrunk by loosens the one that
    comes with the factors. One more eigenvalue problem, of matrices where that is short."""
    if whitening is None or stats is None or min(w.shape[-2:]) > _SHARP_SIDE:
        return None
    barely = whitening_factor(stats.second_moment, stats.rows, _BARELY)
    objective = w.double() @ barely.factor
    return _bound(w, objective, float(torch.linalg.vector_norm(singular_values(objective)[..., rank:])), barely)


def _bound(w: Tensor, objective: Tensor, optimum: float, whitening: Whitening | None) -> Bound | None:
    """Eckart-Young: no matrix of this rank has a smaller error. `optimum` is the proven least |(W - W') L|_F.

    For whitened factors it is one of the error on the rows that they were fitted to, measured without the damping d: the tail of W H W^T is
    at least that of W (H + d I) W^T less d |W|_F^2, and the norm |W L|^2 is smaller without it by exactly d |W|_F^2.
    """
    norm = float(torch.linalg.vector_norm(objective, dtype=torch.float64))
    if norm == 0:
        return None
    if whitening is None:
        return Bound("eckart_young", "weight_error", optimum / norm)
    shift = whitening.shift.reshape(-1)
    damped = float((w.double().square().reshape(len(shift), -1).sum(1) * shift).sum())
    tail, total = optimum**2 - damped, norm**2 - damped
    if tail <= 0 or total <= 0:
        return None
    return Bound("eckart_young", "fitted_error", sqrt(tail / total))
