"""The report as data: one row per site and totals over the whole model. Tables, pages and `report.json` are views of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from matmorph.ir.site import Bound, Sample, Spectrum
from matmorph.runtime.targets.placement import Placement

Status = Literal["rewritten", "rejected", "unclaimed"]
Pair = tuple[int, int]
"""(before, after)."""


@dataclass(frozen=True, slots=True)
class PartRow:
    """One method of a composed rewrite (`rewrite:` list), in order."""

    method: str
    rank: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One site. Errors are relative Frobenius errors, None where they were not computed (unclaimed, plan, no calibration);
    `output_error` is one on rows that nothing was fitted to, and `sample` says how many stand behind it.

    `status`: in a plan, "rewritten" where compile would rewrite. `reason`: why a site was rejected or not claimed. `rank`: effective,
    `rank_at_most`: the data decides and `rank` is the upper limit (plan). `macs`: multiply-accumulates per row of x summed over
    applications. `trainable`: trainable scalars. `bytes`: of this site's initializers in the data file, biases excluded. `coded`: how many
    of the `parameters` after the rewrite are kept as codes of a quantizer. `spectrum`: singular values, where the first method has them.
    `times`: (rows, low, high): the kernel's predicted time over dense at numbers of rows of x; () where none is predicted.
    `open`: left to a budget, in a plan.
    `weights`: dotted names of what is stored for the matrix: its weight, or the parameters that the model computes it from. `stack`:
    encoder or decoder, where there are both.
    """

    path: str
    role: str
    layer: int | None
    form: str
    shape: tuple[int, ...]
    rule: str | None
    method: str | None
    status: Status
    reason: str | None = None
    rank: int | None = None
    rank_at_most: bool = False
    requested_rank: str | None = None
    weight_error: float | None = None
    output_error: float | None = None
    bound: Bound | None = None
    parameters: Pair = (0, 0)
    bytes: Pair = (0, 0)
    macs: Pair = (0, 0)
    trainable: int = 0
    coded: int = 0
    applications: int = 1
    parts: tuple[PartRow, ...] = ()
    notes: tuple[str, ...] = ()
    spectrum: Spectrum | None = None
    sample: Sample | None = None
    times: tuple[tuple[int, float, float], ...] = ()
    open: bool = False
    weights: tuple[str, ...] = ()
    stack: str | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Over the whole model: weights outside any site included, each weight once. `cache`: bytes of keys and values per token of one row,
    None for a model that keeps no cache, and in a plan."""

    parameters: Pair
    bytes: Pair
    macs: Pair
    trainable: int = 0
    cache: Pair | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest difference of ONNX Runtime from torch over the check cases, relative to max(1, max |torch|), against `tolerance`."""

    max_difference: float
    tolerance: float
    cases: int
    provider: str


@dataclass(frozen=True, slots=True)
class Report:
    """`sites` in order of first application. `notes`: plain lines about the run (tracing manners, adopted ranges, solver notes).
    `placements`: of the written model, on each target that hands nodes back to the CPU; () before it is written. `unplaced`: titles of such
    targets in a plan, which writes no file and so cannot say."""

    name: str
    spec_name: str
    sites: tuple[SiteRow, ...]
    totals: Totals
    notes: tuple[str, ...] = ()
    parity: Parity | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    is_plan: bool = False
    placements: tuple[Placement, ...] = ()
    unplaced: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: exactly `report.json`."""
        data = asdict(self)
        data["format"] = 1
        return data
