"""matmorph: a compiler for the matrix multiplications of trained torch models.

The public names are imported from their homes on first use, so that `import matmorph` and `import matmorph.runtime` work on a machine
without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from matmorph.runtime.format.version import __version__

if TYPE_CHECKING:
    from matmorph.api import Model, Report, Spec, compile, explain, inspect_model, load_spec, plan, trace
    from matmorph.compiled import Compiled
    from matmorph.optimizers import SGD, AdamAtan2, AdamW, Lion
    from matmorph.passes.pruning.widths import prune_schedule

_API = ("Model", "Report", "Spec", "compile", "explain", "inspect_model", "load_spec", "plan", "trace")
_OPTIMIZERS = ("SGD", "AdamAtan2", "AdamW", "Lion")
_HOMES = {
    **dict.fromkeys(_API, "matmorph.api"),
    **dict.fromkeys(_OPTIMIZERS, "matmorph.optimizers"),
    "Compiled": "matmorph.compiled",
    "prune_schedule": "matmorph.passes.pruning.widths",
}

__all__ = [
    "SGD",
    "AdamAtan2",
    "AdamW",
    "Compiled",
    "Lion",
    "Model",
    "Report",
    "Spec",
    "__version__",
    "compile",
    "explain",
    "inspect_model",
    "load_spec",
    "plan",
    "prune_schedule",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'matmorph' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
