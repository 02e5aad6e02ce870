"""Adapters back into the weights they stand beside.

What the factors add leaves the graph, and the base becomes W' = base + sum of their products, computed in float64. A dense base takes W' in
its own type, rounded once. A quantised base is quantised anew with the settings it had: the error of that is what merging costs, and is
reported. Unmerging needs no computation: the base is still where it was before (`Compiled.unmerge`); from files, where only the merged
weights are left, `factors_of` finds factors for the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import InputError, RewriteError, VerifyError, alternatives
from matmorph.ir.adapter import Adapter
from matmorph.ir.build import names_of, unique_name
from matmorph.ir.computed import constant, folded, with_constants
from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.joins import consts_of, without
from matmorph.ir.quantised.dense import codebook_rows, nbits_dense
from matmorph.ir.quantised.ops import CODEBOOK, NBITS
from matmorph.ir.rewiring import exchanged, loaded, rewired, swept
from matmorph.ir.site import Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.types import TensorType, dtype_name
from matmorph.ir.verify import verify
from matmorph.passes.adapters.values import with_values
from matmorph.passes.linalg.svd import truncated_svd
from matmorph.passes.linalg.whiten import relative_weight_error
from matmorph.passes.methods.protocol import Methods, SiteMethod, site_method
from matmorph.passes.methods.protocol import names_of as methods_that_train
from matmorph.passes.rewriting.rewrite import rewrite
from matmorph.specs.match import EVERYTHING
from matmorph.specs.schema import MethodUse, Rule

_BIAS = {NBITS: 4, CODEBOOK: 3}
"""Position of the bias among a quantised node's arguments."""


@dataclass(frozen=True, slots=True)
class Merged:
    """One site. `base`: what took the update in, "dense" or the method whose codes were made anew. `error`: |W' - stored|_F / |W'|_F.
    `change`: |W' - base|_F / |base|_F, how much the update is, and `whole`: |W'|_F / |base|_F. `lost`: |W' - stored|_F / |W' - base|_F, how
    much of the update rounding has cost; above 1 it did more than the update itself. `consts`: dotted names of the weights that hold the
    result."""

    site: str
    methods: tuple[str, ...]
    base: str
    error: float
    change: float
    consts: tuple[str, ...]
    whole: float = 1.0
    quantizer: Mapping[str, Any] | None = None

    @property
    def lost(self) -> float:
        return self.error * self.whole / self.change if self.change else 0.0


def merge(
    graph: Graph, adapters: Sequence[Adapter], methods: Methods, values: Mapping[str, Any] | None = None
) -> tuple[Graph, tuple[Merged, ...]]:
    """The graph without adapters, their products in the weights; a line per site. `values`: trained parameters by dotted name, torch or
    numpy; those of other parameters (norms, heads) are put in too. Without values the adapters are merged as they are.

    InputError: nothing to merge, values of another model or rank (see `with_values`), a base that cannot take an update in.
    """
    if not adapters:
        names = alternatives(methods_that_train(methods, "adapters"))
        raise InputError(f"nothing to merge: the model has no adapters (no rule put in {names})")
    sites = _by_site(adapters)
    _refuse_unfit(sites)
    trained = with_values(graph, values or {})
    factors = {adapter: _Factors.of(trained, adapter, methods) for adapter in adapters}
    for found_factors in factors.values():
        found_factors.refuse()
    current, found = _folded(trained, factors)
    added = {path: left for path, parts in sites.items() if (left := [factors[one] for one in parts if not one.inside])}
    updates = {path: _update(parts) for path, parts in added.items()}
    current = without(current, [const for parts in added.values() for one in parts for const in one.consts]) if added else current
    for path, parts in added.items():
        first = parts[0].adapter
        if first.settings is None:
            current, merged = _put_dense(current, sites[path], first, updates[path])
        else:
            current, merged = _put_codes(_shifted(current, parts), sites[path], first, parts[0].base_again(methods), updates[path])
        found[path] = merged
    verify(current)
    return current, tuple(found[path] for path in sites)


@dataclass(frozen=True, slots=True, eq=False)
class _Factors:
    """An adapter's weights in a graph. `parts`: float64, by short name, as a method's `merge` takes them."""

    adapter: Adapter
    method: SiteMethod
    consts: tuple[Const, ...]

    @classmethod
    def of(cls, graph: Graph, adapter: Adapter, methods: Methods) -> _Factors:
        consts = consts_of(graph, adapter.consts.values())
        return cls(adapter, site_method(methods, adapter.method), consts)

    @property
    def parts(self) -> dict[str, Tensor]:
        return {short: self.read(short) for short in self.adapter.consts}

    def read(self, short: str) -> Tensor:
        """One of the tensors, float64."""
        return self.consts[list(self.adapter.consts).index(short)].load().detach().double()

    def refuse(self) -> None:
        """InputError where the method says that they cannot be merged yet."""
        problem = self.method.refuse_merge(self.adapter, self.read)
        if problem is not None:
            raise problem

    def product(self) -> Tensor:
        """By the method's own merge, onto a base of zeros; float64."""
        adapter, parts = self.adapter, self.parts
        sides = (adapter.out_features, adapter.in_features) if adapter.batch is None else (adapter.in_features, adapter.out_features)
        lead = () if adapter.batch is None else (adapter.batch,)
        zeros = torch.zeros(*lead, *sides, dtype=torch.float64, device=next(iter(parts.values())).device)
        scale = torch.tensor(adapter.scale, dtype=torch.float64)
        return self.method.merge({**parts, "base": zeros, "scale": scale})[0]

    def shifted(self, bias: Tensor | None) -> Tensor | None:
        """What the method makes of the bias beside the weight, float64; None where it leaves it alone."""
        base = torch.zeros(self.adapter.out_features, self.adapter.in_features, dtype=torch.float64)
        new = self.method.merge({**self.parts, "base": base, **({} if bias is None else {"bias": bias})})[1]
        return None if new is None or (bias is not None and torch.equal(new, bias)) else new

    def base_again(self, methods: Methods) -> tuple[SiteMethod, Any]:
        """What makes the base anew, and by which settings."""
        return site_method(methods, self.adapter.base).base_again(self.adapter.settings or {})


def _folded(graph: Graph, factors: Mapping[Adapter, _Factors]) -> tuple[Graph, dict[str, Merged]]:
    """Weights and biases that adapters compute, as constants."""
    found: dict[str, Merged] = {}
    for adapter, own in factors.items():
        if adapter.inside:
            result = folded(graph, adapter.site, own.consts)
            graph = result.graph
            error = relative_weight_error(result.wanted, result.stored.double())
            change = _change(result.before, result.wanted - result.before)
            found[adapter.site] = Merged(adapter.site, (adapter.method,), "dense", error, change, result.names)
    return graph, found


def _by_site(adapters: Sequence[Adapter]) -> dict[str, list[Adapter]]:
    found: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        found.setdefault(adapter.site, []).append(adapter)
    return found


def _refuse_unfit(sites: Mapping[str, Sequence[Adapter]]) -> None:
    unfit = [parts[0] for parts in sites.values() if parts[0].settings is None and parts[0].base not in ("dense", "own")]
    if unfit:
        raise InputError(
            f"{unfit[0].site}: its base is {unfit[0].base}, which keeps its form only as it is: an update cannot be merged into it",
            [f"{len(unfit)} such sites; merging takes dense and quantised bases"],
        )


def _update(parts: Sequence[_Factors]) -> Tensor:
    """Sum of the scaled products [.., out, in], float64."""
    total = parts[0].product()
    for one in parts[1:]:
        total = total + one.product()
    return total


def _shifted(graph: Graph, parts: Sequence[_Factors]) -> Graph:
    """The bias of a quantised base with what the adapters make of it."""
    for one in parts:
        nodes = _quantised_nodes(graph, one.adapter)
        bias = nodes[0].args[_BIAS[nodes[0].op]]
        new = one.shifted(None if bias is None else constant(graph, bias))
        if new is None:
            continue
        like = nodes[0].args[0].tensor
        holder = Value(f"{one.adapter.site}.bias", TensorType(like.dtype, (one.adapter.out_features,)))
        changed = {node: _with_bias(node, holder) for node in nodes}
        anchor = consts_of(graph, [one.adapter.base_consts["codes"]])[0]
        graph = with_constants(graph, changed, {holder: (holder.name, new)}, anchor)[0]
    return graph


def _with_bias(node: Node, bias: Value) -> Node:
    place = _BIAS[node.op]
    return replace(node, args=(*node.args[:place], bias, *node.args[place + 1 :]))


# a dense base


def _put_dense(graph: Graph, parts: Sequence[Adapter], first: Adapter, update: Tensor) -> tuple[Graph, Merged]:
    """W + update in the weight's own place and layout; a frozen base of its own becomes the site's weight again."""
    path = first.site if first.base == "dense" else next(iter(first.base_consts.values()))
    site = next((site for site in find_sites(graph) if site.path == path), None)
    if site is None:
        raise InputError(f"{first.site}: the graph has no matmul of this name, so its adapter cannot be merged")
    w = site.weight().detach().double()
    new, stored = _written(graph, site, w + update, first)
    result = _separated(graph, site, new) if _shared(site) or site.parts else exchanged(graph, {site.const: new})
    merged = Merged(
        first.site, _methods(parts), "dense", relative_weight_error(w + update, stored.double()), _change(w, update), (new.path,)
    )
    return result, merged


def _written(graph: Graph, site: Site, w: Tensor, adapter: Adapter) -> tuple[Const, Tensor]:
    """(the weight with `w` where the site reads it, what the site then reads). A slice leaves the rest of its weight alone."""
    whole = site.const.load().detach().clone()
    view = site.read(whole)
    if view.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        raise RewriteError(f"{site.path}: its weight is read through a copy, so that nothing can be written to it")
    view.copy_(w)
    if not bool(torch.isfinite(view).all()):
        raise RewriteError(f"{site.path}: the merged weight leaves the range of {site.const.tensor.dtype}")
    new_name = None
    if adapter.base == "own" or _shared(site) or site.parts:
        new_name = unique_name(f"{adapter.site}.weight", names_of(graph))
    return replace(loaded(site.const, whole, new_name), trainable=True, rule=None if new_name else site.const.rule), site.read(whole)


def _shared(site: Site) -> bool:
    """Whether an embedding reads the weight too, which must stay as it is."""
    return bool(site.gathers)


def _separated(graph: Graph, site: Site, new: Const) -> Graph:
    """The site's nodes read `new`, everything else goes on reading the old weight, or the parts of a computed one. Views in between are
    written a second time."""
    users = {application.node for application in site.applications}
    taken = names_of(graph)
    copies: dict[Value, Value] = dict.fromkeys(site.operands, new)
    nodes: list[Node] = []
    chain: set[Value] = set(site.operands)
    for node in graph.nodes:
        reads = [value for value in node.inputs() if value in chain]
        if reads and node not in users and set(node.inputs()) <= chain and node not in site.gathers:
            copies.update({value: Value(unique_name(value.name, taken), value.type) for value in node.outputs})
            chain.update(node.outputs)
            nodes += [node, rewired(node, copies)]
        else:
            nodes.append(rewired(node, copies) if node in users else node)
    state = [item for const in graph.state for item in ((const, new) if const is site.anchor else (const,))]
    return swept(replace(graph, nodes=tuple(nodes), state=tuple(state)), graph)


# a quantised base


def _put_codes(
    graph: Graph, parts: Sequence[Adapter], first: Adapter, again: tuple[SiteMethod, Any], update: Tensor
) -> tuple[Graph, Merged]:
    """The quantised nodes become a dense matmul with W', and that is quantised with the same settings."""
    nodes = _quantised_nodes(graph, first)
    base = _dequantised(nodes[0]) + _shift(graph, nodes[0])
    dtype = nodes[0].args[0].tensor.torch_dtype
    wanted = base + update
    dense, const = _made_dense(graph, nodes, wanted.to(dtype), f"{first.site}.weight", first.rule)
    site = next(site for site in find_sites(dense) if site.const is const)
    method, settings = again
    rule = Rule(EVERYTHING, (MethodUse(method.name, settings, None),), name=first.rule, force=True)
    result, (outcome,) = rewrite(dense, [(site, rule)], {method.name: method})
    if outcome.reject is not None or outcome.weight_error is None:
        raise VerifyError(f"{first.site}: {outcome.reject.reason if outcome.reject else 'no error was measured'}")
    names = tuple(const.path for const in outcome.consts)
    change, whole = _change(base, update), _change(base, wanted)
    return result, Merged(first.site, _methods(parts), first.base, outcome.weight_error, change, names, whole, first.settings)


MOST = 0.5
"""Share of an update from which on its loss is said."""


def lost_notes(found: Sequence[Merged]) -> tuple[str, ...]:
    """A warning where rounding to codes has cost most of what was learned, with the way out."""
    losing = [one for one in found if one.quantizer is not None and one.lost > MOST]
    if not losing:
        return ()
    worst = max(losing, key=lambda one: one.lost)
    return (
        f"merging into codes lost most of what was learned at {len(losing)} of {len(found)} sites: at {worst.site} rounding changes the "
        f"weight by {worst.lost:.2f} x what training did; keep the factors beside the codes (the folder that was trained runs as it is, "
        "export: {adapters: inputs} serves them apart), or merge into a dense base",
    )


def _quantised_nodes(graph: Graph, adapter: Adapter) -> list[Node]:
    codes = consts_of(graph, [adapter.base_consts["codes"]])[0]
    nodes = [node for node in graph.nodes if node.op in _BIAS and node.args[1] is codes]
    if not nodes:
        raise InputError(f"{adapter.site}: no quantised matmul reads {codes.path}, so its adapter cannot be merged")
    return nodes


def _dequantised(node: Node) -> Tensor:
    """The dense matrix [out, in] of a quantised node, float64."""
    like = torch.empty(0, dtype=torch.float64)
    if node.op == NBITS:
        _, codes, scales, zeros, _, k, _, bits, block = node.args
        return nbits_dense(codes.load(), scales.load(), None if zeros is None else zeros.load(), k, bits, block, torch.float64)
    _, codes, scales, _, table, k, n, block = node.args
    return torch.cat([rows for _, rows in codebook_rows(like, codes.load(), scales.load(), table, n, k, block)])


def _tail(graph: Graph, node: Node) -> tuple[Node, float] | None:
    """(the sum that follows, c) where c times the sum of the features is added: what an offset for the whole matrix became."""
    producers = graph.producers()
    for user in graph.users().get(node.output, ()):
        scaled = producers.get(user.args[1]) if user.op == "aten.add.Tensor" and user.args[0] is node.output else None
        total = producers.get(scaled.args[0]) if scaled is not None and scaled.op == "aten.mul.Scalar" else None
        if scaled is not None and total is not None and total.op == "aten.sum.dim_IntList" and total.args[0] is node.args[0]:
            return user, float(scaled.args[1])
    return None


def _shift(graph: Graph, node: Node) -> float:
    found = _tail(graph, node)
    return found[1] if found else 0.0


def _made_dense(graph: Graph, nodes: Sequence[Node], w: Tensor, wish: str, rule: str) -> tuple[Graph, Const]:
    name = unique_name(wish, names_of(graph))
    const = Const(name, TensorType(dtype_name(w.dtype), tuple(w.shape)), lambda: w, (name,), trainable=True, storage=name, rule=rule)
    ends = {node: _tail(graph, node) for node in nodes}
    replaced: dict[Node, Node] = {}
    for node, end in ends.items():
        output = end[0].output if end else node.output
        bias = node.args[_BIAS[node.op]]
        replaced[node] = Node("aten.linear.default", (node.args[0], const, bias), (output,), origin=replace(node.origin, rule=None))
    dropped = {end[0] for end in ends.values() if end}
    new = tuple(replaced.get(node, node) for node in graph.nodes if node not in dropped)
    codes = nodes[0].args[1]
    state = tuple(item for old in graph.state for item in ((const, old) if old is codes else (old,)))
    return swept(replace(graph, nodes=new, state=state), graph), const


def _methods(parts: Sequence[Adapter]) -> tuple[str, ...]:
    return tuple(adapter.method for adapter in parts)


def _change(base: Tensor, update: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(base))
    return float(torch.linalg.vector_norm(update)) / norm if norm else 0.0


# and back


def factors_of(merged: Tensor, base: Tensor, adapter: Adapter, rank: int) -> tuple[dict[str, Tensor], float]:
    """Factors whose scaled product is `merged` - `base` [.., out, in], and |rest|_F / |difference|_F: zero but for rounding where the
    difference is of that rank, as it is after merging into a dense base."""
    difference = merged.double() - base.double()
    found = truncated_svd(difference, rank)
    root = (found.s / adapter.scale).sqrt()
    down, up = found.vh.transpose(-2, -1) * root.unsqueeze(-2), root.unsqueeze(-1) * found.u.transpose(-2, -1)
    rest = relative_weight_error(difference, adapter.scale * (down @ up).transpose(-2, -1)) if float(difference.abs().max()) else 0.0
    return {"down": down, "up": up}, rest
