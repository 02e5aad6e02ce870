"""What the kernels of quantised matmuls are known to cost on the targets: notes for plans and reports, never a refusal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from matmorph.passes.linalg.choices import CHANNEL
from matmorph.passes.rewriting.rewrite import Outcome
from matmorph.runtime.targets import chosen_targets
from matmorph.runtime.targets.target import MEASURED_ROWS, KernelCost, Target
from matmorph.specs.schema import Export

_TABLES = ("nf2", "nf3")
_CHANNELS = ("uniform_8_channel",)
_BESIDE = {"uniform_8": "uniform_8_channel"}
"""Codes in blocks that have a form with a scale per output channel."""
_DENSE = ((1.0, 1.0),) * len(MEASURED_ROWS)
_DENSE_AGAIN = "the session makes the matrix dense when it loads: speed and memory of dense, a small file"
_GATHER = "GatherBlockQuantized: only the rows that are looked up are unpacked"


def kernel_notes(outcome: Outcome, export: Export) -> tuple[str, ...]:
    """What is known of the kernels that a rewritten site will run on; () where it has no quantised part."""
    spec = _quantised(outcome)
    if spec is None:
        return ()
    looks_up = bool(outcome.site.gathers) and not outcome.rule.untie
    notes = list(_matmul_notes(spec.kernel, spec.block_size, export)) if outcome.site.applications else []
    return (*notes, *((_GATHER,) if looks_up else ()))


def predicted_times(spec: Any, export: Export) -> tuple[tuple[int, float], ...]:
    """(rows, time over dense), the better end of each range of `time_ranges`."""
    return tuple((rows, low) for rows, low, _ in time_ranges(spec, export))


def times_of(outcome: Outcome, export: Export) -> tuple[tuple[int, float, float], ...]:
    """`time_ranges` of the kernel that a rewritten site will run on; () where it has no quantised part."""
    spec = _quantised(outcome)
    return time_ranges(spec, export) if spec is not None and outcome.site.applications else ()


def _quantised(outcome: Outcome) -> Any:
    """The settings of the part that a kernel for codes runs; None where a site was not rewritten, or has no such part."""
    specs = (part.use.spec for part in outcome.parts if getattr(part.use.spec, "kernel", None))
    return next(specs, None) if outcome.reject is None else None


def time_ranges(spec: Any, export: Export) -> tuple[tuple[int, float, float], ...]:
    """(rows, low, high): the time over dense at the measured numbers of rows nearest below those of `export.tokens`, on the target that was
    measured; () for a method without known kernels, or where no measured target runs the file."""
    kernel = getattr(spec, "kernel", None)
    measured = next((target for target in chosen_targets(export.target) if target.measured), None)
    if kernel is None or measured is None:
        return ()
    if _is_rebuilt(kernel, export):
        ratios: tuple[tuple[float, float], ...] = _DENSE
    else:
        cost = _cost(measured, kernel, spec.block_size, export)
        ratios = cost.ratios if cost is not None else ()
    return tuple((MEASURED_ROWS[index], *ratios[index]) for index in _measured_at(export.tokens)) if ratios else ()


def kernel_summary(outcomes: Iterable[Outcome], export: Export) -> list[str]:
    """Each note once, with the number of sites that it holds for."""
    counted = Counter(note for outcome in outcomes for note in kernel_notes(outcome, export))
    return [f"{count} {'site' if count == 1 else 'sites'}: {note}" for note, count in counted.items()]


def _matmul_notes(kernel: str, block_size: int | str, export: Export) -> Iterable[str]:
    if _is_rebuilt(kernel, export):
        yield (
            f"not multiplied in integers ({_no_integers(export)}): {_DENSE_AGAIN}"
            if kernel in _CHANNELS
            else f"codebook rebuild: {_DENSE_AGAIN}"
        )
        return
    for target in chosen_targets(export.target):
        cost = _cost(target, kernel, block_size, export)
        if cost is not None:
            yield _note(target.name, cost, export.tokens)
    if kernel in _BESIDE and export.integer_products:
        yield from (f"block_size: channel would be: {note}" for note in _matmul_notes(_BESIDE[kernel], CHANNEL, export))


def _is_rebuilt(kernel: str, export: Export) -> bool:
    return (kernel in _TABLES and export.codebook == "rebuild") or (kernel in _CHANNELS and not export.integer_products)


def _no_integers(export: Export) -> str:
    if export.activations != "int8":
        return f"export.activations is {export.activations}"
    lacking = [target.name for target in chosen_targets(export.target) if not target.multiplies_integers]
    return f"{' and '.join(lacking)} has no such product, and export.target names it"


def _cost(target: Target, kernel: str, block_size: int | str, export: Export) -> KernelCost | None:
    return target.costs.get((kernel, _manner(target, kernel, block_size, export)))


def _manner(target: Target, kernel: str, block_size: int | str, export: Export) -> str:
    if kernel in _TABLES:
        return export.codebook
    if kernel in _CHANNELS:
        return "integers"
    if not kernel.startswith("uniform"):
        return ""
    falls_back = block_size not in target.int8_blocks.get(kernel, (block_size,))
    return "fp32" if falls_back else export.activations


def _note(name: str, cost: KernelCost, tokens: Iterable[int]) -> str:
    """The measured figures at the numbers of rows nearest below those of `export.tokens`, or what else is known."""
    if not cost.ratios:
        return f"{name} ({cost.basis}): {cost.kernel}"
    figures = ", ".join(
        f"{_range(cost.ratios[index])} at {MEASURED_ROWS[index]} row{'s' * (MEASURED_ROWS[index] > 1)}" for index in _measured_at(tokens)
    )
    return f"{name}: {cost.kernel}: time over dense {figures}"


def _measured_at(tokens: Iterable[int]) -> tuple[int, ...]:
    """Which of the measured numbers of rows stand for these."""
    nearest = (max(index for index, rows in enumerate(MEASURED_ROWS) if rows <= max(count, 1)) for count in sorted(tokens))
    return tuple(dict.fromkeys(nearest))


def _range(pair: tuple[float, float]) -> str:
    low, high = pair
    return f"{low:g} x" if low == high else f"{low:g} to {high:g} x"
