"""The settings of transact, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.specs.notations import Width


@dataclass(frozen=True, slots=True)
class TransactSpec:
    """Prunes the width between the two halves of attention and MLP blocks.

    `width` counts input features of the last matmul (o, down, fc2). Heads round up to whole heads, everything else up to `multiple_of`.
    """

    width: Width = field(metadata={"doc": "input features of the last matmul of a block that stay: a number or a percentage"})
    unit: Literal["heads", "head_dims"] = field(
        default="heads", metadata={"doc": "what goes in attention: whole heads, or dimensions of every head (q and k in rotary pairs)"}
    )
    score: Literal["activation", "taylor", "weight"] = field(
        default="activation",
        metadata={
            "doc": "what stays: the largest activations on the calibration data, |gradient x activation| (train.loss, labels), or weights"
        },
    )
    compensate: Literal["least_squares", "none"] = field(
        default="least_squares", metadata={"doc": "refit the last matmul to its old outputs on the calibration data"}
    )
    damping: float | None = field(
        default=None,
        metadata={
            "doc": "share of the mean of the second moment's diagonal that holds the refit to the old weight; by default as the sample "
            "asks for (OAS)",
            "minimum": 0,
            "maximum": 1,
        },
    )
    multiple_of: int = field(default=8, metadata={"doc": "widths are multiples of this", "minimum": 1})
    shots: int = field(default=1, metadata={"doc": "prune in so many steps, scoring the already pruned model anew", "minimum": 1})


class TransactLanguage(MethodLanguage):
    """What stands below `transact:` in a spec."""

    name: ClassVar[str] = "transact"
    kind: ClassVar[MethodKind] = "block"
    Spec: ClassVar[type] = TransactSpec
    automatic: ClassVar[tuple[str, ...]] = ("width",)
