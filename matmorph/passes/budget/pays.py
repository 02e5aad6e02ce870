"""`pays: {time: true}`: a rewrite that is predicted to be slower than the dense matmul is a Reject. Bytes are judged in `rewrite`."""

from __future__ import annotations

from collections.abc import Sequence

from matmorph.errors import SpecError
from matmorph.ir.site import Reject
from matmorph.passes.kernel_costs import predicted_times
from matmorph.passes.methods.protocol import Methods, site_method
from matmorph.passes.rewriting.rewrite import Outcome
from matmorph.specs.schema import Export

SLOWER = 1.05
"""Times dense above which a prediction counts as slower: predictions are no better than that (decision C13)."""


def refuse_slow(outcomes: Sequence[Outcome], export: Export, methods: Methods) -> tuple[Outcome, ...]:
    """The outcomes, those that their rule wants fast and that are predicted to be slow as Rejects. It judges what takes the place of the
    matmul; what is added to it is never judged.

    SpecError: a rule that wants this of methods that predict no time for these devices, or only adds to the matmul.
    """
    return tuple(_judged(outcome, export, methods) for outcome in outcomes)


def _judged(outcome: Outcome, export: Export, methods: Methods) -> Outcome:
    rule, site = outcome.rule, outcome.site
    if outcome.reject is not None or not rule.pays.time or not site.applications:
        return outcome
    main = next((part for part in outcome.parts if part.kind == "replace"), None)
    if main is None:
        raise SpecError(f"rule {rule.name}: pays.time judges what replaces a matmul, and {_names(outcome)} only adds to it", at=rule.at)
    if main.choice.at_most:  # the weight decides: judged when it is compiled
        return outcome
    times = main.cost.times or site_method(methods, main.use.method).times(site, main.use.spec, main.choice, export)
    times = times or predicted_times(main.use.spec, export)
    if not times:
        where = ", ".join(export.target)
        raise SpecError(f"rule {rule.name}: pays.time: the time of {main.use.method} is not predicted on {where}", at=main.use.at)
    if max(ratio for _, ratio in times) <= SLOWER:
        return outcome
    return Outcome(site, rule, Reject(f"predicted to be slower: {_said(times)} (pays: {{time: true}} refuses it)"))


def _names(outcome: Outcome) -> str:
    return " + ".join(part.use.method for part in outcome.parts)


def _said(times: Sequence[tuple[int, float]]) -> str:
    return ", ".join(f"{ratio:.3g} x dense at {rows} row{'s' * (rows != 1)}" for rows, ratio in times)
