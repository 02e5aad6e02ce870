"""A task: the work on one site that needs nothing of the graph, so that it can be done in another process, and kept.

What a method reads of its site is in `bare`: the site without the graph around it. A task that is run gives the same bits wherever that is:
on one thread, from tensors that are laid out as torch does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from matmorph.errors import VerifyError
from matmorph.ir.core import Const, Node, Value
from matmorph.ir.site import Application, Site
from matmorph.passes.methods.protocol import Methods
from matmorph.specs.schema import MethodUse


class Task(Protocol):
    """`kind`: a word for what is done."""

    @property
    def kind(self) -> str: ...

    @property
    def path(self) -> str:
        """Of the site, for messages."""
        ...

    @property
    def uses(self) -> tuple[MethodUse, ...]:
        """All methods that have a part in it."""
        ...

    def identity(self) -> Any:
        """A nest of all that the result depends on, methods and code apart."""
        ...

    def run(self, methods: Methods) -> Any:
        """The result, a nest. Raises RewriteError."""
        ...


def bare(site: Site) -> Site:
    """The site as a task carries it: what is said of it stays, of the graph only types and counts, and no weight."""
    return replace(
        site,
        const=_const(site.const),
        applications=tuple(_application(one) for one in site.applications),
        gathers=tuple(Node(node.op, (), tuple(_value(value) for value in node.outputs)) for node in site.gathers),
        parts=tuple(_const(part) for part in site.parts),
        roots=tuple(_value(value) for value in site.roots),
        read=_as_it_is,
    )


def with_weight(site: Site, weight: Tensor) -> Site:
    """A bare site that has a weight [out, in]."""
    return replace(site, read=_Held(weight), const=replace(site.const, load=_Held(weight)))


def described(site: Site) -> Any:
    """A nest of what a bare site says."""
    return (
        *(site.path, site.form, site.layout, site.in_features, site.out_features, site.batch, site.role, site.layer, site.rows),
        *(site.container, site.stack, site.blocked, _said(site.const), tuple(map(_said, site.parts))),
        tuple((one.node.op, str(one.x.type), str(one.output.type), one.bias is not None) for one in site.applications),
        tuple(node.op for node in site.gathers),
    )


def _said(const: Const) -> tuple[str, str, str]:
    return const.path, const.kind, str(const.type)


def _application(one: Application) -> Application:
    node = Node(one.node.op, (), ())
    bias = None if one.bias is None else _value(one.bias)
    return Application(node, _value(one.x), _value(one.output), bias, None if one.select is None else _value(one.select))


def _value(value: Value) -> Value:
    return _const(value) if isinstance(value, Const) else Value(value.name, value.type)


def _const(const: Const) -> Const:
    return replace(const, load=_not_here)


def _not_here() -> Tensor:
    raise VerifyError("a method reads a weight other than that of its site where it is to need nothing of the graph")


def _as_it_is(stored: Tensor) -> Tensor:
    return stored


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    weight: Tensor

    def __call__(self, *_: Tensor) -> Tensor:
        return self.weight


def packages_of(methods: Methods) -> frozenset[str]:
    """Top-level packages that the methods come from."""
    return frozenset(("matmorph", *(kind.__module__.partition(".")[0] for kind in _kinds(methods))))


def _kinds(methods: Methods) -> Iterator[type]:
    return (type(method) for method in methods.values())
