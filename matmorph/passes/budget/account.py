"""`budget:`: the limits in numbers, the choice for every site that a rule leaves open, and what the report says of both.

The objective is the sum over sites of scale * (relative error)^2; see `candidates.Scale`. What rules without a choice do is counted first;
the open sites share what that leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor

from matmorph.errors import SpecError, VerifyError
from matmorph.ir.core import Graph
from matmorph.ir.site import Cost, Reject, Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.budget.knapsack import RESOURCES, Allocation, Candidate, Resource, Unreachable, allocate
from matmorph.passes.budget.offers import ErrorScale, Offer, Option, Sizes, describe, sizes_of, summed
from matmorph.passes.methods.protocol import Methods, SiteStats
from matmorph.passes.reporting import dense_rows, weights_of
from matmorph.passes.rewriting.block_pass import of_block
from matmorph.passes.rewriting.rewrite import Outcome, appraise, total_cost
from matmorph.passes.selection.select import Selection
from matmorph.passes.sizes import exported_sizes
from matmorph.report.model import SiteRow
from matmorph.specs.notations import Amount
from matmorph.specs.schema import ANY_OF, Budget, Export, Rule, Stage


@dataclass(frozen=True, slots=True)
class Account:
    """The limits of a budget and what is spent before anything is chosen, per limited resource: `limits` in all, `fixed` by what is not
    open, `dense` by everything as it is. `base`: what percentages are of."""

    budget: Budget
    limits: Mapping[Resource, int]
    fixed: Mapping[Resource, int]
    dense: Mapping[Resource, int]
    base: Mapping[Resource, int]

    @property
    def left(self) -> dict[Resource, int]:
        """For the open sites. Negative where the rest alone is above the limit."""
        return {name: limit - self.fixed[name] for name, limit in self.limits.items()}

    def said(self, name: Resource) -> str:
        amount: Amount = getattr(self.budget, name)
        whole = "the matched matmuls" if self.budget.of == "matched" else "the model"
        given = f" ({amount.plain()} of {whole})" if amount.percent else f" ({whole})"
        return f"{name} <= {self.limits[name]:,}{given}"


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """A selection without open rules, and the account, options, candidates (one per option) and scales that it came from."""

    selection: Selection
    notes: tuple[str, ...]
    account: Account
    offers: tuple[Offer, ...]
    chosen: tuple[Option, ...]
    allocation: Allocation
    candidates: tuple[tuple[Candidate, ...], ...]
    scales: tuple[ErrorScale, ...]

    @property
    def refused(self) -> tuple[Outcome, ...]:
        """Sites that no method of their rule takes; their rules stay open in `selection`."""
        found = ((site, one) for one in self.offers if _is_refused(one) for site in one.sites)
        return tuple(Outcome(site, one.rule, Reject("; ".join(one.refused))) for site, one in found)


def _is_refused(one: Offer) -> bool:
    """No method of its rule takes it, and nobody wrote `keep`."""
    keeps = one.rule.rewrite[0].method == ANY_OF and () in one.rule.alternatives
    return bool(one.refused) and not keeps and not any(option.uses for option in one.options)


def open_claims(selection: Selection) -> list[tuple[Site, Rule]]:
    return [(claim.site, claim.rule) for claim in selection.claims if claim.rule is not None and claim.rule.is_open]


def account(
    graph: Graph,
    source: Graph,
    stage: Stage,
    selection: Selection,
    methods: Methods,
    export: Export,
    pruned: Mapping[Site, Cost] | None = None,
    coded: int = 0,
) -> Account:
    """`graph` is what the stage works on, `source` the model that percentages of the model are of. Rules that are not open count with what
    their methods promise, upper limits where the data decides; `pruned`: what sites of blocks take under such rules, `coded`: parameters
    that earlier stages have put into codes."""
    if stage.budget is None:
        raise SpecError("something is left open and the stage has no budget")
    sizes = exported_sizes(graph, export.precision)
    everything = {claim.site: sizes_of(claim.site, None, sizes, export.precision) for claim in selection.claims}
    open_ = {site for site, _ in open_claims(selection)}
    rules = {claim.site: claim.rule for claim in selection.claims if claim.rule is not None}
    of_model = stage.budget.of == "model"
    scope = [site for site in everything if of_model or site in rules]
    costs = {site: _cost(site, rules.get(site), methods, pruned or {}) for site in scope if site not in open_}
    untied = {site for site, rule in rules.items() if rule.untie}
    settled = [sizes_of(site, cost, sizes, export.precision, site in untied) for site, cost in costs.items()]
    outside = _outside(graph, everything, export, coded) if of_model else Sizes(0, 0, 0)
    whole = summed([outside, *(everything[site] for site in scope)])
    base = _of_model(source, export) if of_model else whole
    limits = {name: _amount(amount, getattr(base, name)) for name in RESOURCES if (amount := getattr(stage.budget, name)) is not None}
    fixed, dense, base_of = ({name: int(getattr(sums, name)) for name in limits} for sums in (summed([outside, *settled]), whole, base))
    return Account(stage.budget, limits, fixed, dense, base_of)


def _cost(site: Site, rule: Rule | None, methods: Methods, pruned: Mapping[Site, Cost]) -> Cost | None:
    """Of a site whose rule leaves no choice; None where it stays."""
    if rule is None or not rule.rewrite or site in pruned or of_block(rule, methods) is not None:
        return pruned.get(site)
    parts = appraise(site, rule, methods)
    return None if isinstance(parts, Reject) else total_cost(site, parts)


def _outside(graph: Graph, everything: Mapping[Site, Sizes], export: Export, coded: int) -> Sizes:
    """What the model has beside its sites: biases, norms, tables that nothing claims."""
    parameters, size = weights_of(graph, export.precision)
    sites = summed(list(everything.values()))
    return Sizes(parameters + coded - sites.parameters, size - sites.bytes, 0)


def _of_model(source: Graph, export: Export) -> Sizes:
    parameters, size = weights_of(source, export.precision)
    return Sizes(parameters, size, sum(row.macs[0] for row in dense_rows(find_sites(source), source, export.precision)))


def _amount(amount: Amount, base: int) -> int:
    """A percentage is rounded down: it is a promise."""
    return floor(round(amount.value * base / 100, 6)) if amount.percent else int(amount.value)


# the choice


def decide(
    offers: tuple[Offer, ...], held: Account, selection: Selection, stats: Mapping[Site, SiteStats], scales: Sequence[ErrorScale]
) -> Decision:
    """The choice for every open site, exactly optimal. `offers` are measured, `scales` go with them. SpecError at the budget where it
    cannot be met."""
    candidates = tuple(
        tuple(_candidate(option, scale.of(option, one.site in stats)) for option in one.options)
        for one, scale in zip(offers, scales, strict=True)
    )
    found = allocate(candidates, held.left)
    if isinstance(found, Unreachable):
        raise unreachable(held, found, offers)
    chosen = tuple(one.options[index] for one, index in zip(offers, found.chosen, strict=True))
    notes = tuple(_summary(held, found, offers, chosen))
    return Decision(_closed(selection, offers, chosen), notes, held, offers, chosen, found, candidates, tuple(scales))


def _candidate(option: Option, error: float) -> Candidate:
    sizes = option.sizes
    return Candidate(option.label, error, sizes.parameters, sizes.bytes, sizes.macs)


def refuse_unreachable(held: Account, offers: Sequence[Offer]) -> None:
    """From shapes alone: SpecError for a limit below what any choice takes."""
    candidates = [[_candidate(option, 0.0) for option in one.options] for one in offers]
    found = allocate(candidates, held.left)
    if isinstance(found, Unreachable):
        raise unreachable(held, found, offers)


def plan_notes(held: Account, offers: Sequence[Offer]) -> tuple[str, ...]:
    """What shapes alone say of a budget, and what they do not. SpecError as `refuse_unreachable`."""
    refuse_unreachable(held, offers)
    found = [f"budget: {held.said(name)}; the smallest that can be reached is {_least(held, offers, name):,}" for name in held.limits]
    sites = f"{len(offers)} {'site is' if len(offers) == 1 else 'sites are'}"
    return (*found, f"budget: {sites} decided when compiled, on weights and calibration data; until then they count as they are")


def _least(held: Account, offers: Sequence[Offer], name: Resource) -> int:
    return held.fixed[name] + sum(min(int(getattr(option.sizes, name)) for option in one.options) for one in offers)


def unreachable(held: Account, found: Unreachable, offers: Sequence[Offer]) -> SpecError:
    """What can be reached, and what stands in the way."""
    least = {name: held.fixed[name] + found.smallest[name] for name in found.limiting}
    reached = " and ".join(f"{least[name]:,} {name}{_share(least[name], held.base[name])}" for name in found.limiting)
    together = " at the same time" if len(found.limiting) > 1 and len(held.limits) == len(found.limiting) else ""
    name = found.limiting[0]
    details = [f"limit: {held.said(name)}" for name in found.limiting]
    if held.fixed[name]:
        details.append(f"{held.fixed[name]:,} {name} belong to weights that no rule with auto or any_of decides on")
    smallest_of = {one: min(getattr(option.sizes, name) for option in one.options) for one in offers}
    worst = sorted(offers, key=lambda one: -smallest_of[one])[:3]
    details += [f"{one.site.path}: at least {smallest_of[one]:,}{_why(one)}" for one in worst]
    return SpecError(
        f"the budget cannot be met: the smallest that can be reached is {reached}{together}",
        at=held.budget.at,
        keypath="budget",
        details=details,
    )


def _share(amount: int, base: int) -> str:
    return f" ({100 * amount / base:.3g}%)" if base else ""


def _why(one: Offer) -> str:
    return f" ({one.refused[0]})" if one.refused else ""


def _closed(selection: Selection, offers: Sequence[Offer], chosen: Sequence[Option]) -> Selection:
    """The selection with concrete rules in the place of open ones."""
    chosen_of: dict[Site, Rule] = {}
    for one, option in zip(offers, chosen, strict=True):
        if not _is_refused(one):
            chosen_of.update(dict.fromkeys(one.sites, replace(one.rule, rewrite=option.uses)))  # one rule for the sites of a block
    claims = (replace(claim, rule=chosen_of.get(claim.site, claim.rule)) for claim in selection.claims)
    return replace(selection, claims=tuple(claims))


def _summary(held: Account, found: Allocation, offers: Sequence[Offer], chosen: Sequence[Option]) -> Iterable[str]:
    for name in held.limits:
        total = held.fixed[name] + found.totals[name]
        yield f"budget: {held.said(name)}: {total:,} chosen{_share(total, held.base[name])}"
    if all(held.dense[name] <= limit for name, limit in held.limits.items()):
        yield "budget: the original already holds it"
    sites = f"{len(offers)} {'site' if len(offers) == 1 else 'sites'}"
    options = sum(len(one.options) for one in offers)
    binds = f"binding: {', '.join(found.binding)}" if found.binding else "no limit binds"
    yield f"budget: {options} candidates of {sites}; optimality gap {found.gap:.2g}; {binds}"
    counted = Counter(describe(option.uses) for option in chosen)
    yield "budget: " + ", ".join(f"{count} x {text}" for text, count in counted.most_common())


def verdict(decided: Decision, rows: Sequence[SiteRow]) -> tuple[str, ...]:
    """What the budget came to once the stage was built, from its report rows. A note for each limit that sites which were rolled back, or
    refused when they were built, now exceed. VerifyError where it is exceeded and there are none: our bug."""
    held = decided.account
    totals = {name: held.dense[name] + sum(pair[1] - pair[0] for pair in (getattr(row, name) for row in rows)) for name in held.limits}
    dense = [row.path for row in rows if row.status == "rejected"]
    notes = []
    for name, total in totals.items():
        if total > held.limits[name] and not dense:
            raise VerifyError(f"the rewrite takes {total:,} {name} where {held.said(name)} was allocated")
        if total > held.limits[name]:
            notes.append(f"budget: {held.said(name)} does not hold: {total:,}, because {_listed(dense)} stayed dense")
    return tuple(notes)


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
