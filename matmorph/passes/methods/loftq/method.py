"""loftq: W becomes codes of a quantizer and two factors that make up for its error, y = x @ Q^T + scale (x @ down) @ up + bias.

LoftQ (arXiv 2310.08659), alternating between quantiser and truncated SVD; the best iterate is kept, which need not be the last. Whitened,
the error of the outputs on the calibration data is minimised instead of that of the weight. See `linalg.loftq`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from matmorph.errors import RewriteError
from matmorph.ir.core import Const, Value
from matmorph.ir.site import Choice, Cost, Fragment, FragmentAdapter, Site, Statistic
from matmorph.passes.linalg.curves import directions
from matmorph.passes.linalg.loftq import LoftQResult, loftq
from matmorph.passes.linalg.second_order import Curvature
from matmorph.passes.linalg.whiten import Whitening
from matmorph.passes.methods.loftq.settings import LoftQLanguage, LoftQSpec
from matmorph.passes.methods.protocol import Error, FragmentBuilder, Peft, SiteStats
from matmorph.passes.methods.quantized_base import (
    Rounding,
    base_of,
    curvature_of,
    quantized_cost,
    quantized_needs,
    rounded,
    rounding_for,
    size_notes,
    with_bits,
)
from matmorph.passes.methods.quantized_pair import QuantizedPair
from matmorph.passes.methods.quantized_settings import bit_choices
from matmorph.passes.methods.weights import (
    curve_errors,
    readable,
    stored,
    times,
    weighting_of,
    whitening_of,
)
from matmorph.specs.schema import Rank


class LoftQ(LoftQLanguage, QuantizedPair):
    """Quantised matrix and low-rank correction, fitted together."""

    code: ClassVar[str | None] = "LQ"
    colour: ClassVar[int | None] = 2
    peft: ClassVar[Peft | None] = Peft(refused="fitted to a quantised base that PEFT's model does not have; merge it instead")

    def needs(self, spec: LoftQSpec) -> frozenset[Statistic]:
        whitened = frozenset({Statistic.INPUT_SECOND_MOMENT}) if spec.whiten else frozenset()
        return whitened | quantized_needs(spec)

    def choices(self, site: Site, spec: LoftQSpec) -> Iterable[Choice]:
        """One; under `auto` each number of bits with each rank of `RANKS` that its limits and the matrix allow."""
        ranks = _ranks(site, spec.rank) if spec.rank.kind == "auto" else [int(spec.rank.value or 1)]
        bits = bit_choices(spec) if spec.bits == "auto" else (None,)
        return [Choice(rank, bits=one) for one in bits for rank in ranks]

    def cost(self, site: Site, spec: LoftQSpec, choice: Choice) -> Cost:
        return quantized_cost(site, with_bits(spec, choice), choice.rank or 0, _factor_type(site, spec))

    def errors(self, site: Site, spec: LoftQSpec, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        """Of the first iterate, which later ones only improve on: one quantisation and one decomposition of what it leaves over for all
        ranks of a number of bits. Weight errors and, with statistics, output errors."""
        w = readable(site, site.weight())
        curved, most = curvature_of(site, spec, w, stats), max((choice.rank or 0 for choice in choices), default=0)
        whitening, every = _whitening(site, spec, stats), dict.fromkeys(choice.bits for choice in choices)
        curves = {bits: _curve(site, with_bits(spec, Choice(bits=bits)), w, curved, whitening, stats, most) for bits in every}
        return [curves[choice.bits][choice.rank or 0] for choice in choices]

    def solve(
        self, site: Site, spec: LoftQSpec, choice: Choice, stats: SiteStats | None, weight: Tensor, seed: int
    ) -> tuple[LoftQResult, tuple[str, ...]]:
        """The alternation, and what whitening had to note. Raises RewriteError as `build`."""
        whitening, weighting = _whitening(site, spec, stats), weighting_of(site, stats) if spec.whiten else None
        rounding = rounding_for(site, spec, curvature_of(site, spec, weight, stats))
        found = _solved(site, spec, choice, weight, rounding, whitening, weighting, seed)
        return found, (*(whitening.notes if whitening else ()), *rounding.notes)

    def build(self, site: Site, spec: LoftQSpec, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        """Raises RewriteError for NaN or infinity in the weight (named), and for scales or factors outside their type."""
        found, notes = b.solution or self.solve(site, spec, choice, stats, b.weight(), b.seed)
        base = base_of(site, spec, found.quantized, b)
        scale = spec.adapter_scale
        up_t, down_t = (found.A, found.B) if scale == 1 else found.factors(scale)
        factors = {"down": _stored(site, spec, down_t.T), "up": _stored(site, spec, up_t.T)}
        down, up = (b.const(name, factor) for name, factor in factors.items())

        def body(rows: Value) -> Value:
            update = _product(b, _product(b, rows, down), up)
            scaled = times(b, update, scale)
            return b("aten.add.Tensor", base.matmul(rows), scaled)

        return b.fragment(
            body,
            [*base.consts, down, up],
            lambda: self.merge({"base": base.dense(), **factors, "scale": found.A.new_tensor(scale)})[0],
            choice=choice,
            adds_bias=True,
            notes=(*notes, *_iterate_notes(spec, found, stats is not None and stats.output_moment is not None), *size_notes(site, spec)),
            adapter=FragmentAdapter({"down": down, "up": up}, scale, starts_at_zero=False),
        )


def _factor_type(site: Site, spec: LoftQSpec) -> str:
    return "float16" if spec.factors == "fp16" else site.const.tensor.dtype


def _stored(site: Site, spec: LoftQSpec, factor: Tensor) -> Tensor:
    """In the type of the weight and, where that is asked for, of half precision. RewriteError where one cannot hold it."""
    narrow = stored(site, factor)
    if spec.factors == "keep":
        return narrow
    half = narrow.half()
    if not bool(torch.isfinite(half).all()):
        raise RewriteError(f"{site.path}: the factors leave the range of float16")
    return half


def _product(b: FragmentBuilder, rows: Value, factor: Const) -> Value:
    """rows @ factor; a factor in another type is cast, a node of constants that is folded when a session loads."""
    name = factor.path.rpartition(".")[2]
    if factor.tensor.dtype == rows.tensor.dtype:
        return b.matmul(rows, factor, name=name)
    wide = b("aten._to_copy.default", factor, dtype=rows.tensor.torch_dtype)
    return b("aten.matmul.default", rows, wide, name=name)


RANKS = (4, 8, 16, 32, 64)


def _ranks(site: Site, rank: Rank) -> list[int]:
    full = min(site.in_features, site.out_features, rank.max or 1 << 62)
    fitting = [one for one in (*RANKS, rank.min, rank.max or rank.min) if rank.allows(one) and one <= full]
    return sorted(set(fitting)) or [min(max(rank.min, rank.multiple_of), full)]


def _curve(
    site: Site, spec: LoftQSpec, w: Tensor, curved: Curvature | None, whitening: Whitening | None, stats: SiteStats | None, most: int
) -> list[Error]:
    """The errors at every rank up to `most`, relative to W."""
    weighting = weighting_of(site, stats)
    left = rounded(site, spec, w, curved, stats, weighting)
    factor = None if whitening is None else whitening.factor
    if spec.whiten:
        found = directions(left.matrix, factor, weighting, most=most, seen=left.seen)
    else:
        found = directions(left.matrix, factor, most=most)
    return [left.error.times(rest) for rest in curve_errors(found, stats, weighting, left)]


def _whitening(site: Site, spec: LoftQSpec, stats: SiteStats | None) -> Whitening | None:
    return whitening_of(site, "loftq", stats, spec.damping) if spec.whiten else None


def _solved(
    site: Site,
    spec: LoftQSpec,
    choice: Choice,
    weight: Tensor,
    rounding: Rounding,
    whitening: Whitening | None,
    weighting: Tensor | None,
    seed: int,
) -> LoftQResult:
    w = readable(site, weight)
    try:
        return loftq(
            w,
            rounding,
            choice.rank or 1,
            spec.iterations,
            svd_first=spec.svd_first,
            whitening=whitening,
            weighting=weighting,
            seed=seed,
        )
    except ValueError as error:
        raise RewriteError(f"{site.const.path}: {error}") from error


def _iterate_notes(spec: LoftQSpec, found: LoftQResult, weighed: bool) -> tuple[str, ...]:
    """The kept iterate next to the last one and to the quantizer alone."""
    what = "error that it minimises" if spec.whiten and weighed else "output error" if spec.whiten else "weight error"
    kept, last = found.kept + 1, len(found.errors)
    other = f", {found.errors[-1]:.4g} after iteration {last}" if kept != last else ""
    return (f"{what} {found.error:.4g} after iteration {kept} of {last} (kept){other}, {found.quantized_only:.4g} without factors",)
