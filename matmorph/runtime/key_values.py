"""The key/value cache between two runs, in the memory of the session's provider.

`Growing`: each run reads the last one's results as they lie and makes new ones. `Shared`: past and present are one buffer per slot, which
the model writes in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime

from matmorph.runtime.decoder import Decoder, Slot
from matmorph.runtime.device import Device


class KeyValues(Protocol):
    """What a run needs of the cache."""

    def bind(self, binding: Any, total: int) -> None:
        """Inputs and outputs of a run after which there are `total` tokens."""
        ...

    def after(self, outputs: Sequence[onnxruntime.OrtValue]) -> KeyValues:
        """The cache after a run that gave these for the slots, in their order."""
        ...

    def cropped(self, length: int) -> KeyValues:
        """The first tokens only."""
        ...


def empty_cache(decoder: Decoder, rows: int, device: Device, room: int) -> KeyValues:
    """A cache without a token. `room`: tokens that are certain to come."""
    if decoder.cache.share_buffer:
        return Shared(decoder.slots, rows, device, room)
    empty = [np.zeros(slot.sized(rows, 0), slot.dtype) for slot in decoder.slots]
    return Growing(decoder.slots, device, [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in empty])


@dataclass(frozen=True, slots=True)
class Growing:
    """Tensors that a run replaces."""

    slots: Sequence[Slot]
    device: Device
    held: Sequence[onnxruntime.OrtValue]

    def bind(self, binding: Any, total: int) -> None:
        for slot, value in zip(self.slots, self.held, strict=True):
            binding.bind_ortvalue_input(slot.past, value)
            binding.bind_output(slot.present, self.device.kind, self.device.number)

    def after(self, outputs: Sequence[onnxruntime.OrtValue]) -> Growing:
        return Growing(self.slots, self.device, outputs)

    def cropped(self, length: int) -> Growing:
        held = [_cropped(value, slot, length, self.device) for value, slot in zip(self.held, self.slots, strict=True)]
        return Growing(self.slots, self.device, held)


def _cropped(value: onnxruntime.OrtValue, slot: Slot, length: int, device: Device) -> onnxruntime.OrtValue:
    return device.value(value.numpy()[(*(slice(None),) * slot.axis, slice(length))])


class Shared:
    """Buffers of `room` tokens; where more come they are made anew, twice as large. What lies behind the tokens is never read."""

    def __init__(self, slots: Sequence[Slot], rows: int, device: Device, room: int) -> None:
        self._slots, self._rows, self._device, self._room = slots, rows, device, room
        self._buffers = [device.value(np.zeros(slot.sized(rows, room), slot.dtype)) for slot in slots]
        self._bound: Any = None

    def bind(self, binding: Any, total: int) -> None:
        if total > self._room:
            self._widen(max(total, 2 * self._room))
        if binding is self._bound:
            return
        for slot, buffer in zip(self._slots, self._buffers, strict=True):
            binding.bind_ortvalue_input(slot.past, buffer)
            binding.bind_ortvalue_output(slot.present, buffer)
        self._bound = binding

    def after(self, outputs: Sequence[onnxruntime.OrtValue]) -> Shared:
        return self  # they are the buffers

    def cropped(self, length: int) -> Shared:
        return self  # whoever reads or writes says how many tokens there are

    def _widen(self, room: int) -> None:
        wider: list[onnxruntime.OrtValue] = []
        for slot, buffer in zip(self._slots, self._buffers, strict=True):
            array = np.zeros(slot.sized(self._rows, room), slot.dtype)
            array[(*(slice(None),) * slot.axis, slice(self._room))] = buffer.numpy()
            wider.append(self._device.value(array))
        self._buffers, self._room, self._bound = wider, room, None
