"""ia3: outputs or inputs of a matmul times a number each, y = l o (x @ W^T + b) or y = (x o l) @ W^T + b.

IA3, arXiv 2205.05638, section 3.3. l starts at one. It stands in the weight, l o W or W o l, and in the bias of scaled outputs, so that
nothing is added to inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from matmorph.ir.core import Const, Value
from matmorph.ir.site import Reject, Site
from matmorph.passes.methods.ia3.settings import IA3Language, IA3Spec
from matmorph.passes.methods.protocol import FragmentBuilder
from matmorph.passes.methods.tensor_update import InsideUpdate, Part, constant
from matmorph.passes.methods.weights import widened


class IA3(IA3Language, InsideUpdate):
    """A weight whose rows, or columns, have a trained factor."""

    code: ClassVar[str | None] = "IA"

    def check(self, site: Site, spec: IA3Spec) -> Reject | None:
        odd = site.bias is None and {application.bias for application in site.applications} != {None}
        why = Reject("ia3 scales a bias of one number per output, the same wherever the weight is used")
        return super().check(site, spec) or (why if spec.of == "outputs" and odd else None)

    def parts(self, site: Site, spec: IA3Spec) -> Mapping[str, Part]:
        return {spec.of: Part((site.out_features if spec.of == "outputs" else site.in_features,), constant(1))}

    def weight(self, w: Value, parts: Mapping[str, Const], spec: IA3Spec, b: FragmentBuilder) -> Value:
        factor: Value = parts[spec.of]
        result: Value = b("aten.mul.Tensor", w, factor if spec.of == "inputs" else b("aten.unsqueeze.default", factor, 1))
        return result

    def bias(self, site: Site, own: Value | None, parts: Mapping[str, Const], spec: IA3Spec, b: FragmentBuilder) -> Value | None:
        """l o b of scaled outputs; where b itself is added after the fragment, what is missing of that."""
        if spec.of == "inputs" or site.bias is None:
            return own
        if own is not None:
            return b("aten.mul.Tensor", own, parts["outputs"])
        return b("aten.mul.Tensor", site.bias, b("aten.add.Scalar", parts["outputs"], -1.0))

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(W' [out, in], b') in float32 or better, of `base` = W and `bias` where there is one."""
        w, b = widened(parts["base"]), parts.get("bias")
        if "inputs" in parts:
            return w * widened(parts["inputs"]), b
        factor = widened(parts["outputs"])
        return w * factor[:, None], None if b is None else widened(b) * factor
