"""The three training graphs as ONNX Runtime sessions, and the state that stays with them: in the memory of the target that loads.

The state lies in two sets of buffers: an update reads one and writes the other, then they change roles. Each buffer is allocated by ONNX
Runtime: an OrtValue made from a numpy array on a CPU is that array, so that m and v made from one `zeros` would be one vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from matmorph.runtime.device import Device
from matmorph.runtime.errors import ArtifactError, ExecutionError, first_line
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.training import (
    APPLY_MODEL,
    COUNT,
    EVAL_MODEL,
    GRAD_MODEL,
    GRADIENT,
    LOSS,
    LOSS_SCALE,
    THETA,
    TRAIN_MANIFEST,
    TrainManifest,
)
from matmorph.runtime.providers import Provider
from matmorph.runtime.session import load_session, session_settings
from matmorph.runtime.targets.cpu import CPU

_OPTIONAL = ("mask", "segment_lr", "segment_decay")
_NUMBERS = ("lr", "weight_decay", "grad_scale", "max_norm")
_ERRORS_ONLY = 3  # apply.onnx has inputs with defaults, which ONNX Runtime warns about


@dataclass(frozen=True, slots=True)
class Sessions:
    """How a folder's sessions are made; `log` hears of it when the preferred target does not load."""

    folder: Path
    providers: str | Sequence[Provider] | None
    threads: int | None
    log: Callable[[str], None]

    def load(self, name: str, beside: bool = False) -> onnxruntime.InferenceSession:
        """Raises ArtifactError and ProviderError. `beside`: a short run between the long ones of another session, on whose cores its idle
        workers must not spin.
        """
        options = session_settings(self.threads, True)
        # A memory pattern is one more block as large as all activations, for each shape of a batch (decision A26).
        options.enable_mem_pattern = False
        if beside:
            options.log_severity_level = _ERRORS_ONLY
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return load_session(self.folder / name, self.providers, options, self.log)


class StateVectors:
    """theta and the optimizer's states, float32 [length] each."""

    def __init__(self, names: Sequence[str], length: int, device: Device) -> None:
        self.names = tuple(names)
        zeros = np.zeros(length, np.float32)
        self._sets = tuple({name: device.value(zeros) for name in names} for _ in range(2))
        self._current = 0

    def get(self, name: str) -> Array:
        """A copy."""
        return np.array(self.current[name].numpy())

    def set(self, name: str, array: Array) -> None:
        self.current[name].update_inplace(np.ascontiguousarray(array, np.float32))

    @property
    def current(self) -> Mapping[str, onnxruntime.OrtValue]:
        return self._sets[self._current]

    @property
    def next(self) -> Mapping[str, onnxruntime.OrtValue]:
        return self._sets[1 - self._current]

    def flip(self) -> None:
        """What was written is current from now on."""
        self._current = 1 - self._current


class GradGraph:
    """grad.onnx; `gradient` is its last result, where the vectors are."""

    def __init__(self, sessions: Sessions, manifest: TrainManifest) -> None:
        self._session = sessions.load(GRAD_MODEL)
        _check_inputs(sessions.folder / GRAD_MODEL, self._session, (THETA, LOSS_SCALE, *manifest.graph_inputs))
        self.device = Device.of(self._session)
        self.gradient = self.device.value(np.zeros(manifest.length, np.float32))

    @property
    def provider(self) -> str:
        return str(self._session.get_providers()[0])

    def run(self, theta: onnxruntime.OrtValue, batch: Mapping[str, Array], loss_scale: float) -> tuple[float, float]:
        """(loss, count) of a checked batch. Raises ExecutionError when ONNX Runtime refuses."""
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(THETA, theta)
        binding.bind_ortvalue_output(GRADIENT, self.gradient)
        arrays = {**batch, LOSS_SCALE: np.asarray(loss_scale, np.float32)}
        loss, count = _run(self._session, binding, arrays, (LOSS, COUNT))
        return float(loss), float(count)


class ApplyGraph:
    """apply.onnx. `optional`: values of mask, segment_lr and segment_decay where they are not all ones."""

    def __init__(self, sessions: Sessions, manifest: TrainManifest, optional: Mapping[str, Array]) -> None:
        self._session = sessions.load(APPLY_MODEL, beside=True)
        _check_inputs(sessions.folder / APPLY_MODEL, self._session, (THETA, *manifest.states, GRADIENT, "step", *_NUMBERS))
        self._device = Device.of(self._session)
        self._optional = {name: self._device.value(optional[name]) for name in _OPTIONAL if name in optional}

    def run(
        self, vectors: StateVectors, gradient: onnxruntime.OrtValue, step: int, numbers: Mapping[str, float], mask: Array | None = None
    ) -> tuple[float, bool]:
        """(norm of the scaled gradient, skipped); the new state is in `vectors.next`. `mask`: of this update, in place of the one given at
        first. Raises ExecutionError when ONNX Runtime refuses."""
        binding = self._session.io_binding()
        optional = self._optional if mask is None else {**self._optional, "mask": self._device.value(mask)}
        for name, value in {**vectors.current, **optional, GRADIENT: gradient}.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in vectors.next.items():
            binding.bind_ortvalue_output(f"{name}_next", value)
        arrays: dict[str, Array] = {
            "step": np.asarray(step, np.int64),
            **{name: np.asarray(numbers[name], np.float32) for name in _NUMBERS},
        }
        norm, skipped = _run(self._session, binding, arrays, ("grad_norm", "skipped"))
        return float(norm), bool(skipped)


class EvalGraph:
    """eval.onnx: loss, count and the model's outputs."""

    def __init__(self, sessions: Sessions, manifest: TrainManifest) -> None:
        self._session = sessions.load(EVAL_MODEL)
        _check_inputs(sessions.folder / EVAL_MODEL, self._session, (THETA, *manifest.graph_inputs))
        self._names = [LOSS, COUNT, *(info.name for info in manifest.outputs)]

    def run(self, theta: onnxruntime.OrtValue, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Results by name. Raises ExecutionError when ONNX Runtime refuses."""
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(THETA, theta)
        return dict(zip(self._names, _run(self._session, binding, batch, self._names), strict=True))


def _run(session: onnxruntime.InferenceSession, binding: Any, arrays: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
    """Binds `arrays`, runs, and brings the results `names` to the CPU."""
    whole = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}  # which turns a scalar into [1]
    for name, array in whole.items():
        binding.bind_cpu_input(name, array)
    for name in names:
        binding.bind_output(name, CPU.memory)
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
        raise ExecutionError(f"{session.get_providers()[0]}: {first_line(error)}") from error
    return [np.array(value.numpy()) for value in binding.get_outputs()[-len(names) :]]  # results come in the order of binding


def _check_inputs(path: Path, session: onnxruntime.InferenceSession, expected: Sequence[str]) -> None:
    found = sorted(arg.name for arg in session.get_inputs())
    if found != sorted(expected):
        raise ArtifactError(f"{path}: its inputs are {', '.join(found)}, {TRAIN_MANIFEST} says {', '.join(sorted(expected))}")
