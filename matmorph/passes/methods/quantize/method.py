"""quantize: W becomes integer codes and scales, y = x @ Q^T + bias, without factors.

Serves embedding tables too, and a table that is tied to the output head: one set of codes for the lookup and for the matmul.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from matmorph.ir.site import Choice, Cost, Fragment, Reject, Site, Statistic
from matmorph.passes.linalg.quantize import Quantized
from matmorph.passes.methods.protocol import Error, FragmentBuilder, ReplaceMethod, SiteMethod, SiteStats, Trains
from matmorph.passes.methods.quantize.settings import QuantizeLanguage, QuantizeSpec
from matmorph.passes.methods.quantized_base import (
    base_of,
    curvature_of,
    quantized_cost,
    quantized_needs,
    quantized_or_refused,
    refuse_site,
    rounded,
    rounding_for,
    size_notes,
    table_notes,
    trial_error,
    with_bits,
)
from matmorph.passes.methods.quantized_settings import QuantizedSpec, bit_choices, quantizer_settings
from matmorph.passes.methods.weights import readable, weighting_of, widened


class Quantize(QuantizeLanguage, ReplaceMethod):
    """One matrix as codes of a quantizer."""

    trains: ClassVar[Trains | None] = None
    code: ClassVar[str | None] = "Q"
    colour: ClassVar[int | None] = 1

    def needs(self, spec: QuantizeSpec) -> frozenset[Statistic]:
        return quantized_needs(spec)

    def check(self, site: Site, spec: QuantizeSpec) -> Reject | None:
        return refuse_site(site, spec, self.name, tables=self.name)

    def choices(self, site: Site, spec: QuantizeSpec) -> Iterable[Choice]:
        """One, or one for each number of bits under `auto`."""
        return [Choice(bits=bits) for bits in bit_choices(spec)] if spec.bits == "auto" else [Choice()]

    def cost(self, site: Site, spec: QuantizeSpec, choice: Choice) -> Cost:
        return quantized_cost(site, with_bits(spec, choice))

    def errors(self, site: Site, spec: QuantizeSpec, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        w = readable(site, site.weight())
        weighting, curved = weighting_of(site, stats), curvature_of(site, spec, w, stats)
        return [rounded(site, with_bits(spec, choice), w, curved, stats, weighting).error for choice in choices]

    def solve(
        self, site: Site, spec: QuantizeSpec, choice: Choice, stats: SiteStats | None, weight: Tensor, seed: int
    ) -> tuple[Quantized, tuple[str, ...]]:
        """The codes, and what the calibration data had to note. Raises RewriteError as `build`."""
        w = readable(site, weight)
        rounding = rounding_for(site, spec, curvature_of(site, spec, w, stats))
        found = quantized_or_refused(site, lambda: rounding(w))
        return found, (*rounding.notes, *table_notes(site, spec, w, found))

    def build(self, site: Site, spec: QuantizeSpec, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        """Raises RewriteError for NaN or infinity in the weight (named) and for scales outside their type."""
        quantized, notes = b.solution or self.solve(site, spec, choice, stats, b.weight(), b.seed)
        base = base_of(site, spec, quantized, b)
        lookup = base.lookup if site.gathers else None
        return b.fragment(base.matmul, base.consts, base.dense, lookup=lookup, adds_bias=True, notes=(*notes, *size_notes(site, spec)))

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """W' = `base`, the dequantised matrix [out, in]; the bias is not quantize's."""
        return widened(parts["base"]), None

    def equalises(self, spec: QuantizedSpec) -> bool:
        return spec.equalise

    def trial_error(self, site: Site, spec: QuantizedSpec, stats: SiteStats) -> float:
        return trial_error(site, spec, stats)

    def base_settings(self, spec: QuantizedSpec) -> Mapping[str, Any]:
        return quantizer_settings(spec)

    def base_again(self, settings: Mapping[str, Any]) -> tuple[SiteMethod, QuantizeSpec]:
        return self, QuantizeSpec(**settings)
