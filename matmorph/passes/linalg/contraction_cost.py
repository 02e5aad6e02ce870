"""What a contraction plan costs on a target, and which plan is taken.

FLOPs and bytes are counted by running the plan itself on shapes; the time of a product follows from the rates of the target, which were
measured (or are marked as an estimate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod

from opt_einsum.helpers import flop_count

from matmorph.errors import InputError
from matmorph.passes.linalg.contraction import ContractionPlan, TrainShape, candidate_plans, contract
from matmorph.runtime.targets import TARGETS
from matmorph.runtime.targets.rates import Product, Rates

MARGIN = 0.9
"""A plan is taken only where it is predicted to need at most this share of dense's time, at every token count: the model errs by about as
much, and dense can not be slower than dense (decision C8)."""
SAME = 1.08
"""Plans whose predicted times differ by less are equally fast, as far as the model can tell. Taken is then the one with the least traffic
outside the cache (in a network, and beside other work, less of it is free than where the constants were measured), the fewest products."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one plan at one number of rows, in float32. `flops`: 2 per multiplication and addition; `bytes`: what products and permutes read
    and write; `traffic`: the share of it in tensors that do not fit the target's cache."""

    tokens: int
    seconds: float
    flops: int
    bytes: int
    traffic: int


@dataclass(frozen=True, slots=True)
class PlanCandidate:
    """A plan and its estimates, one per token count."""

    plan: ContractionPlan
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """The choice. `plan` = `chosen.plan`; `candidates`: all, dense last; `explanation`: for plan and report."""

    chosen: PlanCandidate
    candidates: tuple[PlanCandidate, ...]
    target: str
    explanation: str

    @property
    def plan(self) -> ContractionPlan:
        return self.chosen.plan

    @property
    def predicted(self) -> tuple[Estimate, ...]:
        return self.chosen.estimates

    @property
    def dense(self) -> tuple[Estimate, ...]:
        return self.candidates[-1].estimates

    @property
    def ratios(self) -> tuple[float, ...]:
        """Predicted time over dense, per token count."""
        return _over(self.chosen, self.candidates[-1])


def planning_target(targets: Sequence[str]) -> str:
    """Of the devices that a file must run on, the one whose cost decides: the first that was measured, else the first.

    InputError where the cost of none is known.
    """
    return _planned_for(targets)[0]


def _planned_for(targets: Sequence[str]) -> tuple[str, Rates]:
    rates = {name: found.rates for name, found in TARGETS.items() if found.rates is not None}
    known = [name for name in targets if name in rates]
    if not known:
        raise InputError(f"no contraction costs are known for {', '.join(targets) or 'no target'}; they are for {', '.join(sorted(rates))}")
    name = next((name for name in known if rates[name].measured), known[0])
    return name, rates[name]


@cache
def plan_contraction(train: TrainShape, tokens: tuple[int, ...], target: str = "cpu", force: bool = False) -> Planned:
    """The plan for a graph that will see `tokens` rows (several counts: one plan serves them all).

    Taken is the plan with the smallest worst regret, the largest ratio over the token counts of its time to that of the best plan there,
    among those that are predicted to need at most `MARGIN` of dense's time at every count; dense where there is none. Within `SAME` of the
    smallest regret, traffic and the number of products decide. `force` compares the contractions alone, without dense. InputError for no
    token count, a negative one, or an unknown target.
    """
    if not tokens or min(tokens) < 0:
        raise InputError(f"a contraction is planned for numbers of rows, 0 or more; these are {tokens}")
    _, rates = _planned_for((target,))
    candidates = tuple(
        PlanCandidate(plan, tuple(estimate(plan, train, count, rates) for count in tokens)) for plan in candidate_plans(train)
    )
    chosen = choose(candidates, force)
    return Planned(chosen, candidates, target, _explanation(chosen, candidates, target, rates))


def choose(candidates: Sequence[PlanCandidate], force: bool = False) -> PlanCandidate:
    """The one to take, of candidates with dense as the last; see `plan_contraction`."""
    dense = candidates[-1]
    allowed = [item for item in candidates[:-1] if force or max(_over(item, dense)) <= MARGIN] or [dense]
    columns = tuple(zip(*(item.estimates for item in allowed), strict=True))
    fastest = [min(each.seconds for each in column) for column in columns]
    regrets = [max(each.seconds / least for each, least in zip(item.estimates, fastest, strict=True)) for item in allowed]
    near = [item for item, regret in zip(allowed, regrets, strict=True) if regret <= SAME * min(regrets)]
    return min(near, key=lambda item: (sum(each.traffic for each in item.estimates), len(item.plan.groups), item.estimates[-1].seconds))


def estimate(plan: ContractionPlan, train: TrainShape, tokens: int, rates: Rates) -> Estimate:
    """Time, FLOPs and bytes of one run of the plan with `tokens` rows; what is computed at load costs nothing."""
    meter = _measured(plan, train, tokens)
    tensors = [size for item in meter.products for size in (item.constant, item.operand, item.result)]
    tensors += [size for size in meter.permuted for _ in ("read", "written")]
    seconds = rates.seconds(meter.products, meter.views, meter.permuted)
    outside = sum(size for size in tensors if size > rates.cache)
    return Estimate(tokens, seconds, meter.flops, 4 * sum(tensors), 4 * outside)


def products(plan: ContractionPlan, train: TrainShape, tokens: int) -> tuple[Product, ...]:
    """The products that are left when everything of cores alone is folded, in order."""
    return tuple(_measured(plan, train, tokens).products)


def _measured(plan: ContractionPlan, train: TrainShape, tokens: int) -> _Meter:
    meter = _Meter()
    contract(plan, Sized((tokens, train.in_features)), [Sized(shape, constant=True) for shape in train.core_shapes], meter, (tokens,))
    return meter


@dataclass(frozen=True, slots=True)
class Sized:
    """A value of which only the shape is known. `constant`: computed from cores alone."""

    shape: tuple[int, ...]
    constant: bool = False


@dataclass(slots=True)
class _Meter:
    """`Ops` on shapes, which notes what is done to values that depend on x."""

    products: list[Product] = field(default_factory=list)
    permuted: list[int] = field(default_factory=list)
    views: int = 0
    flops: int = 0

    def reshape(self, value: Sized, sizes: Sequence[int]) -> Sized:
        known = prod(size for size in sizes if size != -1)
        shape = tuple(prod(value.shape) // known if size == -1 else size for size in sizes)
        self.views += not value.constant and shape != value.shape
        return Sized(shape, value.constant)

    def permute(self, value: Sized, axes: Sequence[int]) -> Sized:
        if not value.constant:
            self.permuted.append(prod(value.shape))
        return Sized(tuple(value.shape[axis] for axis in axes), value.constant)

    def matmul(self, left: Sized, right: Sized) -> Sized:
        """A matrix on the right has a matrix on its left, in all plans: a batch is always of the right operand."""
        batch = right.shape[:-2]
        result = Sized((*batch, left.shape[-2], right.shape[-1]), left.constant and right.constant)
        if not result.constant:
            self._note(Product(prod(batch), left.shape[-2], left.shape[-1], right.shape[-1], right.constant))
        return result

    def _note(self, product: Product) -> None:
        sizes = {"b": product.batch, "m": product.rows, "k": product.inner, "n": product.columns}
        self.flops += flop_count("bmkn", True, 2, sizes)
        self.products.append(product)


def _over(item: PlanCandidate, reference: PlanCandidate) -> tuple[float, ...]:
    return tuple(mine.seconds / other.seconds for mine, other in zip(item.estimates, reference.estimates, strict=True))


def _explanation(chosen: PlanCandidate, candidates: Sequence[PlanCandidate], target: str, rates: Rates) -> str:
    dense = candidates[-1]
    counts = ", ".join(str(each.tokens) for each in dense.estimates)
    basis = "predicted" if rates.measured else "estimated, not measured,"
    shown = chosen if chosen is not dense else min(candidates[:-1], key=lambda item: max(_over(item, dense)), default=dense)
    ratios = ", ".join(f"{ratio:.2g}" for ratio in _over(shown, dense))
    text = f"{shown.plan.name}, {basis} at {ratios} x the time of dense for {counts} rows on {target}"
    return text if chosen is not dense else f"dense, rebuilt when the file is loaded; the best contraction is {text}"
