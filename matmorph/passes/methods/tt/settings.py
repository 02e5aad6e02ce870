"""The settings of tt, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from matmorph.passes.linalg.choices import Solver
from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.methods.train_settings import ContractionSpec, ModesSpec, refuse_wrong_count
from matmorph.specs.ranks import Ranks

CORES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TTSpec(ContractionSpec):
    """Cores of a tensor train in place of the weight."""

    rank: Ranks = field(metadata={"doc": "ranks between neighbouring cores: a number for all, or a list with one for each pair"})
    modes: ModesSpec | None = field(default=None, metadata={"doc": "factors of the output and of the input features, one pair per core"})
    cores: int | None = field(default=None, metadata={"doc": f"number of cores where modes are found by themselves; {CORES}", "minimum": 2})
    padding: Literal["refuse", "pad"] = field(
        default="refuse",
        metadata={
            "doc": "for sizes without balanced factors (primes): refuse them, or pad the weight with zeros to the next that have some"
        },
    )
    solver: Solver = field(default="auto", metadata={"doc": "singular value solver of the unfoldings"})

    def __post_init__(self) -> None:
        if self.modes is not None and self.cores is not None:
            raise ValueError("modes say how many cores there are: give modes or cores, not both")
        refuse_wrong_count(self.rank, self.count, "modes" if self.modes else "cores" if self.cores else "the default")

    @property
    def count(self) -> int:
        """Number of cores."""
        return len(self.modes.out) if self.modes is not None else self.cores or CORES


class TTLanguage(MethodLanguage):
    """What stands below `tt:` in a spec."""

    name: ClassVar[str] = "tt"
    kind: ClassVar[MethodKind] = "replace"
    Spec: ClassVar[type] = TTSpec
    automatic: ClassVar[tuple[str, ...]] = ("rank",)
