"""Calibration: the second moment of what each matmul reads, streamed over the user's batches.

One accumulator per distinct input (query, key and value read the same rows), summed over all applications of a site. Rows that the model's
`attention_mask` input marks as padding are left out. Products run in float32 per batch (float64 for float64 inputs) and are summed up in
float64: the rounding of one batch does not grow with their number.

What is fitted to rows has too small an error on them. Where a method fits, every fifth batch goes into a second moment of its own, which
errors are measured in; of fewer than five batches every fifth sample does (every fifth row where a batch has fewer than five samples).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from matmorph.errors import InputError
from matmorph.ir.core import Const, Graph, Value
from matmorph.ir.evaluate import bind, evaluate
from matmorph.ir.site import Application, Site, Statistic
from matmorph.ir.types import as_dim
from matmorph.passes.linalg.svd import power_of_two
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.rewriting.row_view import RowStep, apply, row_view
from matmorph.passes.statistics.empty_cache import with_empty_cache
from matmorph.passes.statistics.token_mask import of_rows, token_mask
from matmorph.progress import StepProgress

HELD_OUT_EVERY = 5
"""One in so many batches, or rows, is kept from what is fitted."""
SPILL_ABOVE = 1 << 28
"""Bytes of accumulators that are held in memory; above it, each lives in a temporary file that is mapped into memory."""


@dataclass(frozen=True, slots=True)
class _Source:
    """Rows of one application: a value, how it is read as rows, which matrix each row goes to, and which rows count."""

    x: Value
    enter: tuple[RowStep, ...]
    select: Value | None
    experts: int | None
    mask: Value | None


@dataclass(slots=True, eq=False)
class _Sum:
    """Running sums: `moment` [in, in] or [E, in, in] float64, `rows` [] or [E]. `held`: of what is held out, None where nothing is."""

    moment: Tensor
    rows: Tensor
    held: _Sum | None = None

    def add(self, moment: Tensor, rows: Tensor) -> None:
        self.moment += moment.to(self.moment)
        self.rows += rows
        release(self.moment)


_Held: TypeAlias = Literal["none", "all", "some"]
"""What of a batch is held out: every fifth of its samples where there are too few batches."""
_Rows: TypeAlias = Callable[[Tensor], Tensor]
"""Picks along the first axis."""


def calibrate(
    graph: Graph,
    needs: Sequence[tuple[Site, frozenset[Statistic]]],
    batches: Iterable[Any],
    samples: int,
    progress: StepProgress | None = None,
    *,
    spill_above: int = SPILL_ABOVE,
) -> Mapping[Site, SiteStats]:
    """The statistics of every site that needs one, from at most `samples` samples (first axis of the model's first input).

    A batch is a mapping by input names, a tuple of positional inputs, one tensor, or, for a model that takes both kinds of inputs, a pair
    of args and kwargs; tensors or numpy arrays like the example inputs.
    Rows are held out for the inputs of sites that need `HELD_OUT_MOMENT`, at the price of a second accumulator for each.
    No batch is read where nothing is needed, and none after the last sample. Accumulators of more than `spill_above` bytes in all lie on
    disk; the files are gone as soon as the statistics are. `progress`: of the samples.

    Raises InputError where the batches yield nothing, where one does not fit the model's inputs, or where an input of a matmul is NaN or
    infinite on them.
    """
    keys = {site: _sources(graph, site) for site, wanted in needs if Statistic.INPUT_SECOND_MOMENT in wanted}
    if not keys:
        return {}
    shapes = {keys[site]: _shape(site) for site in keys}
    held = {keys[site] for site, wanted in needs if site in keys and Statistic.HELD_OUT_MOMENT in wanted}
    spill = sum(8 * prod(shape) * (2 if key in held else 1) for key, shape in shapes.items()) > spill_above
    sums = {key: _sum(shape, spill, _sum(shape, spill) if key in held else None) for key, shape in shapes.items()}
    _stream(graph, sums, batches, samples, progress)
    return one_at_a_time({site: _stats(site, sums[key]) for site, key in keys.items()})


def _sum(shape: tuple[int, ...], spill: bool, held: _Sum | None = None) -> _Sum:
    return _Sum(accumulator(shape, spill), torch.zeros(shape[:-2], dtype=torch.int64), held)


def _shape(site: Site) -> tuple[int, ...]:
    return (*(() if site.batch is None else (site.batch,)), site.in_features, site.in_features)


def accumulator(shape: tuple[int, ...], spill: bool) -> Tensor:
    """Zeros, float64; in a temporary file that is mapped into memory where they are to `spill`. InputError where there is no room."""
    if not spill:
        return torch.zeros(shape, dtype=torch.float64)
    size = 8 * prod(shape)
    with tempfile.TemporaryFile(prefix="matmorph-") as file:  # without a name: it lives for as long as the mapping
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk must show now, not as a crash while the mapping is written
                os.posix_fallocate(file.fileno(), 0, size)
            mapped = np.memmap(file, dtype=np.float64, mode="w+", shape=shape)
            found = torch.from_numpy(mapped)
            found.mapping = mapped.base  # type: ignore[attr-defined]  # for `release`
            return found
        except OSError as error:
            raise InputError(f"calibration needs {size:,} bytes of temporary files in {tempfile.gettempdir()}: {error.strerror}") from error


def release(moment: Tensor) -> None:
    """Takes an accumulator that lies in a file out of memory, until it is read again; of any other tensor nothing."""
    mapping = getattr(moment, "mapping", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)  # what was written stays in the file


def one_at_a_time(stats: Mapping[Site, SiteStats]) -> Mapping[Site, SiteStats]:
    """The same; of what lies in files only the site that was asked for last is held in memory."""
    moments = [moment for one in stats.values() for moment in (one.second_moment, one.held_out)]
    return _OneAtATime(stats) if any(hasattr(moment, "mapping") for moment in moments) else stats


class _OneAtATime(Mapping[Site, SiteStats]):
    def __init__(self, stats: Mapping[Site, SiteStats]) -> None:
        self._stats = stats
        self._last: SiteStats | None = None

    def __getitem__(self, site: Site) -> SiteStats:
        found = self._stats[site]
        before, self._last = self._last, found
        for moment in () if before is None or before is found else (before.second_moment, before.held_out):
            if moment is not None:
                release(moment)
        return found

    def __iter__(self) -> Iterator[Site]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)


def _stats(site: Site, found: _Sum) -> SiteStats:
    held = found.held if found.held is not None and bool(found.held.rows.any()) else None
    for one in (found, held):
        if one is not None and not bool(torch.isfinite(one.moment.diagonal(dim1=-2, dim2=-1)).all()):
            raise InputError(f"the calibration data makes NaN or infinity at the input of {site.path}")
        if one is not None:
            release(one.moment)
    stats = SiteStats(found.moment, _count(found))
    return stats if held is None else replace(stats, held_out=held.moment, held_rows=_count(held))


def _count(found: _Sum) -> int | Tensor:
    return int(found.rows) if found.rows.dim() == 0 else found.rows


# What is read


def _sources(graph: Graph, site: Site) -> tuple[_Source, ...]:
    return tuple(_source(graph, site, application) for application in site.applications)


def _source(graph: Graph, site: Site, application: Application) -> _Source:
    view = row_view(site, application)
    return _Source(application.x, view.enter, application.select, site.batch, _mask(graph, site, application))


def _mask(graph: Graph, site: Site, application: Application) -> Value | None:
    """The attention mask, where its axes are those in front of the features of x, apart or flattened into one."""
    mask = token_mask(graph)
    if mask is None or site.form == "conv1x1" or site.batch is not None:
        return None
    leading = application.x.tensor.shape[:-1]
    return mask.value if leading in (mask.axes, (as_dim(prod(mask.axes)),)) else None


# Streaming


def _stream(
    graph: Graph, sums: Mapping[tuple[_Source, ...], _Sum], batches: Iterable[Any], samples: int, progress: StepProgress | None
) -> None:
    total = _total(batches, samples)
    reading = _cut(graph, batches, samples)
    first = list(islice(reading, HELD_OUT_EVERY)) if any(found.held is not None for found in sums.values()) else []
    enough, done = len(first) == HELD_OUT_EVERY, 0
    for number, (inputs, count) in enumerate(chain(first, reading)):
        last = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        with of_batch(number):
            _observe(graph, sums, inputs, "some" if not enough else "all" if last else "none")
        done += count
        if progress is not None:
            progress(done, total)
    if done == 0:
        raise InputError("the calibration data yields nothing: it has no batch with a sample in it")


@contextmanager
def of_batch(number: int) -> Iterator[None]:
    """What torch raises while the model runs on batch `number`, from 0, as an InputError: a token outside of the vocabulary, a class that
    there is not."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"calibration batch {number + 1}: the model fails on it: {reason}") from error


def _cut(graph: Graph, batches: Iterable[Any], samples: int) -> Iterator[tuple[list[Tensor], int]]:
    """The batches that have samples, and how many, until there are `samples`."""
    done = 0
    for number, batch in enumerate(batches):
        inputs, count = cut_batch(graph, bound_batch(graph, batch, number), samples - done)
        done += count
        if count:
            yield inputs, count
        if done >= samples:
            return


def _total(batches: Iterable[Any], samples: int) -> int | None:
    """How many samples there will be, where the batches are a list."""
    if not isinstance(batches, list | tuple):
        return None
    shapes = [tuple(getattr(next(iter(tree_leaves(batch)), None), "shape", ())) for batch in batches]
    return min(samples, sum(int(shape[0]) if shape else 1 for shape in shapes))


def bound_batch(graph: Graph, batch: Any, number: int) -> list[Tensor]:
    """The tensors of a batch in `graph.inputs` order, on the graph's device. Positional inputs may also come by their names.
    For a model with a cache a batch is whole texts."""
    found, named = _as_traced(graph, with_empty_cache(graph, batch))
    args = tuple(_tensor(leaf, graph.device) for leaf in found)
    kwargs = {str(key): _tensor(leaf, graph.device) for key, leaf in named.items()}
    try:
        return bind(graph, args, kwargs)
    except InputError as error:
        wanted = ", ".join(entry.name for entry in graph.signature.inputs)
        given = ", ".join([*([f"{len(args)} without names"] if args or not kwargs else []), *kwargs])
        details = [*error.details, f"the model's inputs: {wanted}", f"the batch has: {given}"]
        raise InputError(f"calibration batch {number + 1}: {error.message}", details) from error


def _as_traced(graph: Graph, batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """(args, kwargs) of a batch. A mapping that names all positional inputs stands for them; a model that takes both kinds of inputs also
    takes a pair of args and kwargs."""
    args, kwargs = graph.signature.in_spec.children()
    if not isinstance(batch, Mapping):
        leaves = batch if isinstance(batch, tuple | list) else (batch,)
        both = args.num_leaves and kwargs.num_leaves and _is_pair(leaves)
        return (leaves[0], leaves[1]) if both else (leaves, {})
    names = [entry.name for entry in graph.signature.inputs][: args.num_leaves]
    if not all(name in batch for name in names):
        return (), batch
    return [batch[name] for name in names], {name: leaf for name, leaf in batch.items() if name not in names}


def _is_pair(batch: Sequence[Any]) -> bool:
    return len(batch) == 2 and isinstance(batch[0], tuple | list) and isinstance(batch[1], Mapping)


def _tensor(leaf: Any, device: str) -> Any:
    tensor = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
    return tensor.to(device) if isinstance(tensor, Tensor) else tensor


def cut_batch(graph: Graph, inputs: list[Tensor], left: int) -> tuple[list[Tensor], int]:
    """At most `left` samples, and how many they are. An axis that is fixed or must be longer is not cut."""
    if not inputs or not inputs[0].dim():
        return inputs, 1
    axis = graph.inputs[0].tensor.shape[0]
    count = len(inputs[0])
    least = graph.ranges[str(axis)].low if str(axis) in graph.ranges else 1
    if isinstance(axis, int) or count <= left or left < least:
        return inputs, count
    along = [bool(value.tensor.shape) and value.tensor.shape[0] == axis for value in graph.inputs]
    return [tensor[:left] if cut else tensor for tensor, cut in zip(inputs, along, strict=True)], left


def _observe(graph: Graph, sums: Mapping[tuple[_Source, ...], _Sum], inputs: Sequence[Tensor], held: _Held) -> None:
    """One forward pass; a source is added as soon as its rows and what picks their experts are both there."""
    given = dict(zip(graph.inputs, inputs, strict=True))
    targets: dict[_Source, list[_Sum]] = {}
    for key, found in sums.items():
        for source in key:
            targets.setdefault(source, []).append(found)
    readers: dict[Value, list[_Source]] = {}
    for source in targets:
        for value in {source.x, source.select} - {None}:
            readers.setdefault(value, []).append(source)  # type: ignore[arg-type]
    seen: dict[Value, Tensor] = {}

    def arrive(value: Value, tensor: Tensor) -> None:
        if any(source.select is not None for source in readers[value]):
            seen[value] = tensor
        for source in readers[value]:
            picked = None if source.select is None else (tensor if value is source.select else seen.get(source.select))
            rows = tensor if value is source.x else seen.get(source.x)
            if rows is not None and (source.select is None or picked is not None):
                _add(targets[source], source, rows, picked, None if source.mask is None else given[source.mask], held)

    with torch.no_grad():
        for value in readers:
            if isinstance(value, Const):
                arrive(value, value.load())
        evaluate(graph, inputs, {value: partial(arrive, value) for value in readers})


def _add(targets: Sequence[_Sum], source: _Source, x: Tensor, picked: Tensor | None, mask: Tensor | None, held: _Held) -> None:
    rows = apply(source.enter, x.detach())
    rows = rows if rows.dtype == torch.float64 else rows.float()
    rows = rows if power_of_two(rows) == 1 else rows.double()  # squares of float32 would leave its range
    part = held if any(target.held is not None for target in targets) else "none"
    for out, pick in _PARTS[part]:
        if source.experts is None:
            moment, count = _plain(rows, None if mask is None else of_rows(mask, prod(rows.shape[:-1])), pick)
        elif picked is None:
            moment, count = _all_experts(rows, pick)
        else:
            moment, count = _picked_experts(rows, picked, source.experts, pick)
        for target in targets:
            (target.held if out and target.held is not None else target).add(moment, count)


def _every(rows: Tensor) -> Tensor:
    return rows


def _fifth(rows: Tensor) -> Tensor:
    return rows[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]


def _others(rows: Tensor) -> Tensor:
    return rows[torch.arange(len(rows), device=rows.device) % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]


_PARTS: Mapping[_Held, Sequence[tuple[bool, _Rows]]] = {
    "none": [(False, _every)],
    "all": [(True, _every)],
    "some": [(False, _others), (True, _fifth)],
}
"""(whether it is held out, which rows) of the parts that a batch goes into."""


def _plain(rows: Tensor, mask: Tensor | None, pick: _Rows) -> tuple[Tensor, Tensor]:
    """Picked along the first axis, the samples, where it is long enough; else row by row."""
    total = prod(rows.shape[:-1])
    samples = len(rows) if rows.dim() > 1 and len(rows) >= HELD_OUT_EVERY else total
    sides = samples, total // max(samples, 1)
    flat = pick(rows.reshape(*sides, rows.shape[-1]))
    flat = flat.flatten(0, 1) if mask is None else flat[pick(mask.reshape(sides)) != 0]
    return flat.T @ flat, torch.tensor(len(flat))


def _all_experts(rows: Tensor, pick: _Rows) -> tuple[Tensor, Tensor]:
    """Every expert has rows of its own [.., E, rows, in], or all read the same (no such axis, or one of size 1)."""
    stacked = rows.unsqueeze(0) if rows.dim() == 2 else rows.movedim(-3, 0)
    flat = pick(stacked.reshape(len(stacked), -1, rows.shape[-1]).transpose(0, 1)).transpose(0, 1)
    return flat.transpose(1, 2) @ flat, torch.tensor(flat.shape[1])


def _picked_experts(rows: Tensor, picked: Tensor, experts: int, pick: _Rows) -> tuple[Tensor, Tensor]:
    """Row group k [n, in] goes to expert `picked[k]`."""
    groups = rows.reshape(len(picked), -1, rows.shape[-1])
    moment = rows.new_zeros(experts, rows.shape[-1], rows.shape[-1])
    count = torch.zeros(experts, dtype=torch.int64)
    for expert in sorted(set(picked.tolist())):
        flat = pick(groups[picked == expert].reshape(-1, rows.shape[-1]))
        moment[expert] = flat.T @ flat
        count[expert] = len(flat)
    return moment, count
