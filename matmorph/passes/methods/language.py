"""What the spec language knows of a method, without anything that the method computes with: a spec is read before torch is."""

from __future__ import annotations

from typing import ClassVar, Literal

MethodKind = Literal["replace", "update", "block"]
"""replace: takes the place of the dense matmul; update: is added to what stays, or to what took its place; block: prunes a whole block."""


class MethodLanguage:
    """The part of a method that lies in its `settings.py`; the method itself inherits it.

    `name`: the YAML key. `Spec`: a frozen dataclass, whose fields are the YAML keys below it; fields `tokens` and `target` get those of
    `export` where they are None. `automatic`: the keys that may be `auto`. `example`: how a message shows what a method looks like in a
    spec; the first of the table that has one stands for all.
    """

    name: ClassVar[str]
    kind: ClassVar[MethodKind]
    Spec: ClassVar[type]
    automatic: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[str | None] = None
