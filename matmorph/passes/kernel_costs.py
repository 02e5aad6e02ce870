"""What the kernels of quantised matmuls are known to cost on ONNX Runtime's providers: notes for plans and reports, never a refusal.

Time over that of the dense float32 matmul of the same shape, measured with ONNX Runtime 1.31.1, CPU provider, one thread, AVX512-VNNI, at
1024 x 1024 and 4096 x 4096, for 1, 16 and 256 rows. The CUDA provider's kernels were read, not measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from matmorph.passes.rewriting.rewrite import Outcome
from matmorph.specs.schema import Export

_ROWS = (1, 16, 256)
"""Numbers of rows that were measured."""

_INT8_2_BIT_BLOCKS = (32, 64, 128)
"""Block sizes for which the 2-bit kernel multiplies int8 activations; others fall back to the float32 path."""


@dataclass(frozen=True, slots=True)
class CpuCost:
    """`kernel`: the operator and its manner. `ratios`: (low, high) of the time over dense, at 1, 16 and 256 rows."""

    kernel: str
    ratios: tuple[tuple[float, float], ...]


_DENSE = ((1.0, 1.0),) * len(_ROWS)
_UNPACKED = "no float32 kernel: the matrix is unpacked on every call"
_CPU: Mapping[tuple[str, str], CpuCost] = {
    ("uniform_4", "fp32"): CpuCost("MatMulNBits, 4 bits, float32 activations", ((0.25, 0.7), (1.5, 1.6), (0.6, 1.0))),
    ("uniform_4", "int8"): CpuCost("MatMulNBits, 4 bits, int8 activations", ((0.08, 0.26), (0.43, 0.81), (0.9, 1.1))),
    ("uniform_8", "fp32"): CpuCost(f"MatMulNBits, 8 bits, float32 activations, {_UNPACKED}", ((7, 16), (5, 12), (1.5, 1.8))),
    ("uniform_8", "int8"): CpuCost("MatMulNBits, 8 bits, int8 activations", ((0.36, 0.36), (0.78, 0.78), (0.73, 0.73))),
    ("uniform_2", "fp32"): CpuCost(f"MatMulNBits, 2 bits, float32 activations, {_UNPACKED}", ((17, 20), (13, 14), (1.7, 1.7))),
    ("uniform_2", "int8"): CpuCost("MatMulNBits, 2 bits, int8 activations", ((0.07, 0.22), (0.29, 0.85), (1.1, 1.5))),
    ("nf4", ""): CpuCost("MatMulBnb4 (NF4), the matrix is unpacked on every call", ((3.5, 7.1), (3.6, 3.7), (1.2, 1.5))),
    ("nf3", "packed"): CpuCost("table look-up of 4-bit wide codes on every call", ((48, 51), (36, 36), (2.9, 2.9))),
    ("nf2", "packed"): CpuCost("table look-up of 2-bit codes on every call", ((22, 28), (16, 21), (1.6, 2.3))),
}
_REBUILT = "codebook rebuild: the session makes the matrix dense when it loads: speed and memory of dense, a small file"
_GATHER = "GatherBlockQuantized: only the rows that are looked up are unpacked"
_CUDA: Mapping[str, str] = {
    "uniform": "cuda (read in the kernel, not measured): packed for few rows, else unpacked on every call for a dense product",
    "nf4": "cuda (read in the kernel, not measured): packed for one row, else unpacked on every call for a dense product",
    "packed": "cuda (not measured): a look-up of all codes on every call, then a dense product",
}


def cpu_costs() -> Mapping[tuple[str, str], CpuCost]:
    """What was measured on the CPU provider, by codes and manner: (uniform_4, int8), (nf3, packed)."""
    return _CPU


def kernel_notes(outcome: Outcome, export: Export) -> tuple[str, ...]:
    """What is known of the kernels that a rewritten site will run on; () where it has no quantised part."""
    spec = next((part.use.spec for part in outcome.parts if getattr(part.use.spec, "kernel", None)), None)
    if spec is None or outcome.reject is not None:
        return ()
    looks_up = bool(outcome.site.gathers) and not outcome.rule.untie
    notes = list(_matmul_notes(spec.kernel, spec.block_size, export)) if outcome.site.applications else []
    return (*notes, *((_GATHER,) if looks_up else ()))


def predicted_times(spec: Any, export: Export) -> tuple[tuple[int, float], ...]:
    """(rows, time over dense on the CPU provider) at the measured numbers of rows nearest below those of `export.tokens`, the better end of
    each range; () for a method without known kernels, or where no CPU runs the file: the other kernels were never measured."""
    kernel = getattr(spec, "kernel", None)
    if kernel is None or "cpu" not in export.target:
        return ()
    table = kernel in ("nf2", "nf3")
    ratios = _DENSE if table and export.codebook == "rebuild" else _CPU[kernel, _manner(kernel, spec.block_size, export)].ratios
    return tuple((_ROWS[index], ratios[index][0]) for index in _measured_at(export.tokens))


def kernel_summary(outcomes: Iterable[Outcome], export: Export) -> list[str]:
    """Each note once, with the number of sites that it holds for."""
    counted = Counter(note for outcome in outcomes for note in kernel_notes(outcome, export))
    return [f"{count} {'site' if count == 1 else 'sites'}: {note}" for note, count in counted.items()]


def _matmul_notes(kernel: str, block_size: int, export: Export) -> Iterable[str]:
    table = kernel in ("nf2", "nf3")
    if table and export.codebook == "rebuild":
        yield _REBUILT
        return
    if "cpu" in export.target:
        yield _cpu_note(_CPU[kernel, _manner(kernel, block_size, export)], export.tokens)
    if "cuda" in export.target:
        yield _CUDA["packed" if table else kernel.partition("_")[0]]


def _manner(kernel: str, block_size: int, export: Export) -> str:
    if kernel in ("nf2", "nf3"):
        return export.codebook
    if not kernel.startswith("uniform"):
        return ""
    falls_back = kernel == "uniform_2" and block_size not in _INT8_2_BIT_BLOCKS
    return "fp32" if falls_back else export.activations


def _cpu_note(cost: CpuCost, tokens: Iterable[int]) -> str:
    """The measured figures at the numbers of rows nearest below those of `export.tokens`."""
    figures = ", ".join(f"{_range(cost.ratios[index])} at {_ROWS[index]} row{'s' * (_ROWS[index] > 1)}" for index in _measured_at(tokens))
    return f"cpu: {cost.kernel}: time over dense {figures}"


def _measured_at(tokens: Iterable[int]) -> tuple[int, ...]:
    """Which of the measured numbers of rows stand for these."""
    nearest = (max(index for index, rows in enumerate(_ROWS) if rows <= max(count, 1)) for count in sorted(tokens))
    return tuple(dict.fromkeys(nearest))


def _range(pair: tuple[float, float]) -> str:
    low, high = pair
    return f"{low:g} x" if low == high else f"{low:g} to {high:g} x"
