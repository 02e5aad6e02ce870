"""The execution providers that a user asks for, by short or full name; what each of them is stands in `targets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime

from matmorph.runtime.errors import ProviderError, nearest
from matmorph.runtime.targets import TARGETS

Provider = str | tuple[str, Mapping[str, Any]]
"""A name ("cuda", "CPUExecutionProvider") or a name with ONNX Runtime's options for it."""


def name_of(provider: Provider) -> str:
    """The name, without the options."""
    return provider if isinstance(provider, str) else provider[0]


def requested(providers: str | Sequence[Provider]) -> list[Provider]:
    """The explicit list with full names. Raises ProviderError for one that this machine cannot load, with the reason."""
    asked = [providers] if isinstance(providers, str) else list(providers)
    if not asked:
        raise ProviderError("providers is an empty list; None lets the session choose")
    full = [_full_name(p) if isinstance(p, str) else (_full_name(p[0]), p[1]) for p in asked]
    available = onnxruntime.get_available_providers()
    for name in map(name_of, full):
        if name not in available:
            hint = nearest(name, [*available, *TARGETS])
            raise ProviderError(f"{name} is not in this onnxruntime; it has {', '.join(available)}{hint}")
    for target in TARGETS.values():
        obstacle = target.obstacle() if target.provider in map(name_of, full) else None
        if obstacle:
            raise ProviderError(f"{target.provider} was asked for and cannot be used: {obstacle}")
    return full


def _full_name(name: str) -> str:
    return TARGETS[name].provider if name in TARGETS else name
