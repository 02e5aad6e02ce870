"""The settings of low_rank, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from matmorph.passes.linalg.choices import Solver
from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.methods.whitened_settings import damping_field, whiten_field
from matmorph.specs.notations import Rank


@dataclass(frozen=True, slots=True)
class LowRankSpec:
    """Two factors of inner size `rank`.

    `{error: e}` bounds the weight error |W - W'|/|W| of a plain rewrite and the output error on the calibration data of a whitened one;
    `{energy: e}` counts squared singular values of W, or of W L with L L^T the damped second moment of the input. Where sensitivities were
    gathered (`calibration.sensitivity`), whitened means C^T W L with C C^T the damped second moment of the gradients at the output, for
    `error` too.
    """

    rank: Rank = field(metadata={"doc": "inner size of the two factors"})
    whiten: bool = whiten_field()
    damping: float | None = damping_field()
    solver: Solver = field(default="auto", metadata={"doc": "singular value solver; each proves its result within 1 % of the best"})


class LowRankLanguage(MethodLanguage):
    """What stands below `low_rank:` in a spec."""

    name: ClassVar[str] = "low_rank"
    kind: ClassVar[MethodKind] = "replace"
    Spec: ClassVar[type] = LowRankSpec
    automatic: ClassVar[tuple[str, ...]] = ("rank",)
    example: ClassVar[str | None] = "{low_rank: {rank: 64}}"
