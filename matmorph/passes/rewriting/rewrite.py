"""Rewrite: every claimed site gets its fragments, all on one graph, and ONE splice puts them in.

`appraise` judges from shapes alone (plan uses it too), `build` makes the fragments and measures them, `splice` exchanges the nodes.
`rewrite` is the three in a row; a caller that rolls back leaves outcomes out between the last two.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from matmorph.errors import RewriteError, SpecError
from matmorph.ir.adapter import Adapter
from matmorph.ir.build import Builder
from matmorph.ir.core import Const, Graph, Node
from matmorph.ir.infer import Inference
from matmorph.ir.rewiring import swept
from matmorph.ir.site import Bound, Choice, Cost, Fragment, Reject, Sample, Site, Spectrum, Statistic
from matmorph.passes.linalg.parallel import ordered_map
from matmorph.passes.methods.protocol import Methods, SiteMethod, SiteStats, dense_cost, refuse_larger, site_method
from matmorph.passes.pruning.find_blocks import Block
from matmorph.passes.pruning.patch import Patch
from matmorph.passes.rewriting.row_view import unreadable
from matmorph.passes.rewriting.site_builder import SiteScope
from matmorph.passes.rewriting.site_task import SiteTask, Solved, keeps_node, measured, standing
from matmorph.passes.rewriting.spill import Spill
from matmorph.passes.work.hands import Hands, Here
from matmorph.passes.work.nest import laid_out
from matmorph.passes.work.task import bare
from matmorph.progress import StepProgress, tell

if TYPE_CHECKING:
    from matmorph.specs.schema import MethodUse, Rule


@dataclass(frozen=True, slots=True)
class Part:
    """One method of a site's rewrite: what it takes under `choice`, and what its fragment had to say."""

    use: MethodUse
    kind: str
    choice: Choice
    cost: Cost
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of one claimed site. `reject`: why nothing did, then all the rest is empty.

    `weight_error` and `output_error` (None without calibration, and without rows that nothing was fitted to) are measured with the stored
    factors, the latter on the rows that `sample` tells of. `cost` is what the site takes
    afterwards, a dense weight that stays included. `nodes`: what stands in place of each application's node. `consts`: the new weights.
    `keeps_dense`: the dense weight stays beside them. `block`: the block that is pruned as a whole, `patch` what it becomes (with the
    outcome of its last matmul alone). `adapters`: what of it trains to be exchanged and merged.
    """

    site: Site
    rule: Rule
    reject: Reject | None = None
    parts: tuple[Part, ...] = ()
    weight_error: float | None = None
    output_error: float | None = None
    bound: Bound | None = None
    cost: Cost | None = None
    nodes: Mapping[Node, tuple[Node, ...]] | None = None
    consts: tuple[Const, ...] = ()
    keeps_dense: bool = False
    block: Block | None = None
    patch: Patch | None = None
    spectrum: Spectrum | None = None
    sample: Sample | None = None
    adapters: tuple[Adapter, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for part in self.parts for note in part.notes)


def rewrite(
    graph: Graph,
    claims: Iterable[tuple[Site, Rule]],
    methods: Methods,
    stats: Mapping[Site, SiteStats] | None = None,
    *,
    seed: int = 0,
    progress: StepProgress | None = None,
) -> tuple[Graph, tuple[Outcome, ...]]:
    """The rewritten graph and an outcome per claim, in order. Claims of rules that keep (`rewrite: keep`) must be left out by the caller.

    RewriteError: a weight with NaN or infinity. SpecError: a method that needs calibration data where `stats` has none for its site, or
    a rank that no site of its rule can have.
    """
    outcomes = build(graph, claims, methods, stats, seed=seed, progress=progress)
    return splice(graph, outcomes), outcomes


def appraise(site: Site, rule: Rule, methods: Methods) -> Reject | tuple[Part, ...]:
    """What the rule would make of the site, from shapes only: a choice and a cost per method (upper limits where the data decides), or why
    not. The bytes law is judged here where the choice is final."""
    if site.blocked is not None:
        return Reject(site.blocked)
    site = _treated(site, rule)
    if (reason := unreadable(site)) is not None:
        return reason
    parts: list[Part] = []
    for use in rule.rewrite:
        method = standing(site_method(methods, use.method), [part.use for part in parts], methods)
        reject = method.check(site, use.spec) or _without_dense(method, use, parts, methods)
        if reject is not None:
            return reject
        choices = list(method.choices(site, use.spec))
        if len(choices) != 1 or (method.kind == "replace" and parts):
            raise RewriteError(f"{site.path}: {use.method} leaves {len(choices)} choices as part {len(parts) + 1} of its rewrite")
        parts.append(Part(use, method.kind, choices[0], method.cost(site, use.spec, choices[0]), _said(choices[0])))
    return _too_large(site, rule, [part for part in parts if not part.choice.at_most]) or tuple(parts)


def _said(choice: Choice) -> tuple[str, ...]:
    """Notes that shapes alone give."""
    return (*((choice.clamped,) if choice.clamped else ()), *choice.notes)


def _without_dense(method: SiteMethod, use: MethodUse, before: Sequence[Part], methods: Methods) -> Reject | None:
    """A method that splits the dense weight needs it to be there still; one with a `beside` works on the dense weight, which no update
    before it may have made its own."""
    how = method.splits_weight(use.spec)
    if before and how is not None:
        return Reject(f"{use.method} {how} the dense weight, and {before[0].use.method} comes before it")
    updates = [(part, site_method(methods, part.use.method)) for part in before]
    taken = [part.use.method for part, other in updates if other.splits_weight(part.use.spec) or other.beside is not None]
    if not taken or method.beside is None:
        return None
    return Reject(f"{use.method} works on the dense weight, and {taken[0]} before it has made that its own")


def _treated(site: Site, rule: Rule, stats: SiteStats | None = None) -> Site:
    """The site as its methods see it: under `untie` its gathers keep the table to themselves; with a target for what takes its place, that
    is the weight."""
    treated = replace(site, gathers=()) if rule.untie else site
    return treated if stats is None else aimed(treated, stats)


def aimed(site: Site, stats: SiteStats) -> Site:
    """The site with the target as its weight; itself where there is none."""
    target = stats.target
    return site if target is None else replace(site, read=lambda stored: target)


def total_cost(site: Site, parts: Sequence[Part]) -> Cost:
    """Of all parts together, and of the dense weight where none replaces it."""
    costs = [part.cost for part in parts]
    if not any(part.kind == "replace" for part in parts):
        costs.append(dense_cost(site))
    stored: dict[str, int] = {}
    for cost in costs if any(cost.stored for cost in costs) else ():
        for dtype, count in cost.stored or ((site.const.tensor.dtype, cost.parameters),):
            stored[dtype] = stored.get(dtype, 0) + count
    sums = {field: sum(getattr(cost, field) for cost in costs) for field in ("parameters", "bytes", "macs", "coded", "trains", "frozen")}
    return Cost(**sums, stored=tuple(stored.items()))


def refuse_impossible(claims: Iterable[tuple[Site, Rule]], methods: Methods) -> None:
    """SpecError for settings that fit no site of their rule at all. What fits some of them is a Reject of the others."""
    owned: dict[int, tuple[Rule, list[Site]]] = {}
    for site, rule in claims:
        owned.setdefault(id(rule), (rule, []))[1].append(site)
    for rule, sites in owned.values():
        for use in rule.rewrite:
            why = site_method(methods, use.method).impossible(sites, use.spec)
            if why is not None:
                raise SpecError(f"rule {rule.name}: {why}", at=use.at)


@dataclass(frozen=True, slots=True, eq=False)
class Workshop:
    """What all sites of one graph share while their fragments are made. `dotted`: names of weights that are taken. `shared`: weights that
    several sites read, by what makes them the same. `hands`: who does what needs nothing of the graph."""

    builder: Builder
    inference: Inference
    dotted: set[str]
    methods: Methods
    seed: int
    hands: Hands
    shared: dict[Hashable, Const] = field(default_factory=dict)

    @classmethod
    def over(cls, graph: Graph, methods: Methods, seed: int, hands: Hands | None = None) -> Workshop:
        inference = Inference(graph.ranges, graph.device)
        dotted = {name for const in graph.state for name in const.names}
        return cls(Builder(graph, inference=inference, keep=Spill().kept), inference, dotted, methods, seed, hands or Here(methods))


def build(
    graph: Graph,
    claims: Iterable[tuple[Site, Rule]],
    methods: Methods,
    stats: Mapping[Site, SiteStats] | None = None,
    *,
    seed: int = 0,
    progress: StepProgress | None = None,
    hands: Hands | None = None,
) -> tuple[Outcome, ...]:
    """An outcome per claim. One site per hand at a time: its weight is let go before the next is read, and the new ones go to disk."""
    listed = list(claims)
    refuse_impossible(listed, methods)
    return build_with(Workshop.over(graph, methods, seed, hands), listed, stats, progress)


def build_with(
    shop: Workshop,
    claims: Sequence[tuple[Site, Rule]],
    stats: Mapping[Site, SiteStats] | None = None,
    progress: StepProgress | None = None,
) -> tuple[Outcome, ...]:
    """The same for some of the claims on a graph, the others of which come later or were before."""
    found: list[Outcome] = []
    plans = [(site, rule, appraise(site, rule, shop.methods), (stats or {}).get(site)) for site, rule in claims]
    solutions = ordered_map(lambda plan: _solved(shop, *plan), plans, shop.hands.count)
    for plan, solved in zip(plans, solutions, strict=True):
        found.append(_outcome(shop, *plan, solved))
        tell(progress, plan[0].path, len(found), len(claims))
    return tuple(found)


Appraisal: TypeAlias = Reject | tuple[Part, ...]
"""What `appraise` says of a site."""


def _solved(shop: Workshop, site: Site, rule: Rule, planned: Appraisal, stats: SiteStats | None) -> Solved | None:
    """The pure part of a rewrite, which needs nothing of the other sites; None where its first method has none, or will not get so far."""
    if isinstance(planned, Reject) or type(site_method(shop.methods, planned[0].use.method)).solve is SiteMethod.solve:
        return None
    if stats is None and any(needed_statistics(site_method(shop.methods, part.use.method), part.use.spec, site) for part in planned):
        return None  # no weight is read for nothing
    treated = _treated(site, rule, stats)
    uses, choices = tuple(part.use for part in planned), tuple(part.choice for part in planned)
    original = None if stats is None or stats.target is None else site.weight().detach()
    known, weight, own = laid_out((stats, treated.weight().detach(), original))
    found: Solved = shop.hands.do(SiteTask(bare(treated), uses, choices, known, weight, own, shop.seed))
    return found


def _outcome(shop: Workshop, site: Site, rule: Rule, planned: Appraisal, stats: SiteStats | None, solved: Solved | None) -> Outcome:
    if isinstance(planned, Reject):
        return Outcome(site, rule, planned)
    location = f"{rule.at.file}:{rule.at.line}" if rule.at is not None else None
    treated = _treated(site, rule, stats)
    scope = SiteScope(treated, shop.builder, shop.inference, rule.name, location, shop.dotted, shop.shared)
    fragments: list[Fragment] = []
    parts: list[Part] = []
    for part, label in zip(planned, _labels(planned), strict=True):
        method = standing(site_method(shop.methods, part.use.method), [one.use for one in parts], shop.methods)
        _needs(method, part.use, rule, site, stats)
        b = scope.builder_for(method, label, shop.seed, fragments, None if fragments or solved is None else solved.solution)
        fragment = method.build(treated, part.use.spec, part.choice, stats, b)
        fragments.append(fragment)
        cost = method.cost(treated, part.use.spec, fragment.choice)
        said = () if stats is None or parts else stats.remarks
        parts.append(replace(part, choice=fragment.choice, cost=cost, notes=(*_said(fragment.choice), *fragment.notes, *said)))
    if (reject := _too_large(site, rule, parts)) is not None:
        return Outcome(site, rule, reject)
    base = site_method(shop.methods, parts[0].use.method)
    return replace(
        _finished(site, scope, rule, parts, fragments, stats, shop.methods, solved), adapters=_adapters(site, rule, base, parts, fragments)
    )


def _labels(parts: Sequence[Part]) -> list[str]:
    """What names the weights of each part: the method, numbered where it comes again."""
    names = [part.use.method for part in parts]
    return [name if name not in names[:k] else f"{name}_{names[:k].count(name)}" for k, name in enumerate(names)]


def needed_statistics(method: SiteMethod, spec: Any, site: Site) -> frozenset[Statistic]:
    """Statistics that the site needs. A table that is only looked up has no inputs that there could be any of."""
    return method.needs(spec) if site.applications else frozenset()


def _needs(method: SiteMethod, use: MethodUse, rule: Rule, site: Site, stats: SiteStats | None) -> None:
    missing = sorted(statistic.value for statistic in needed_statistics(method, use.spec, site)) if stats is None else []
    if missing:
        raise SpecError(f"rule {rule.name}: {use.method} needs calibration data ({', '.join(missing)} of {site.path})", at=use.at)


def _too_large(site: Site, rule: Rule, parts: Iterable[Part]) -> Reject | None:
    """The bytes law, for the replacing part."""
    judged = () if rule.force else (refuse_larger(site, part.cost) for part in parts if part.kind == "replace")
    return next((reject for reject in judged if reject is not None), None)


def _finished(
    site: Site,
    scope: SiteScope,
    rule: Rule,
    parts: Sequence[Part],
    fragments: Sequence[Fragment],
    stats: SiteStats | None,
    methods: Methods,
    solved: Solved | None,
) -> Outcome:
    uses = [part.use for part in parts]
    made = [(standing(site_method(methods, use.method), uses[:k], methods), use) for k, use in enumerate(uses)]
    stays = keeps_node(fragments, made)
    if solved is None:
        w = scope.weight() if stats is None or stats.target is None else site.weight().detach()
        measures = measured(site, made, fragments, stats, w)
    else:
        measures = solved.measures
    return Outcome(
        site,
        rule,
        None,
        tuple(parts),
        weight_error=measures.weight_error,
        output_error=measures.output_error,
        sample=measures.sample,
        # a bound for one form says nothing of a sum, and one for the target nothing of the weight
        bound=fragments[0].bound if len(fragments) == 1 and (stats is None or stats.target is None) else None,
        cost=total_cost(site, parts),
        nodes=scope.close(fragments, stays),
        consts=tuple(const for fragment in fragments for const in fragment.consts),
        keeps_dense=stays or _read_again(site, fragments),
        spectrum=fragments[0].spectrum,
    )


def _adapters(site: Site, rule: Rule, first: SiteMethod, parts: Sequence[Part], fragments: Sequence[Fragment]) -> tuple[Adapter, ...]:
    """One per part that brought one. `first`: the method of the first part, which may have taken the weight's place."""
    own = next((item for item in fragments if item.adapter is not None and item.adapter.own_base is not None), None)
    base, base_consts, settings = "dense", dict[str, str](), None
    if own is not None and own.adapter is not None:
        base, base_consts = "own", {"base": next(const.path for const in own.consts if const.part == own.adapter.own_base)}
    elif parts[0].kind == "replace":
        base, settings = parts[0].use.method, first.base_settings(parts[0].use.spec)
        base_consts = {const.part or const.path: const.path for const in fragments[0].consts if settings is None or not const.trainable}
    return tuple(
        Adapter(
            site=site.path,
            rule=rule.name,
            method=part.use.method,
            consts={short: const.path for short, const in found.consts.items()},
            scale=found.scale,
            in_features=site.in_features,
            out_features=site.out_features,
            batch=site.batch,
            base=base,
            base_consts=base_consts,
            settings=settings,
            form=site.form,
            applications=len(site.applications),
            inside=found.inside,
            starts_at_zero=found.starts_at_zero and base != "own",
            kept=found.kept,
            details=found.details,
        )
        for part, fragment in zip(parts, fragments, strict=True)
        if (found := fragment.adapter) is not None
    )


def _read_again(site: Site, fragments: Sequence[Fragment]) -> bool:
    """Whether a fragment reads the dense weight, which so stays."""
    return any(value in node.inputs() for value in site.operands for item in fragments for part in item.parts for node in part)


def splice(graph: Graph, outcomes: Iterable[Outcome]) -> Graph:
    """The graph with all fragments in the place of their nodes. What only they read (transposes of the weight, sizes, picked experts) goes
    too, and a replaced weight that nothing reads any more leaves `state`; new weights stand where it stood."""
    taken = [outcome for outcome in outcomes if outcome.nodes is not None]
    exchanged = {node: new for outcome in taken for node, new in (outcome.nodes or {}).items()}
    nodes = [new for node in graph.nodes for new in exchanged.get(node, (node,))]
    added: dict[Const, list[Const]] = {}
    placed: set[Const] = set()
    for outcome in taken:
        added.setdefault(outcome.site.anchor, []).extend(const for const in outcome.consts if const not in placed)
        placed.update(outcome.consts)
    state = [item for const in graph.state for item in (const, *added.get(const, ()))]
    return swept(replace(graph, nodes=tuple(nodes), state=tuple(state)), graph)
