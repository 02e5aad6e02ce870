"""What is known, without running it, of where ONNX Runtime runs the nodes of a file: records, and what they say in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["matmul", "attention", "norm", ""]

# fmt: off
_NAMES: Mapping[Kind, str] = {
    "matmul":
        "MatMul Gemm Einsum Conv ConvTranspose MatMulInteger ConvInteger QLinearMatMul QLinearConv RNN LSTM GRU "
        "MatMulNBits MatMulBnb4 FusedMatMul FusedGemm GemmFastGelu GemmFloat8 MatMulIntegerToFloat DynamicQuantizeMatMul "
        "FusedConv MoE QMoE",
    "attention":
        "Attention MultiHeadAttention GroupQueryAttention PagedAttention SparseAttention PackedAttention PackedMultiHeadAttention "
        "DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention LinearAttention",
    "norm":
        "LayerNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization "
        "EmbedLayerNormalization GroupNormalization GroupNorm SkipGroupNorm InstanceNormalization BatchNormalization LpNormalization "
        "MeanVarianceNormalization",
}
# fmt: on
HEAVY: Mapping[str, Kind] = {name: kind for kind, names in _NAMES.items() for name in names.split()}
"""Operators that a model's time goes into, by name whatever the domain: a file that leaves one of them to the CPU is not one for a GPU.
A norm that was written out in plain operators is these operators."""


@dataclass(frozen=True, slots=True)
class HandedBack:
    """A node that the provider has no kernel for. `operator`: with its domain where that is not ONNX's own. `reason`: what kernel is
    missing ("for T bfloat16", "at all"). `types`: of its inputs, "?" where not known. `path`: the module it comes from, "" where the file
    does not say. `nowhere`: the CPU has no kernel either, so the file does not load. `wholes`: it computes no floating point number."""

    node: str
    operator: str
    reason: str
    types: tuple[str, ...]
    path: str = ""
    nowhere: bool = False
    wholes: bool = False

    @property
    def heavy(self) -> Kind:
        """What a compile is refused for; whole numbers multiplied are none of it."""
        return "" if self.wholes else HEAVY.get(self.operator.rpartition(".")[2], "")

    def line(self) -> str:
        """In one line."""
        where = f" in {self.path}" if self.path else ""
        fate = ", and neither has the CPU: the file does not load" if self.nowhere else ""
        return f"{self.operator} ({self.node}{where}): no kernel {self.reason}{fate}"


@dataclass(frozen=True, slots=True)
class Placement:
    """Of one graph on one provider. `graph`: the file's name. `nodes`: how many run, after what the session computes once when it loads.
    `handed`: in the file's order. `sizes`: nodes without a kernel that compute sizes and places from shapes, which ONNX Runtime keeps on
    the CPU on purpose. `unknown`: operators that the list does not hold at all, and so nothing is said of. `source`: of the list."""

    target: str
    title: str
    graph: str
    nodes: int
    handed: tuple[HandedBack, ...] = ()
    sizes: int = 0
    unknown: tuple[str, ...] = ()
    source: str = ""

    def heavy(self) -> tuple[HandedBack, ...]:
        """Those that a compile is refused for."""
        return tuple(one for one in self.handed if one.heavy)

    def lines(self) -> Iterator[str]:
        """First how many, then each node, alike ones of one module in one line."""
        yield f"{self.graph}: {self._summary()}"
        counted = Counter(one.line() for one in self.handed)
        yield from (f"{line}{f', {count} times' if count > 1 else ''}" for line, count in counted.items())
        if self.unknown:
            yield f"nothing is known of {', '.join(self.unknown)}, which ONNX Runtime's list does not have"

    def _summary(self) -> str:
        sizes = f"; {self.sizes} more compute sizes there" if self.sizes else ""
        read = "read from ONNX Runtime's list of kernels, not run"
        if not self.handed:
            return f"{self.title} has a kernel for each of the {self.nodes - self.sizes} nodes{sizes} ({read})"
        return f"{self.title} hands {len(self.handed)} of {self.nodes} nodes back to the CPU{sizes} ({read})"
