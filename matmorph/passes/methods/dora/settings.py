"""The settings of dora, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.methods.update_settings import ScaledRankSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DoraSpec(ScaledRankSpec):
    """A length for every row of the weight, to be trained, and factors that turn its direction."""

    norm_gradient: bool = field(
        default=False,
        metadata={"doc": "let the gradient through the norm too; without it the norm counts as a constant, as its authors train"},
    )


class DoraLanguage(MethodLanguage):
    """What stands below `dora:` in a spec."""

    name: ClassVar[str] = "dora"
    kind: ClassVar[MethodKind] = "update"
    Spec: ClassVar[type] = DoraSpec
