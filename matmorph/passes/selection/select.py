"""Which rule owns which matmul: in the order of the spec, the first rule that matches a site owns it. No weight is read, except by the
conditions that ask for a statistic of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matmorph.errors import SpecError
from matmorph.ir.site import Site
from matmorph.passes.selection.context import context_of
from matmorph.passes.selection.dead_rules import dead_rule, wrong_count
from matmorph.passes.selection.survey import Survey
from matmorph.specs.conditions.base import SelectionContext
from matmorph.specs.match import Match, leaves
from matmorph.specs.pattern_match import Occurrence

if TYPE_CHECKING:
    from matmorph.specs.schema import Rule, Stage


@dataclass(frozen=True, slots=True)
class Claim:
    """A site and the rule that owns it, or None. `why` is one line for the report; `occurrences`: those of the rule's patterns that claim
    the site (none for a rule without a pattern)."""

    site: Site
    rule: Rule | None
    why: str
    occurrences: tuple[Occurrence, ...] = ()


@dataclass(frozen=True, slots=True)
class Selection:
    """One claim per site, in site order. `notes`: alternatives of a condition that match nothing although others do."""

    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()

    def of(self, rule: Rule) -> tuple[Claim, ...]:
        """What one rule owns."""
        return tuple(claim for claim in self.claims if claim.rule is rule)


def select(stage: Stage, survey: Survey) -> Selection:
    """The claims of a stage's rules on the sites of the survey.

    SpecError: a rule that is not `optional` and owns nothing (with what exists nearby, and which condition excludes the most sites), an
    `expect` that is not the number of sites the rule owns, a statistic asked of weights on the meta device.
    """
    sites, context = survey.sites, context_of(survey)
    owners: dict[Site, Rule] = {}
    for rule in stage.rules:
        taken = [site for site in sites if site not in owners and rule.match.test(site, context)]
        check_count(rule, taken, owners, survey, context)
        owners.update(dict.fromkeys(taken, rule))
    claims = tuple(_claim(site, owners.get(site), context) for site in sites)
    return Selection(claims, tuple(note for rule in stage.rules for note in _unmatched(rule.match, sites)))


def check_count(rule: Rule, taken: Sequence[Site], owners: Mapping[Site, Rule], survey: Survey, context: SelectionContext) -> None:
    """SpecError where a rule owns nothing or another number of sites than it expects; an optional rule may always own nothing."""
    if not taken and rule.optional:
        return
    error: SpecError | None = None
    if not taken:
        error = dead_rule(rule, owners, survey, context)
    elif rule.expect is not None and rule.expect != len(taken):
        error = wrong_count(rule, taken, owners, context)
    if error is not None:
        raise error


def _claim(site: Site, rule: Rule | None, context: SelectionContext) -> Claim:
    if rule is None:
        inserted = site.const.rule
        why = f"inserted by rule {inserted}, and no rule matches it with inserted_by" if inserted else site.blocked or "no rule matches"
        return Claim(site, None, why)
    return Claim(site, rule, f"matched by rule {rule.name}", rule.match.claiming(site, context))


def _unmatched(match: Match, sites: Sequence[Site]) -> list[str]:
    """A line for each alternative of an un-negated condition that no site satisfies while others do."""
    notes: list[str] = []
    for leaf, positive in leaves(match.root):
        place = ": ".join(str(part) for part in (leaf.at, leaf.keypath) if part)
        notes.extend(f"{place}: {text!r} matches no site" for text in leaf.unmatched(sites) if positive)
    return notes
