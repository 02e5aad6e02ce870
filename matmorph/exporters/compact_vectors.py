"""Check vectors of a file whose cache has no gaps: calls that its kernel takes, and the places at which its answer is defined.

What is compared with is the graph with its attention as it was traced. Rows are padded behind their tokens alone; a pad's own answer is
nobody's, and behind a row's tokens such a cache holds other things than one with gaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from matmorph.errors import VerifyError
from matmorph.exporters.vectors import HALVES, Vectors, answered, example_sizes, resized, widened
from matmorph.ir.cache import Slot, find_slots
from matmorph.ir.core import Graph, Value
from matmorph.ir.evaluate import Runner
from matmorph.ir.without_cache import positions_of
from matmorph.passes.attention.setting import Setting, find_setting
from matmorph.runtime.format.cases import Case


@dataclass(frozen=True, slots=True)
class _Call:
    """`held`: tokens of the past of each row, `new`: of the call."""

    past: int
    length: int
    held: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def mask(self) -> torch.Tensor:
        """[rows, past + length]."""
        total = torch.arange(self.past + self.length)
        held, new = torch.tensor(self.held)[:, None], torch.tensor(self.new)[:, None]
        return ((total < held) | ((total >= self.past) & (total < self.past + new))).to(torch.int64)


def compact_vectors(
    graph: Graph, examples: Sequence[torch.Tensor], windowed: bool, precision: str = "fp32", run: Runner | None = None
) -> Vectors:
    """As `check_vectors`, of the graph before its attention is fused. `windowed`: some of it sees the last tokens alone; then a gap in
    the past of what is compared with would count as tokens, and there is no case with one."""
    slots = find_slots(graph)
    setting = find_setting(graph, slots[0])
    if isinstance(setting, str):
        raise VerifyError(f"attention was fused over a cache of which nothing could be proved: {setting}")
    running = graph if precision == "keep" else widened(graph)
    examples = [tensor.float() if running is not graph and tensor.dtype in HALVES else tensor for tensor in examples]
    own = example_sizes(graph.inputs, examples)
    rows, length, past = (own[str(axis)] for axis in (setting.batch, setting.length, setting.before))
    cases = []
    for call in _calls(max(rows, 2), max(length, 2), max(past, 2), windowed):
        case = answered(running, _inputs(graph, setting, examples, own, call), run)
        cases.append(Case(case.inputs, case.outputs, _compared(graph, slots, call)))
    return Vectors(tuple(cases))


def _calls(rows: int, length: int, past: int, windowed: bool) -> Iterator[_Call]:
    """One row with a past, prompts, one token each, and both with rows that are shorter than their batch."""
    yield _Call(past, length, (past,), (length,))
    yield _Call(0, length, (0,) * rows, (length,) * rows)
    yield _Call(past, 1, (past,) * rows, (1,) * rows)
    long = length + past
    yield _Call(0, long, (0,) * rows, (long, *[(long + 1) // 2] * (rows - 1)))
    if not windowed:
        yield _Call(past, 1, (past, *[(past + 1) // 2] * (rows - 1)), (1,) * rows)


def _inputs(graph: Graph, setting: Setting, examples: Sequence[torch.Tensor], own: Mapping[str, int], call: _Call) -> list[torch.Tensor]:
    sizes = {**own, **setting.sizes(len(call.new), call.length, call.past)}
    given = dict(zip(graph.inputs, examples, strict=True))
    mask = call.mask
    found = []
    for value, tensor in given.items():
        if value is setting.mask:
            found.append(mask.to(tensor.dtype))
        elif _holds_places(value, tensor, given[setting.mask], setting):
            found.append(positions_of(mask)[:, -call.length :].to(tensor.dtype).contiguous())
        else:
            found.append(resized(tensor, value, sizes))
    return found


def _holds_places(value: Value, tensor: torch.Tensor, mask: torch.Tensor, setting: Setting) -> bool:
    """Whether the example has the place of each token there."""
    if value.tensor.shape != setting.rows or tensor.is_floating_point():
        return False
    return torch.equal(tensor.long(), positions_of(mask)[:, -tensor.shape[1] :])


def _compared(graph: Graph, slots: Sequence[Slot], call: _Call) -> dict[str, np.ndarray]:
    """By output: bool, broadcast to it, where it is defined; () where that is everywhere."""
    if call.mask.all():
        return {}
    new = torch.tensor(call.new)[:, None]
    real = (torch.arange(call.length) < new).numpy()
    # The tokens that every kind of cache holds at the same places: those of the past, and of a call without one.
    kept = (torch.arange(call.past + call.length) < (torch.tensor(call.held)[:, None] if call.past else new)).numpy()
    presents = {slot.output for slot in slots}
    return {name: kept[:, None, :, None] if name in presents else real[..., None] for name, _ in graph.results}
