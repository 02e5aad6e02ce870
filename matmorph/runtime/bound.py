"""A session whose inputs and outputs are bound, so that what one run gives stays where the next one takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime

from matmorph.runtime.adapters import LoadedAdapter
from matmorph.runtime.device import Device
from matmorph.runtime.errors import ExecutionError, first_line
from matmorph.runtime.feeds import Array
from matmorph.runtime.session import Session


class BoundSession:
    """Runs of one session. ONNX Runtime looks at `RunOptions` in plain runs only, so an adapter is bound like any other input."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.device = Device.of(session.inference)

    def of_adapter(self, adapter: LoadedAdapter | None) -> dict[str, onnxruntime.OrtValue]:
        """The values of an adapter that this model has inputs for: of two parts, each has its own."""
        if adapter is None:
            return {}
        names = {value.name for value in self.session.inference.get_overridable_initializers()}
        return {name: value for name, value in adapter.values.items() if name in names}

    def run(self, binding: Any) -> Sequence[onnxruntime.OrtValue]:
        """What is bound as outputs. Raises ExecutionError."""
        try:
            self.session.inference.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            raise ExecutionError(f"{self.session.provider}: {first_line(error)}") from error
        found: Sequence[onnxruntime.OrtValue] = binding.get_outputs()
        return found

    def once(self, arrays: Mapping[str, Array], adapter: LoadedAdapter | None) -> dict[str, onnxruntime.OrtValue]:
        """All outputs of one run by name, in the memory of the provider."""
        binding = self.session.inference.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name, value in self.of_adapter(adapter).items():
            binding.bind_ortvalue_input(name, value)
        for info in self.session.outputs:
            binding.bind_output(info.name, self.device.kind, self.device.number)
        return dict(zip((info.name for info in self.session.outputs), self.run(binding), strict=True))
