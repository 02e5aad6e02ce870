"""The ways to contract rows with a tensor train, as data: y [rows, out] = x [rows, in] @ W^T without forming W, or with W rebuilt at load.

A plan is a list of steps, reshape, matmul and permute alone. One interpreter (`contract`) runs it on anything that has these three: torch
tensors, the values of a graph, or mere shapes. Steps that read cores only are constants of the graph: ONNX Runtime computes them when it
loads the file, which therefore stays as small as the cores.

TT-matrix (Novikov et al. 2015, arXiv 1509.06569): cores G_k [r_{k-1}, out_k, in_k, r_k] and
W[(o_1 .. o_d), (i_1 .. i_d)] = G_1[:, o_1, i_1, :] ... G_d[:, o_d, i_d, :].
TT-vector (TT-LoRA, arXiv 2408.01008, 2504.21190): cores G_k [r_{k-1}, mode_k, r_k]; the first `p` modes are those of the input,
W[(n_{p+1} .. n_d), (m_p .. m_1)] = G_1[:, m_1, :] ... G_d[:, n_d, :]: outputs in order, inputs in reverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod
from typing import Any, Literal, Protocol, TypeVar

from matmorph.errors import InputError

V = TypeVar("V")
CoreGroup = tuple[int, int]
"""Cores a .. b - 1, merged into one."""

MANY_CORES = 16
MAX_GROUPS = 4
ALL_GROUPINGS = 8
"""Of more cores than this only the groupings into at most `MAX_GROUPS` are tried, beside the unmerged chain: every group costs a product,
and a train of so many cores has small modes."""


@dataclass(frozen=True, slots=True)
class TrainShape:
    """What a plan depends on. `outputs[k]`, `inputs[k]`: the sizes that core k carries, 1 where it carries none (TT-vector); `ranks`: those
    of all d + 1 edges, 1 at both ends."""

    form: Literal["matrix", "vector"]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        cores = len(self.outputs)
        faults = (
            (
                cores == 0 or len(self.inputs) != cores or len(self.ranks) != cores + 1,
                "a train has as many modes as cores and one rank more",
            ),
            (self.ranks[:1] != (1,) or self.ranks[-1:] != (1,), "the ranks at both ends of a train are 1"),
            (min((*self.outputs, *self.inputs, *self.ranks), default=1) < 1, "modes and ranks of a train are 1 or more"),
        )
        for fails, text in faults:
            if fails:
                raise InputError(f"{text}; this one has outputs {self.outputs}, inputs {self.inputs}, ranks {self.ranks}")

    @property
    def in_features(self) -> int:
        return prod(self.inputs)

    @property
    def out_features(self) -> int:
        return prod(self.outputs)

    @property
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The canonical layout: [r, out, in, r'] of a TT-matrix, [r, mode, r'] of a TT-vector."""
        sizes = zip(self.ranks, self.outputs, self.inputs, self.ranks[1:], strict=False)
        return tuple((r, o, i, s) if self.form == "matrix" else (r, o * i, s) for r, o, i, s in sizes)


def matrix_train(outputs: Sequence[int], inputs: Sequence[int], ranks: Sequence[int]) -> TrainShape:
    """Of cores [r_{k-1}, outputs[k], inputs[k], r_k]. InputError where the numbers do not fit together."""
    return TrainShape("matrix", tuple(outputs), tuple(inputs), tuple(ranks))


def vector_train(shape: Sequence[int], boundary: int, ranks: Sequence[int]) -> TrainShape:
    """Of cores [r_{k-1}, shape[k], r_k]; the first `boundary` carry the input. InputError where the numbers do not fit together."""
    if not 0 < boundary < len(shape):
        raise InputError(f"the boundary of a TT-vector lies between its modes; {boundary} of {len(shape)} leaves one side empty")
    ones = (1,) * len(shape)
    return TrainShape("vector", (*ones[:boundary], *shape[boundary:]), (*shape[:boundary], *ones[boundary:]), tuple(ranks))


@dataclass(frozen=True, slots=True)
class ContractionStep:
    """One operation on earlier values. `operands`: 0 is x, 1 .. d are the cores, d + 1 .. the results of the steps. `sizes`: of a reshape
    (-1: whatever is left), or the axes of a permute."""

    op: Literal["reshape", "permute", "matmul"]
    operands: tuple[int, ...]
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ContractionPlan:
    """One way to contract. `name` is unique among the plans of one train; `groups` are merged at load, before any row is seen.

    `order` of a TT-matrix: which end goes first, and whether the rows stay in front or go behind (`columns`: two transpositions, of x and
    of y, for products that are wide). `unfolds`: y is a product and has the leading sizes of x already; else the last step is a reshape to
    [rows, out].
    """

    name: str
    groups: tuple[CoreGroup, ...]
    order: str
    steps: tuple[ContractionStep, ...]

    @property
    def is_dense(self) -> bool:
        return len(self.groups) == 1


class ArrayOps(Protocol[V]):
    """What a plan runs on. Semantics of torch: `matmul` broadcasts, `reshape` is row-major and takes one -1."""

    def reshape(self, value: V, sizes: Sequence[Any], /) -> V: ...

    def permute(self, value: V, axes: Sequence[int], /) -> V: ...

    def matmul(self, left: V, right: V, /) -> V: ...


def contract(plan: ContractionPlan, x: V, cores: Sequence[V], ops: ArrayOps[V], leading: Sequence[Any] = (-1,)) -> V:
    """y [.., out] of x [.., in]. `cores` in canonical layout. `leading`: the sizes that y has before `out` where x is not [rows, in], at
    most one of them -1, in whatever form `ops.reshape` takes a size."""
    values = [x, *cores]
    for number, step in enumerate(plan.steps):
        values.append(_run(step, values, ops, leading if number == len(plan.steps) - 1 else None))
    return values[-1]


def _run(step: ContractionStep, values: Sequence[V], ops: ArrayOps[V], leading: Sequence[Any] | None) -> V:
    operand = values[step.operands[0]]
    if step.op == "matmul":
        return ops.matmul(operand, values[step.operands[1]])
    if step.op == "permute":
        return ops.permute(operand, step.sizes)
    return ops.reshape(operand, step.sizes if leading is None else (*leading, step.sizes[-1]))


def candidate_plans(train: TrainShape) -> tuple[ContractionPlan, ...]:
    """All plans that are worth a look, the unmerged chain first, dense last.

    A grouping is left out where a merged core would hold as many numbers as the dense matrix: dense does less with the same memory.
    """
    makers = _MATRIX if train.form == "matrix" else _VECTOR
    plans = [maker(train, groups) for groups in _groupings(train) for maker in makers]
    return (*plans, _dense(train))


def _groupings(train: TrainShape) -> Iterator[tuple[CoreGroup, ...]]:
    """From the finest to the coarsest; not the single group, which is dense."""
    cores = len(train.outputs)
    dense = train.in_features * train.out_features
    most = MAX_GROUPS if cores <= MANY_CORES else 2  # groups of long trains: their number grows with a power of the cores
    for count in range(cores, 1, -1):
        if most < count < cores and cores > ALL_GROUPINGS:
            continue
        for cuts in combinations(range(1, cores), count - 1):
            groups = tuple(zip((0, *cuts), (*cuts, cores), strict=True))
            if count == cores or all(_elements(train, group) < dense for group in groups):
                yield groups


def _elements(train: TrainShape, group: CoreGroup) -> int:
    low, high = group
    return train.ranks[low] * prod(train.outputs[low:high]) * prod(train.inputs[low:high]) * train.ranks[high]


def _name(train: TrainShape, groups: Sequence[CoreGroup]) -> str:
    """chain, two_factor, or merged_1-2_3: cores 1 and 2 are merged, core 3 stands alone."""
    if len(groups) == len(train.outputs):
        return "chain"
    if train.form == "vector" and len(groups) == 2:
        middle = groups[1][0]
        if prod(train.inputs[:middle]) == train.in_features and prod(train.outputs[middle:]) == train.out_features:
            return "two_factor"
    return "_".join(("merged", *("-".join(str(core + 1) for core in range(low, high)) for low, high in groups)))


class _Writer:
    """Steps as they are written, each under the index that later ones refer to it by."""

    def __init__(self, train: TrainShape) -> None:
        self.train = train
        self.steps: list[ContractionStep] = []
        self.x = 0

    def reshape(self, value: int, *sizes: int) -> int:
        return self._add(ContractionStep("reshape", (value,), sizes))

    def permute(self, value: int, *axes: int) -> int:
        return value if axes == tuple(range(len(axes))) else self._add(ContractionStep("permute", (value,), axes))

    def matmul(self, left: int, right: int) -> int:
        return self._add(ContractionStep("matmul", (left, right)))

    def _add(self, step: ContractionStep) -> int:
        self.steps.append(step)
        return len(self.train.outputs) + len(self.steps)

    def merged(self, group: CoreGroup) -> _Merged:
        """The cores of a group as one, with its axes as they come: r, then out and in of every core in turn, r'."""
        low, high = group
        ranks, sizes = self.train.ranks, [o * i for o, i in zip(self.train.outputs, self.train.inputs, strict=True)]
        value = low + 1
        for core in range(low + 1, high):
            left = self.reshape(value, ranks[low] * prod(sizes[low:core]), ranks[core])
            value = self.matmul(left, self.reshape(core + 1, ranks[core], sizes[core] * ranks[core + 1]))
        return _Merged(self, value, group)


@dataclass(frozen=True, slots=True)
class _Merged:
    """A merged core before it gets its last layout."""

    writer: _Writer
    value: int
    group: CoreGroup

    def matrix(self, rows: str, columns: str) -> int:
        """As a matrix; each side names axes in the order wanted: `r` and `s` for the ranks before and behind, `o` for all outputs in order,
        `i` for all inputs in order, `j` for all inputs in reverse."""
        train, (low, high) = self.writer.train, self.group
        cores = high - low
        axes = {
            "r": [0],
            "o": [1 + 2 * core for core in range(cores)],
            "i": [2 + 2 * core for core in range(cores)],
            "j": [2 + 2 * core for core in reversed(range(cores))],
            "s": [1 + 2 * cores],
        }
        sizes = [
            train.ranks[low],
            *(size for core in range(low, high) for size in (train.outputs[core], train.inputs[core])),
            train.ranks[high],
        ]
        order = [axis for letter in rows + columns for axis in axes[letter]]
        kept = [axis for axis in range(len(sizes)) if sizes[axis] > 1]
        moved = [axis for axis in order if sizes[axis] > 1]
        value = self.value
        if moved != kept:
            whole = self.writer.reshape(value, *(sizes[axis] for axis in kept))
            value = self.writer.permute(whole, *(kept.index(axis) for axis in moved))
        height = prod(sizes[axis] for letter in rows for axis in axes[letter])
        return self.writer.reshape(value, height, prod(sizes) // height)


def _dense(train: TrainShape) -> ContractionPlan:
    """W^T [in, out], rebuilt when the file is loaded; then one product."""
    writer = _Writer(train)
    whole = (0, len(train.outputs))
    writer.matmul(writer.x, writer.merged(whole).matrix("ri" if train.form == "matrix" else "jr", "os"))
    return ContractionPlan("dense", (whole,), "rows", tuple(writer.steps))


def _from_left(train: TrainShape, groups: tuple[CoreGroup, ...]) -> ContractionPlan:
    """x [rows, I_1, rest]: every group but the last stands left of the activations, so that what it leaves lies where the next one reads
    it; the last one stands right of them, in one large product. No transposition."""
    writer = _Writer(train)
    value = writer.x
    for group in groups[:-1]:
        value = writer.reshape(value, -1, _left_width(train, group), prod(train.inputs[group[1] :]))
        value = writer.matmul(writer.merged(group).matrix("os", "ri"), value)
    last = groups[-1]
    value = writer.reshape(value, -1, _left_width(train, last))
    value = writer.matmul(value, writer.merged(last).matrix("ri", "os"))
    writer.reshape(value, -1, train.out_features)
    return ContractionPlan(_name(train, groups), groups, "left", tuple(writer.steps))


def _from_right(train: TrainShape, groups: tuple[CoreGroup, ...]) -> ContractionPlan:
    """The mirror image: the last group first, right of the activations; the others left of them."""
    writer = _Writer(train)
    last = groups[-1]
    value = writer.reshape(writer.x, -1, prod(train.inputs[last[0] :]))
    value = writer.matmul(value, writer.merged(last).matrix("i", "ros"))
    for group in reversed(groups[:-1]):
        value = writer.reshape(value, -1, _right_width(train, group), prod(train.outputs[group[1] :]))
        value = writer.matmul(writer.merged(group).matrix("ro", "is"), value)
    writer.reshape(value, -1, train.out_features)
    return ContractionPlan(f"{_name(train, groups)}_right", groups, "right", tuple(writer.steps))


def _columns_from_left(train: TrainShape, groups: tuple[CoreGroup, ...]) -> ContractionPlan:
    """x^T [in, rows]: all groups left of the activations, whose products are as wide as there are rows; two transpositions."""
    writer = _Writer(train)
    value = _columns(writer)
    for group in groups:
        value = _wide(writer, value, prod(train.outputs[: group[0]]), _left_width(train, group))
        value = writer.matmul(writer.merged(group).matrix("os", "ri"), value)
    return _back(writer, value, ContractionPlan(f"{_name(train, groups)}_columns", groups, "left columns", ()))


def _columns_from_right(train: TrainShape, groups: tuple[CoreGroup, ...]) -> ContractionPlan:
    writer = _Writer(train)
    value = _columns(writer)
    for group in reversed(groups):
        value = _wide(writer, value, prod(train.inputs[: group[0]]), _right_width(train, group))
        value = writer.matmul(writer.merged(group).matrix("ro", "is"), value)
    return _back(writer, value, ContractionPlan(f"{_name(train, groups)}_right_columns", groups, "right columns", ()))


def _left_width(train: TrainShape, group: CoreGroup) -> int:
    """What a group reads when those before it are done: its first rank and its inputs."""
    return train.ranks[group[0]] * prod(train.inputs[group[0] : group[1]])


def _right_width(train: TrainShape, group: CoreGroup) -> int:
    """What a group reads when those behind it are done: its inputs and its last rank."""
    return prod(train.inputs[group[0] : group[1]]) * train.ranks[group[1]]


def _columns(writer: _Writer) -> int:
    return writer.permute(writer.reshape(writer.x, -1, writer.train.in_features), 1, 0)


def _wide(writer: _Writer, value: int, batch: int, width: int) -> int:
    return writer.reshape(value, width, -1) if batch == 1 else writer.reshape(value, batch, width, -1)


def _back(writer: _Writer, value: int, plan: ContractionPlan) -> ContractionPlan:
    value = writer.permute(writer.reshape(value, writer.train.out_features, -1), 1, 0)
    writer.reshape(value, -1, writer.train.out_features)
    return replace(plan, steps=tuple(writer.steps))


def _along(train: TrainShape, groups: tuple[CoreGroup, ...]) -> ContractionPlan:
    """A TT-vector: every group stands right of the activations [rows .. m_2 m_1], eats the last inputs and the rank, and leaves outputs and
    the next rank behind. One group on either side of the boundary is the exact two-factor form."""
    writer = _Writer(train)
    value, last, folded = writer.x, train.in_features, False
    for group in groups:
        width = _left_width(train, group)
        if last != width:
            value, folded = writer.reshape(value, -1, width), True
        value = writer.matmul(value, writer.merged(group).matrix("jr", "os"))
        last = prod(train.outputs[slice(*group)]) * train.ranks[group[1]]
    if folded or last != train.out_features:
        writer.reshape(value, -1, train.out_features)
    return ContractionPlan(_name(train, groups), groups, "rows", tuple(writer.steps))


_MATRIX = (_from_left, _from_right, _columns_from_left, _columns_from_right)
_VECTOR = (_along,)
