"""Writing what replaces a site: rows in, fragments of the methods, their sum, the bias, and the layout the node had."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import VerifyError
from matmorph.ir.build import Builder, unique_name
from matmorph.ir.core import Const, ConstKind, Node, Origin, Value
from matmorph.ir.infer import Inference
from matmorph.ir.rewiring import rewired
from matmorph.ir.site import Application, Fragment, FragmentAdapter, Site
from matmorph.passes.methods.protocol import SiteMethod
from matmorph.passes.rewriting.row_view import RowView, emit, row_view


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One application read as rows: the value, and the nodes that make it."""

    application: Application
    view: RowView
    rows: Value
    nodes: tuple[Node, ...]

    @property
    def row_bias(self) -> Value | None:
        """The bias, where it may be added to the rows [.., out] before they get the node's layout; None also where there is none."""
        bias = self.application.bias
        plain = bias is not None and len(bias.tensor.shape) == 1 and bias.tensor.dtype == self.rows.tensor.dtype
        return bias if plain and (self.view.bias_on_rows or not self.view.leave) else None


class SiteScope:
    """All applications of one site, each entered as rows once however many methods read them.

    `rule`, `location`: go into the origin of every new node. `dotted`: names of all weights of the model; new ones are added. `shared`:
    weights that several sites read, by key; new ones are added.
    """

    def __init__(
        self,
        site: Site,
        builder: Builder,
        inference: Inference,
        rule: str,
        location: str | None,
        dotted: set[str],
        shared: dict[Hashable, Const] | None = None,
    ) -> None:
        self.site = site
        self._shared = {} if shared is None else shared
        self._builder = builder
        self._inference = inference
        self._rule = rule
        self._location = location
        self._dotted = dotted
        self._weight: Tensor | None = None
        self._entries = tuple(self._enter(application) for application in site.applications)

    def weight(self) -> Tensor:
        """W, loaded once; it goes with the scope."""
        if self._weight is None:
            self._weight = self.site.weight().detach()
        return self._weight

    def builder_for(self, method: SiteMethod, label: str, seed: int, before: Sequence[Fragment], solution: Any = None) -> SiteBuilder:
        """What the next method writes with: `label` names its weights, `before` are the fragments of the methods before it, `solution` is
        what its own `solve` found ahead of time."""
        return SiteBuilder(self, method, label, seed, tuple(before), solution)

    def close(self, fragments: Sequence[Fragment], keeps_node: bool) -> Mapping[Node, tuple[Node, ...]]:
        """What stands in place of each application's node, and of each gather's that a fragment serves too. `keeps_node`: the dense
        matmul stays, the fragments are added to it.

        The result is bound to the node's own output Value, so nothing behind it changes. VerifyError where the type would differ.
        """
        closed = {entry.application.node: self._close(entry, k, fragments, keeps_node) for k, entry in enumerate(self._entries)}
        for fragment in fragments:
            for node, (written, value) in zip(self.site.gathers, fragment.lookups, strict=bool(fragment.lookups)):
                closed[node] = self._bound(written, value, node.output)
        return closed

    def new_const(self, method: str, label: str, part: str, tensor: Tensor, trainable: bool, kind: ConstKind) -> Const:
        path = self.site.path
        name = unique_name(f"{path}.{label}.{part}", self._dotted)
        b = self._builder
        return b.const(name, tensor.detach(), trainable=trainable, kind=kind, rule=self._rule, site=path, method=method, part=part)

    def shared_const(self, method: str, label: str, part: str, key: Hashable, tensor: Callable[[], Tensor]) -> Const:
        if key not in self._shared:
            self._shared[key] = self.new_const(method, label, part, tensor(), False, "buffer")
        return self._shared[key]

    def write(self, node: Node, body: Callable[[], Value]) -> tuple[Value, tuple[Node, ...]]:
        """The value that `body` makes and the nodes it wrote, in the place of a node."""
        return self._record(node.origin, body)

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self._entries

    @property
    def emitter(self) -> Builder:
        return self._builder

    def _record(self, source: Origin, body: Callable[[], Value]) -> tuple[Value, tuple[Node, ...]]:
        self._builder.origin = replace(source, rule=self._rule, location=self._location)
        mark = len(self._builder.nodes)
        value = body()
        return value, tuple(self._builder.nodes[mark:])

    def _enter(self, application: Application) -> Entry:
        view = row_view(self.site, application)
        rows, nodes = self._record(application.node.origin, lambda: emit(self._builder, view.enter, application.x))
        return Entry(application, view, rows, nodes)

    def _close(self, entry: Entry, k: int, fragments: Sequence[Fragment], keeps_node: bool) -> tuple[Node, ...]:
        node, target = entry.application.node, entry.application.output
        dense: tuple[Node, ...] = ()
        if keeps_node:
            copy, dense = self._record(node.origin, lambda: self._builder(node.op, *node.args, name=f"{target.name}_dense", **node.attrs))
            dense = tuple(replace(item, origin=node.origin) for item in dense)
        values = [fragment.outputs[k] for fragment in fragments]
        added = entry.row_bias is not None and any(fragment.adds_bias for fragment in fragments)
        bias = None if added else entry.application.bias
        final, tail = self._record(node.origin, lambda: self._finish(entry, values, bias, copy if keeps_node else None))
        return self._bound((*dense, *entry.nodes, *(item for fragment in fragments for item in fragment.parts[k]), *tail), final, target)

    def _bound(self, written: Sequence[Node], final: Value, target: Value) -> tuple[Node, ...]:
        if not self._inference.equal(final.type, target.type):
            raise VerifyError(f"{self.site.path}: the rewrite gives {final.type} where the source gives {target.type}")
        return tuple(rewired(item, {final: target}) for item in written)

    def _finish(self, entry: Entry, values: Sequence[Value], bias: Value | None, dense: Value | None) -> Value:
        """Sum, bias, layout; or, beside a dense matmul that stays, sum, layout, and the sum of both."""
        b = self._builder
        y = values[0]
        for value in values[1:]:
            y = b("aten.add.Tensor", y, value)
        if dense is not None:
            return b("aten.add.Tensor", dense, emit(b, entry.view.leave, y))
        if bias is not None and entry.view.bias_on_rows:
            y = b("aten.add.Tensor", y, bias)
        y = emit(b, entry.view.leave, y)
        return y if bias is None or entry.view.bias_on_rows else b("aten.add.Tensor", y, bias)


class SiteBuilder:
    """What a method's `build` writes with (see `methods.FragmentBuilder`)."""

    def __init__(
        self, scope: SiteScope, method: SiteMethod, label: str, seed: int, before: tuple[Fragment, ...], solution: Any = None
    ) -> None:
        self.seed = seed
        self.solution = solution
        self._scope = scope
        self._method = method
        self._label = label
        self._before = before
        self._entry: Entry | None = None

    def weight(self) -> Tensor:
        """W [out, in] or [batch, out, in] in the stored dtype: every method sees the original."""
        return self._scope.weight()

    def residual(self) -> Tensor:
        """What the methods before this one leave of W, in float32 or better; W itself where there is none."""
        w = self.weight()
        left = w if w.dtype == torch.float64 else w.float()
        for fragment in self._before:
            left = left - fragment.weight()
        return left

    def const(self, name: str, tensor: Tensor, *, trainable: bool = True, kind: ConstKind = "parameter") -> Const:
        """A new weight under the dotted name `<site path>.<method>.<name>`."""
        return self._scope.new_const(self._method.name, self._label, name, tensor, trainable, kind)

    def shared(self, name: str, key: Hashable, tensor: Callable[[], Tensor]) -> Const:
        """A buffer that all sites of the graph which ask for the same key share; the first of them names it."""
        return self._scope.shared_const(self._method.name, self._label, name, key, tensor)

    def bias(self) -> Value | None:
        """Inside a body: the bias [out] that the fragment may add itself, under `adds_bias=True`. None where there is none, or where it
        can only be added after the fragment (the rewrite sees to that)."""
        return self._application().row_bias

    def __call__(self, op: str, *args: Any, name: str | None = None, **attrs: Any) -> Value:
        """Any operator, inside a body."""
        return self._scope.emitter(op, *args, name=name, **attrs)

    def matmul(self, x: Value, const: Const, *, name: str | None = None) -> Value:
        """x [.., in] times `const` [in, out]. For an expert stack `const` is [batch, in, out]: the application's own
        selection picks its matrices, or all are used at once."""
        application = self._application().application
        wish = None if name is None else f"{application.output.name}_{name}"
        operand: Value = const
        if self._scope.site.batch is not None and application.select is not None:
            operand = self("aten.index_select.default", operand, 0, application.select)
        return self("aten.matmul.default", x, operand, name=wish)

    def fragment(
        self,
        body: Callable[[Value], Value],
        consts: Sequence[Const],
        weight: Callable[[], Tensor],
        *,
        lookup: Callable[[Value], Value] | None = None,
        **more: Any,
    ) -> Fragment:
        """Emits `body(rows)` once per application: rows [.., in] to [.., out], without the bias unless `adds_bias`. `lookup(indices)`, once
        per gather of the site: integers [..] to rows [.., in] of the table. `more`: choice, bound, notes ...; without an `adapter` among
        them that of a method which trains adapters is all that trains."""
        parts, outputs = [], []
        for entry in self._scope.entries:
            self._entry = entry
            value, nodes = self._written(entry.application.node, body, entry.rows)
            parts.append(nodes)
            outputs.append(value)
        self._entry = None
        lookups = []
        for node in self._scope.site.gathers if lookup is not None else ():
            value, nodes = self._written(node, lookup, node.args[1])  # type: ignore[arg-type]
            lookups.append((nodes, value))
        if self._method.trains == "adapters" and "adapter" not in more:
            more["adapter"] = FragmentAdapter({const.part or const.path: const for const in consts if const.trainable})
        return Fragment(tuple(parts), tuple(outputs), tuple(consts), weight, lookups=tuple(lookups), **more)

    def _written(self, node: Node, body: Callable[[Value], Value], operand: Value) -> tuple[Value, tuple[Node, ...]]:
        value, nodes = self._scope.write(node, lambda: body(operand))
        if not any(value in item.outputs for item in nodes):
            raise VerifyError(f"{self._scope.site.path}: the fragment of {self._label} does not make its own output")
        return value, nodes

    def _application(self) -> Entry:
        if self._entry is None:
            raise VerifyError("a matmul is emitted outside the body of a fragment")
        return self._entry
