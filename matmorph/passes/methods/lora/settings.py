"""The settings of lora, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.methods.update_settings import alpha_field, refuse_rslora, rslora_field, scale_of
from matmorph.specs.notations import Rank

Init = Literal["kaiming", "gaussian", "pissa", "olora", "milora"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """Factors of inner size `rank` to be trained beside a matmul that stays; after a replacing method, beside what that one put in."""

    rank: Rank = field(metadata={"doc": "inner size of the two factors: a number"})
    alpha: float | None = alpha_field()
    rslora: bool = rslora_field()
    init: Init = field(
        default="kaiming",
        metadata={
            "doc": "kaiming, gaussian: a product of zero; pissa, olora, milora: a part of the weight, which the frozen base then lacks"
        },
    )

    def __post_init__(self) -> None:
        if self.rank.kind != "fixed":
            raise ValueError(f"lora takes a number as its rank, not {self.rank.kind}")
        refuse_rslora(self.rslora, self.alpha)

    @property
    def adapter_scale(self) -> float:
        """See `scale_of`."""
        return scale_of(int(self.rank.value or 1), self.alpha, self.rslora)


class LoraLanguage(MethodLanguage):
    """What stands below `lora:` in a spec."""

    name: ClassVar[str] = "lora"
    kind: ClassVar[MethodKind] = "update"
    Spec: ClassVar[type] = LoraSpec
