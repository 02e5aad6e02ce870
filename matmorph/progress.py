"""How far something is, told to whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""(what is going on, how much of it is done, of how much or None)."""

StepProgress: TypeAlias = Callable[[int, int | None], None]
"""Of one thing that is going on: (how much of it is done, of how much or None)."""


def silent(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


@runtime_checkable
class Watcher(Protocol):
    """A `Progress` that also wants to know which block or matmul it is at."""

    def __call__(self, what: str, done: int, total: int | None) -> None: ...

    def at(self, what: str, place: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """The `StepProgress` of `what`."""

    progress: Progress
    what: str

    def __call__(self, done: int, total: int | None) -> None:
        self.progress(self.what, done, total)

    def at(self, place: str) -> None:
        if isinstance(self.progress, Watcher):
            self.progress.at(self.what, place)


def tell(progress: StepProgress | None, place: str, done: int, total: int | None) -> None:
    """How far a step is, and where, as far as anybody wants to know."""
    if progress is None:
        return
    progress(done, total)
    if isinstance(progress, Step):
        progress.at(place)
