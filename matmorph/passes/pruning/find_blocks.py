"""Blocks: the matmuls on both sides of one inner width, and all that carries it between them.

attention = q, k, v (or their fusions) and o; mlp = gate and up (gate_up, fc1) and down (fc2). They are found by roles and dataflow. A
walk from the producers' results to the consumer's input says of which units every axis is made; what it cannot explain blocks the units
concerned, and a block without any unit left is a Reject with the name of the node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal as OneOf

from matmorph.ir.cache import Slot, find_slots
from matmorph.ir.core import Const, Graph, Node, Value, values_in
from matmorph.ir.op_table import PRODUCTS, having, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.site import Reject, Site
from matmorph.ir.sites.roles import FUSED
from matmorph.ir.types import TensorType
from matmorph.passes.pruning.axes import HEADS, QK, WIDTH, Atom, Axis, AxisProduct, Concat, V, plain, product, size_of, units_of
from matmorph.passes.pruning.axis_rules import AXIS_RULES
from matmorph.passes.pruning.axis_walk import AxisWalk, Literal, OutsideValue, PastValue, SoftmaxScale, Stuck

BlockKind = OneOf["attention", "mlp"]
_FAMILIES: Mapping[str, BlockKind] = {"attention": "attention", "cross_attention": "attention", "mlp": "mlp"}
_CONSUMERS = ("o", "down", "fc2")
_LAYOUTS = having(of_kind("permute", "same"), casts=False)
"""Operators between a stored weight and its matmul that no width is written in; a converted weight is not the one that is stored."""


@dataclass(frozen=True, slots=True, eq=False)
class Producer:
    """A matmul whose out features are the block's: `axis` says which is which."""

    site: Site
    axis: Axis


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Numbers of an attention: `groups` key/value heads, each read by `queries` query heads; `dim` of queries and keys, `value_dim` of
    values. `pairs`: how rotary embeddings pair the dimensions: "half", "next", or "" where they are free."""

    groups: int
    queries: int
    dim: int
    value_dim: int
    pairs: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """`axis`: the consumer's input features by unit. `literals`, `sides`, `scales`, `pasts`: all that a change of width must change in the
    `region` between producers and consumer. `blocked`: units that cannot be removed, and the node that is why. `reject`: why none can."""

    kind: BlockKind
    layer: int | None
    producers: tuple[Producer, ...]
    consumer: Site
    axis: AxisProduct = ()
    heads: Heads | None = None
    region: tuple[Node, ...] = ()
    literals: tuple[Literal, ...] = ()
    sides: tuple[OutsideValue, ...] = ()
    scales: tuple[SoftmaxScale, ...] = ()
    pasts: tuple[PastValue, ...] = ()
    blocked: Mapping[str, str] = field(default_factory=dict)
    reject: Reject | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """Producers in graph order, then the consumer."""
        return (*(producer.site for producer in self.producers), self.consumer)

    @property
    def width(self) -> int:
        """Input features of the consumer."""
        return self.consumer.in_features

    @property
    def name(self) -> str:
        return f"the {self.kind} block of {self.consumer.path}"

    def shared(self, unit: str) -> bool:
        """Whether all heads keep the same dimensions: rotary pairs do, and what meets a value from outside."""
        paired = unit == QK and self.heads is not None and self.heads.pairs != ""
        return paired or any(unit in units_of(side.axis) and HEADS not in units_of(side.axis) for side in self.sides)


def find_blocks(graph: Graph, sites: Sequence[Site]) -> tuple[Block, ...]:
    """Every block of the graph in order of its consumer, those that cannot be pruned with `reject`. No weight is read."""
    search = _Search(graph, sites)
    blocks = [search.block(site, kind) for site in sites if (kind := search.ends(site)) is not None]
    return tuple(_refuse_shared(blocks))


def _consumes(site: Site) -> str | None:
    family, _, part = site.role.partition(".")
    return family if family in _FAMILIES and part in _CONSUMERS else None


def _refuse_shared(blocks: Sequence[Block]) -> Iterable[Block]:
    """A matmul that produces for two blocks gives both an index set of its own."""
    owners: dict[Site, list[Block]] = {}
    for block in blocks:
        for site in block.sites:
            owners.setdefault(site, []).append(block)
    for block in blocks:
        common = next((site for site in block.sites if len(owners[site]) > 1), None)
        yield block if common is None else replace(block, reject=Reject(f"{common.path} belongs to several blocks"))


@dataclass(frozen=True, slots=True, eq=False)
class _Region:
    """Nodes between producers and one application of the consumer."""

    nodes: tuple[Node, ...]
    producers: tuple[tuple[Node, Site], ...]
    slots: Mapping[Node, Slot]


class _Search:
    """What all blocks of one graph are found with."""

    def __init__(self, graph: Graph, sites: Sequence[Site]) -> None:
        self._order = {node: k for k, node in enumerate(graph.nodes)}
        self._makers = graph.producers()
        self._users = graph.users()
        self._outputs = set(values_in(graph.outputs))
        self._slots = {slot.join: slot for slot in find_slots(graph)}
        self._sites = {application.node: site for site in sites if not site.listed for application in site.applications}

    def block(self, consumer: Site, kind: BlockKind) -> Block:
        regions = [self._region(application.x, kind) for application in consumer.applications]
        producers = tuple(dict.fromkeys(site for region in regions for _, site in region.producers))
        bare = Block(kind, consumer.layer, tuple(Producer(site, ()) for site in producers), consumer)
        reason = self._refusal(bare, regions)
        if reason is not None:
            return replace(bare, reject=Reject(reason))
        return _explained(bare, regions)

    def ends(self, site: Site) -> BlockKind | None:
        """The kind of block that the site is the last matmul of. A chain that is the whole model ends in its head."""
        family = _consumes(site)
        if family is not None:
            return _FAMILIES[family]
        chain = site.role == "head" and any(self._region(application.x, "mlp").producers for application in site.applications)
        return "mlp" if chain else None

    # regions

    def _region(self, x: Value, kind: BlockKind) -> _Region:
        """Backwards from the consumer's input to the block's own matmuls; then only what depends on them."""
        seen: set[Node] = set()
        ends: dict[Node, Site] = {}
        todo = [x]
        while todo:
            node = self._makers.get(todo.pop())
            if node is None or node in seen:
                continue
            seen.add(node)
            site = self._sites.get(node)
            if site is not None and _FAMILIES.get(site.role.partition(".")[0]) == kind and _consumes(site) is None:
                ends[node] = site
            elif site is None:
                todo += [value for value in node.inputs() if not isinstance(value, Const)]
        carried = {value for node in ends for value in node.outputs}
        between = []
        for node in sorted(seen - ends.keys(), key=self._order.__getitem__):
            if any(value in carried for value in node.inputs()):
                carried.update(node.outputs)
                between.append(node)
        slots = {node: self._slots[node] for node in between if node in self._slots}
        return _Region(tuple(between), tuple((node, ends[node]) for node in sorted(ends, key=self._order.__getitem__)), slots)

    def _refusal(self, block: Block, regions: Sequence[_Region]) -> str | None:
        """Why the block cannot be pruned whatever lies between."""
        inside = {node for region in regions for node in region.nodes}
        applied = {node for region in regions for node, _ in region.producers}
        last = {application.node for application in block.consumer.applications}
        if not block.producers:
            return f"no matmul of the {block.kind} block leads to {block.consumer.path}"
        for site in block.sites:
            if (reason := self._unfit(site)) is not None:
                return f"{site.path}: {reason}"
        for producer in block.producers:
            loose = next((a.node for a in producer.site.applications if a.node not in applied), None)
            if loose is not None:
                return f"{producer.site.path} is also applied outside the block (%{loose.name})"
        for node in (*applied, *inside):
            for value in node.outputs:
                other = next((user for user in self._users.get(value, ()) if user not in inside and user not in last), None)
                if value in self._outputs and node not in self._slots:
                    return f"%{value.name} of the block is a result of the model"
                if other is not None and base_name(other.op) != "sym_size" and isinstance(value.type, TensorType):
                    return f"%{value.name} of the block is also read by {base_name(other.op)} (%{other.name})"
        return None

    def _unfit(self, site: Site) -> str | None:
        """Why the weight of a site cannot be cut."""
        if site.blocked is not None:
            return site.blocked
        if site.parts:
            return f"its weight is computed from {site.parts[0].path}, which cannot be cut with it"
        if site.form not in ("linear", "addmm", "mm") or site.batch is not None or len(site.const.tensor.shape) != 2:
            return f"a matmul of form {site.form} with a weight of {len(site.const.tensor.shape)} axes is not pruned"
        if site.rows is not None:
            return "its weight is a slice of a larger one"
        if site.gathers:
            return "its weight is also read as an embedding table"
        for application in site.applications:
            operand = self._operand(application.node, application.x, application.bias)
            if operand is None:
                return f"how {base_name(application.node.op)} (%{application.node.name}) reads its weight is not understood"
            bias = application.bias
            if bias is not None and bias.tensor.shape[-1:] != (site.out_features,):
                return "its bias is broadcast"
            if isinstance(bias, Const) and any(self._sites.get(user) is not site for user in self._users.get(bias, ())):
                return f"its bias {bias.path} is also read elsewhere"
        return None

    def _operand(self, node: Node, x: Value, bias: Value | None) -> Value | None:
        """The weight operand, where it comes from a constant by layout alone and stands on the right."""
        others = [value for value in node.inputs() if value is not x and value is not bias]
        if len(others) != 1 or (base_name(node.op) in PRODUCTS and node.args[0] is others[0]):
            return None
        value = others[0]
        while not isinstance(value, Const):
            maker = self._makers.get(value)
            if maker is None or base_name(maker.op) not in _LAYOUTS:
                return None
            value = maker.args[0]
        return others[0]


# ------------------------------------------------------------------------------------------------------------- explanations


def _explained(block: Block, regions: Sequence[_Region]) -> Block:
    """The block with every axis and literal that carries its width; the reading of the head dimensions that blocks the least."""
    if block.kind == "mlp":
        return _walked(block, regions, None)
    heads = _heads(block, regions)
    if isinstance(heads, str):
        return replace(block, reject=Reject(heads))
    block = replace(block, heads=heads)
    best = _walked(block, regions, heads)
    for pairs in ("half", "next"):
        if best.reject is not None or QK not in best.blocked or heads.dim % 2:
            break
        other = _walked(block, regions, replace(heads, pairs=pairs))
        best = other if QK not in other.blocked else best
    return best


def _heads(block: Block, regions: Sequence[_Region]) -> Heads | str:
    """Head counts and dimensions from the operands of the attention itself, or why they do not fit."""
    cores = [core for region in regions if (core := _core(region)) is not None]
    if len(cores) != len(regions) or len(set(cores)) != 1:
        return f"no single attention leads to {block.consumer.path}"
    dim, value_dim = cores[0]
    if block.width % value_dim:
        return f"{block.width} input features of {block.consumer.path} are no whole number of heads of {value_dim}"
    heads = block.width // value_dim
    per_group = {"q": 0, "k": dim, "v": value_dim}
    counts = set()
    for producer in block.producers:
        parts = producer.site.role.rpartition(".")[2]
        own = producer.site.out_features - (heads * dim if "q" in parts else 0)
        each = sum(per_group[part] for part in parts)
        if (each == 0 and own) or (each and own % each) or own < 0:
            return f"{producer.site.path} ({parts}) has {producer.site.out_features} out features: no whole number of heads of {dim}"
        if each:
            counts.add(own // each)
    known = {part for producer in block.producers for part in producer.site.role.rpartition(".")[2]}
    if known != set("qkv"):
        return f"{', '.join(sorted(set('qkv') - known))} of the attention is no matmul of its own"
    groups = next(iter(counts))
    if len(counts) != 1 or not groups or heads % groups:
        return f"keys and values have {' and '.join(map(str, sorted(counts)))} heads, queries {heads}"
    return Heads(groups, heads // groups, dim, value_dim)


def _core(region: _Region) -> tuple[int, int] | None:
    """(dimensions of a head of queries and keys, of values) of the attention in a region."""
    carried = {value for node, _ in region.producers for value in node.outputs}
    carried.update(value for node in region.nodes for value in node.outputs)
    products = []
    for node in region.nodes:
        base = base_name(node.op)
        if base in FUSED:
            found = (node.args[0].tensor.shape[-1], node.args[2].tensor.shape[-1])
            return found if all(isinstance(dim, int) for dim in found) else None
        if base in PRODUCTS:
            operands = [node.args[k] for k in PRODUCTS[base]]
            if all(value in carried for value in operands):
                products.append(operands)
    if len(products) < 2:
        return None
    dims = (products[0][0].tensor.shape[-1], products[-1][1].tensor.shape[-1])
    return dims if all(isinstance(dim, int) for dim in dims) else None


def _walked(block: Block, regions: Sequence[_Region], heads: Heads | None) -> Block:
    """Walks until every unit that is left can be removed; those that cannot are walked past as plain sizes."""
    units = {WIDTH} if heads is None else {HEADS, QK, V}
    blocked: dict[str, str] = {}
    if heads is not None and heads.groups == 1:
        blocked[HEADS] = "there is one key/value head, which all query heads read"
    while True:
        live = units - blocked.keys()
        walks = []
        try:
            axes = _axes(block, heads, live)
            for region, application in zip(regions, block.consumer.applications, strict=True):
                starts = {node.outputs[0]: _produced(node, axes[site]) for node, site in region.producers}
                walk = AxisWalk(starts, AXIS_RULES, region.slots)
                walk.run(region.nodes)
                _arrives(walk, application.x, axes[block.consumer])
                walks.append(walk)
        except Stuck as answer:
            blocked.update(dict.fromkeys(answer.units & live or live, answer.reason))
            if not live - blocked.keys():
                return replace(block, heads=heads, blocked=blocked, reject=Reject(f"cannot be pruned: {answer.reason}"))
            continue
        return replace(
            block,
            heads=heads,
            producers=tuple(Producer(producer.site, axes[producer.site]) for producer in block.producers),
            axis=axes[block.consumer],  # type: ignore[arg-type]
            region=tuple(dict.fromkeys(node for region in regions for node in region.nodes)),
            literals=tuple(literal for walk in walks for literal in walk.literals.values()),
            sides=tuple(side for walk in walks for side in walk.sides.values()),
            scales=tuple(scale for walk in walks for scale in walk.scales.values()),
            pasts=tuple(past for walk in walks for past in walk.pasts.values()),
            blocked=blocked,
        )


def _produced(node: Node, axis: Axis) -> tuple[Axis, ...]:
    return (*plain(node.outputs[0].tensor.shape[:-1]), axis)


def _arrives(walk: AxisWalk, x: Value, expected: Axis) -> None:
    """The consumer's input must have the block's axis last, and nothing of it elsewhere."""
    *others, last = walk.axes(x)
    if last != expected or any(units_of(axis) for axis in others):
        units = frozenset(unit for axis in (*others, last, expected) for unit in units_of(axis))
        raise Stuck(units, f"the input of the last matmul (%{x.name}) does not run as the producers' results do")


def _axes(block: Block, heads: Heads | None, live: set[str]) -> dict[Site, Axis]:
    """Of every producer's out features and of the consumer's in features; units that are not live are plain sizes."""

    def atom(size: int, unit: str) -> Atom:
        return Atom(size, unit if unit in live and size > 1 else None)

    if heads is None:
        width = product(atom(block.width, WIDTH))
        found = {producer.site: _fused(producer.site, width) for producer in block.producers}
        return {**found, block.consumer: width}
    group, queries = atom(heads.groups, HEADS), Atom(heads.queries)
    half = heads.dim // 2
    dims = {"": (atom(heads.dim, QK),), "half": (Atom(2), atom(half, QK)), "next": (atom(half, QK), Atom(2))}[heads.pairs]
    values = atom(heads.value_dim, V)
    parts = {"q": product(group, queries, *dims), "k": product(group, *dims), "v": product(group, values)}
    axes: dict[Site, Axis] = {}
    for producer in block.producers:
        own = [parts[part] for part in producer.site.role.rpartition(".")[2]]
        axes[producer.site] = own[0] if len(own) == 1 else Concat(tuple(own))
    return {**axes, block.consumer: product(group, queries, values)}


def _fused(site: Site, width: AxisProduct) -> Axis:
    """One matmul may give gate and up after each other."""
    times, rest = divmod(site.out_features, int(size_of(width)))
    if rest or times > 2:
        raise Stuck(frozenset(), f"{site.path} has {site.out_features} out features for a width of {size_of(width)}")
    return width if times == 1 else Concat((width,) * times)
