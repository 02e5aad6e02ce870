"""The settings of loftq, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.methods.quantized_settings import QuantizedSpec, refuse_impossible, refuse_other_ranks
from matmorph.passes.methods.whitened_settings import damping_field, whiten_field
from matmorph.specs.notations import Rank


@dataclass(frozen=True, slots=True, kw_only=True)
class LoftQSpec(QuantizedSpec):
    """A quantised base and factors fitted to what the quantizer leaves over; the factors train."""

    rank: Rank = field(metadata={"doc": "inner size of the two factors: a number, or auto"})
    iterations: int = field(default=5, metadata={"doc": "alternations between quantizer and SVD; the best is kept", "minimum": 1})
    svd_first: bool = field(default=False, metadata={"doc": "SVD of W first, then the quantizer on what is left: a variant of the paper"})
    whiten: bool = whiten_field()
    damping: float | None = damping_field()
    factors: Literal["keep", "fp16"] = field(
        default="keep",
        metadata={"doc": "type the factors are stored in: the weight's, or half precision (with export.precision: keep; fp32 widens them)"},
    )
    alpha: float | None = field(
        default=None, metadata={"doc": "the factors' product is scaled by alpha / rank, and they are divided by it", "exclusive_minimum": 0}
    )

    def __post_init__(self) -> None:
        refuse_impossible(self)
        if self.rank.kind != "auto":
            refuse_other_ranks("loftq", self.rank)

    @property
    def adapter_scale(self) -> float:
        """alpha / rank; 1 without alpha."""
        return 1.0 if self.alpha is None else self.alpha / int(self.rank.value or 1)


class LoftQLanguage(MethodLanguage):
    """What stands below `loftq:` in a spec."""

    name: ClassVar[str] = "loftq"
    kind: ClassVar[MethodKind] = "replace"
    Spec: ClassVar[type] = LoftQSpec
    automatic: ClassVar[tuple[str, ...]] = ("rank", "bits")
