"""Adapters back into the weights they stand beside.

What the factors add leaves the graph, and the base becomes W' = base + sum of their products, computed in float64. A dense base takes W' in
its own type, rounded once. A quantised base is quantised anew with the settings it had: the error of that is what merging costs, and is
reported. Unmerging needs no computation: the base is still where it was before (`api.Compiled.unmerge`); from files, where only the merged
weights are left, `factors_of` finds factors for the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import InputError, RewriteError, VerifyError
from matmorph.ir.build import names_of, unique_name
from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.quantised.dense import codebook_rows, nbits_dense
from matmorph.ir.quantised.ops import CODEBOOK, NBITS
from matmorph.ir.rewiring import exchanged, loaded, rewired, swept
from matmorph.ir.site import Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.types import TensorType, dtype_name
from matmorph.ir.verify import verify
from matmorph.passes.adapters.reparametrised import constant, folded, with_constants
from matmorph.passes.adapters.table import Adapter, consts_of, with_values, without
from matmorph.passes.linalg.svd import truncated_svd
from matmorph.passes.linalg.whiten import relative_weight_error
from matmorph.passes.methods import Method
from matmorph.passes.methods.quantize import Quantize
from matmorph.passes.rewriting.rewrite import rewrite
from matmorph.specs.load import load_spec

_BIAS = {NBITS: 4, CODEBOOK: 3}
"""Position of the bias among a quantised node's arguments."""


@dataclass(frozen=True, slots=True)
class Merged:
    """One site. `base`: what took the update in, "dense" or the method whose codes were made anew. `error`: |W' - stored|_F / |W'|_F.
    `change`: |W' - base|_F / |base|_F, how much the update is. `consts`: dotted names of the weights that hold the result."""

    site: str
    methods: tuple[str, ...]
    base: str
    error: float
    change: float
    consts: tuple[str, ...]
    quantizer: Mapping[str, Any] | None = None


def merge(
    graph: Graph, adapters: Sequence[Adapter], methods: Mapping[str, Method], values: Mapping[str, Any] | None = None
) -> tuple[Graph, tuple[Merged, ...]]:
    """The graph without adapters, their products in the weights; a line per site. `values`: trained parameters by dotted name, torch or
    numpy; those of other parameters (norms, heads) are put in too. Without values the adapters are merged as they are.

    InputError: nothing to merge, values of another model or rank (see `with_values`), a base that cannot take an update in.
    """
    if not adapters:
        raise InputError("nothing to merge: the model has no adapters (no rule put in lora, tt_lora, glora, sparse_grad, loftq or qlora)")
    sites = _by_site(adapters)
    _refuse_unfit(sites)
    trained = with_values(graph, values or {})
    factors = {adapter: consts_of(trained, adapter.consts.values()) for adapter in adapters}
    _refuse_undecided(factors)
    current, found = _folded(trained, factors)
    added = {path: left for path, parts in sites.items() if (left := [adapter for adapter in parts if not _inside(adapter)])}
    updates = {path: _update(parts, factors, methods) for path, parts in added.items()}
    current = without(current, [const for parts in added.values() for adapter in parts for const in factors[adapter]]) if added else current
    for path, parts in added.items():
        put = _put_codes if parts[0].quantizer is not None else _put_dense
        current, merged = put(_shifted(current, parts, factors, methods), parts, updates[path])
        found[path] = replace(merged, methods=_methods(sites[path]))
    verify(current)
    return current, tuple(found[path] for path in sites)


def _inside(adapter: Adapter) -> bool:
    """Whether the adapter is not added to a matmul but computes its weight and bias."""
    return adapter.method in ("glora", "sparse_grad") and adapter.base == "dense"


def _refuse_undecided(factors: Mapping[Adapter, Sequence[Const]]) -> None:
    for adapter, consts in factors.items():
        gates = dict(zip(adapter.consts, consts, strict=True)).get("gates")
        if gates is not None and not bool(gates.load().any()):
            raise InputError(
                f"{adapter.site}: a supernet of glora, and no configuration says which of its tensors to merge",
                ["name one: merge(values, configuration=...), matmorph merge --configuration FILE; matmorph search finds one"],
            )


def _folded(graph: Graph, factors: Mapping[Adapter, Sequence[Const]]) -> tuple[Graph, dict[str, Merged]]:
    """Weights and biases that glora and sparse_grad compute, as constants."""
    found: dict[str, Merged] = {}
    for adapter, consts in factors.items():
        if _inside(adapter):
            result = folded(graph, adapter.site, consts)
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
    unfit = [parts[0] for parts in sites.values() if parts[0].quantizer is None and parts[0].base not in ("dense", "own")]
    if unfit:
        raise InputError(
            f"{unfit[0].site}: its base is {unfit[0].base}, which keeps its form only as it is: an update cannot be merged into it",
            [f"{len(unfit)} such sites; merging takes dense and quantised bases"],
        )


def _update(parts: Sequence[Adapter], factors: Mapping[Adapter, Sequence[Const]], methods: Mapping[str, Method]) -> Tensor:
    """Sum of the scaled products [.., out, in], float64."""
    total: Tensor | None = None
    for adapter in parts:
        tensors = {short: const.load().detach().double() for short, const in zip(adapter.consts, factors[adapter], strict=True)}
        total = _product(adapter, tensors, methods) if total is None else total + _product(adapter, tensors, methods)
    if total is None:
        raise VerifyError("a site without adapters")
    return total


def _product(adapter: Adapter, tensors: Mapping[str, Tensor], methods: Mapping[str, Method]) -> Tensor:
    """By the method's own merge, onto a base of zeros."""
    some = next(iter(tensors.values()))
    shape = (
        (adapter.out_features, adapter.in_features) if adapter.batch is None else (adapter.batch, adapter.in_features, adapter.out_features)
    )
    zeros = torch.zeros(shape, dtype=torch.float64, device=some.device)
    scale = torch.tensor(adapter.scale, dtype=torch.float64)
    return methods[adapter.method].merge({**tensors, "base": zeros, "scale": scale})[0]


def _shifted(graph: Graph, parts: Sequence[Adapter], factors: Mapping[Adapter, Sequence[Const]], methods: Mapping[str, Method]) -> Graph:
    """The bias of a quantised base with what glora adds to it."""
    shifting = [adapter for adapter in parts if adapter.method == "glora" and {"D", "E"} & set(adapter.consts)]
    if not shifting or parts[0].quantizer is None:
        return graph
    adapter = shifting[0]
    tensors = {short: const.load().detach().double() for short, const in zip(adapter.consts, factors[adapter], strict=True)}
    nodes = _quantised_nodes(graph, adapter)
    bias = nodes[0].args[_BIAS[nodes[0].op]]
    old = {} if bias is None else {"bias": constant(graph, bias)}
    base = torch.zeros(adapter.out_features, adapter.in_features, dtype=torch.float64)
    new = methods[adapter.method].merge({**tensors, "base": base, **old})[1]
    if new is None:
        raise VerifyError(f"{adapter.site}: glora has a shift of the bias, and merging gives none")
    like = nodes[0].args[0].tensor
    holder = Value(f"{adapter.site}.bias", TensorType(like.dtype, (adapter.out_features,)))
    changed = {node: _with_bias(node, holder) for node in nodes}
    anchor = consts_of(graph, [adapter.base_consts["codes"]])[0]
    return with_constants(graph, changed, {holder: (holder.name, new)}, anchor)[0]


def _with_bias(node: Node, bias: Value) -> Node:
    place = _BIAS[node.op]
    return replace(node, args=(*node.args[:place], bias, *node.args[place + 1 :]))


# a dense base


def _put_dense(graph: Graph, parts: Sequence[Adapter], update: Tensor) -> tuple[Graph, Merged]:
    """W + update in the weight's own place and layout; a frozen base of its own becomes the site's weight again."""
    first = parts[0]
    path = first.site if first.base == "dense" else next(iter(first.base_consts.values()))
    site = next((site for site in find_sites(graph) if site.path == path), None)
    if site is None:
        raise InputError(f"{first.site}: the graph has no matmul of this name, so its adapter cannot be merged")
    w = site.weight().detach().double()
    new, stored = _written(graph, site, w + update, first)
    result = exchanged(graph, {site.const: new}) if not _shared(site) else _separated(graph, site, new)
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
    if adapter.base == "own" or _shared(site):
        new_name = unique_name(f"{adapter.site}.weight", names_of(graph))
    return replace(loaded(site.const, whole, new_name), trainable=True, rule=None if new_name else site.const.rule), site.read(whole)


def _shared(site: Site) -> bool:
    """Whether an embedding reads the weight too, which must stay as it is."""
    return bool(site.gathers)


def _separated(graph: Graph, site: Site, new: Const) -> Graph:
    """The site's nodes read `new`, everything else goes on reading the old weight. Views in between are written a second time."""
    users = {application.node for application in site.applications}
    taken = names_of(graph)
    copies: dict[Value, Value] = {site.const: new}
    nodes: list[Node] = []
    chain: set[Value] = {site.const}
    for node in graph.nodes:
        reads = [value for value in node.inputs() if value in chain]
        if reads and node not in users and set(node.inputs()) <= chain and node not in site.gathers:
            copies.update({value: Value(unique_name(value.name, taken), value.type) for value in node.outputs})
            chain.update(node.outputs)
            nodes += [node, rewired(node, copies)]
        else:
            nodes.append(rewired(node, copies) if node in users else node)
    state = [item for const in graph.state for item in ((const, new) if const is site.const else (const,))]
    return swept(replace(graph, nodes=tuple(nodes), state=tuple(state)), graph)


# a quantised base


def _put_codes(graph: Graph, parts: Sequence[Adapter], update: Tensor) -> tuple[Graph, Merged]:
    """The quantised nodes become a dense matmul with W', and that is quantised with the same settings."""
    first = parts[0]
    nodes = _quantised_nodes(graph, first)
    base = _dequantised(nodes[0]) + _shift(graph, nodes[0])
    dtype = nodes[0].args[0].tensor.torch_dtype
    wanted = base + update
    dense, const = _made_dense(graph, nodes, wanted.to(dtype), f"{first.site}.weight", first.rule)
    site = next(site for site in find_sites(dense) if site.const is const)
    result, (outcome,) = rewrite(dense, [(site, _quantize_rule(first))], {"quantize": Quantize()})
    if outcome.reject is not None or outcome.weight_error is None:
        raise VerifyError(f"{first.site}: {outcome.reject.reason if outcome.reject else 'no error was measured'}")
    names = tuple(const.path for const in outcome.consts)
    return result, Merged(first.site, _methods(parts), first.base, outcome.weight_error, _change(base, update), names, first.quantizer)


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


def _quantize_rule(adapter: Adapter) -> Any:
    """A rule that does to one site what the base's method did to its weight."""
    settings = {name: value for name, value in (adapter.quantizer or {}).items() if value is not None}
    rule = {"name": adapter.rule, "match": {"op": "matmul"}, "force": True, "rewrite": {"quantize": settings}}
    return load_spec({"version": 1, "rules": [rule]}, {"quantize": Quantize}).rules[0]


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
