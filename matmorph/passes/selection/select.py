"""Which rule owns which matmul: in the order of the spec, the first rule that matches a site owns it. No weight is read, except by the
conditions that ask for a statistic of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from matmorph.errors import SpecError
from matmorph.ir.core import Graph
from matmorph.ir.site import Site
from matmorph.passes.selection.dead_rules import dead_rule, wrong_count
from matmorph.passes.selection.survey import Survey
from matmorph.specs.conditions import Facts, PathCondition, path_matches, read_statistic, site_names
from matmorph.specs.globs import Glob
from matmorph.specs.match import Match, leaves
from matmorph.specs.pattern import Pattern
from matmorph.specs.pattern_match import Occurrence, find

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
    """One claim per site, in site order. `notes`: alternatives of a path selector that match nothing although the rule itself does."""

    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()

    def of(self, rule: Rule) -> tuple[Claim, ...]:
        """What one rule owns."""
        return tuple(claim for claim in self.claims if claim.rule is rule)


def facts_of(survey: Survey) -> dict[Site, Facts]:
    """What conditions may ask, per site; a pattern is searched and a statistic is read at most once for all of them."""

    @cache
    def occurrences(pattern: Pattern) -> tuple[Occurrence, ...]:
        return find(pattern, survey.graph, survey.sites)

    @cache
    def kinds() -> Mapping[Site, str]:
        return {site: block.kind for block in survey.blocks for site in block.sites}

    statistic = cache(read_statistic)
    return {site: Facts(site, survey.layers, occurrences, statistic, lambda part: kinds().get(part)) for site in survey.sites}


def select(stage: Stage, survey: Survey) -> Selection:
    """The claims of a stage's rules on the sites of the survey.

    SpecError: a rule that is not `optional` and owns nothing (with what exists nearby, and which condition excludes the most sites), an
    `expect` that is not the number of sites the rule owns, a statistic asked of weights on the meta device.
    """
    graph, sites, facts = survey.graph, survey.sites, facts_of(survey)
    owners: dict[Site, Rule] = {}
    for rule in stage.rules:
        taken = [site for site in sites if site not in owners and rule.match.test(facts[site])]
        check_count(rule, taken, owners, facts, graph)
        owners.update(dict.fromkeys(taken, rule))
    claims = tuple(_claim(site, owners.get(site), facts[site]) for site in sites)
    return Selection(claims, tuple(note for rule in stage.rules for note in _dead_alternatives(rule.match, sites)))


def check_count(rule: Rule, taken: Sequence[Site], owners: Mapping[Site, Rule], facts: Mapping[Site, Facts], graph: Graph) -> None:
    """SpecError where a rule owns nothing or another number of sites than it expects; an optional rule may always own nothing."""
    if not taken and rule.optional:
        return
    error: SpecError | None = None
    if not taken:
        error = dead_rule(rule, owners, facts, graph)
    elif rule.expect is not None and rule.expect != len(taken):
        error = wrong_count(rule, taken, owners, facts)
    if error is not None:
        raise error


def _claim(site: Site, rule: Rule | None, facts: Facts) -> Claim:
    if rule is None:
        inserted = site.const.rule
        why = f"inserted by rule {inserted}, and no rule matches it with inserted_by" if inserted else "no rule matches"
        return Claim(site, None, why)
    found = dict.fromkeys(occurrence for condition in rule.match.patterns() for occurrence in condition.claiming(facts))
    return Claim(site, rule, f"matched by rule {rule.name}", tuple(found))


def _dead_alternatives(match: Match, sites: Sequence[Site]) -> list[str]:
    """A line for each alternative of an un-negated path selector that matches no site while another one does."""
    notes: list[str] = []
    for leaf, positive in leaves(match.root):
        if not positive or not isinstance(leaf, PathCondition):
            continue
        alternatives = [alternative for pattern in leaf.patterns for alternative in _alternatives(pattern)]
        dead = [
            text for text, pattern in alternatives if not any(path_matches(pattern, name) for site in sites for name in site_names(site))
        ]
        if dead and len(dead) < len(alternatives):
            place = ": ".join(str(part) for part in (leaf.at, leaf.keypath) if part)
            notes.extend(f"{place}: {text!r} matches no site" for text in dead)
    return notes


def _alternatives(pattern: Glob | re.Pattern[str]) -> list[tuple[str, Glob | re.Pattern[str]]]:
    if isinstance(pattern, Glob):
        return [(text, Glob(text)) for text in pattern.alternatives]
    return [(f"re:{pattern.pattern}", pattern)]
