"""Roles of sites from dataflow alone: names play no part, so renaming every module changes nothing.

One forward pass records, for each value, which matmuls it comes from without another matmul between, and whether through an activation
or a split. Roles are then read off:

* attention: scaled_dot_product_attention, or a softmax between two products of activations. What feeds its operands is q, k, v (one matmul
  that feeds several is their fusion: qkv, kv, qk), what it feeds is o. It is cross attention where the inputs of q and k are unrelated.
* mlp: what comes through an activation is fc1 (gate beside an up branch, gate_up where one matmul gives both) of the next matmul, which is
  fc2 (down where gated). In a longer chain all but the last are fc1; where the model is nothing else, the last is its head. With expert
  stacks the family is moe, and moe.router is what picks.
* head: a matmul that is tied to an embedding table, and everything after the last block (attention, expert stack, or MLP that is added
  back to its input): poolers, projections, the dense layer before a vocabulary. Where there is no block at all, the last matmul, behind
  which nothing with a weight comes; of a chain too, unless it is gated.
* embedding: tables. Everything else is "other" (for instance a projection between embedding and first block).

One weight has one role over all its applications: the first that any of them gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.op_table import LAYOUT_OPS, OPERATORS, PRODUCTS, having, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.site import Application, Site
from matmorph.ir.types import TensorType

ACTIVATIONS = having(frozenset(OPERATORS), activation=True)
SPLITS = of_kind("part", "glu")
SOFTMAX = of_kind("softmax")
FUSED = of_kind("attention")
CONVOLUTIONS = of_kind("convolution")
TABLES = of_kind("lookup")
PICKS = of_kind("pick")
RESCALES = frozenset("mul div sub pow mean rsqrt".split())
"""With `add` of a number, what a norm is made of where it is not one operator."""
NEAR = LAYOUT_OPS | SPLITS | RESCALES | of_kind("norm", "dropout")
"""What stands between a value and the matmul that it is made for."""
MANY = 8
"""A value that comes from more matmuls than this is the residual stream of a deep part: it says nothing."""


@dataclass(frozen=True, slots=True)
class _Source:
    """What a value comes from: a matmul application (its node), an attention (its core), a product or softmax of activations, or something
    foreign (a table, a convolution, a float input). `bent`: through an activation; `split`: through a part of it."""

    node: Node | None
    kind: str
    bent: bool = False
    split: bool = False


Applications: TypeAlias = Mapping[Node, tuple[Site, Application]]

_FOREIGN = _Source(None, "foreign")
_Flow = frozenset[_Source]
_NONE: _Flow = frozenset()


@dataclass(slots=True)
class _Attention:
    """Applications that feed each operand of one attention."""

    q: set[Node]
    k: set[Node]
    v: set[Node]


@dataclass(slots=True)
class _Flows:
    """Result of the forward pass. `added`: what an application's result is added to, as a block's is to the residual
    stream. `routed`: applications whose result a top-k reads. `order`: position of every node."""

    order: Mapping[Node, int]
    of: dict[Value, _Flow] = field(default_factory=dict)
    attentions: dict[Node, _Attention] = field(default_factory=dict)
    added: dict[Node, Value] = field(default_factory=dict)
    routed: set[Node] = field(default_factory=set)


def infer_roles(graph: Graph, sites: Sequence[Site]) -> dict[Site, str]:
    """A role for every site, from dataflow. Linear in the size of the graph."""
    applications = {a.node: (site, a) for site in sites for a in site.applications}
    producers = graph.producers()
    flows = _flow(graph, applications)
    found: dict[Node, str] = {}
    _attention_roles(flows, applications, producers, found)
    chains = _chains(flows, applications, found)
    _expert_roles(flows, applications, chains, found)
    body = {node for node, role in found.items() if role != "moe.router"}
    for chain in chains:
        if chain.last in flows.added:
            body.update(chain.nodes)
    for node, other in flows.added.items():
        if node not in body and _comes_from({applications[node][1].x}, {other}, producers):
            body.add(node)
    before, after = _reach(graph, body, applications)
    tail = {node for node in applications if node not in body and node in after and node not in before}
    last = set() if body else _last(graph, applications)
    for chain in chains:
        for node, role in chain.roles(applications):
            if node not in tail and not (node in last and role == "mlp.fc2"):
                found.setdefault(node, role)
    for node in tail | last:
        found.setdefault(node, "head")
    return {site: _role(site, found) for site in sites}


def _role(site: Site, found: Mapping[Node, str]) -> str:
    if site.gathers:
        return "head" if site.applications else "embedding"
    return next((found[a.node] for a in site.applications if a.node in found), "other")


# ------------------------------------------------------------------------------------------------------------------ forward pass


def _flow(graph: Graph, applications: Applications) -> _Flows:
    flows = _Flows({node: position for position, node in enumerate(graph.nodes)})
    for value in graph.inputs:
        floating = isinstance(value.type, TensorType) and value.tensor.torch_dtype.is_floating_point
        flows.of[value] = frozenset((_FOREIGN,)) if floating else _NONE
    for node in graph.nodes:
        base = base_name(node.op)
        flow = _through(node, base, flows, applications)
        for value in node.outputs:
            flows.of[value] = flow if isinstance(value.type, TensorType) else _NONE  # a size says nothing of what it measures
    return flows


def _through(node: Node, base: str, flows: _Flows, applications: Applications) -> _Flow:
    """Sources of a node's results; attentions, residual additions and routers are noted in passing."""
    if node in applications:
        return frozenset((_Source(node, "matmul"),))
    if base in FUSED:
        q, k, v = (_matmuls(flows.of.get(value, _NONE)) for value in node.args[:3])
        flows.attentions[node] = _Attention(q, k, v)
        return frozenset((_Source(node, "attention"),))
    if base in CONVOLUTIONS or base in TABLES:
        return frozenset((_FOREIGN,))
    operands = _operands(node, base)
    if operands is not None:
        return _product(node, operands, flows)
    read = node.inputs()[:1] if base in PICKS else node.inputs()
    merged = frozenset(source for value in read if not isinstance(value, Const) for source in flows.of.get(value, _NONE))
    if base in SOFTMAX and any(source.kind == "product" for source in merged):
        return frozenset((_Source(node, "softmax"),))
    if base in ("add", "sub", "rsub"):
        _note_additions(node, flows)
    if base == "topk":
        flows.routed.update(_matmuls(merged))
    bent, split = base in ACTIVATIONS, base in SPLITS
    if bent or split:
        merged = frozenset(_Source(s.node, s.kind, s.bent or bent, s.split or split) for s in merged)
    return merged if len(merged) <= MANY else frozenset((_FOREIGN,))


def _operands(node: Node, base: str) -> tuple[Value, Value] | None:
    """The two operands of a product of activations."""
    if base == "einsum":
        values = node.args[1]
        return (values[0], values[1]) if len(values) == 2 else None
    if base not in PRODUCTS:
        return None
    left, right = PRODUCTS[base]
    return node.args[left], node.args[right]


def _product(node: Node, operands: tuple[Value, Value], flows: _Flows) -> _Flow:
    """Scores, the weighted sum of an attention, or a product of no known meaning."""
    left, right = (flows.of.get(value, _NONE) for value in operands)
    for weights, values in ((left, right), (right, left)):
        softmax = min((s.node for s in weights if s.kind == "softmax" and s.node is not None), key=flows.order.__getitem__, default=None)
        if softmax is not None:
            q, k = _scores(softmax, flows)
            flows.attentions[node] = _Attention(q, k, _matmuls(values))
            return frozenset((_Source(node, "attention"),))
    return frozenset((_Source(node, "product"),)) if left or right else _NONE


def _scores(softmax: Node, flows: _Flows) -> tuple[set[Node], set[Node]]:
    """Applications behind queries and keys. The softmax runs over the keys: the last axis, which the second operand brings.

    Further products that are added to the scores (DeBERTa's positions) pair a known query or key with its counterpart.
    """
    products = {s.node for s in flows.of[softmax.args[0]] if s.kind == "product" and s.node is not None}
    pairs = []
    for product in sorted(products, key=lambda node: flows.order[node]):
        operands = _operands(product, base_name(product.op))
        if operands is not None:
            left, right = (_matmuls(flows.of.get(value, _NONE)) for value in operands)
            pairs.append((left, right))
    if not pairs:
        return set(), set()
    q, k = (set(side) for side in pairs[0])
    for left, right in pairs[1:]:
        turned = bool(left & k) and not left & q
        q |= right if turned else left
        k |= left if turned else right
    return q, k


def _matmuls(flow: _Flow) -> set[Node]:
    return {source.node for source in flow if source.kind == "matmul" and source.node is not None}


def _note_additions(node: Node, flows: _Flows) -> None:
    """a + b where a is one matmul's result as it came, and b comes from elsewhere."""
    values = [value for value in node.args[:2] if isinstance(value, Value) and not isinstance(value, Const)]
    if len(values) != 2:
        return
    for one, other in (values, values[::-1]):
        flow, rest = flows.of.get(one, _NONE), flows.of.get(other, _NONE)
        alone = next(iter(flow)) if len(flow) == 1 else None
        if alone is not None and alone.kind == "matmul" and not alone.bent and alone.node is not None and rest and rest != flow:
            flows.added.setdefault(alone.node, other)


# --------------------------------------------------------------------------------------------------------------------- attention


def _attention_roles(flows: _Flows, applications: Applications, producers: Mapping[Value, Node], found: dict[Node, str]) -> None:
    family: dict[Node, str] = {}
    for core, attention in flows.attentions.items():
        family[core] = "cross_attention" if _is_cross(attention, applications, producers) else "attention"
        for node in attention.q | attention.k | attention.v:
            parts = "".join(name for name in "qkv" if node in getattr(attention, name))
            found.setdefault(node, f"{family[core]}.{parts}")
    for node, (_, application) in applications.items():
        sources = flows.of.get(application.x, _NONE)
        cores = {source.node for source in sources if source.kind == "attention" and source.node is not None}
        gated = all(source.bent for source in sources if source.kind != "attention")
        if cores and gated:
            found.setdefault(node, f"{family[min(cores, key=flows.order.__getitem__)]}.o")


def _is_cross(attention: _Attention, applications: Applications, producers: Mapping[Value, Node]) -> bool:
    """Whether queries and keys are made of different things: no matmul in common, and nothing in common just behind their inputs."""
    if attention.q & attention.k or not attention.q or not attention.k:
        return False
    left = {value for node in attention.q for value in _near(applications[node][1].x, applications, producers)}
    right = {value for node in attention.k for value in _near(applications[node][1].x, applications, producers)}
    return not left & right and not _comes_from(right, left, producers)


def _near(value: Value, applications: Applications, producers: Mapping[Value, Node]) -> set[Value]:
    """The value, and what it was before layout, norms, one addition (positions are added to queries and keys) and one matmul (queries and
    keys of a low-rank attention have a projection in front)."""
    found, todo = {value}, [(value, 1, 1)]
    while todo:
        current, additions, matmuls = todo.pop()
        node = producers.get(current)
        if node is None:
            continue
        base = base_name(node.op)
        before = [v for v in node.inputs() if isinstance(v.type, TensorType) and not isinstance(v, Const)]
        if node in applications and matmuls:
            before, matmuls = [applications[node][1].x], matmuls - 1
        elif base == "add" and len(before) > 1 and additions:
            additions -= 1
        elif not (base in NEAR or (base == "add" and len(before) == 1)):
            continue
        fresh = [v for v in before if v not in found]
        found.update(fresh)
        todo += [(v, additions, matmuls) for v in fresh]
    return found


def _comes_from(values: set[Value], sources: set[Value], producers: Mapping[Value, Node]) -> bool:
    """Whether any value is computed from one of the sources (keys of a shrunk copy of the queries' input)."""
    todo, seen = list(values), set(values)
    while todo:
        value = todo.pop()
        if value in sources:
            return True
        node = producers.get(value)
        for before in node.inputs() if node is not None else ():
            if before not in seen and isinstance(before.type, TensorType) and not isinstance(before, Const):
                seen.add(before)
                todo.append(before)
    return False


# --------------------------------------------------------------------------------------------------------------------------- mlp


@dataclass(frozen=True, slots=True)
class _Chain:
    """Two linked steps of an MLP: `first` by role name, and the matmul they lead to."""

    first: tuple[tuple[Node, str], ...]
    last: Node

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (*(node for node, _ in self.first), self.last)

    def roles(self, applications: Applications) -> Iterable[tuple[Node, str]]:
        family = "moe" if applications[self.last][0].batch is not None else "mlp"
        for node, role in self.first:
            yield node, f"{family}.{role}"
        yield self.last, f"{family}.{'fc2' if self.first[0][1] == 'fc1' else 'down'}"


def _chains(flows: _Flows, applications: Applications, found: Mapping[Node, str]) -> list[_Chain]:
    """MLPs, the later of two that share a matmul first, so that the middle of a longer chain is an fc1."""
    chains = []
    for node, (_, application) in applications.items():
        first = _first_steps(flows.of.get(application.x, _NONE)) if node not in found else ()
        if first and not any(step in found for step, _ in first):
            chains.append(_Chain(first, node))
    return chains[::-1]


def _first_steps(sources: _Flow) -> tuple[tuple[Node, str], ...]:
    """gate and up, gate_up, or fc1 behind a value; empty where it is no hidden value of an MLP."""
    if any(source.kind != "matmul" for source in sources):
        return ()
    bent = {source.node for source in sources if source.bent and source.node is not None}
    straight = {source.node for source in sources if not source.bent and source.node is not None} - bent
    if len(bent) != 1 or len(straight) > 1:
        return ()
    gate = next(iter(bent))
    if straight:
        return ((gate, "gate"), (next(iter(straight)), "up"))
    return ((gate, "gate_up" if any(source.split for source in sources) else "fc1"),)


def _expert_roles(flows: _Flows, applications: Applications, chains: Sequence[_Chain], found: dict[Node, str]) -> None:
    experts = [(node, site, application) for node, (site, application) in applications.items() if site.batch is not None]
    if not experts:
        return
    for _, _, application in experts:
        if application.select is not None:
            flows.routed.update(_matmuls(flows.of.get(application.select, _NONE)))
    for node in flows.routed:
        if applications[node][0].batch is None:
            found.setdefault(node, "moe.router")
    for chain in chains:
        if applications[chain.last][0].batch is not None:
            for node, role in chain.roles(applications):
                found.setdefault(node, role)
    for node, _, _ in experts:
        found.setdefault(node, "moe.other")


# -------------------------------------------------------------------------------------------------------------------------- head


def _reach(graph: Graph, body: set[Node], applications: Applications) -> tuple[set[Node], set[Node]]:
    """(matmuls from which a block's matmul is reached, matmuls that one reaches)."""
    after: set[Node] = set()
    reached: set[Value] = set()
    for node in graph.nodes:
        hit = any(value in reached for value in node.inputs())
        if hit and node in applications:
            after.add(node)
        if hit or node in body:
            reached.update(node.outputs)
    before: set[Node] = set()
    leading: set[Value] = set()
    for node in reversed(graph.nodes):
        hit = any(value in leading for value in node.outputs)
        if hit and node in applications:
            before.add(node)
        if hit or node in body:
            leading.update(node.inputs())
    return before, after


def _last(graph: Graph, applications: Applications) -> set[Node]:
    """In a model without blocks: matmuls that come after something with weights and lead to no further one."""
    leads: set[Value] = set()
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in applications and not any(value in leads for value in node.outputs):
            found.add(node)
        if node in applications or any(value in leads for value in node.outputs) or base_name(node.op) in CONVOLUTIONS:
            leads.update(node.inputs())
    weighted: set[Value] = set()
    for node in graph.nodes:
        known = any(value in weighted for value in node.inputs())
        if known or node in applications or base_name(node.op) in CONVOLUTIONS | TABLES:
            weighted.update(node.outputs)
        if node in applications and not known:
            found.discard(node)
    return found
