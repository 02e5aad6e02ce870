"""Settings that methods share which may be fitted to the outputs on the calibration data."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def whiten_field() -> Any:
    """`whiten: bool` of a spec."""
    return field(default=False, metadata={"doc": "minimise the error of the outputs on the calibration data instead of that of the weight"})


def damping_field() -> Any:
    """`damping: float | None` of a spec."""
    return field(
        default=None,
        metadata={
            "doc": "share of the mean of the second moment's diagonal that whitening adds to it; by default as the sample asks for (OAS)",
            "minimum": 0,
            "maximum": 1,
        },
    )
