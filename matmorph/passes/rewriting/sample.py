"""What the calibration data can carry: how many rows stand behind a site's rewrite and its error, and what is refused or said about it.

A rewrite that was fitted to rows says too little of its error on them, by much where they are fewer than the features. So errors are
measured on rows that were held out; where none could be there is no error, and no limit on one can be held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from matmorph.errors import SpecError
from matmorph.ir.site import Sample, Site
from matmorph.passes.linalg.shrinkage import ENOUGH, effective_rank
from matmorph.passes.methods.protocol import Method, Methods, SiteStats
from matmorph.specs.schema import MethodUse, Rule, Tolerance

if TYPE_CHECKING:
    from matmorph.passes.rewriting.rewrite import Outcome


def rule_fits(rule: Rule, methods: Methods) -> bool:
    """Whether any way that the rule leaves open is fitted to data."""
    return any(methods[use.method].fitted(use.spec) for uses in rule.alternatives for use in uses)


def sample_of(site: Site, stats: SiteStats | None, uses: Iterable[tuple[Method, MethodUse]]) -> Sample | None:
    """The rows behind a rewrite of the site by these methods; None without data."""
    if stats is None:
        return None
    fitted = _least(stats.rows) if stats.target is not None or any(method.fitted(use.spec) for method, use in uses) else 0
    judged = _all(stats.held_rows) if stats.held_out is not None else 0 if fitted else _all(stats.rows)
    return Sample(fitted, judged, round(_effective(stats.second_moment if fitted else stats.judged), 2))


def with_fitted_error(sample: Sample | None, w: Tensor, approximation: Tensor, stats: SiteStats | None) -> Sample | None:
    """With the error on the rows of the fit, where there was one."""
    if sample is None or stats is None or not sample.fitted:
        return sample
    return replace(sample, fitted_error=stats.fitted_error(w, approximation))


def unseen(sample: Sample | None) -> bool:
    """Whether there is nothing to measure an output error on but what was fitted to."""
    return sample is not None and not sample.judged


def sample_notes(sample: Sample | None, features: int) -> tuple[str, ...]:
    """What a site's row says of too few rows."""
    if sample is None or not _is_thin(sample, features):
        return ()
    rows = "1 row" if sample.fitted == 1 else f"{sample.fitted:,} rows"
    note = f"fitted to {rows} (effective rank {sample.effective_rank:.3g}) for {features:,} features, fewer than {ENOUGH} x as many"
    return (f"{note}; no row could be held out, so there is no output error" if not sample.judged else note,)


def sample_summary(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """One line for all sites that were fitted to too few rows."""
    fitted = [(one.sample, one.site) for one in outcomes if one.reject is None and one.sample is not None and one.sample.fitted]
    thin = [(sample, site) for sample, site in fitted if _is_thin(sample, site.in_features)]
    if not thin:
        return ()
    sample, site = min(thin, key=lambda pair: pair[0].fitted / pair[1].in_features)
    return (
        f"too little calibration data: {len(thin)} of {len(fitted)} fitted matmuls have fewer rows than {ENOUGH} x their features, "
        f"{site.path} {sample.fitted:,} for {site.in_features:,}; more samples would make better factors",
    )


def massive_summary(stats: Mapping[Site, SiteStats]) -> tuple[str, ...]:
    """One line for all sites whose second moment such tokens dominate."""
    there = {site: one.massive for site, one in stats.items() if one.massive is not None and one.massive.dominates}
    if not there:
        return ()
    site, worst = max(there.items(), key=lambda pair: pair[1].share)
    return (
        f"massive activations dominate the second moments of {len(there)} of {len(stats)} matmuls: at {site.path} {worst.tokens:,} of "
        f"{worst.rows:,} rows make {worst.share:.1%} (token_weights: norm lets every row count alike)",
    )


def refuse_undetermined(
    tolerance: Tolerance | None, claims: Iterable[tuple[Site, Rule]], methods: Methods, stats: Mapping[Site, SiteStats]
) -> None:
    """SpecError for a limit on output errors where a rule fits a site to fewer rows than it has features, or leaves none to measure on."""
    if tolerance is None or tolerance.output_error is None:
        return
    for site, rule in claims:
        found = stats.get(site)
        if found is None or not rule_fits(rule, methods):
            continue
        rows = _least(found.rows)
        if rows >= site.in_features and found.held_out is not None:
            continue
        count = f"{rows:,} row{'' if rows == 1 else 's'}"
        raise SpecError(
            f"a limit on output errors needs more calibration data: {site.path} has {site.in_features:,} features, and rule {rule.name} "
            f"would fit it to {count}",
            at=tolerance.at,
            keypath="tolerance.output_error",
            details=[
                f"give {ENOUGH} rows or more per feature, {ENOUGH * site.in_features:,} here; a fifth of them is held out, "
                "to measure errors on"
            ],
        )


def _is_thin(sample: Sample, features: int) -> bool:
    return 0 < sample.fitted < ENOUGH * features


def _least(rows: int | Tensor) -> int:
    """Of the matrix that saw the fewest; one that saw none is not fitted at all."""
    seen = torch.as_tensor(rows).reshape(-1)
    return int(seen[seen > 0].min()) if bool((seen > 0).any()) else 0


def _all(rows: int | Tensor) -> int:
    return int(torch.as_tensor(rows).sum())


def _effective(moment: Tensor) -> float:
    """Of the least determined matrix that saw data."""
    ranks: list[Any] = [effective_rank(matrix) for matrix in (moment if moment.dim() == 3 else moment.unsqueeze(0))]
    return min((rank for rank in ranks if rank), default=0.0)
