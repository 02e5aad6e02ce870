"""Errors of selection, with what a person needs to mend the spec: what exists nearby and which condition excludes the most sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matmorph.errors import SpecError
from matmorph.ir.core import Graph
from matmorph.ir.site import Site
from matmorph.passes.selection.survey import Survey
from matmorph.specs.conditions.base import SelectionContext

if TYPE_CHECKING:
    from matmorph.specs.schema import Rule

MAX_LISTED = 20
MAX_NAMED = 3


def dead_rule(rule: Rule, owners: Mapping[Site, Rule], survey: Survey, context: SelectionContext) -> SpecError:
    """The error of a rule that owns nothing: because earlier rules own all it matches, or because of its conditions."""
    expected = f" (expect is {rule.expect})" if rule.expect is not None else ""
    owned = [site for site in owners if rule.match.test(site, context)]
    if owned:
        message = f"rule {rule.name} owns nothing{expected}: earlier rules own {_all(len(owned))} that it matches"
        return SpecError(message, at=rule.match.at, keypath=rule.match.keypath, details=_owned_lines(owned, owners))
    message = f"rule {rule.name} matches no matmul{expected}"
    return SpecError(
        message, at=rule.match.at, keypath=rule.match.keypath, details=[*_reasons(rule, survey.sites, context), *_quantised(survey.graph)]
    )


def _quantised(graph: Graph) -> list[str]:
    """Weights that an earlier stage put into codes: they are there, and no matmul of floats any more."""
    paths = [const.path.rsplit(".", 2)[0] for const in graph.state if const.rule is not None and const.path.endswith(".codes")]
    more = f" and {len(paths) - MAX_NAMED} more" if len(paths) > MAX_NAMED else ""
    return [f"quantised already by an earlier stage: {', '.join(paths[:MAX_NAMED])}{more}"] if paths else []


def wrong_count(rule: Rule, taken: Sequence[Site], owners: Mapping[Site, Rule], context: SelectionContext) -> SpecError:
    """The error of a rule that owns another number of sites than its `expect` says."""
    owned = [site for site in owners if rule.match.test(site, context)]
    keypath = f"{rule.match.keypath.removesuffix('match')}expect"
    details = [*_listed([site.path for site in taken]), *_owned_lines(owned, owners)]
    return SpecError(f"rule {rule.name} owns {_sites(len(taken))}, expect is {rule.expect}", at=rule.at, keypath=keypath, details=details)


def _owned_lines(owned: Sequence[Site], owners: Mapping[Site, Rule]) -> list[str]:
    counts = Counter(owners[site].name for site in owned)
    return [f"rule {name} already owns {_sites(count)} that it matches too" for name, count in counts.items()]


def _listed(lines: Sequence[str]) -> list[str]:
    more = [f"... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return [*lines[:MAX_LISTED], *more]


def _sites(count: int) -> str:
    return f"{count} site{'s' * (count != 1)}"


def _all(count: int) -> str:
    return "the only site" if count == 1 else f"all {count} sites"


# ------------------------------------------------------------------------------------------------------------------ reasons


def _reasons(rule: Rule, sites: Sequence[Site], context: SelectionContext) -> list[str]:
    """A line per condition that excludes sites, the one that excludes the most first, each with what there is instead."""
    if not sites:
        return ["the model has no weight matmul"]
    failed = Counter(condition for site in sites for condition in rule.match.test(site, context).failed)
    in_spec_order = [condition for condition in (*rule.match.conjuncts(), *rule.match.implied) if condition in failed]
    lines = []
    for condition in sorted(in_spec_order, key=failed.__getitem__, reverse=True):
        count = failed[condition]
        hint = "" if condition in rule.match.implied else condition.nearby(sites, context)
        lines.append(f"{condition.text}: excludes {count} of {_sites(len(sites))}{f'; {hint}' if hint else ''}")
    if max(failed.values(), default=0) < len(sites):
        lines.append("each condition holds for some site, but never all of them for the same one")
    return lines
