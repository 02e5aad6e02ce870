"""Operators that draw random numbers. What they give can neither be checked nor exported: two runs of one file would differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from matmorph.ir.core import Graph, Node
from matmorph.ir.ops import resolve

_SWITCHES = ("train", "training")
_SHARES = ("p", "dropout_p", "dropout")
"""Arguments that say whether an operator draws at all, and how much of its operand it drops."""


def may_draw(op: str) -> bool:
    """Whether the operator can draw, whatever its arguments say. By torch's own tag."""
    return torch.Tag.nondeterministic_seeded in getattr(resolve(op), "tags", ())


def draws(node: Node) -> bool:
    """Whether the node's result is random: dropout outside of training is not."""
    target = resolve(node.op)
    if not isinstance(target, torch._ops.OpOverload) or not may_draw(node.op):
        return False
    given: dict[str, Any] = {
        argument.name: node.args[place] if place < len(node.args) else node.attrs.get(argument.name, argument.default_value)
        for place, argument in enumerate(target._schema.arguments)
    }
    off = any(given.get(name) is False for name in _SWITCHES)
    return not off and not any(isinstance(given.get(name), int | float) and given[name] == 0 for name in _SHARES)


def drawing(graph: Graph) -> Iterable[Node]:
    """The nodes that draw, in order."""
    return (node for node in graph.nodes if draws(node))
