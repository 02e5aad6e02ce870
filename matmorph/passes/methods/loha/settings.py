"""The settings of loha, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.methods.update_settings import ScaledRankSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LohaSpec(ScaledRankSpec):
    """The elementwise product of two low-rank matrices of inner size `rank`, whose rank is up to the square of that."""


class LohaLanguage(MethodLanguage):
    """What stands below `loha:` in a spec."""

    name: ClassVar[str] = "loha"
    kind: ClassVar[MethodKind] = "update"
    Spec: ClassVar[type] = LohaSpec
