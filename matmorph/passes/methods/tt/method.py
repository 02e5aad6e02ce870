"""tt: W [out, in] becomes a TT-matrix, cores G_k [r_{k-1}, out_k, in_k, r_k] whose product it is (Novikov et al., arXiv 1509.06569).

The cores are those of TT-SVD (see `linalg.tensor_train`): within sqrt(d - 1) of the smallest error at their ranks. They stay what is stored
and what trains; how they meet the rows is planned by cost (`linalg.contraction`): core by core, neighbours merged, or W rebuilt at load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from matmorph.errors import RewriteError
from matmorph.ir.core import Value
from matmorph.ir.site import Bound, Choice, Cost, Fragment, Reject, Site
from matmorph.passes.linalg.contraction import TrainShape, matrix_train
from matmorph.passes.linalg.modes import Modes, balanced_modes, modes_problem, padded_modes
from matmorph.passes.linalg.tensor_train import Info, TensorTrain, matrix_to_tensor, reconstruct, round_tt, split_modes, tt_svd
from matmorph.passes.methods.protocol import Error, FragmentBuilder, ReplaceMethod, SiteStats
from matmorph.passes.methods.tt.settings import TTLanguage, TTSpec
from matmorph.passes.methods.tt_base import (
    automatic_ranks,
    chosen_ranks,
    core_consts,
    matmul_train,
    plan_note,
    planned,
    times_text,
    train_cost,
)
from matmorph.passes.methods.weights import error_between, readable, refuse_matrix, stored, weighting_of, widened


class TT(TTLanguage, ReplaceMethod):
    """A TT-matrix by TT-SVD."""

    code: ClassVar[str | None] = "TT"
    colour: ClassVar[int | None] = 3

    def impossible(self, sites: Sequence[Site], spec: TTSpec) -> str | None:
        """Modes by hand that fit none of the sites."""
        problems = [_modes_problem(site, spec) for site in sites]
        return f"{sites[0].path}: {problems[0]}" if spec.modes is not None and all(problems) else None

    def check(self, site: Site, spec: TTSpec) -> Reject | None:
        problem = refuse_matrix(site, self.name)
        why = None if problem else _modes_problem(site, spec)
        return Reject(why) if why else problem

    def choices(self, site: Site, spec: TTSpec) -> Iterable[Choice]:
        """One: the ranks, or for `energy` and `error` their upper limits, since the weight decides. Several under `auto`."""
        if spec.rank.kind == "auto":
            found = automatic_ranks(spec.rank, _modes(site, spec).sizes, site.parameters)
            return [_described(site, spec, choice) for choice in found]
        return [_described(site, spec, chosen_ranks(spec.rank, _modes(site, spec).sizes, site.parameters))]

    def cost(self, site: Site, spec: TTSpec, choice: Choice) -> Cost:
        return train_cost(site, _train(site, spec, choice), spec)

    def errors(self, site: Site, spec: TTSpec, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        """Weight errors and, with statistics, output errors. Of several choices all from one TT-SVD, at their largest ranks, rounded to
        the others: at most sqrt(d - 1) times the smallest error, as the TT-SVD of each is."""
        w = site.weight()
        if len(choices) == 1:
            first = self.solve(site, spec, choices[0], stats, w, 0)[0]
            return [_error(site, w, first, stats)]
        modes = _modes(site, spec)
        limits = tuple(map(max, zip(*(choice.ranks for choice in choices), strict=True)))
        tensor = matrix_to_tensor(_padded(readable(site, w), modes), modes)
        whole = tt_svd(tensor, limits, solver=spec.solver)[0]
        rounded = (split_modes(round_tt(whole, choice.ranks, solver=spec.solver)[0], modes) for choice in choices)
        return [_error(site, w, train, stats) for train in rounded]

    def solve(
        self, site: Site, spec: TTSpec, choice: Choice, stats: SiteStats | None, weight: Tensor, seed: int
    ) -> tuple[TensorTrain, Info]:
        """The TT-SVD. Raises RewriteError for NaN or infinity in the weight (named)."""
        modes, rank = _modes(site, spec), spec.rank
        tensor = matrix_to_tensor(_padded(readable(site, weight), modes), modes)
        if not choice.at_most:
            train, info = tt_svd(tensor, choice.ranks, solver=spec.solver, seed=seed)
        else:
            error, energy = (float(rank.value or 0) if rank.kind == kind else None for kind in ("error", "energy"))
            step, solver = rank.multiple_of, spec.solver
            train, info = tt_svd(tensor, choice.ranks, error=error, energy=energy, multiple_of=step, solver=solver, seed=seed)
            raised = tuple(min(max(rank.min, one), limit) for one, limit in zip(train.ranks, choice.ranks, strict=True))
            if raised != train.ranks:
                train, info = tt_svd(tensor, raised, solver=spec.solver, seed=seed)
        return split_modes(train, modes), info

    def build(self, site: Site, spec: TTSpec, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        """Raises RewriteError for NaN or infinity in the weight (named), or cores that leave the range of the stored type."""
        train, info = b.solution or self.solve(site, spec, choice, stats, b.weight(), b.seed)
        cores = [stored(site, core) for core in train.cores]
        taken = _described(site, spec, replace(choice, rank=max(train.ranks), at_most=False, ranks=train.ranks))
        shape = _train(site, spec, taken)
        consts = core_consts(b, cores)

        def body(rows: Value) -> Value:
            return matmul_train(b, shape, spec, rows, consts, site.out_features)

        size = torch.tensor([site.out_features, site.in_features])
        parts = {**{f"core_{k}": core for k, core in enumerate(cores)}, "size": size}
        return b.fragment(
            body,
            consts,
            lambda: self.merge(parts)[0],
            choice=taken,
            bound=Bound("eckart_young_unfolding", "weight_error", info.bound) if info.norm > 0 else None,
            notes=_solver_notes(info),
        )

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """W' [out, in] of `core_0`, `core_1` ... in float32 or better, cut to `size` = (out, in) where it was padded; no bias."""
        whole = reconstruct(train_of(parts))
        out, in_features = (int(size) for size in parts["size"]) if "size" in parts else whole.shape
        return whole[:out, :in_features], None


def _error(site: Site, weight: Tensor, train: TensorTrain, stats: SiteStats | None) -> Error:
    """Of the matrix [out, in] in the corner of what the train stands for."""
    w = readable(site, weight)
    dense = reconstruct(train)[: w.shape[0], : w.shape[1]]
    return error_between(w, dense, stats, weighting_of(site, stats))


def train_of(parts: Mapping[str, Tensor]) -> TensorTrain:
    """The train of `core_0`, `core_1` ..., in float32 or better. RewriteError where they do not fit together."""
    count = sum(name.startswith("core_") for name in parts)
    try:
        return TensorTrain(tuple(widened(parts[f"core_{k}"]) for k in range(count)))
    except (KeyError, ValueError) as error:
        raise RewriteError(f"no tensor train: {error}") from error


def _modes_problem(site: Site, spec: TTSpec) -> str | None:
    """Why the modes by hand, or the automatic ones, do not fit the site."""
    if spec.modes is None:
        try:
            _modes(site, spec)
        except ValueError as error:
            return f"{error}; padding: pad takes the larger ones"
        return None
    if spec.padding == "pad" and prod(spec.modes.out) >= site.out_features and prod(spec.modes.in_) >= site.in_features:
        return None
    return modes_problem(spec.modes.out, spec.modes.in_, site.out_features, site.in_features)


def _modes(site: Site, spec: TTSpec) -> Modes:
    """ValueError where the site's sizes have no balanced factors."""
    if spec.modes is not None:
        return Modes(spec.modes.out, spec.modes.in_)
    find = padded_modes if spec.padding == "pad" else balanced_modes
    return find(site.out_features, site.in_features, spec.count)


def _train(site: Site, spec: TTSpec, choice: Choice) -> TrainShape:
    modes = _modes(site, spec)
    return matrix_train(modes.out, modes.in_, (1, *choice.ranks, 1))


def _described(site: Site, spec: TTSpec, choice: Choice) -> Choice:
    """The choice with what there is to say of its shapes."""
    modes = _modes(site, spec)
    shapes = f"modes out {times_text(modes.out)}, in {times_text(modes.in_)}; ranks {'<= ' if choice.at_most else ''}{list(choice.ranks)}"
    padded = (modes.out_features, modes.in_features) != (site.out_features, site.in_features)
    padding = (f"padded with zeros from {site.out_features} x {site.in_features} to {modes.out_features} x {modes.in_features}",)
    plan = plan_note(planned(_train(site, spec, choice), spec), spec)
    return replace(choice, notes=(shapes, *(padding if padded else ()), plan))


def _padded(w: Tensor, modes: Modes) -> Tensor:
    """W in the corner of zeros [out, in] of the modes."""
    more = (0, modes.in_features - w.shape[1], 0, modes.out_features - w.shape[0])
    return torch.nn.functional.pad(w, more) if any(more) else w


def _solver_notes(info: Info) -> tuple[str, ...]:
    """How far from the smallest error the cores can be."""
    if not 1 < info.guard < float("inf"):
        return ()
    return (f"TT-SVD: proven within {info.guard - 1:.2%} of the smallest error at these ranks",)
