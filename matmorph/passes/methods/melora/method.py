"""melora: n small LoRAs side by side, y = x @ W^T + b + s x @ diag(down_1 @ up_1, .., down_n @ up_n) (MELoRA, arXiv 2402.17263, eq. 3).

Each pair stands between its own n-th of the inputs and of the outputs: together they have rank n r and the r (in + out) numbers of LoRA.
`down` [n, in / n, r] is drawn as lora draws it, `up` [n, r, out / n] starts at zero. All pairs are one stacked matmul.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from matmorph.ir.core import Const, Value
from matmorph.ir.site import Site
from matmorph.passes.linalg.modes import nearest_divisor
from matmorph.passes.methods.melora.settings import MeloraLanguage, MeloraSpec
from matmorph.passes.methods.protocol import FragmentBuilder, Peft
from matmorph.passes.methods.tensor_update import AddedUpdate, Part, constant, kaiming
from matmorph.passes.methods.weights import leading, times, widened


class Melora(MeloraLanguage, AddedUpdate):
    """Block-diagonal low-rank factors to be trained, beside a matmul that stays."""

    code: ClassVar[str | None] = "ME"
    peft: ClassVar[Peft | None] = Peft()

    def misfit(self, site: Site, spec: MeloraSpec) -> str | None:
        ins, outs, n = site.in_features, site.out_features, spec.groups
        if ins % n or outs % n:
            near = nearest_divisor(gcd(ins, outs), n)
            return f"{n} groups divide {ins} inputs and {outs} outputs not evenly; the nearest number that does is {near}"
        least = min(ins, outs) // n
        return f"rank {spec.rank} is above the {least} features of the smaller side of a group" if spec.rank > least else None

    def parts(self, site: Site, spec: MeloraSpec) -> Mapping[str, Part]:
        ins, outs = site.in_features // spec.groups, site.out_features // spec.groups
        return {
            "down": Part((spec.groups, ins, spec.rank), kaiming(ins)),
            "up": Part((spec.groups, spec.rank, outs), constant(0)),
        }

    def scale(self, spec: MeloraSpec) -> float:
        return spec.adapter_scale

    def macs(self, site: Site, spec: MeloraSpec) -> int:
        return spec.rank * (site.in_features + site.out_features)

    def update(self, rows: Value, parts: Mapping[str, Const], spec: MeloraSpec, b: FragmentBuilder) -> Value:
        n, share, _ = parts["down"].tensor.shape
        lead = leading(b, rows)
        grouped = b("aten.reshape.default", rows, (*(lead[:-1]), *(lead[-1:] or (1,)), n, share))
        narrow = b("aten.matmul.default", b("aten.transpose.int", grouped, -3, -2), parts["down"])
        scale = spec.adapter_scale
        scaled = times(b, narrow, scale)
        wide = b("aten.transpose.int", b("aten.matmul.default", scaled, parts["up"]), -3, -2)
        result: Value = b("aten.reshape.default", wide, (*lead, n * parts["up"].tensor.shape[-1]))
        return result

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """`scale` diag(down_k @ up_k)^T [out, in] in float32 or better, plus `base` where there is one."""
        blocks = widened(parts["down"]) @ widened(parts["up"])
        update = float(parts.get("scale", 1.0)) * _diagonal(blocks).T
        return update + (widened(parts["base"]) if "base" in parts else 0), None

    def two_factor(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of rank n r, with zeros outside the blocks."""
        return _diagonal(parts["down"]), float(parts.get("scale", 1.0)) * _diagonal(parts["up"])


def _diagonal(blocks: Tensor) -> Tensor:
    """[n, a, b] as [n a, n b]."""
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole
