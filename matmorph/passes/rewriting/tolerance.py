"""`tolerance:`: which rewritten sites have errors above the limits, and what happens then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matmorph.errors import CheckError, SpecError
from matmorph.ir.site import Reject
from matmorph.passes.pruning.find_blocks import Block
from matmorph.passes.rewriting.rewrite import Outcome
from matmorph.specs.schema import Tolerance

ERROR_KINDS = ("weight_error", "output_error")


def refuse_unmeasured(tolerance: Tolerance | None) -> None:
    """SpecError for a limit on output errors where there is no data to measure them on: said before the work, not after it."""
    if tolerance is not None and tolerance.output_error is not None:
        raise SpecError(
            "a limit on output errors needs calibration data and none was given",
            at=tolerance.at,
            keypath="tolerance.output_error",
            details=["pass calibration=... to compile, or --calibration FILE on the command line"],
        )


def hold(outcomes: Sequence[Outcome], tolerance: Tolerance | None) -> tuple[tuple[Outcome, ...], tuple[str, ...]]:
    """The outcomes that stay, and a note per site that was rolled back, the worst first.

    Raises CheckError naming the worst site under `on_exceed: fail`, and SpecError for a limit on output errors that nothing measured.
    """
    if tolerance is None:
        return tuple(outcomes), ()
    excess = {outcome: found for outcome in outcomes if outcome.reject is None and (found := _excess(outcome, tolerance)) is not None}
    ranked = sorted(excess, key=lambda outcome: -excess[outcome][0])
    whole = {outcome.block: outcome for outcome in ranked if outcome.block is not None}  # it stays or goes as a whole
    if ranked and tolerance.on_exceed == "fail":
        others = [f"{outcome.site.path}: {excess[outcome][1]}" for outcome in ranked[1:6]]
        more = [f"and {len(ranked) - 6} more"] if len(ranked) > 6 else []
        raise CheckError(f"{ranked[0].site.path}: {excess[ranked[0]][1]}", [*others, *more, *_where(tolerance)])
    kept = tuple(
        outcome if (worst := _rolled_back(outcome, excess, whole)) is None else Outcome(outcome.site, outcome.rule, worst)
        for outcome in outcomes
    )
    return kept, tuple(f"{outcome.site.path} rolled back: {excess[outcome][1]}" for outcome in ranked)


def _rolled_back(outcome: Outcome, excess: Mapping[Outcome, tuple[float, str]], whole: Mapping[Block, Outcome]) -> Reject | None:
    """Why an outcome is taken back, None where it stays."""
    cause = outcome if outcome in excess or outcome.block is None else whole.get(outcome.block)
    if cause is None or cause not in excess:
        return None
    return Reject(f"rolled back: {'' if cause is outcome else f'{cause.site.path}: '}{excess[cause][1]}")


def _excess(outcome: Outcome, tolerance: Tolerance) -> tuple[float, str] | None:
    """(how many times the limit, in words) of the error that exceeds its limit most, None where all hold."""
    found = []
    for kind in ERROR_KINDS:
        limit, error = getattr(tolerance, kind), getattr(outcome, kind)
        if limit is None or (error is None and not outcome.site.applications):  # what a table looks up is no output of a matmul
            continue
        if error is None and outcome.block is not None and outcome.patch is None:  # a block is judged by its last matmul
            continue
        if error is None:
            raise SpecError(f"{kind} of {outcome.site.path} was not measured", at=tolerance.at, keypath=f"tolerance.{kind}")
        if error > limit:
            found.append((error / limit, f"{kind} {error:.3g} exceeds {limit:g}"))
    return max(found, default=None)


def _where(tolerance: Tolerance) -> list[str]:
    return [f"limit at {tolerance.at}", "on_exceed: roll_back leaves such sites dense"] if tolerance.at else []


def refuse_rejects(outcomes: Sequence[Outcome], strict: bool) -> None:
    """Under `strict: true` a Reject of a matched site, or a request that its shape clamps, is a SpecError at the rule."""
    refused = [(outcome, why) for outcome in outcomes if (why := _reason(outcome))] if strict else []
    if not refused:
        return
    (first, reason), rest = refused[0], refused[1:6]
    what = f"cannot rewrite {first.site.path}" if first.reject is not None else f"cannot treat {first.site.path} as it says"
    details = [f"{outcome.site.path}: {why}" for outcome, why in rest]
    raise SpecError(f"strict: rule {first.rule.name} {what}: {reason}", at=first.rule.at, details=details)


def _reason(outcome: Outcome) -> str | None:
    """Why not, or what was clamped; None where all is as asked for."""
    if outcome.reject is not None:
        return outcome.reject.reason
    return next((part.choice.clamped for part in outcome.parts if part.choice.clamped), None)
