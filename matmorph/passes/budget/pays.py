"""`pays`: a rewrite that is predicted to be slower than the dense matmul is a Reject under `time: true`; where nothing is said of time, a
budget does not choose what is predicted to be much slower. Bytes are judged in `rewrite`."""

from __future__ import annotations

from collections.abc import Sequence

from matmorph.errors import SpecError
from matmorph.ir.site import Reject, Site
from matmorph.passes.kernel_costs import predicted_times
from matmorph.passes.methods.protocol import Methods, site_method
from matmorph.passes.rewriting.rewrite import Outcome, Part
from matmorph.specs.schema import Export

SLOWER = 1.05
"""Times dense above which a prediction counts as slower: predictions are no better than that (decision C13)."""


MUCH_SLOWER = 2.0
"""Times dense above which a budget needs `time: false` to choose an option (decision C15): kernels that read codes take at most 1.8 times
dense at any number of rows that was measured, those that unpack the whole matrix on every call from 3.5 times at one row."""


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
    main = _main(outcome)
    if main is None:
        raise SpecError(f"rule {rule.name}: pays.time judges what replaces a matmul, and {_names(outcome)} only adds to it", at=rule.at)
    if main.choice.at_most:  # the weight decides: judged when it is compiled
        return outcome
    times = _times(site, main, export, methods)
    if not times:
        where = ", ".join(export.target)
        raise SpecError(f"rule {rule.name}: pays.time: the time of {main.use.method} is not predicted on {where}", at=main.use.at)
    if max(ratio for _, ratio in times) <= SLOWER:
        return outcome
    return Outcome(site, rule, Reject(f"predicted to be slower: {_said(times)} (pays: {{time: true}} refuses it)"))


def much_slower(outcome: Outcome, export: Export, methods: Methods) -> str | None:
    """Why a budget leaves an option out, where its rule says nothing of time; None where it does, and where no time is predicted."""
    main = _main(outcome)
    if main is None or main.choice.at_most or outcome.rule.pays.time is not None or not outcome.site.applications:
        return None
    times = _times(outcome.site, main, export, methods)
    if max((ratio for _, ratio in times), default=0.0) <= MUCH_SLOWER:
        return None
    return f"{main.use.method} is predicted to take {_said(times)} (pays: {{time: false}} lets a budget choose it)"


def _main(outcome: Outcome) -> Part | None:
    """What takes the place of the matmul, where anything does."""
    return next((part for part in outcome.parts if part.kind == "replace"), None)


def _times(site: Site, main: Part, export: Export, methods: Methods) -> tuple[tuple[int, float], ...]:
    """(rows, time over dense); () where none is predicted."""
    times = main.cost.times or site_method(methods, main.use.method).times(site, main.use.spec, main.choice, export)
    return times or predicted_times(main.use.spec, export)


def _names(outcome: Outcome) -> str:
    return " + ".join(part.use.method for part in outcome.parts)


def _said(times: Sequence[tuple[int, float]]) -> str:
    return ", ".join(f"{ratio:.3g} x dense at {rows} row{'s' * (rows != 1)}" for rows, ratio in times)
