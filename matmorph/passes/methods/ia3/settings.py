"""The settings of ia3, and what the spec language knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from matmorph.passes.methods.language import MethodKind, MethodLanguage


@dataclass(frozen=True, slots=True, kw_only=True)
class IA3Spec:
    """One number to be trained per output, or per input."""

    of: Literal["outputs", "inputs"] = field(
        default="outputs",
        metadata={"doc": "what is scaled: outputs, as of keys and values; inputs, as of the last matmul of an MLP"},
    )


class IA3Language(MethodLanguage):
    """What stands below `ia3:` in a spec."""

    name: ClassVar[str] = "ia3"
    kind: ClassVar[MethodKind] = "update"
    Spec: ClassVar[type] = IA3Spec
