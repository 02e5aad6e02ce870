"""Settings that methods of tensor trains share: modes by hand, and how cores are multiplied with rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from matmorph.runtime.targets import TARGETS
from matmorph.specs.ranks import Ranks

PlanWish = Literal["auto", "contract", "rebuild"]


@dataclass(frozen=True, slots=True)
class ModesSpec:
    """Factors of the two sides of the weight, one pair per core."""

    out: tuple[int, ...] = field(metadata={"doc": "sizes that multiply to the output features", "minimum": 1, "min_items": 2})
    in_: tuple[int, ...] = field(metadata={"key": "in", "doc": "sizes that multiply to the input features", "minimum": 1, "min_items": 2})

    def __post_init__(self) -> None:
        if len(self.out) != len(self.in_):
            raise ValueError(f"a core has one output mode and one input mode: out gives {len(self.out)}, in gives {len(self.in_)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractionSpec:
    """How cores are multiplied with rows. `tokens` and `target` are those of `export` where nothing stands here."""

    plan: PlanWish = field(
        default="auto",
        metadata={
            "doc": "contract: multiply core by core even where that is predicted to be slower; rebuild: the dense matrix, when the "
            "session loads; auto: whichever is predicted to be faster"
        },
    )
    tokens: tuple[int, ...] | None = field(
        default=None, metadata={"doc": "numbers of rows to plan for; those of export by default", "minimum": 1, "min_items": 1}
    )
    target: tuple[str, ...] | None = field(
        default=None,
        metadata={"doc": "devices to plan for; those of export by default", "choices": TARGETS.keys(), "min_items": 1},
    )


MAX_CORES = 64
"""Both sides of a matrix have at most 32 prime factors each below 2^32 features; what is beyond is 1."""


def refuse_wrong_count(rank: Ranks, cores: int, of: str) -> None:
    """ValueError for more cores than a matrix has factors, and for a list of ranks that is not one shorter than there are cores."""
    if cores > MAX_CORES:
        raise ValueError(f"{cores:,} cores: at most {MAX_CORES}, as many as there are factors above 1")
    if rank.each and len(rank.each) != cores - 1:
        raise ValueError(f"{cores} cores ({of}) take a list of {cores - 1}, one rank between neighbours; this list has {len(rank.each)}")
