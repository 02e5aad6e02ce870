"""`Target`: all that matmorph knows of one execution provider of ONNX Runtime, for the compiler and for the runtime alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from matmorph.runtime.targets.rates import Rates

MEASURED_ROWS = (1, 16, 256)
"""Numbers of rows for which `KernelCost.ratios` stand."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a provider's kernel of one contrib operator takes: types of the activations (of the result of a gather) as numpy names them,
    block sizes, bits of a code."""

    dtypes: tuple[str, ...]
    blocks: tuple[int, ...] = (16, 32, 64, 128, 256)
    bits: tuple[int, ...] = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class KernelCost:
    """What is known of the time of a quantised matmul. `kernel`: the operator and its manner. `ratios`: (low, high) of the time over
    that of the dense float32 matmul of the same shape, at each of `MEASURED_ROWS`; () where it was never measured, and `basis` says so."""

    kernel: str
    ratios: tuple[tuple[float, float], ...] = ()
    basis: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One execution provider.

    `name`: in specs and on the command line; `provider`: ONNX Runtime's name; `title`: in messages. `memory`: where an OrtValue lies that
    the provider reads without a copy, as ONNX Runtime names it. `obstacle()`: why it cannot be used on this machine, None where nothing
    stands in its way; cheap and quiet. `default`: whether a file must run on it unless its spec says otherwise.

    `kernels`: by operator of com.microsoft. `lacks`: precisions (fp32, fp16, bf16) it has no kernels for, each with the reason. `rates`: of
    matrix products. `costs`: of quantised matmuls, by codes and manner: (uniform_4, int8), (nf4, ""), (nf3, packed). `int8_blocks`: block
    sizes for which codes are multiplied with int8 activations, others fall back to float32; codes that are not named take any.
    """

    name: str
    provider: str
    title: str
    memory: str
    obstacle: Callable[[], str | None]
    default: bool = False
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    rates: Rates | None = None
    costs: Mapping[tuple[str, str], KernelCost] = field(default_factory=dict)
    int8_blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether times of its quantised matmuls were measured, at least some."""
        return any(cost.ratios for cost in self.costs.values())
