"""Widths of iterative pruning: pure numbers."""

from __future__ import annotations

from matmorph.errors import InputError


def prune_schedule(width: int, target: int, shots: int = 8, *, multiple_of: int = 1) -> tuple[int, ...]:
    """The width after each shot on the way from `width` to `target`: next = current - (current - target) // (shots left), rounded up to
    `multiple_of` (the head dimension where whole heads go), as TransAct prunes (arXiv 2407.05690).

    prune_schedule(4096, 768, multiple_of=128) and prune_schedule(11008, 1536) are those of LLaMA-2-7B. Raises InputError for numbers below
    1 and a target above the width.
    """
    if min(width, target, shots, multiple_of) < 1 or target > width:
        raise InputError(
            f"a schedule goes from a width down to a target of 1 or more in 1 or more shots, got {width} -> {target} in {shots}"
        )
    found = []
    for left in range(shots, 0, -1):
        wanted = width - (width - target) // left
        width = min(-(-wanted // multiple_of) * multiple_of, width)
        found.append(width)
    return tuple(found)
