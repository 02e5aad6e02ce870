"""The settings of sparse_grad, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.specs.notations import Count


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGradSpec:
    """Few entries of the weight's update learn at each step, in a basis in which its gradients are sparse."""

    keep: Count = field(default=Count(1.0, percent=True), metadata={"doc": "how many entries of a weight learn: a percentage or a count"})
    mask: Literal["step", "fixed"] = field(
        default="step", metadata={"doc": "step: the largest |gradient| of each update; fixed: the largest mean |gradient| beforehand"}
    )
    basis: Literal["hosvd", "none"] = field(
        default="hosvd", metadata={"doc": "hosvd: singular vectors of the gradients of the preliminary phase; none: the weight's own axes"}
    )
    share: Literal["shape", "layer"] = field(
        default="shape", metadata={"doc": "shape: one basis for all weights of one shape under a rule; layer: each its own"}
    )
    steps: int = field(default=30, metadata={"doc": "calibration batches whose gradients make basis and fixed mask", "minimum": 1})

    def count(self, entries: int) -> int:
        """How many of so many entries learn, at least one."""
        return max(round(entries * self.keep.value / 100), 1) if self.keep.percent else int(self.keep.value)


class SparseGradLanguage(MethodLanguage):
    """What stands below `sparse_grad:` in a spec."""

    name: ClassVar[str] = "sparse_grad"
    kind: ClassVar[MethodKind] = "update"
    Spec: ClassVar[type] = SparseGradSpec
