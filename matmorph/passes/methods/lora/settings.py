"""The settings of lora, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar, Literal

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.specs.notations import Rank

Init = Literal["kaiming", "gaussian", "pissa", "olora", "milora"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """Factors of inner size `rank` to be trained beside a matmul that stays; after a replacing method, beside what that one put in."""

    rank: Rank = field(metadata={"doc": "inner size of the two factors: a number"})
    alpha: float | None = field(
        default=None,
        metadata={
            "doc": "the factors' product is scaled by alpha / rank (rslora: alpha / sqrt(rank)); 1 without it",
            "exclusive_minimum": 0,
        },
    )
    rslora: bool = field(default=False, metadata={"doc": "scale by alpha / sqrt(rank), which keeps large ranks learning"})
    init: Init = field(
        default="kaiming",
        metadata={
            "doc": "kaiming, gaussian: a product of zero; pissa, olora, milora: a part of the weight, which the frozen base then lacks"
        },
    )

    def __post_init__(self) -> None:
        if self.rank.kind != "fixed":
            raise ValueError(f"lora takes a number as its rank, not {self.rank.kind}")
        if self.rslora and self.alpha is None:
            raise ValueError("rslora scales alpha by sqrt(rank): give alpha")

    @property
    def adapter_scale(self) -> float:
        """alpha / rank, under rslora alpha / sqrt(rank); 1 without alpha."""
        rank = int(self.rank.value or 1)
        return 1.0 if self.alpha is None else self.alpha / (sqrt(rank) if self.rslora else rank)


class LoraLanguage(MethodLanguage):
    """What stands below `lora:` in a spec."""

    name: ClassVar[str] = "lora"
    kind: ClassVar[MethodKind] = "update"
    Spec: ClassVar[type] = LoraSpec
