"""lokr: a Kronecker product beside the matmul, y = x @ W^T + b + s x @ (left (x) right)^T (LoKr, arXiv 2309.14859, section 3.2).

left [o1, i1] and right [o2, i2] with o1 o2 = out and i1 i2 = in; right is a product of two factors where its rank is less than half its
longer side, and whole otherwise, as in LyCORIS and PEFT. `left` starts at zero, the rest as torch draws a linear layer. No [out, in] matrix
is made: a row is [i1, i2], and is multiplied from both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, isqrt
from typing import ClassVar

import torch
from torch import Tensor

from matmorph.ir.core import Const, Value
from matmorph.ir.site import Site
from matmorph.passes.linalg.modes import nearest_divisor
from matmorph.passes.methods.lokr.settings import LokrLanguage, LokrSpec
from matmorph.passes.methods.protocol import FragmentBuilder, Peft
from matmorph.passes.methods.tensor_update import AddedUpdate, Part, constant, kaiming
from matmorph.passes.methods.weights import leading, times, widened


class Lokr(LokrLanguage, AddedUpdate):
    """A Kronecker product to be trained, beside a matmul that stays."""

    code: ClassVar[str | None] = "LK"
    peft: ClassVar[Peft | None] = Peft()

    def misfit(self, site: Site, spec: LokrSpec) -> str | None:
        ins, outs, factor = site.in_features, site.out_features, spec.factor
        if factor is not None and (ins % factor or outs % factor):
            near = nearest_divisor(gcd(ins, outs), factor)
            return f"factor {factor} divides not both {ins} inputs and {outs} outputs; the nearest that does is {near}"
        return None

    def parts(self, site: Site, spec: LokrSpec) -> Mapping[str, Part]:
        (o1, o2), (i1, i2) = (_factors(size, spec.factor) for size in (site.out_features, site.in_features))
        left = {"left": Part((o1, i1), constant(0))}
        if 2 * spec.rank >= max(o2, i2):
            return {**left, "right": Part((i2, o2), kaiming(i2))}
        return {**left, "down": Part((i2, spec.rank), kaiming(i2)), "up": Part((spec.rank, o2), kaiming(spec.rank))}

    def scale(self, spec: LokrSpec) -> float:
        return spec.adapter_scale

    def macs(self, site: Site, spec: LokrSpec) -> int:
        """Of both sides, one after the other."""
        (o1, o2), (i1, i2) = (_factors(size, spec.factor) for size in (site.out_features, site.in_features))
        right = i2 * o2 if 2 * spec.rank >= max(o2, i2) else spec.rank * (i2 + o2)
        return i1 * right + o1 * i1 * o2

    def update(self, rows: Value, parts: Mapping[str, Const], spec: LokrSpec, b: FragmentBuilder) -> Value:
        left, lead = parts["left"], leading(b, rows)
        o1, i1 = left.tensor.shape
        x = b("aten.reshape.default", rows, (*lead, i1, int(rows.tensor.shape[-1]) // int(i1)))
        for name in ("right", "down", "up"):
            x = b("aten.matmul.default", x, parts[name]) if name in parts else x
        scale = spec.adapter_scale
        y = b("aten.matmul.default", times(b, left, scale), x)
        result: Value = b("aten.reshape.default", y, (*lead, int(o1) * int(y.tensor.shape[-1])))
        return result

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """`scale` left (x) right [out, in] in float32 or better, plus `base` where there is one."""
        right = parts["right"] if "right" in parts else widened(parts["down"]) @ widened(parts["up"])
        update = float(parts.get("scale", 1.0)) * torch.kron(widened(parts["left"]), widened(right).T.contiguous())
        return update + (widened(parts["base"]) if "base" in parts else 0), None

    def two_factor(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """left (x) (down up)^T = (left (x) up^T) (1 (x) down^T), of rank i1 r; a whole `right` is the second factor itself."""
        left = parts["left"]
        down = parts.get("down", parts.get("right"))
        if down is None:
            raise KeyError("down")
        up = parts.get("up", torch.eye(down.shape[1], dtype=down.dtype))
        one = torch.eye(left.shape[1], dtype=left.dtype)
        return torch.kron(one, down.contiguous()), float(parts.get("scale", 1.0)) * torch.kron(left.T.contiguous(), up.contiguous())


def _factors(size: int, factor: int | None) -> tuple[int, int]:
    """(the first, the rest); the most even without a factor, the smaller first."""
    first = factor or next(k for k in range(isqrt(size), 0, -1) if size % k == 0)
    return first, size // first
