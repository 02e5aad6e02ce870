"""`equalise: true`: scales of input channels between what makes a value and the matmuls that read it, before these become codes.

x / s times W s is x times W. W s goes into the weights of every matmul that reads x, 1 / s into what makes x: the weight of a norm, or the
rows of the matmul before it, also through a sum with a bias and through one factor of a gate's product. The graph computes what it did;
only numbers of weights change. Where anything else reads x, or where what makes it has no such weight, the wish is refused with the node.

The scales are those of `linalg.equalise`. Of its exponents the one is taken whose codes have the smallest error on the outputs of all
readers together, measured as the report measures it; codes are rounded to nearest there, whatever rounds them in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import TypeAlias

import torch
from torch import Tensor

from matmorph.errors import SpecError
from matmorph.ir.core import Const, Graph, Node, Value, values_in
from matmorph.ir.op_table import having, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.rewiring import exchanged
from matmorph.ir.site import Application, Site
from matmorph.passes.linalg.equalise import ALPHAS, channel_scales, scaled_moment
from matmorph.passes.linalg.parallel import ordered_map
from matmorph.passes.methods.protocol import Methods, SiteMethod, SiteStats, site_method
from matmorph.passes.rewriting.rewrite import Outcome
from matmorph.passes.rewriting.row_view import row_view
from matmorph.progress import StepProgress
from matmorph.specs.schema import Rule

Claims: TypeAlias = Sequence[tuple[Site, Rule]]
Divided: TypeAlias = tuple[tuple[Const, int], ...]
"""Weights, each with the axis along which its numbers are divided by the scales."""

_SAME = having(of_kind("same"), casts=False)
_NORMS: Mapping[str, tuple[int, ...]] = {"layer_norm": (2, 3), "native_layer_norm": (2, 3), "rms_norm": (2,)}
"""Where the weight of a norm, and what it adds, stand among its arguments."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The matmuls that read one value, and what takes the other side of their scales."""

    sites: tuple[Site, ...]
    divided: Divided

    @property
    def partners(self) -> str:
        return ", ".join(const.path for const, _ in self.divided)


@dataclass(frozen=True, slots=True, eq=False)
class Equalised:
    """`stats`: of the same sites, on what they read now. `notes`: by the path of each site that wished for it."""

    graph: Graph
    stats: Mapping[Site, SiteStats]
    notes: Mapping[str, str]


class _Refused(Exception):  # noqa: N818  (not an error: an answer)
    """Why a value cannot be scaled."""


def wishes(claims: Claims, methods: Methods) -> tuple[Site, ...]:
    """The sites whose rule asks for it, of those that single methods take."""
    return tuple(site for site, rule in claims if _trial(rule, methods) is not None)


def refuse_open(rules: Iterable[Rule], methods: Methods) -> None:
    """SpecError where a budget would decide over it: scales depend on the codes that are chosen."""
    for rule in rules:
        for use in (use for uses in rule.alternatives for use in uses if rule.is_open):
            method = methods.get(use.method)
            if isinstance(method, SiteMethod) and method.equalises(use.spec):
                raise SpecError(f"rule {rule.name}: equalise is for codes that are known, and the budget decides these", at=use.at)


def find_groups(graph: Graph, sites: Iterable[Site], claims: Claims, methods: Methods) -> tuple[tuple[Group, ...], Mapping[str, str]]:
    """What can be equalised, and by path why the others cannot. From shapes alone. `sites`: all of the graph."""
    search = _Search(graph, tuple(sites), dict(claims), methods)
    wishing_all = wishes(claims, methods)
    groups: list[Group] = []
    refused = {
        site.path: "not equalised: rows of a table are looked up, and sum no channels" for site in wishing_all if not site.applications
    }
    for x, wishing in _by_input(wishing_all).items():
        try:
            groups.append(search.group(x, wishing))
        except _Refused as reason:
            refused.update({site.path: f"not equalised: {reason}" for site in wishing})
    return tuple(groups), refused


def equalise(
    graph: Graph,
    sites: Sequence[Site],
    claims: Claims,
    stats: Mapping[Site, SiteStats],
    methods: Methods,
    progress: StepProgress | None = None,
) -> Equalised:
    """The graph with the scales in its weights. Sites without statistics stay as they are. RewriteError for a weight that is not finite."""
    groups, notes = find_groups(graph, sites, claims, methods)
    rules, change, found = dict(claims), _Change(), dict(stats)
    texts = dict(notes)
    ready = [group for group in groups if all(site in stats for site in group.sites)]
    for number, (group, (alpha, s, before, after)) in enumerate(
        zip(ready, ordered_map(partial(_best, rules, stats, methods), ready), strict=True)
    ):
        texts.update({site.path: _said(group, alpha, before, after) for site in group.sites})
        if alpha:
            change.apply(group, s)
            found.update({site: _on_scaled(found[site], s) for site in group.sites})
        if progress is not None:
            progress(number + 1, len(ready))
    scaled = change.graph(graph)
    return Equalised(scaled, found, texts)


def _said(group: Group, alpha: float, before: float, after: float) -> str:
    if not alpha:
        return f"not equalised: no scales are better than none (error of the outputs {before:.3g} of codes rounded to nearest)"
    return (
        f"equalised: channels by their root mean square to the power of {alpha:g}, the other side in {group.partners}; error of the "
        f"outputs {before:.3g} -> {after:.3g} of codes rounded to nearest"
    )


def remarked(outcomes: Sequence[Outcome], remarks: Mapping[str, str]) -> tuple[Outcome, ...]:
    """The outcomes with what is to be said of the scales of each rewritten site."""

    def said(outcome: Outcome) -> Outcome:
        if outcome.reject is not None or outcome.site.path not in remarks or not outcome.parts:
            return outcome
        first, *others = outcome.parts
        return replace(outcome, parts=(replace(first, notes=(remarks[outcome.site.path], *first.notes)), *others))

    return tuple(map(said, outcomes))


# which scales


def _best(
    rules: Mapping[Site, Rule], stats: Mapping[Site, SiteStats], methods: Methods, group: Group
) -> tuple[float, Tensor, float, float]:
    """(alpha, its scales, error without, error with): relative to the outputs of all readers together."""
    first = stats[group.sites[0]]
    power = first.second_moment.diagonal().double() / max(int(first.rows), 1)
    exact = any(const.tensor.torch_dtype.itemsize < torch.float32.itemsize for const in _weights(group))
    sizes = [_energy(site, stats[site]) for site in group.sites]
    whole = max(sum(sizes), torch.finfo(torch.float64).tiny)
    best, least, plain = 0.0, inf, inf
    for alpha in ALPHAS:
        s = channel_scales(power, alpha, exact)
        error = sum(size * _error(rules[site], site, stats[site], s, methods) ** 2 for site, size in zip(group.sites, sizes, strict=True))
        plain = error if alpha == 0 else plain
        if error < least:
            best, least = alpha, error
    return best, channel_scales(power, best, exact), (plain / whole) ** 0.5, (least / whole) ** 0.5


def _weights(group: Group) -> tuple[Const, ...]:
    return (*(site.const for site in group.sites), *(const for const, _ in group.divided))


def _energy(site: Site, stats: SiteStats) -> float:
    """tr(W H W^T)."""
    w = site.weight().detach().double()
    return float(((w @ stats.judged.double()) * w).sum())


def _error(rule: Rule, site: Site, stats: SiteStats, s: Tensor, methods: Methods) -> float:
    trial, spec = _trial(rule, methods) or (None, None)
    if trial is None:
        return 0.0
    scaled = replace(site, read=lambda stored: site.read(stored) * s.to(stored))
    return trial.trial_error(scaled, spec, _on_scaled(stats, s))


def _trial(rule: Rule, methods: Methods) -> tuple[SiteMethod, object] | None:
    """The first method of the rule that asks for scales, where it is one of single matmuls."""
    for use in rule.rewrite:
        method = methods.get(use.method)
        if isinstance(method, SiteMethod) and method.equalises(use.spec):
            return site_method(methods, use.method), use.spec
    return None


def _on_scaled(stats: SiteStats, s: Tensor) -> SiteStats:
    """Of a site that reads x / s."""
    held = stats.held_out if stats.held_out is None else scaled_moment(stats.held_out, s)
    return replace(stats, second_moment=scaled_moment(stats.second_moment, s), held_out=held)


class _Change:
    """The weights of a graph as they are scaled, one factor after the other."""

    def __init__(self) -> None:
        self._new: dict[Const, Const] = {}

    def apply(self, group: Group, s: Tensor) -> None:
        for site in group.sites:
            self._scale(site.const, _in_axis(site), s)
        for const, axis in group.divided:
            self._scale(const, axis, 1 / s)

    def _scale(self, const: Const, axis: int, factor: Tensor) -> None:
        """Loaded anew each time: nothing is held beside the weight that is stored."""
        old = self._new.get(const, const)
        shape = [1] * len(const.tensor.shape)
        shape[axis] = -1

        def load() -> Tensor:
            stored = old.load().detach()
            wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
            return (wide * factor.view(shape).to(wide)).to(stored.dtype)

        self._new[const] = replace(old, load=load, storage=f"{const.storage or const.path}#equalised")

    def graph(self, graph: Graph) -> Graph:
        return exchanged(graph, self._new) if self._new else graph


# what can be scaled


def _by_input(sites: Iterable[Site]) -> Mapping[Value, tuple[Site, ...]]:
    found: dict[Value, tuple[Site, ...]] = {}
    for site in sites:
        if site.applications:
            x = site.applications[0].x
            found[x] = (*found.get(x, ()), site)
    return found


def _in_axis(site: Site) -> int:
    return 1 if site.layout == "oi" else 0


class _Search:
    """What makes a value, as far as the other side of a scale can be put into it."""

    def __init__(self, graph: Graph, sites: tuple[Site, ...], rules: Mapping[Site, Rule], methods: Methods) -> None:
        self._users, self._producers = graph.users(), graph.producers()
        self._results = frozenset(values_in(graph.outputs))
        self._sites: dict[Node, tuple[Site, Application]] = {
            application.node: (site, application) for site in sites for application in site.applications
        }
        self._rules, self._methods = rules, methods

    def group(self, x: Value, sites: Sequence[Site]) -> Group:
        """Of the sites that wish for it, all of which read `x`. Raises _Refused."""
        for site in sites:
            self._refuse_form(site, x)
        return Group(tuple(sites), self._divided(x, frozenset(site.applications[0].node for site in sites), sites[0].in_features))

    def _refuse_form(self, site: Site, x: Value) -> None:
        guards = (
            (len(site.applications) > 1, "its weight is applied several times"),
            (bool(site.gathers), "its weight is an embedding table too"),
            (bool(site.parts), "its weight is computed from others"),
            (site.rows is not None, "its weight is a part of a larger one"),
            (site.batch is not None, "its weight is a stack of experts"),
            (self._users.get(site.const, ()) != (site.applications[0].node,), "something else reads its weight"),
        )
        for fails, reason in guards:
            if fails:
                raise _Refused(reason)
        if row_view(site, site.applications[0]).enter:
            raise _Refused(f"{_label(site.applications[0].node)} does not read features along the last axis")

    def _divided(self, value: Value, readers: frozenset[Node], features: int) -> Divided:
        """What of the weights behind `value` takes 1 / s, where nothing but `readers` reads it."""
        stranger = next((node for node in self._users.get(value, ()) if node not in readers), None)
        if stranger is not None:
            raise _Refused(f"{_label(stranger)} reads the same input")
        node = self._producers.get(value)
        if value in self._results or node is None:
            raise _Refused(f"its input (%{value.name}) is an input or a result of the model")
        if node in self._sites:
            return self._matmul(*self._sites[node], features)
        rule = _RULES.get(base_name(node.op))
        if rule is None or node.outputs[0] is not value:
            raise _Refused(f"{_label(node)} makes its input and has no weight per channel")
        return rule(self, node, features)

    def _matmul(self, site: Site, application: Application, features: int) -> Divided:
        rule = self._rules.get(site)
        if rule is not None and rule.rewrite and _trial(rule, self._methods) is None:
            raise _Refused(f"{site.path} before it is rewritten by a rule without equalise")
        self._refuse_form(site, application.x)
        if row_view(site, application).leave or site.out_features != features:
            raise _Refused(f"{_label(application.node)} before it does not give these channels along the last axis")
        bias = application.bias
        if bias is None:
            return ((site.const, 1 - _in_axis(site)),)
        return ((site.const, 1 - _in_axis(site)), self._channels(bias, application.node, features))

    def through(self, node: Node, features: int) -> Divided:
        return self._divided(_value(node.args[0], node), frozenset((node,)), features)

    def norm(self, node: Node, features: int) -> Divided:
        given = [node.args[k] for k in _NORMS[base_name(node.op)] if k < len(node.args)]
        if not given or not isinstance(given[0], Value):
            raise _Refused(f"{_label(node)} makes its input and has no weight")
        return tuple(self._channels(one, node, features) for one in given if isinstance(one, Value))

    def product(self, node: Node, features: int) -> Divided:
        """One factor of it: a weight, or whatever makes one of the two."""
        weight = next((arg for arg in node.args[:2] if isinstance(arg, Const)), None)
        if weight is not None:
            return (self._channels(weight, node, features),)
        reasons = []
        if node.args[0] is node.args[1]:
            raise _Refused(f"{_label(node)} makes its input from one value twice")
        for factor in reversed(node.args[:2]):
            try:
                return self._divided(_value(factor, node), frozenset((node,)), features)
            except _Refused as reason:
                reasons.append(str(reason))
        raise _Refused("; ".join(dict.fromkeys(reasons)))

    def total(self, node: Node, features: int) -> Divided:
        """A bias and what it is added to."""
        bias = next((arg for arg in node.args[:2] if isinstance(arg, Const)), None)
        other = next((arg for arg in node.args[:2] if arg is not bias), None)
        if bias is None or node.attrs:
            raise _Refused(f"{_label(node)} makes its input and has no weight per channel")
        return (self._channels(bias, node, features), *self._divided(_value(other, node), frozenset((node,)), features))

    def _channels(self, const: Value, node: Node, features: int) -> tuple[Const, int]:
        if not isinstance(const, Const) or self._users.get(const, ()) != (node,) or const in self._results:
            raise _Refused(f"{_label(node)} makes its input from %{const.name}, which is no weight of its own")
        shape = const.tensor.shape
        if not shape or shape[-1] != features or const.numel != features:
            raise _Refused(f"{_label(node)} makes its input and has no weight per channel")
        return const, len(shape) - 1


def _value(arg: object, node: Node) -> Value:
    if not isinstance(arg, Value):
        raise _Refused(f"{_label(node)} makes its input and has no weight per channel")
    return arg


def _label(node: Node) -> str:
    return f"{base_name(node.op)} (%{node.name})"


_RULES: Mapping[str, Callable[[_Search, Node, int], Divided]] = {
    **dict.fromkeys(_SAME, _Search.through),
    **dict.fromkeys(_NORMS, _Search.norm),
    "mul": _Search.product,
    "add": _Search.total,
}
