"""A walk through the nodes between the two halves of a block: which axes carry its units, and every literal that follows from their number.

What an operator does to the axes is in `axis_rules`. Where a rule cannot say, or where the operator mixes units (so that none could be
removed alone), it raises `Stuck` with the units concerned and the node's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from matmorph.ir.cache import Slot
from matmorph.ir.core import Arg, Node, Value
from matmorph.ir.op_table import having, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.types import Dim, TensorType
from matmorph.passes.pruning.axes import (
    HEADS,
    PART,
    QK,
    WIDTH,
    Atom,
    Axes,
    Axis,
    AxisProduct,
    Concat,
    V,
    plain,
    regrouped,
    resized,
    size_of,
    units_of,
)

Place: TypeAlias = tuple[int | str, ...]
"""Where in a node's arguments: (1,) the second, (1, 2) the third item of the second, ("scale",) a keyword."""


@dataclass(frozen=True, slots=True)
class Literal:
    """A number in a node's arguments that carries the width: the sum of the sizes of `terms`. `fill`: it is no number of its own but part
    of a computed one, and -1 says the same. `what`: its meaning, for people."""

    node: Node
    place: Place
    terms: tuple[Axis, ...]
    what: str
    fill: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """What a node reads at `place`, along one of its axes: number `dim`, which is `axis`."""

    place: Place
    value: Value
    dim: int
    axis: Axis


@dataclass(frozen=True, slots=True)
class OutsideValue:
    """A value from outside that meets a carrying axis position by position (a bias, RoPE's cosines): its `dim` keeps the same positions."""

    node: Node
    place: Place
    value: Value
    dim: int
    axis: Axis


@dataclass(frozen=True, slots=True)
class PastValue:
    """What a cache brings of the keys or values of calls before: its axes are those of what this call adds to it."""

    value: Value
    axes: Axes


@dataclass(frozen=True, slots=True)
class SoftmaxScale:
    """A softmax scale that the operator takes from the head dimension: it must be written out as it is before that shrinks."""

    node: Node
    value: float


class Stuck(Exception):  # noqa: N818  (not an error: an answer)
    """These units cannot be removed, and why."""

    def __init__(self, units: frozenset[str], reason: str) -> None:
        super().__init__(reason)
        self.units = units
        self.reason = reason


_PROBES: tuple[Mapping[str, int], ...] = ({HEADS: 1}, {WIDTH: 1})


class AxisWalk:
    """`starts`: axes of the producers' results; `slots`: of a cache, by the node that puts a past in front of what the block makes. After
    `run`: `literals`, `sides`, `scales`, `pasts`, and `axes(value)` of every value between.

    A value may have alternatives, one per part of a fused projection that a reshape has put on an axis of its own; the part that is picked
    from that axis has one again.
    """

    def __init__(self, starts: Mapping[Value, Axes], rules: Mapping[str, AxisRule], slots: Mapping[Node, Slot]) -> None:
        self._known: dict[Value, tuple[Axes, ...]] = {value: (axes,) for value, axes in starts.items()}
        self._rules = rules
        self._slots = slots
        self._alternative = 0
        self.literals: dict[tuple[Node, Place], Literal] = {}
        self.sides: dict[tuple[Node, Place], OutsideValue] = {}
        self.scales: dict[Node, SoftmaxScale] = {}
        self.pasts: dict[Value, PastValue] = {}

    def run(self, region: Sequence[Node]) -> None:
        for node in region:
            self._visit(node)

    # what rules ask

    def carries(self, value: Any) -> bool:
        """Whether the value comes from the producers."""
        return isinstance(value, Value) and value in self._known

    def axes(self, value: Value) -> Axes:
        """Its axes; plain ones of a value from outside."""
        found = self._known.get(value)
        if found is None:
            return plain(value.tensor.shape)
        return found[self._alternative if len(found) > 1 else 0]

    def literal(self, node: Node, place: Place, *terms: Axis, fill: bool = False) -> None:
        """Notes the number at `place`; nothing where no unit is in it."""
        if not any(units_of(term) for term in terms):
            return
        new = Literal(node, place, terms, f"argument {'.'.join(map(str, place))} of {base_name(node.op)}", fill)
        old = self.literals.setdefault((node, place), new)
        if not _agree(old, new):
            raise stuck(node, "is one number for parts of different width", *terms, *old.terms)

    def side(self, node: Node, place: Place, value: Value, dim: int, axis: Axis) -> None:
        """Notes that `dim` of a value from outside runs along a carrying axis."""
        old = self.sides.setdefault((node, place), OutsideValue(node, place, value, dim, axis))
        if old.axis != axis or old.dim != dim:
            raise stuck(node, "meets a value from outside along several axes of the block", axis, old.axis)

    def scale(self, node: Node, value: float) -> None:
        """Notes a softmax scale that is left to the operator."""
        self.scales[node] = SoftmaxScale(node, value)

    # the walk

    def _visit(self, node: Node) -> None:
        base = base_name(node.op)
        read = [value for value in node.inputs() if value in self._known]
        if base == "sym_size":
            axis = self.axes(node.args[0])[node.args[1]]
            if units_of(axis):
                raise stuck(node, "computes with the width", axis)
            return
        if not read:
            return
        slot = self._slots.get(node)
        if slot is not None and slot.new in self._known:
            self._append(node, slot)
            return
        if base in _SPECIAL:
            _SPECIAL[base](self, node)
            return
        rule = self._rules.get(base)
        results = []
        for self._alternative in range(max(len(self._known[value]) for value in read)):
            results.append(rule(self, node) if rule is not None else self._unknown(node, read))
        self._alternative = 0
        for k, value in enumerate(node.outputs):
            if isinstance(value.type, TensorType):
                self._known[value] = tuple(result[k] for result in results)

    def _append(self, node: Node, slot: Slot) -> None:
        """A past in front of what the block makes: all but the tokens runs alike in both."""
        found = self._known[slot.new]
        axes = found[0]
        if units_of(axes[slot.axis]) or any(other != axes for other in found):
            raise stuck(node, "puts a cache in front of what is no whole of keys or of values", *(axis for own in found for axis in own))
        self.pasts[slot.past] = PastValue(slot.past, axes)
        tokens = plain([slot.total])[0]
        self._known[slot.present] = ((*axes[: slot.axis], tokens, *axes[slot.axis + 1 :]),)

    def _unknown(self, node: Node, read: Sequence[Value]) -> list[Axes]:
        axes = [axis for value in read for axis in self.axes(value)]
        if any(units_of(axis) for axis in axes):
            raise stuck(node, "is not understood here", *axes)
        return [plain(value.tensor.shape) for value in node.outputs]

    def reshape(self, node: Node) -> None:
        """A change of shape, and the sizes in its arguments."""
        source, shape = self._known.get(node.args[0]), node.output.tensor.shape
        if source is None:
            raise stuck(node, "takes its shape from the block")
        found = [regrouped(axes, shape) for axes in source]
        if None in found and len(source) == 1:
            source = _parted(source[0])
            found = [regrouped(axes, shape) for axes in source]
        done = [axes for axes in found if axes is not None]
        if not done or len(done) < len(found):
            carrying = [axis for axes in source for axis in axes if units_of(axis)]
            if carrying:
                raise stuck(node, "cuts an axis of the block", *carrying)
            done = [plain(shape)]
        self._known[node.output] = tuple(done)
        for axes in done:
            self._sizes(node, axes)

    def _sizes(self, node: Node, axes: Axes) -> None:
        """The literals of reshape's and unflatten's arguments."""
        base = base_name(node.op)
        if base not in ("reshape", "view", "_unsafe_view", "unflatten"):
            return
        argument = 2 if base == "unflatten" else 1
        sizes = node.args[argument]
        first = node.args[1] % len(node.args[0].tensor.shape) if base == "unflatten" else 0
        own = axes[first : first + len(sizes)]
        computed = [k for k, (size, axis) in enumerate(zip(sizes, own, strict=True)) if isinstance(size, Value) and units_of(axis)]
        for k, (size, axis) in enumerate(zip(sizes, own, strict=True)):
            if isinstance(size, Value) and units_of(axis):
                self.literal(node, (argument, k), axis, fill=True)
            elif isinstance(size, int) and size == -1 and computed:
                if not isinstance(size_of(axis), int) or len(computed) > 1:
                    raise stuck(node, "computes several sizes from the width", axis, *(own[j] for j in computed))
                self.literals[(node, (argument, k))] = Literal(node, (argument, k), (axis,), "the other open size")
            elif isinstance(size, int) and size != -1:
                self.literal(node, (argument, k), axis)
        if len(computed) > 1:
            raise stuck(node, "computes several sizes from the width", *(own[j] for j in computed))

    def pick(self, node: Node) -> None:
        """select and unbind: a part of a fused projection, or a position on an axis that carries nothing."""
        value = node.args[0]
        source = self._known[value]
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(value.tensor.shape)
        axis = source[0][dim]
        indices = [node.args[2]] if base_name(node.op) == "select" else range(len(node.outputs))
        if units_of(axis):
            raise stuck(node, "picks from an axis of the block", axis)
        parted = isinstance(axis, tuple) and len(axis) == 1 and axis[0].unit == PART
        for output, index in zip(node.outputs, indices, strict=True):
            chosen = (source[index],) if parted else source
            self._known[output] = tuple((*axes[:dim], *axes[dim + 1 :]) for axes in chosen)


AxisRule: TypeAlias = Callable[[AxisWalk, Node], "list[Axes]"]
"""Axes of each result of a node; notes its literals in passing."""

# Not `like`: the other tensor would keep the old sizes.
_RESHAPES = having(of_kind("reshape"), like=False)
_SPECIAL: Mapping[str, Callable[[AxisWalk, Node], None]] = {
    **dict.fromkeys(_RESHAPES, AxisWalk.reshape),
    **dict.fromkeys(("select", "unbind"), AxisWalk.pick),
}


def stuck(node: Node, why: str, *axes: Axis) -> Stuck:
    """The answer of a node that cannot be explained."""
    units = frozenset(unit for axis in axes for unit in units_of(axis))
    return Stuck(units, f"{base_name(node.op)} (%{node.name}) {why}")


def _agree(one: Literal, other: Literal) -> bool:
    """Whether two meanings of one number give the same whatever is pruned: whole units of each kind, and the same share of every head."""
    if one.terms == other.terms:
        return one.fill == other.fill
    atoms = [atom for literal in (one, other) for term in literal.terms for part in _products(term) for atom in part]
    halves = {str(atom.unit): int(atom.size) // 2 for atom in atoms if atom.unit in (QK, V) and isinstance(atom.size, int)}
    return one.fill == other.fill and all(_sum(one, counts) == _sum(other, counts) for counts in ({}, halves, *_PROBES))


def _products(axis: Axis) -> tuple[AxisProduct, ...]:
    return axis.parts if isinstance(axis, Concat) else (axis,)


def _sum(literal: Literal, counts: Mapping[str, int]) -> Dim:
    return sum(resized(term, counts) for term in literal.terms)


def _parted(axes: Axes) -> tuple[Axes, ...]:
    """One alternative per part of the first concatenation whose parts are equally long: an axis over the parts, then the part's own."""
    for k, axis in enumerate(axes):
        if isinstance(axis, Concat) and len({size_of(part) for part in axis.parts}) == 1:
            over: AxisProduct = (Atom(len(axis.parts), PART),)
            return tuple((*axes[:k], over, part, *axes[k + 1 :]) for part in axis.parts)
    return (axes,)


def replaced(arg: Arg, place: Place, new: Any) -> Arg:
    """A nest of arguments with what stands at `place` exchanged."""
    head, *rest = place
    items = list(arg)
    items[int(head)] = replaced(items[int(head)], tuple(rest), new) if rest else new
    return tuple(items)
