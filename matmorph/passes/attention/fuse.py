"""`fuse_attention`: attention over the cache as one operator, in the form that an export asks for.

| form     | operator            | what must be proved                                                                          |
|----------|---------------------|----------------------------------------------------------------------------------------------|
| plain    | -                   | nothing: the graph stays                                                                     |
| standard | `cached_attention`  | the operator's formula; its boolean mask is kept, whatever it says                           |
| gqa      | `compact_attention` | the formula, with a cap or a sink; that the mask is a causal decoder's, maybe with a window  |

The second turns queries and keys by the places of their tokens too, where that is proved of the graph; else it stays outside. What is not
proved stays as it is, and a line says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from matmorph.ir.attention_ops import CACHED, COMPACT
from matmorph.ir.build import Builder
from matmorph.ir.cache import find_slots
from matmorph.ir.core import Const, Graph, Node, Origin, Value
from matmorph.ir.infer import Inference
from matmorph.ir.rewiring import rewired, rewired_outputs, swept
from matmorph.passes.attention.cone import Parts
from matmorph.passes.attention.core import Core, find_cores
from matmorph.passes.attention.core_proof import Formula, proved_formula
from matmorph.passes.attention.layouts import joined_after, joined_before
from matmorph.passes.attention.mask_proof import proved_window
from matmorph.passes.attention.rotary_proof import Rotation, Tables, proved_rotation
from matmorph.passes.attention.setting import Setting, find_setting

Form = Literal["plain", "standard", "gqa"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one attention: `fused`, and what to know of it, or why not."""

    path: str
    layer: int | None
    fused: bool
    said: str


@dataclass(frozen=True, slots=True, eq=False)
class FusedAttention:
    """`compact`: rows of the cache have no gaps, so that pads may stand behind tokens alone; `shared`: past and present may be one
    buffer, since nothing but the operator looks at the past; `windowed`: some of it sees the last tokens alone."""

    graph: Graph
    outcomes: tuple[Outcome, ...] = ()
    compact: bool = False
    shared: bool = False
    windowed: bool = False


def fuse_attention(graph: Graph, examined: Graph, form: Form, max_length: int | None = None) -> FusedAttention:
    """The graph with what of its attention over the cache can be fused. `examined`: the same graph in float32, on which it is proved what
    it computes (`exporters.vectors.widened`); `max_length`: tokens that the model has positions for, without which no rotation is fused."""
    cores = find_cores(graph) if form != "plain" and graph.device != "meta" else ()
    if not cores:
        return FusedAttention(graph)
    setting = find_setting(graph, cores[0].key)
    if isinstance(setting, str):
        return FusedAttention(graph, tuple(_outcome(core, False, setting) for core in cores))
    study = _Study(graph, Parts(examined), setting, max_length)
    plans = [study.standard(core) if form == "standard" else study.gqa(core) for core in cores]
    outcomes = tuple(
        _outcome(core, False, plan) if isinstance(plan, str) else _outcome(core, True, plan.said)
        for core, plan in zip(cores, plans, strict=True)
    )
    chosen = {core: plan for core, plan in zip(cores, plans, strict=True) if not isinstance(plan, str)}
    made = _replaced(graph, setting, study.parts, chosen)
    compact = form == "gqa" and bool(chosen)
    windowed = any(isinstance(plan, _Compact) and plan.window > 0 for plan in chosen.values())
    return FusedAttention(made, outcomes, compact, compact and _is_shared(made), windowed)


def _outcome(core: Core, fused: bool, said: str) -> Outcome:
    return Outcome(core.node.origin.path, core.node.origin.layer, fused, said)


def outcome_lines(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """A plain line per kind of outcome, with the layers that it is about."""
    groups: dict[tuple[bool, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.fused, outcome.said), []).append(outcome)
    return tuple(
        f"attention of {_where(group)}: {'fused' if fused else 'kept as it is'}, {said}" for (fused, said), group in groups.items()
    )


def _where(group: Sequence[Outcome]) -> str:
    layers = sorted({outcome.layer for outcome in group if outcome.layer is not None})
    if len(layers) != len(group):
        return ", ".join(outcome.path or "the model itself" for outcome in group)
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    said = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {said}"


@dataclass(frozen=True, slots=True, eq=False)
class _Standard:
    core: Core
    mask: Value
    scale: float
    said: str = "as one Attention over past and new keys, its mask kept"


@dataclass(frozen=True, slots=True, eq=False)
class _Compact:
    """`query` and `key`: before the rotation, where there is one."""

    core: Core
    formula: Formula
    window: int
    rotation: Rotation | None
    query: Value
    key: Value
    said: str


@dataclass(frozen=True, slots=True, eq=False)
class _Study:
    """What is proved of one graph."""

    graph: Graph
    parts: Parts
    setting: Setting
    max_length: int | None
    windows: dict[Value, int | str] = field(default_factory=dict)
    tables: dict[Value, torch.Tensor | None] = field(default_factory=dict)

    def standard(self, core: Core) -> _Standard | str:
        """How it becomes ONNX's own operator."""
        formula = self._formula(core)
        if isinstance(formula, str):
            return formula
        if formula.softcap or formula.sink is not None:
            return f"ONNX's Attention has no {'sink' if formula.sink is not None else 'cap before its mask'}"
        if formula.mask is None or formula.mask.tensor.torch_dtype != torch.bool or len(formula.mask.tensor.shape) != 4:
            return "its mask is none of yes and no, with which ONNX's Attention is exact"
        return _Standard(core, formula.mask, formula.scale)

    def gqa(self, core: Core) -> _Compact | str:
        """How it becomes GroupQueryAttention."""
        formula = self._formula(core)
        if isinstance(formula, str):
            return formula
        window = self._window(formula.mask)
        if isinstance(window, str):
            return window
        if core.size % 8 or core.value.past.tensor.shape[3] != core.size:
            return f"GroupQueryAttention wants keys and values of one size, a multiple of 8, and they have {core.size}"
        rotation, why = self._rotations(core)
        facts = [
            f"window {window}" if window else "",
            f"scores capped at {formula.softcap:g}" if formula.softcap else "",
            "a sink per head" if formula.sink is not None else "",
            "rotation inside" if rotation is not None else why,
        ]
        said = ", ".join(["as one GroupQueryAttention", *filter(None, facts)])
        query, key = (core.query, core.key.new) if rotation is None else (rotation[0].source, rotation[1].source)
        return _Compact(core, formula, window, None if rotation is None else rotation[0], query, key, said)

    def _formula(self, core: Core) -> Formula | str:
        if any(not _is_only_read_by(self.graph, slot.present, core, self.parts) for slot in (core.key, core.value)):
            return "keys or values of the cache are read by something else too"
        return proved_formula(self.parts, core, self.setting)

    def _window(self, mask: Value | None) -> int | str:
        if mask is None:
            return "it has no mask"
        if mask not in self.windows:
            self.windows[mask] = proved_window(self.parts, mask, self.setting, self.max_length)
        return self.windows[mask]

    def _rotations(self, core: Core) -> tuple[tuple[Rotation, Rotation] | None, str]:
        """Of query and key by one table, or why they stay outside; "" where there is none at all."""
        if self.max_length is None:
            return None, "a rotation, if there is one, outside, since the model does not say how many positions it has"
        tables = Tables(self.parts, self.setting, self.max_length, self.tables)
        query, key = (proved_rotation(tables, value) for value in (core.query, core.key.new))
        if query is None and key is None:
            return None, ""
        if isinstance(query, Rotation) and isinstance(key, Rotation):
            if not query.turns_as(key):
                return None, "rotation outside: queries and keys are not turned alike"
            if core.size % 16 or query.cos.shape[1] % 8:
                return None, f"rotation outside: the kernel turns heads of a multiple of 16 by 8 angles or more, and a head has {core.size}"
            return (query, key), ""
        reason = next((found for found in (query, key) if isinstance(found, str)), "only one of queries and keys is turned")
        return None, f"rotation outside: {reason}"


def _is_only_read_by(graph: Graph, present: Value, core: Core, parts: Parts) -> bool:
    cone = parts.cone(core.result, {core.query, core.key.present, core.value.present})
    inside = {node.outputs for node in cone.nodes} if cone is not None else set()
    return all(node.outputs in inside for node in graph.nodes if present in node.inputs())


def _replaced(graph: Graph, setting: Setting, parts: Parts, chosen: Mapping[Core, _Standard | _Compact]) -> Graph:
    """The graph with the new operators where the results of the old ones were made, and without what nobody reads any more."""
    writer = _Writer(graph, setting, parts)
    at = {core.node.outputs: plan for core, plan in chosen.items()}
    before = writer.shared() if any(isinstance(plan, _Compact) for plan in chosen.values()) else ()
    made = {node.outputs: writer.write(plan, node.origin) for node in graph.nodes if (plan := at.get(node.outputs)) is not None}
    change = writer.change
    nodes = list(before)
    for node in graph.nodes:
        # What made a value that has another maker now is read by nobody, and goes.
        nodes.append(node if not change.keys().isdisjoint(node.outputs) else rewired(node, change))
        nodes += [rewired(each, change) for each in made.get(node.outputs, ())]
    fused = replace(graph, nodes=tuple(nodes), outputs=rewired_outputs(graph, change), state=(*graph.state, *writer.consts))
    return swept(fused, graph)


class _Writer:
    """Writes the new operators; `change`: what stands for an old value from now on."""

    def __init__(self, graph: Graph, setting: Setting, parts: Parts) -> None:
        self.graph, self.setting, self.parts = graph, setting, parts
        self.users = graph.users()
        self.build = Builder(graph, inference=Inference(graph.ranges, graph.device))
        self.change: dict[Value, Value] = {}
        self.tables: list[tuple[Rotation, tuple[Const, Const]]] = []
        self.last: Value | None = None

    @property
    def consts(self) -> tuple[Const, ...]:
        return tuple(self.build.consts)

    def shared(self) -> tuple[Node, ...]:
        """The place of each row's last token, for all operators."""
        tokens = self.build("aten.sum.dim_IntList", self.setting.mask, (1,), name="tokens")
        self.last = self.build("aten._to_copy.default", self.build("aten.sub.Tensor", tokens, 1), dtype=torch.int32, name="last_token")
        return self._written()

    def write(self, plan: _Standard | _Compact, origin: Origin) -> tuple[Node, ...]:
        self.build.origin = origin
        core = plan.core
        pasts = core.key.past, core.value.past
        if isinstance(plan, _Standard):
            found = self.build.many(CACHED, core.query, core.key.new, core.value.new, *pasts, plan.mask, plan.scale, name="attended")
            self.change[core.result] = found[0]
        else:
            rows = [self._joined(value) for value in (plan.query, plan.key, core.value.new)]
            tables = (None, None) if plan.rotation is None else self._tables(plan.rotation, core.query)
            numbers = plan.formula.scale, plan.window, plan.formula.softcap, plan.rotation is not None and plan.rotation.interleaved
            given = (*rows, *pasts, self.last, self.setting.mask, *tables, self._sink(plan.formula.sink))
            found = self.build.many(COMPACT, *given, *numbers, name="attended")
            self._put_apart(core, found[0])
        self.change[core.key.present], self.change[core.value.present] = found[1:]
        return self._written()

    def _written(self) -> tuple[Node, ...]:
        nodes = tuple(self.build.nodes)
        self.build.nodes.clear()
        return nodes

    def _joined(self, apart: Value) -> Value:
        """[B, N, S, D] as [B, S, N*D]."""
        before = joined_before(self.parts, apart, self.setting)
        if before is not None:
            return before
        return self.build("aten.flatten.using_ints", self.build("aten.transpose.int", apart, 1, 2), 2)

    def _put_apart(self, core: Core, rows: Value) -> None:
        """The result for all that read the old one: side by side where that is what they want."""
        after = joined_after(self.parts, self.users, core.result, self.setting)
        if after is not None:
            self.change[after] = rows
            return
        apart = self.build("aten.unflatten.int", rows, -1, (core.heads[0], core.size))
        self.change[core.result] = self.build("aten.transpose.int", apart, 1, 2)

    def _tables(self, rotation: Rotation, like: Value) -> tuple[Const, Const]:
        """One pair for all that turn alike."""
        known = next((consts for other, consts in self.tables if rotation.turns_as(other)), None)
        if known is not None:
            return known
        number = f"_{len(self.tables)}" if self.tables else ""
        kind = like.tensor.torch_dtype
        made = (
            self.build.const(f"rotary{number}.cos", rotation.cos.to(kind), kind="constant"),
            self.build.const(f"rotary{number}.sin", rotation.sin.to(kind), kind="constant"),
        )
        self.tables.append((rotation, made))
        return made

    def _sink(self, sink: Const | None) -> Value | None:
        return sink if sink is None or len(sink.tensor.shape) == 1 else self.build("aten.reshape.default", sink, (-1,))


def _is_shared(graph: Graph) -> bool:
    """Whether nothing looks at the past but operators that write the new tokens into it."""
    users = graph.users()
    return all(node.op == COMPACT for slot in find_slots(graph) for node in users.get(slot.past, ()))
