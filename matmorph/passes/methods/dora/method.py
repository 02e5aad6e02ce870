"""dora: length and direction of every row of the weight apart, W' = m o V / |V| with V = W + s (down @ up)^T (arXiv 2402.09353, eq. 5).

m [out] starts as the norms of W's rows, `up` at zero, so that W' = W but for rounding. The paper writes the norm of columns, of a weight
[in, out]; here, as in its authors' code and in PEFT, they are rows of [out, in]: one length per output. |V| is a constant to the gradient
(section 4.3, eq. 11) but for `norm_gradient`. A row of zeros has no direction and stays zero until the factors give it one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Generator, Tensor

from matmorph.ir.core import Const, Value
from matmorph.ir.site import Site
from matmorph.passes.methods.dora.settings import DoraLanguage, DoraSpec
from matmorph.passes.methods.protocol import FragmentBuilder
from matmorph.passes.methods.tensor_update import InsideUpdate, Part, constant, kaiming, rank_above
from matmorph.passes.methods.weights import times, widened

WIDE = ("float32", "float64")
"""Types that hold the square of a norm; others compute it in float32."""
TINY = 1e-30
"""Added to the square of a norm: far below what a row of a trained weight has, and enough that zero is divided by no zero."""


class Dora(DoraLanguage, InsideUpdate):
    """A weight whose rows have a trained length and a trained direction."""

    code: ClassVar[str | None] = "DO"

    def misfit(self, site: Site, spec: DoraSpec) -> str | None:
        return rank_above(site, spec.rank)

    def parts(self, site: Site, spec: DoraSpec) -> Mapping[str, Part]:
        ins, outs = site.in_features, site.out_features
        return {
            "down": Part((ins, spec.rank), kaiming(ins)),
            "up": Part((spec.rank, outs), constant(0)),
            "magnitude": Part((outs,), _norms),
        }

    def scale(self, spec: DoraSpec) -> float:
        return spec.adapter_scale

    def weight(self, w: Value, parts: Mapping[str, Const], spec: DoraSpec, b: FragmentBuilder) -> Value:
        product = b("aten.t.default", b("aten.matmul.default", parts["down"], parts["up"]))
        scale = spec.adapter_scale
        turned = b("aten.add.Tensor", w, times(b, product, scale))
        wide = turned if w.tensor.dtype in WIDE else b("aten._to_copy.default", turned, dtype=torch.float32)
        squares = b("aten.sum.dim_IntList", b("aten.mul.Tensor", wide, wide), [1], True)
        norm = b("aten.sqrt.default", b("aten.add.Scalar", squares, TINY))
        fixed = norm if spec.norm_gradient else b("aten.detach.default", norm)
        ratio = b("aten.div.Tensor", b("aten.unsqueeze.default", parts["magnitude"], 1), fixed)
        narrow = ratio if wide is turned else b("aten._to_copy.default", ratio, dtype=w.tensor.torch_dtype)
        result: Value = b("aten.mul.Tensor", turned, narrow)
        return result

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """W' [out, in] in float32 or better, of `base` = W and the three tensors."""
        update = float(parts.get("scale", 1.0)) * (widened(parts["down"]) @ widened(parts["up"])).T
        turned = widened(parts["base"]) + update
        norm: Tensor = (turned.square().sum(1, keepdim=True) + TINY).sqrt()
        return widened(parts["magnitude"])[:, None] / norm * turned, None


def _norms(shape: tuple[int, ...], generator: Generator, weight: Callable[[], Tensor]) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight().double(), dim=1)
    return norms
