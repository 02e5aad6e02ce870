"""matmorph: a compiler for the matrix multiplications of trained torch models.

The public names come from `matmorph.api` and are imported on first use, so that `import matmorph` and `import matmorph.runtime`
work on a machine without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from matmorph.api import Compiled, Model, compile, inspect_model, load_spec, plan, trace

_API = ("Compiled", "Model", "compile", "inspect_model", "load_spec", "plan", "trace")

__all__ = ["Compiled", "Model", "__version__", "compile", "inspect_model", "load_spec", "plan", "trace"]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'matmorph' has no attribute {name!r}")
    return getattr(import_module("matmorph.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
