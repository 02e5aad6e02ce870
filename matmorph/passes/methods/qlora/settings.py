"""The settings of qlora, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.methods.quantized_settings import QuantizedSpec, refuse_impossible, refuse_other_ranks
from matmorph.specs.notations import Rank


@dataclass(frozen=True, slots=True, kw_only=True)
class QLoraSpec(QuantizedSpec):
    """A quantised base and fresh factors of product zero beside it; the factors train."""

    rank: Rank = field(metadata={"doc": "inner size of the two factors: a number"})
    alpha: float | None = field(
        default=None, metadata={"doc": "the factors' product is scaled by alpha / rank; 1 without it", "exclusive_minimum": 0}
    )

    def __post_init__(self) -> None:
        refuse_impossible(self)
        refuse_other_ranks("qlora", self.rank)

    @property
    def adapter_scale(self) -> float:
        """alpha / rank; 1 without alpha."""
        return 1.0 if self.alpha is None else self.alpha / int(self.rank.value or 1)


class QLoraLanguage(MethodLanguage):
    """What stands below `qlora:` in a spec."""

    name: ClassVar[str] = "qlora"
    kind: ClassVar[MethodKind] = "replace"
    Spec: ClassVar[type] = QLoraSpec
