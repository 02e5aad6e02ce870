"""How far something is, told to whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""(what is going on, how much of it is done, of how much or None)."""

StepProgress: TypeAlias = Callable[[int, int | None], None]
"""Of one thing that is going on: (how much of it is done, of how much or None)."""


def silent(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""
