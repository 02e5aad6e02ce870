"""What each site offers a budget: every concrete rewrite that its rule leaves open, with what it takes and the error it would make.

Shapes alone give the options and their costs; the errors of all options of one alternative come from one decomposition of the weight
(`Method.errors`). A concrete option is an ordinary rewrite: once it is chosen nothing downstream knows that there was a choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from matmorph.ir.core import Const
from matmorph.ir.site import Choice, Cost, Reject, Site
from matmorph.passes.budget.pays import much_slower, refuse_slow
from matmorph.passes.budget.price_task import Energies, Prices, PriceTask, energies_of, square
from matmorph.passes.linalg.parallel import ordered_map
from matmorph.passes.methods.protocol import Error, Methods, SiteStats, dense_cost, site_method
from matmorph.passes.methods.weights import readable
from matmorph.passes.rewriting.rewrite import Outcome, appraise, total_cost
from matmorph.passes.sizes import item_size, site_bytes
from matmorph.passes.statistics.sensitivity import Sensitivity
from matmorph.passes.work.hands import Hands, Here
from matmorph.passes.work.nest import laid_out
from matmorph.passes.work.task import bare
from matmorph.specs.notations import Width
from matmorph.specs.schema import Export, MethodUse, Rank, Rule

if TYPE_CHECKING:
    from matmorph.specs.schema import Tolerance

NO_ERROR = Error(0.0, 0.0)
KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a site takes, its bias excluded: parameters, bytes in the data file, multiply-accumulates per row."""

    parameters: int
    bytes: int
    macs: int


@dataclass(frozen=True, slots=True)
class Option:
    """One concrete rewrite; `uses` () keeps the matmul. `source`: (number of its alternative, choice), None for `keep`. `error` is that of
    the part that replaces the matmul: what is added to it begins at zero."""

    label: str
    uses: tuple[MethodUse, ...]
    sizes: Sizes
    source: tuple[int, Choice] | None = None
    error: Error = NO_ERROR


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """The options of a site under an open rule; `refused`: why other ones are none. `block`: all sites that take an option together, and
    `site` is the one whose output is judged; () for a site by itself. `energies`: of that site, where they were found with the errors."""

    site: Site
    rule: Rule
    options: tuple[Option, ...]
    refused: tuple[str, ...] = ()
    block: tuple[Site, ...] = ()
    energies: Energies | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.block or (self.site,)


def sizes_of(site: Site, cost: Cost | None, dense: Mapping[Const, int], precision: str, untie: bool = False) -> Sizes:
    """As the report will count them (`passes.reporting`). `cost` None: the site stays. `dense`: exported bytes of the weights."""
    before = Sizes(site.held[0], site_bytes(site, dense), _macs(site))
    if cost is None:
        return before
    stored = cost.stored or ((site.const.tensor.dtype, cost.parameters),)
    after = Sizes(cost.parameters, sum(count * item_size(dtype, precision) for dtype, count in stored), cost.macs)
    if not (untie and site.gathers):
        return after
    return Sizes(after.parameters + before.parameters, after.bytes + before.bytes, after.macs)  # the table keeps its gather


def _macs(site: Site) -> int:
    return 0 if site.form == "embedding" or site.listed else dense_cost(site).macs


def offer(site: Site, rule: Rule, methods: Methods, dense: Mapping[Const, int], export: Export) -> Offer:
    """From shapes alone. Options that the methods, the bytes law or `pays` refuse are left out; where none is left, `keep` is. What is
    predicted to be much slower is left out as long as another rewrite is left."""
    options: list[Option] = []
    slow: dict[str, str] = {}
    refused: list[str] = []
    for number, uses in enumerate(rule.alternatives):
        if not uses:
            options.append(kept([sizes_of(site, None, dense, export.precision)]))
            continue
        problem = site_method(methods, uses[0].method).check(site, uses[0].spec) if site.blocked is None else Reject(site.blocked)
        choices = [] if problem is not None else list(site_method(methods, uses[0].method).choices(site, uses[0].spec))
        refused += [problem.reason] if problem is not None else []
        for choice in choices:
            concrete = (settled(uses[0], choice), *uses[1:])
            found = _appraised(site, replace(rule, rewrite=concrete), methods, export)
            if isinstance(found, Reject):
                refused.append(found.reason)
                continue
            sizes = sizes_of(site, found.cost, dense, export.precision, rule.untie)
            option = Option(label(number, concrete), concrete, sizes, (number, choice))
            options.append(option)
            why = much_slower(found, export, methods)
            slow |= {option.label: why} if why is not None else {}
    if any(option.uses and option.label not in slow for option in options):
        options = [option for option in options if option.label not in slow]
        refused += slow.values()
    stays = (kept([sizes_of(site, None, dense, export.precision)]),)
    return Offer(site, rule, tuple(options) or stays, tuple(dict.fromkeys(refused)))


def kept(sizes: Sequence[Sizes]) -> Option:
    return Option(KEEP, (), summed(sizes))


def summed(sizes: Sequence[Sizes]) -> Sizes:
    return Sizes(sum(one.parameters for one in sizes), sum(one.bytes for one in sizes), sum(one.macs for one in sizes))


def _appraised(site: Site, rule: Rule, methods: Methods, export: Export) -> Reject | Outcome:
    parts = appraise(site, rule, methods)
    if isinstance(parts, Reject):
        return parts
    (judged,) = refuse_slow([Outcome(site, rule, None, parts, cost=total_cost(site, parts))], export, methods)
    return judged.reject or judged


def settled(use: MethodUse, choice: Choice) -> MethodUse:
    """The use with what says auto as the choice has it."""
    found: dict[str, Any] = {}
    rank = getattr(use.spec, "rank", None)
    if isinstance(rank, Rank) and rank.kind == "auto":
        each = {"each": choice.ranks} if choice.ranks else {}
        found["rank"] = replace(rank, kind="fixed", value=choice.rank, multiple_of=1, min=1, max=None, **each)
    if getattr(use.spec, "bits", None) == "auto":
        found["bits"] = choice.bits
    width = getattr(use.spec, "width", None)
    if isinstance(width, Width) and width.kind == "auto":
        found["width"] = replace(width, kind="fixed", value=choice.rank)
    return replace(use, spec=replace(use.spec, **found)) if found else use


def label(number: int, uses: Sequence[MethodUse]) -> str:
    """Unique among the options of a rule."""
    return f"{number}: {describe(uses)}"


def describe(uses: Sequence[MethodUse]) -> str:
    """low_rank rank 96; quantize 4 bits; keep."""
    return " + ".join(map(_described, uses)) or KEEP


def _described(use: MethodUse) -> str:
    rank, bits, width = (getattr(use.spec, name, None) for name in ("rank", "bits", "width"))
    words = [use.method, f"{bits} bits" if bits else "", f"rank {rank}" if isinstance(rank, Rank) else ""]
    words.append(f"width {width}" if isinstance(width, Width) else "")
    return " ".join(word for word in words if word)


# errors


def measured(
    offers: Iterable[Offer],
    methods: Methods,
    stats: Mapping[Site, SiteStats],
    tolerance: Tolerance | None = None,
    hands: Hands | None = None,
) -> Iterable[Offer]:
    """The offers with the errors of their options, in order, several sites at a time; those beyond the tolerance are left out."""
    found = hands or Here(methods)
    return ordered_map(lambda one: within(_measured(one, methods, stats.get(one.site), found), tolerance), offers, found.count)


def _measured(one: Offer, methods: Methods, stats: SiteStats | None, hands: Hands) -> Offer:
    asked: list[tuple[int, MethodUse, tuple[Choice, ...]]] = []
    for number, uses in enumerate(one.rule.alternatives):
        choices = tuple(option.source[1] for option in one.options if option.source is not None and option.source[0] == number)
        if uses and choices and site_method(methods, uses[0].method).kind == "replace":
            asked.append((number, uses[0], choices))
    felt = stats is not None and stats.output_moment is not None
    if not asked and not felt:
        return replace(one, options=tuple(replace(option, error=NO_ERROR) for option in one.options))
    site = replace(one.site, gathers=()) if one.rule.untie else one.site
    known, weight = laid_out((stats, one.site.weight().detach()))
    prices: Prices = hands.do(PriceTask(bare(site), tuple(asked), known, weight, felt))
    errors = {(number, choice): error for number, choice, error in prices.errors}
    options = tuple(replace(option, error=errors.get(option.source, NO_ERROR) if option.source else NO_ERROR) for option in one.options)
    return replace(one, options=options, energies=prices.energies)


def within(one: Offer, tolerance: Tolerance | None) -> Offer:
    """What would be rolled back (or fail) is no option, as long as one is left."""
    if tolerance is None:
        return one
    limits = (("weight_error", tolerance.weight_error), ("output_error", tolerance.output_error))

    def holds(option: Option) -> bool:
        found = ((getattr(option.error, name), limit) for name, limit in limits)
        return all(error is None or limit is None or error <= limit for error, limit in found)

    kept = tuple(option for option in one.options if holds(option))
    return replace(one, options=kept or one.options)


def error_of(option: Option, measured_on_outputs: bool) -> float:
    """Relative; of outputs where the site's input was watched, else of weights."""
    found = option.error.output_error if measured_on_outputs else option.error.weight_error
    return float(found if found is not None else option.error.weight_error or 0.0)


@dataclass(frozen=True, slots=True)
class ErrorScale:
    """What relative errors of one site count. `felt`: of a squared `felt_error`, None where there are none; `other`: of a squared output or
    weight error; `looked_up`: of a squared weight error, on top, where the weight is a table that rows are looked up in. 1 without
    sensitivities: then errors of all sites count alike."""

    felt: float | None
    other: float
    looked_up: float = 0.0

    @property
    def whole(self) -> float:
        """Of an error of 1."""
        return self.looked_up + (self.other if self.felt is None else self.felt)

    def of(self, option: Option, on_outputs: bool) -> float:
        felt, rows = option.error.felt_error, self.looked_up * (option.error.weight_error or 0.0) ** 2
        return rows + (self.other * error_of(option, on_outputs) ** 2 if felt is None or self.felt is None else self.felt * felt**2)


def scale_of(one: Offer, stats: SiteStats | None, felt: Sensitivity | None) -> ErrorScale:
    """`felt`: None where nothing was gathered. `stats` are those of the offer's site."""
    if felt is None:
        return ErrorScale(None, 1.0)
    site = one.site
    looked_up = felt.lookups[site] * square(readable(site, site.weight())) / site.out_features if site.gathers else 0.0
    if not site.applications:
        return ErrorScale(None, 0.0, looked_up)
    found = one.energies or energies_of(site, stats)
    return ErrorScale(found.felt, felt.slopes[site] * found.output, looked_up)
