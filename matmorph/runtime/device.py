"""Where the values of a session lie, so that what is kept between runs stays there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from matmorph.runtime.feeds import Array
from matmorph.runtime.targets import TARGETS
from matmorph.runtime.targets.cpu import CPU


@dataclass(frozen=True, slots=True)
class Device:
    """A memory, as ONNX Runtime names it."""

    kind: str = CPU.memory
    number: int = 0

    @classmethod
    def of(cls, session: onnxruntime.InferenceSession) -> Device:
        provider = session.get_providers()[0]
        kind = next((target.memory for target in TARGETS.values() if target.provider == provider), CPU.memory)
        if kind == CPU.memory:
            return cls()
        return cls(kind, int(session.get_provider_options()[provider].get("device_id", 0)))

    def room(self, shape: Sequence[int], dtype: np.dtype[Any]) -> onnxruntime.OrtValue:
        """Memory for an array; what is in it is anything."""
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype.type, self.kind, self.number)

    def value(self, array: Array) -> onnxruntime.OrtValue:
        """A copy of the array here."""
        made = self.room(array.shape, array.dtype)
        made.update_inplace(np.ascontiguousarray(array))
        return made
