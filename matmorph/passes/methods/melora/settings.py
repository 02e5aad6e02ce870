"""The settings of melora, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.methods.update_settings import ScaledRankSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MeloraSpec(ScaledRankSpec):
    """Small pairs of factors side by side, each between its own share of the inputs and of the outputs; `rank` is that of each pair."""

    groups: int = field(metadata={"doc": "how many pairs; divides the inputs and the outputs", "minimum": 2})


class MeloraLanguage(MethodLanguage):
    """What stands below `melora:` in a spec."""

    name: ClassVar[str] = "melora"
    kind: ClassVar[MethodKind] = "update"
    Spec: ClassVar[type] = MeloraSpec
