"""Adapters as inputs: the `adapters` of manifest.json, and the version of an `.onnx_adapter` file (ONNX Runtime's AdapterFormat)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from matmorph.runtime.format.plain import ManifestError, from_plain, stored, to_plain

ADAPTER_SUFFIX = ".onnx_adapter"
ADAPTER_FORMAT = 1
"""Version of what is written into an adapter file, in its field `adapter_version`."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One pair of inputs. `down`, `up`: their names. `rank`: that of the default that the model holds, 0 = the base alone. `batch`:
    experts, None = no stack."""

    site: str
    method: str
    down: str
    up: str
    in_features: int
    out_features: int
    batch: int | None
    rank: int
    dtype: str

    def shapes(self, rank: int | str) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        """Of `down` and `up`."""
        lead = () if self.batch is None else (self.batch,)
        return (*lead, self.in_features, rank), (*lead, rank, self.out_features)


@dataclass(frozen=True, slots=True)
class Slots:
    """What a manifest says of its adapters. `fingerprint`: sha256 of the base's weights; a file holds its first 31 bits."""

    fingerprint: str
    slots: tuple[Slot, ...] = field(metadata=stored(key="inputs"))

    @property
    def model_version(self) -> int:
        """The fingerprint as ONNX Runtime's `model_version`, a positive 32-bit number."""
        return int(self.fingerprint[:8], 16) >> 1

    def to_dict(self) -> dict[str, Any]:
        """The `adapters` of manifest.json."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, data: Any) -> Slots:
        """Raises ManifestError for data that says no slots."""
        found = from_plain(cls, data, "adapters")
        if not re.fullmatch("[0-9a-f]{64}", found.fingerprint):
            raise ManifestError(f"adapters.fingerprint: unexpected value {found.fingerprint!r:.80}")
        return found
