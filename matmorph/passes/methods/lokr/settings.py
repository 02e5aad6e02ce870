"""The settings of lokr, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.methods.update_settings import ScaledRankSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LokrSpec(ScaledRankSpec):
    """A Kronecker product of two small matrices; `rank` is that of the larger, which is whole where it would save nothing."""

    factor: int | None = field(
        default=None,
        metadata={
            "doc": "both sides of the first matrix; divides inputs and outputs; without it the most even factors",
            "minimum": 2,
        },
    )


class LokrLanguage(MethodLanguage):
    """What stands below `lokr:` in a spec."""

    name: ClassVar[str] = "lokr"
    kind: ClassVar[MethodKind] = "update"
    Spec: ClassVar[type] = LokrSpec
