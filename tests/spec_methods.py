"""Methods that exist for the tests of the spec language alone: one of each kind, with every type of setting a Spec can have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from matmorph.specs.schema import Rank


@dataclass(frozen=True)
class LowRankSpec:
    """Two factors of inner size `rank`."""

    rank: Rank = field(metadata={"doc": "inner size of the two factors"})
    whiten: bool = field(default=False, metadata={"doc": "minimise the output error"})
    damping: float = field(default=1e-4, metadata={"doc": "share of the diagonal that is added", "minimum": 0, "maximum": 1})
    solver: Literal["auto", "exact"] = "auto"


@dataclass(frozen=True)
class Modes:
    """Factors of the two axes."""

    in_modes: tuple[int, ...] = field(metadata={"key": "in", "minimum": 2})
    out_modes: tuple[int, ...] = field(metadata={"key": "out", "minimum": 2})


@dataclass(frozen=True)
class LoraSpec:
    """A trainable update of two factors."""

    rank: int = field(default=8, metadata={"minimum": 1})
    bits: Literal[2, 4, 8] = 4
    levels: int | Literal["auto"] = field(default="auto", metadata={"minimum": 1})
    init: str = field(default="zero", metadata={"choices": ("zero", "normal")})
    label: str | None = None
    modes: Modes | None = None
    span: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.span[0] > self.span[1]:
            raise ValueError(f"span {self.span[0]:g} .. {self.span[1]:g} is empty")


@dataclass(frozen=True)
class NoSettings:
    """Nothing to set."""


class Fake:
    """What the loader asks of every method."""

    automatic: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[str | None] = None


class LowRank(Fake):
    example: ClassVar[str | None] = "{low_rank: {rank: 64}}"
    kind: ClassVar[str] = "replace"
    automatic: ClassVar[tuple[str, ...]] = ("rank",)
    Spec: ClassVar[type] = LowRankSpec


class Quantize(Fake):
    kind: ClassVar[str] = "replace"
    Spec: ClassVar[type] = NoSettings


class Lora(Fake):
    kind: ClassVar[str] = "update"
    Spec: ClassVar[type] = LoraSpec


class Prune(Fake):
    kind: ClassVar[str] = "block"
    Spec: ClassVar[type] = NoSettings


METHODS: dict[str, type[Any]] = {"low_rank": LowRank, "quantize": Quantize, "lora": Lora, "prune": Prune}
