"""loha: W' = W + s (up_1 @ down_1) o (up_2 @ down_2), an elementwise product (arXiv 2108.06098, eq. 4; 2309.14859).

The product of two matrices of rank r has a rank of up to r^2, for twice the numbers of LoRA. up_k [out, r], down_k [r, in]; `down_2` starts
at zero, the others as torch draws a linear layer, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from matmorph.ir.core import Const, Value
from matmorph.ir.site import Site
from matmorph.passes.methods.loha.settings import LohaLanguage, LohaSpec
from matmorph.passes.methods.protocol import FragmentBuilder
from matmorph.passes.methods.tensor_update import InsideUpdate, Part, constant, kaiming, rank_above
from matmorph.passes.methods.weights import times, widened


class Loha(LohaLanguage, InsideUpdate):
    """A weight with an elementwise product of low-rank matrices added to it."""

    code: ClassVar[str | None] = "LH"

    def misfit(self, site: Site, spec: LohaSpec) -> str | None:
        return rank_above(site, spec.rank)

    def parts(self, site: Site, spec: LohaSpec) -> Mapping[str, Part]:
        ins, outs, rank = site.in_features, site.out_features, spec.rank
        up, down = Part((outs, rank), kaiming(rank)), Part((rank, ins), kaiming(ins))
        return {"up_1": up, "down_1": down, "up_2": up, "down_2": Part((rank, ins), constant(0))}

    def scale(self, spec: LohaSpec) -> float:
        return spec.adapter_scale

    def weight(self, w: Value, parts: Mapping[str, Const], spec: LohaSpec, b: FragmentBuilder) -> Value:
        first, second = (b("aten.matmul.default", parts[f"up_{k}"], parts[f"down_{k}"]) for k in (1, 2))
        product = b("aten.mul.Tensor", first, second)
        scale = spec.adapter_scale
        result: Value = b("aten.add.Tensor", w, times(b, product, scale))
        return result

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """W' [out, in] in float32 or better, of `base` = W and the four factors."""
        first, second = (widened(parts[f"up_{k}"]) @ widened(parts[f"down_{k}"]) for k in (1, 2))
        return widened(parts["base"]) + float(parts.get("scale", 1.0)) * first * second, None
