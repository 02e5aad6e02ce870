"""qlora: W becomes codes of a quantizer, with two factors beside it that start at zero, y = x @ Q^T + scale (x @ down) @ up + bias.

QLoRA (arXiv 2305.14314): the factors hold nothing yet, they are there to be trained. `down` is drawn as torch draws a linear layer
(Kaiming uniform with a = sqrt(5)), `up` is zero.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from matmorph.ir.core import Value
from matmorph.ir.site import Choice, Cost, Fragment, FragmentAdapter, Site, Statistic
from matmorph.passes.linalg.quantize import Quantized
from matmorph.passes.linalg.whiten import relative_weight_error
from matmorph.passes.methods.protocol import Error, FragmentBuilder, Peft, SiteStats
from matmorph.passes.methods.qlora.settings import QLoraLanguage, QLoraSpec
from matmorph.passes.methods.quantized_base import (
    base_of,
    curvature_of,
    quantized_cost,
    quantized_needs,
    quantized_or_refused,
    rounding_for,
    size_notes,
)
from matmorph.passes.methods.quantized_pair import QuantizedPair
from matmorph.passes.methods.weights import readable, stored, times


class QLora(QLoraLanguage, QuantizedPair):
    """Quantised matrix and low-rank factors to be trained."""

    code: ClassVar[str | None] = "QL"
    colour: ClassVar[int | None] = 5
    peft: ClassVar[Peft | None] = Peft(takes_in=True)

    def needs(self, spec: QLoraSpec) -> frozenset[Statistic]:
        return quantized_needs(spec)

    def choices(self, site: Site, spec: QLoraSpec) -> Iterable[Choice]:
        return [Choice(int(spec.rank.value or 1))]

    def cost(self, site: Site, spec: QLoraSpec, choice: Choice) -> Cost:
        return quantized_cost(site, spec, choice.rank or 0)

    def errors(self, site: Site, spec: QLoraSpec, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        w = readable(site, site.weight())
        rounding = rounding_for(site, spec, curvature_of(site, spec, w, stats))
        dense = quantized_or_refused(site, lambda: rounding(w)).dequantize()
        return [Error(relative_weight_error(w, dense)) for _ in choices]

    def solve(
        self, site: Site, spec: QLoraSpec, choice: Choice, stats: SiteStats | None, weight: Tensor, seed: int
    ) -> tuple[Quantized, tuple[str, ...]]:
        """The codes, and what the calibration data had to note. Raises RewriteError as `build`."""
        w = readable(site, weight)
        rounding = rounding_for(site, spec, curvature_of(site, spec, w, stats))
        return quantized_or_refused(site, lambda: rounding(w)), rounding.notes

    def build(self, site: Site, spec: QLoraSpec, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        """Raises RewriteError for NaN or infinity in the weight (named) and for scales outside their type."""
        quantized, said = b.solution or self.solve(site, spec, choice, stats, b.weight(), b.seed)
        base = base_of(site, spec, quantized, b)
        rank, scale = choice.rank or 1, spec.adapter_scale
        down = b.const("down", stored(site, _drawn(site, rank, b.seed)))
        up = b.const("up", stored(site, torch.zeros(rank, site.out_features)))

        def body(rows: Value) -> Value:
            update = b.matmul(b.matmul(rows, down, name="down"), up, name="up")
            scaled = times(b, update, scale)
            return b("aten.add.Tensor", base.matmul(rows), scaled)

        notes = (*said, *size_notes(site, spec))
        adapter = FragmentAdapter({"down": down, "up": up}, scale)
        return b.fragment(body, [*base.consts, down, up], base.dense, choice=choice, adds_bias=True, notes=notes, adapter=adapter)


def _drawn(site: Site, rank: int, seed: int) -> Tensor:
    """[in, rank], uniform within +- 1 / sqrt(in); every site has a stream of its own, whatever else is rewritten."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {site.path}".encode()))  # torch uses 32 bits of a seed
    bound = 1 / sqrt(site.in_features)
    return torch.empty(site.in_features, rank).uniform_(-bound, bound, generator=generator)
