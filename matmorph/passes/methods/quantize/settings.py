"""The settings of quantize, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.methods.quantized_settings import QuantizedSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSpec(QuantizedSpec):
    """Codes and scales only. Also for embedding tables (uniform codes)."""


class QuantizeLanguage(MethodLanguage):
    """What stands below `quantize:` in a spec."""

    name: ClassVar[str] = "quantize"
    kind: ClassVar[MethodKind] = "replace"
    Spec: ClassVar[type] = QuantizeSpec
    automatic: ClassVar[tuple[str, ...]] = ("bits",)
