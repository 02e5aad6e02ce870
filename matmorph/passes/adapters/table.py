"""Which factors of a rewritten graph are adapters, as a table that a folder can keep, and the surgery that all of their life cycle needs:
putting values in, and taking what they add out of the graph.

An adapter's nodes end in one `add` per application: one operand comes from the adapter's weights, the other is the matmul beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from matmorph.errors import InputError, VerifyError, did_you_mean
from matmorph.ir.core import Const, Graph, Node, Value, values_in
from matmorph.ir.rewiring import exchanged, loaded, rewired, rewired_outputs, swept
from matmorph.passes.adapters.trainables import GROUPS
from matmorph.passes.methods.quantized_base import QuantizedSpec
from matmorph.report.model import Report, SiteRow
from matmorph.specs.schema import MethodUse, Spec

METHODS = GROUPS["adapters"]
NEAREST = 5
GATES = "gates"
"""Short name of what says which tensors of a supernet count; no factor, but what the factors mean depends on it."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One method's factors at one site.

    `consts`: dotted names by the method's short ones ("down", "up"; "core_0" ...; of a supernet also "gates"). `scale`: of the factors'
    product. `base`: what they stand beside: "dense", "own" (a frozen weight that lacks what they start with), or the method that took
    the weight's place, with `quantizer` its settings where that is a quantised one. `applications`: how often the site's weight is used.
    `rslora`: whether the scale is alpha / sqrt(rank). `words`: of a supernet, by tensor what it may be.
    """

    site: str
    rule: str
    method: str
    consts: Mapping[str, str]
    scale: float
    in_features: int
    out_features: int
    batch: int | None
    base: str
    base_consts: Mapping[str, str]
    quantizer: Mapping[str, Any] | None
    form: str = "linear"
    applications: int = 1
    rslora: bool = False
    words: Mapping[str, Sequence[str]] | None = None

    @property
    def starts_at_zero(self) -> bool:
        """Whether the base alone is the model before training."""
        return self.base != "own" and self.method != "loftq"


class Described(Protocol):
    """What `describe_adapters` reads of a compiled model."""

    @property
    def spec(self) -> Spec: ...
    @property
    def graph(self) -> Graph: ...
    @property
    def report(self) -> Report: ...


def describe_adapters(compiled: Described) -> list[dict[str, Any]]:
    """The table of adapters as plain data, for a file; `read_adapters` reads it."""
    return [asdict(adapter) for adapter in find_adapters(compiled.spec, compiled.graph, compiled.report)]


def read_adapters(data: Any, where: str) -> tuple[Adapter, ...]:
    """The table from plain data. InputError naming `where` (a file) for what is none."""
    try:
        return tuple(Adapter(**entry) for entry in data)
    except TypeError as error:
        raise InputError(f"{where}: its table of adapters cannot be read: {error}") from error


def find_adapters(spec: Spec, graph: Graph, report: Report) -> tuple[Adapter, ...]:
    """The adapters of all rewritten sites, in order; those whose factors have left the graph (merged) are none."""
    uses = {rule.name: rule.rewrite for rule in spec.rules}
    state = {const.path: const for const in graph.state}
    rows = [row for row in report.sites if row.status == "rewritten"]
    return tuple(adapter for row in rows for adapter in _of_site(row, uses.get(row.rule or "", ()), state))


def _of_site(row: SiteRow, uses: Sequence[MethodUse], state: Mapping[str, Const]) -> Iterator[Adapter]:
    parts = [(use, _short(state, f"{row.path}.{_label(uses, k)}.")) for k, use in enumerate(uses)]
    base, base_consts, settings = _base(parts, state)
    for use, consts in parts:
        factors = {short: path for short, path in consts.items() if state[path].trainable}
        if use.method in METHODS and factors:
            factors |= {short: path for short, path in consts.items() if short == GATES}
            yield Adapter(
                row.path,
                row.rule or "",
                use.method,
                factors,
                _scale(use),
                row.shape[-1],
                row.shape[-2],
                row.shape[0] if len(row.shape) == 3 else None,
                base,
                base_consts,
                settings,
                row.form,
                row.applications,
                bool(getattr(use.spec, "rslora", False)),
                _words(use, factors) if GATES in factors else None,
            )


def _words(use: MethodUse, consts: Mapping[str, str]) -> Mapping[str, Sequence[str]]:
    """What each tensor of a supernet may be here; one that the site has no numbers for is none."""
    present = {short.partition("_")[0] for short in consts}
    return {tensor: words if tensor in present else ("none",) for tensor, words in use.spec.words.items()}


def _base(
    parts: Sequence[tuple[MethodUse, Mapping[str, str]]], state: Mapping[str, Const]
) -> tuple[str, Mapping[str, str], Mapping[str, Any] | None]:
    """(kind, weights, quantizer's settings) of what the factors stand beside."""
    own = next((consts["base"] for use, consts in parts if use.method == "lora" and "base" in consts), None)
    if own is not None:
        return "own", {"base": own}, None
    first, consts = parts[0]
    settings = _settings(first.spec) if isinstance(first.spec, QuantizedSpec) else None
    if settings is None and first.method in METHODS:
        return "dense", {}, None
    return first.method, {short: path for short, path in consts.items() if settings is None or not state[path].trainable}, settings


def _label(uses: Sequence[MethodUse], k: int) -> str:
    """What names the weights of a part, as the rewrite names them."""
    names = [use.method for use in uses]
    count = names[:k].count(names[k])
    return f"{names[k]}_{count}" if count else names[k]


def _short(state: Mapping[str, Const], prefix: str) -> dict[str, str]:
    return {path[len(prefix) :]: path for path in state if path.startswith(prefix) and "." not in path[len(prefix) :]}


def _scale(use: MethodUse) -> float:
    """Of the factors' product: `adapter_scale` of the two-factor methods, tt_lora's plain alpha."""
    return float(getattr(use.spec, "adapter_scale", getattr(use.spec, "alpha", 1.0)))


def _settings(spec: QuantizedSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in fields(QuantizedSpec)}


# values


def with_values(graph: Graph, values: Mapping[str, Any], where: str = "the values") -> Graph:
    """The graph with other numbers in some of its parameters, in their own type. `values`: torch or numpy arrays by dotted name.

    InputError for a name that is no parameter, another shape (for factors: another rank) and for NaN or infinity, naming `where`.
    """
    known = {name: const for const in graph.state for name in const.names}
    for name in values:
        if name not in known or known[name].kind != "parameter":
            factors = [path for path in known if known[path].trainable and known[path].rule is not None]
            raise InputError(
                f"{where}: the model has no parameter {name}{did_you_mean(name, known)}; these are values of another model",
                [f"parameters that rules put in: {', '.join(factors[:NEAREST])}{' ...' if len(factors) > NEAREST else ''}"]
                if factors
                else [],
            )
    given = {known[name]: _fitted(known[name], value, where) for name, value in values.items()}
    return exchanged(graph, {const: loaded(const, tensor) for const, tensor in given.items()})


def _fitted(const: Const, value: Any, where: str) -> Tensor:
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    shape = tuple(int(dim) for dim in const.tensor.shape)
    if tuple(tensor.shape) != shape:
        kind = "another rank" if const.rule is not None and len(tensor.shape) == len(shape) else "another base"
        raise InputError(f"{where}: {const.path} is {list(tensor.shape)} there and {list(shape)} in this model: an adapter of {kind}")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{where}: {const.path} has NaN or infinity")
    return tensor.to(const.tensor.torch_dtype)


# surgery


@dataclass(frozen=True, slots=True, eq=False)
class Join:
    """Where an adapter meets what it stands beside: `node` adds `update` to `beside`."""

    node: Node
    update: Value
    beside: Value


def joins(graph: Graph, factors: Collection[Const]) -> tuple[tuple[Join, ...], frozenset[Value]]:
    """(where the results of these weights are added, all values that come from them on the way). VerifyError where one is not added."""
    tainted: set[Value] = set(factors)
    found: list[Join] = []
    for node in graph.nodes:
        touched = [value for value in node.inputs() if value in tainted]
        if not touched:
            continue
        if node.op == "aten.add.Tensor" and len(touched) == 1 and not node.attrs:
            beside = next(value for value in node.inputs() if value not in tainted)
            found.append(Join(node, touched[0], beside))
            continue
        tainted.update(node.outputs)
    if not found or any(value in tainted for value in values_in(graph.outputs)):
        raise VerifyError(f"the weights {', '.join(const.path for const in factors)} are not added to a matmul")
    return tuple(found), frozenset(tainted)


def without(graph: Graph, factors: Collection[Const]) -> Graph:
    """The graph as it is without what these weights add; the node beside takes the name of the sum."""
    ends, tainted = joins(graph, factors)
    dropped = {join.node for join in ends}
    names: dict[Value, Value] = {}
    for join in reversed(ends):  # the sum's value goes to what makes the other operand; sums of sums in turn
        names.setdefault(join.beside, names.get(join.node.output, join.node.output))
    kept = [rewired(node, names) for node in graph.nodes if node not in dropped and not any(value in tainted for value in node.outputs)]
    state = tuple(const for const in graph.state if const not in factors)
    return swept(replace(graph, nodes=tuple(kept), outputs=rewired_outputs(graph, names), state=state), graph)


def consts_of(graph: Graph, names: Iterable[str]) -> tuple[Const, ...]:
    """Weights by dotted name. InputError for one that the graph does not have: it was merged, or the table is another model's."""
    known = {const.path: const for const in graph.state}
    wanted = tuple(names)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise InputError(f"the graph has no weight {missing[0]}: its adapters were merged already, or the table belongs to another model")
    return tuple(known[name] for name in wanted)
