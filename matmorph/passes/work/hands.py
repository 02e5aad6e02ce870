"""Who does the tasks of a run: this process, others, other machines. What comes of a task is the same whoever does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from matmorph.passes.methods.protocol import Methods
from matmorph.passes.work.task import Task


class Hands(Protocol):
    """`count`: tasks at a time, None = one per thread of torch."""

    @property
    def count(self) -> int | None: ...

    def do(self, task: Task) -> Any:
        """What the task gives. Called from several threads at a time. Raises what the task raises."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Here:
    """This process."""

    methods: Methods
    count: int | None = None

    def do(self, task: Task) -> Any:
        return task.run(self.methods)
