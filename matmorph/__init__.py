"""matmorph: a compiler for the matrix multiplications of trained torch models.

The public names are imported from their homes on first use, so that `import matmorph` and `import matmorph.runtime` work on a machine
without torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from matmorph.runtime.format.version import __version__

if TYPE_CHECKING:
    from matmorph.api import Model, Report, compile, explain, inspect_model, open_folder, plan, trace
    from matmorph.compiled import Compiled
    from matmorph.models.text_batches import text_batches
    from matmorph.optimizers import SGD, AdamAtan2, AdamW, Lion
    from matmorph.passes.pruning.widths import prune_schedule
    from matmorph.spec import Spec, load_spec, method, methods
    from matmorph.specs.objects import Auto, Energy, MaxError, Percent, Ratio
    from matmorph.specs.schema import Rule

_HOMES = {
    **dict.fromkeys(("Model", "Report", "compile", "explain", "inspect_model", "open_folder", "plan", "trace"), "matmorph.api"),
    **dict.fromkeys(("Spec", "load_spec", "method", "methods"), "matmorph.spec"),
    **dict.fromkeys(("Auto", "Energy", "MaxError", "Percent", "Ratio"), "matmorph.specs.objects"),
    **dict.fromkeys(("SGD", "AdamAtan2", "AdamW", "Lion"), "matmorph.optimizers"),
    "Compiled": "matmorph.compiled",
    "Rule": "matmorph.specs.schema",
    "prune_schedule": "matmorph.passes.pruning.widths",
    "text_batches": "matmorph.models.text_batches",
}

__all__ = [
    "SGD",
    "AdamAtan2",
    "AdamW",
    "Auto",
    "Compiled",
    "Energy",
    "Lion",
    "MaxError",
    "Model",
    "Percent",
    "Ratio",
    "Report",
    "Rule",
    "Spec",
    "__version__",
    "compile",
    "explain",
    "inspect_model",
    "load_spec",
    "method",
    "methods",
    "open_folder",
    "plan",
    "prune_schedule",
    "text_batches",
    "trace",
]


def __getattr__(name: str) -> Any:
    """A public name from its home; any other in CamelCase is the class of a method, which is given its settings."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    found = _method_classes() if name[:1].isupper() else {}
    if name in found:
        return import_module("matmorph.spec").method(found[name])
    from matmorph.errors import did_you_mean  # a machine that only runs artefacts loads nothing but the runtime

    raise AttributeError(f"module 'matmorph' has no attribute {name!r}{did_you_mean(name, [*_HOMES, *found])}")


def _method_classes() -> dict[str, str]:
    """Names of methods by their classes; {} on a machine that only runs artefacts, without torch."""
    return {} if find_spec("torch") is None else import_module("matmorph.spec").method_classes()


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_method_classes()})
