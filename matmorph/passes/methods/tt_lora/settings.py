"""The settings of tt_lora, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.methods.train_settings import ContractionSpec, ModesSpec, refuse_wrong_count
from matmorph.specs.ranks import Ranks

CORES = 6
Init = Literal["zero", "tt_svd", "direct"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TTLoraSpec(ContractionSpec):
    """Cores of a tensor train to be trained beside a matmul that stays, or beside what a replacing method put in."""

    rank: Ranks = field(metadata={"doc": "ranks between neighbouring cores: a number for all, or a list with one for each pair"})
    alpha: float = field(default=1.0, metadata={"doc": "the update is scaled by alpha, which no rank divides", "exclusive_minimum": 0})
    shape: tuple[int, ...] | None = field(
        default=None,
        metadata={"doc": "the papers' notation: factors of the inputs, then factors of the outputs reversed", "minimum": 1, "min_items": 2},
    )
    modes: ModesSpec | None = field(default=None, metadata={"doc": "a TT-matrix instead: pairs of an output and an input factor"})
    cores: int | None = field(
        default=None, metadata={"doc": f"number of cores where the shape is found by itself; {CORES}, half of them inputs", "minimum": 2}
    )
    init: Init = field(
        default="zero", metadata={"doc": "zero: the model starts unchanged; tt_svd, direct: the authors' random starts, which change it"}
    )

    def __post_init__(self) -> None:
        given = [name for name in ("shape", "modes", "cores") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of shape, modes and cores, not {' and '.join(given)}")
        if self.rank.kind != "fixed":
            raise ValueError(f"tt_lora takes a number or a list as its rank, not {self.rank.kind}")
        count = len(self.shape or ()) or (len(self.modes.out) if self.modes else self.cores or CORES)
        refuse_wrong_count(self.rank, count, given[0] if given else "the default")


class TTLoraLanguage(MethodLanguage):
    """What stands below `tt_lora:` in a spec."""

    name: ClassVar[str] = "tt_lora"
    kind: ClassVar[MethodKind] = "update"
    Spec: ClassVar[type] = TTLoraSpec
