"""Hands that look into a work folder first, and put there what they finish."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from matmorph.errors import RewriteError
from matmorph.passes.methods.protocol import Methods
from matmorph.passes.work.digests import Digests, class_sha256, code_sha256
from matmorph.passes.work.folder import WorkFolder
from matmorph.passes.work.hands import Hands
from matmorph.passes.work.nest import NotANestError
from matmorph.passes.work.task import Task, packages_of
from matmorph.runtime.format.version import __version__


@dataclass(frozen=True, slots=True, eq=False)
class Remembering:
    """`hands`: who does what is not there yet."""

    hands: Hands
    folder: WorkFolder
    methods: Methods
    digests: Digests = field(default_factory=Digests)

    @property
    def count(self) -> int | None:
        return self.hands.count

    def do(self, task: Task) -> Any:
        """Raises RewriteError also for a method whose settings or solution have no written form."""
        used = sorted({use.method for use in task.uses})
        try:
            key = self.digests.of((code_sha256(), tuple(class_sha256(type(self.methods[name])) for name in used), task.identity()))
        except NotANestError as error:
            raise RewriteError(f"{task.path}: settings of {', '.join(used)} hold {error}, which has no written form for --work") from error
        packages = packages_of(self.methods)
        found = self.folder.get(task.kind, key, packages)
        if found is not None:
            return found
        made = self.hands.do(task)
        try:
            self.folder.put(task.kind, key, made, {"matmorph": __version__, "path": task.path, "methods": ", ".join(used)})
        except NotANestError as error:
            raise RewriteError(f"{task.path}: {', '.join(used)} solves {error}, which has no written form for --work") from error
        return made
