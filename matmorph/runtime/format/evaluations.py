"""What was measured on a written folder, as run.json keeps it: the newest of each kind of measurement, oldest first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EVALUATIONS = "evaluations"
_KEPT = 16
"""More are not looked at."""
_SAME = ("text", "data", "window", "stride", "tokens", "loss", "output")
"""Two measurements that agree in these, and in what they are beside, are one that was made again."""


def with_evaluation(run: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """run.json's table with another measurement in it."""
    others = [one for one in evaluations(run) if _identity(one) != _identity(figures)]
    return {**run, EVALUATIONS: [*others, dict(figures)][-_KEPT:]}


def evaluations(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those of run.json's table; what is damaged is left out."""
    found = run.get(EVALUATIONS)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _identity(figures: Mapping[str, Any]) -> list[Any]:
    beside = figures.get("beside")
    return [*(figures.get(key) for key in _SAME), beside.get("folder") if isinstance(beside, dict) else None]
