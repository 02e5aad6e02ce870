"""`Target`: all that matmorph knows of one execution provider of ONNX Runtime, for the compiler and for the runtime alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matmorph.runtime.targets.kernels import NONE, Kernels
from matmorph.runtime.targets.rates import Rates

MEASURED_ROWS = (1, 16, 256)
"""Numbers of rows for which `KernelCost.ratios` stand."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a kernel of quantised weights takes beside the types, which the list of kernels says nothing of: block sizes, bits of a code."""

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

    `kernels()`: its list of kernels; what is not on it the provider does not run. `hands_back`: the list is whole, and a node that is not
    on it runs on the CPU. `casts`: types that a node without a kernel is run in, by the type it has: ONNX Runtime writes the Casts.
    `declines`: what of a node's attributes keeps it off a kernel that takes its types, by operator. `limits`: by operator of com.microsoft,
    those that quantised weights are written for. `lacks`: precisions (fp32, fp16, bf16) it has no kernels for, each with the reason.
    `rates`: of matrix products. `costs`: of quantised matmuls, by codes and manner: (uniform_4, int8), (nf4, ""), (nf3, packed),
    (uniform_8_channel, integers).
    `int8_blocks`: block sizes for which codes are multiplied with int8 activations, others fall back to float32; codes that are not named
    take any.
    """

    name: str
    provider: str
    title: str
    memory: str
    obstacle: Callable[[], str | None]
    default: bool = False
    kernels: Callable[[], Kernels] = lambda: NONE
    hands_back: bool = False
    casts: Mapping[str, str] = field(default_factory=dict)
    declines: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = field(default_factory=dict)
    limits: Mapping[str, Limits] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    rates: Rates | None = None
    costs: Mapping[tuple[str, str], KernelCost] = field(default_factory=dict)
    int8_blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether times of its quantised matmuls were measured, at least some."""
        return any(cost.ratios for cost in self.costs.values())

    @property
    def multiplies_integers(self) -> bool:
        """Whether it has both kernels of a product of 8-bit activations, rounded as it runs, with signed 8-bit codes."""
        rounds = self.missing("", "DynamicQuantizeLinear", 21, ["float32"], ["uint8", "float32", "uint8"])
        taken = ["uint8", "int8", "float32", "float32", "uint8"]
        return rounds is None and self.missing("com.microsoft", "MatMulIntegerToFloat", 1, taken, ["float32"]) is None

    def missing(self, domain: str, name: str, opset: int, inputs: Sequence[str | None], outputs: Sequence[str | None]) -> str | None:
        """What kernel a node lacks here ("for T bfloat16", "at all"), None where it runs. Types as the list writes them."""
        kernels = self.kernels()
        found = kernels.lacks(domain, name, opset, inputs, outputs)
        if found is None or not self.casts:
            return found
        cast = ([self.casts.get(one, one) if one else one for one in side] for side in (inputs, outputs))
        return None if kernels.lacks(domain, name, opset, *cast) is None else found

    def results(self, name: str) -> tuple[str, ...]:
        """Types in which it computes an operator of com.microsoft."""
        own = self.kernels().results("com.microsoft", name)
        return tuple(sorted({*own, *(given for given, run in self.casts.items() if run in own)}))
