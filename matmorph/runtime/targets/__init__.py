"""The execution providers that matmorph compiles for: one file and one line of `TARGETS` each.

The records lie in the runtime because that imports nothing else of matmorph, and this package loads nothing but them, so that the spec
language and the passes read the same records without ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterable

from matmorph.runtime.targets.cpu import CPU
from matmorph.runtime.targets.cuda import CUDA
from matmorph.runtime.targets.target import Target

TARGETS: dict[str, Target] = {
    CUDA.name: CUDA,
    CPU.name: CPU,
}
"""By name, in the order in which a session that is told nothing tries them; the last is always there."""


def chosen_targets(names: Iterable[str]) -> tuple[Target, ...]:
    """Those of the table that `names` holds, the one that is always there first."""
    wanted = set(names)
    return tuple(target for target in reversed(TARGETS.values()) if target.name in wanted)


def target_names() -> str:
    """All names as text: "cpu or cuda"."""
    *most, final = sorted(TARGETS)
    return f"{', '.join(most)} or {final}" if most else final
