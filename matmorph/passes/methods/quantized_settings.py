"""The settings of a quantised base, which quantize, loftq and qlora share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from matmorph.passes.linalg.choices import CHANNEL, CHANNEL_BITS, CODEBOOK_BITS, UNIFORM_BITS, QuantizerName, quantizer_bits
from matmorph.specs.notations import Rank


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedSpec:
    """A base of integer codes and scales. The definitions of the quantizers are those of `matmorph.passes.linalg.quantize`."""

    quantizer: QuantizerName = field(
        metadata={
            "doc": "nf4, nf3, nf2: NormalFloat tables; uniform: steps of a scale per block; uniform_clipped: per tensor, mean +- 2 std"
        }
    )
    bits: Literal[2, 3, 4, 8] | Literal["auto"] | None = field(
        default=None,
        metadata={
            "doc": "bits of a code; the tables have their own; auto: the budget decides; 3 are stored 4 bits wide, as kernels have it"
        },
    )
    block_size: Literal[16, 32, 64, 128, 256] | Literal["channel"] = field(
        default=64,
        metadata={
            "doc": "weights that share a scale: sizes the kernels have; channel: all of an output channel (8 bits, matmuls only), which is "
            "multiplied in integers under export: {activations: int8, target: [cpu]}"
        },
    )
    zero_point: bool | Literal["integer", "float"] = field(
        default=False,
        metadata={
            "doc": "a zero point per block (uniform): true, integer = a code; float = any number, as GGUF's Q4_1 has (2 to 4 bits, matmuls "
            "only)"
        },
    )
    scale: Literal["absmax", "search", "weighted"] = field(
        default="absmax",
        metadata={
            "doc": "search: the scale with the smallest squared error of its block (uniform); weighted: each feature's error counts by its "
            "mean square on the calibration data"
        },
    )
    rounding: Literal["nearest", "gptq"] = field(
        default="nearest",
        metadata={"doc": "gptq: each code makes up for the errors of those before it, on the outputs of the calibration data"},
    )
    equalise: bool = field(
        default=False,
        metadata={
            "doc": "true: loud input channels are scaled down in what makes them and up in the weight, by the power of their root mean "
            "square whose codes have the smallest error on the outputs; where the graph has no place for that, the report says so"
        },
    )
    double_quant: bool = field(
        default=False, metadata={"doc": "scales rounded as 8-bit codes (tables); the ONNX kernels take them expanded"}
    )

    def __post_init__(self) -> None:
        refuse_impossible(self)

    @property
    def kernel(self) -> str:
        """What multiplies it, as `passes.kernel_costs` knows it: "nf4", "uniform_2" ..."""
        if self.quantizer in CODEBOOK_BITS:
            return self.quantizer
        form = "_float" if self.zero_point == "float" else "_channel" if self.block_size == CHANNEL else ""
        return f"uniform_{4 if self.bits == 3 else self.bits}{form}"

    def block(self, in_features: int) -> int:
        """Weights that share a scale where a row has that many."""
        return in_features if self.block_size == CHANNEL else int(self.block_size)


def refuse_impossible(spec: QuantizedSpec) -> None:
    """ValueError for settings that do not go together, before any model is read."""
    if spec.quantizer not in CODEBOOK_BITS and spec.bits is None:
        raise ValueError(f"{spec.quantizer} needs bits: {', '.join(map(str, UNIFORM_BITS))}")
    if spec.quantizer in CODEBOOK_BITS and spec.bits == "auto":
        raise ValueError(f"{spec.quantizer} has bits of its own: auto is for uniform codes")
    for bits in bit_choices(spec):
        _refuse_channel(spec, bits)
        quantizer_bits(spec.quantizer, bits, spec.block(8), zero_points(spec), searched(spec), spec.double_quant)
    if spec.equalise and spec.bits == "auto":
        raise ValueError("equalise is for codes that are known, and bits: auto leaves them to the budget")
    if spec.rounding == "gptq" and spec.quantizer == "uniform_clipped":
        raise ValueError("uniform_clipped has one scale for the whole tensor: gptq rounds on scales per block (uniform, nf4, nf3, nf2)")


def _refuse_channel(spec: QuantizedSpec, bits: int | None) -> None:
    if spec.block_size == CHANNEL and spec.zero_point:
        raise ValueError("block_size: channel has codes without zero points, as integer products take them")
    if spec.block_size == CHANNEL and (spec.quantizer != "uniform" or bits not in CHANNEL_BITS):
        what = spec.quantizer if spec.quantizer != "uniform" else f"bits: {spec.bits}"
        raise ValueError(
            f"block_size: channel is for uniform codes of {', '.join(map(str, CHANNEL_BITS))} bits, which kernels multiply with one scale "
            f"per output channel, not for {what}"
        )


def zero_points(spec: QuantizedSpec) -> bool | Literal["float"]:
    """What the zero points are."""
    return "float" if spec.zero_point == "float" else bool(spec.zero_point)


def searched(spec: QuantizedSpec) -> Literal["absmax", "search"]:
    """The rule for scales apart from what an error counts."""
    return "absmax" if spec.scale == "absmax" else "search"


def reads_inputs(spec: QuantizedSpec) -> bool:
    """Whether the base depends on the calibration data."""
    return spec.rounding != "nearest" or spec.scale == "weighted"


def bit_choices(spec: QuantizedSpec) -> tuple[Literal[2, 3, 4, 8] | None, ...]:
    """What `bits` may become; what it is where it is not auto."""
    return (2, 4, 8) if spec.bits == "auto" else (spec.bits,)


def quantizer_settings(spec: QuantizedSpec) -> Mapping[str, Any]:
    """What the base is made anew by, of another weight and without data: the settings of the quantizer alone, as plain data."""
    own = {entry.name: getattr(spec, entry.name) for entry in fields(QuantizedSpec) if entry.name not in ("rounding", "equalise")}
    return {**own, "scale": searched(spec)}


def refuse_other_ranks(method: str, rank: Rank) -> None:
    """ValueError unless the rank is a number: what a quantizer leaves over has no energy worth a threshold."""
    if rank.kind != "fixed":
        raise ValueError(f"{method} takes a number as its rank, not {rank.kind}")
