"""`export.adapters: inputs`: two-factor adapters as optional inputs of the graph, so that one session serves many of them.

y = base(x) + (x @ down) @ up, where `down` [in, rank] and `up` [rank, out] are initializers that are inputs too, each pair with a rank of
its own. The scale is folded into `up`, so an adapter's file says all of it. The default is rank 0, the base alone, where the base is what
the model was before training; where the factors start with a part of the weight (loftq, `init` from the weight) it is these factors. A
TT-LoRA adapter has an exact two-factor form at the border between its input and output modes; so have block-diagonal and Kronecker ones.
An input is no constant: ONNX Runtime neither folds nor prepacks it, and runs with IO binding ignore adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from matmorph.errors import ExportError, InputError, alternatives
from matmorph.exporters.data_file import weights_sha256
from matmorph.ir.adapter import Adapter
from matmorph.ir.build import Builder
from matmorph.ir.core import Const, Graph, Node, Value, mapped_arguments
from matmorph.ir.joins import Join, consts_of, joins
from matmorph.ir.op_table import having, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.rewiring import rewired, swept
from matmorph.ir.types import TensorType, dtype_name
from matmorph.passes.methods.protocol import Methods, SiteMethod, names_of, site_method
from matmorph.runtime.format.adapters import Slot, Slots

PARTS = ("down", "up")
_INPUT = "input."
"""Before the short name of a factor that is an input of the ONNX graph."""
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A graph whose adapters can be inputs. `fingerprint`: of all weights but those of the adapters."""

    graph: Graph
    inputs: tuple[Slot, ...]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """The `adapters` of a manifest."""
        return Slots(self.fingerprint, self.inputs).to_dict()


def serve(graph: Graph, adapters: Sequence[Adapter], precision: str, methods: Methods) -> Served:
    """The graph with every adapter as two plain matmuls of weights `<site>.<method>.down` and `.up`, at their defaults. `precision`: of
    the export.

    ExportError for none at all, for an adapter that has no two-factor form, and for a type that numpy does not have.
    """
    if not adapters:
        names = [name for name in names_of(methods, "adapters") if site_method(methods, name).peft is not None]
        raise ExportError(f"export.adapters: inputs, and the model has no adapters (no rule put in {alternatives(names)})")
    fingerprint = base_fingerprint(graph, adapters)
    inputs: list[Slot] = []
    for adapter in adapters:
        graph, entry = _served(graph, adapter, precision, site_method(methods, adapter.method))
        inputs.append(entry)
    return Served(graph, tuple(inputs), fingerprint)


def base_fingerprint(graph: Graph, adapters: Sequence[Adapter]) -> str:
    """sha256 over names, types and bytes of the weights that the graph reads, the adapters' own left out."""
    own = {name for adapter in adapters for name in adapter.consts.values()}
    return weights_sha256(const for const in graph.used_state() if const.path not in own)


def adapter_arrays(adapters: Sequence[Adapter], values: Mapping[str, Any], methods: Methods) -> dict[str, np.ndarray]:
    """What the inputs are given: down [.., in, rank] and up [.., rank, out], float32, the scale folded in. `values`: torch or numpy arrays
    by dotted name; they may have another rank than the compiled model, and leave adapters out.

    InputError where only a part of one is there, its shape does not fit, or no adapter is there at all.
    """
    found: dict[str, np.ndarray] = {}
    for adapter in adapters:
        missing = [name for name in adapter.consts.values() if name not in values]
        if len(missing) == len(adapter.consts):
            continue
        if missing:
            raise InputError(f"the values lack {missing[0]} of the adapter at {adapter.site}")
        tensors = {short: _tensor(values[name]) for short, name in adapter.consts.items()}
        down, up = two_factors_of(adapter, tensors, site_method(methods, adapter.method))
        for part, tensor in zip(PARTS, (down, up), strict=True):
            found[_name(adapter, part)] = tensor.float().contiguous().numpy()
    if not found:
        raise InputError("the values hold no adapter of this model")
    return found


def two_factors_of(adapter: Adapter, tensors: Mapping[str, Tensor], method: SiteMethod) -> tuple[Tensor, Tensor]:
    """(down [.., in, rank], up [.., rank, out]) with the scale in `up`, in the type of the factors. InputError for a method without such a
    form and for factors that do not fit, ExportError for tensors that have none."""
    numbers = {"scale": torch.tensor(adapter.scale, dtype=torch.float64), "in_features": torch.tensor(adapter.in_features)}
    try:
        found = method.two_factor({**tensors, **numbers})
    except ExportError as error:
        raise ExportError(f"{adapter.site}: {error.message}", error.details) from error
    if found is None:  # of whoever writes files for other programs
        raise InputError(f"{adapter.site}: {adapter.method} has no two-factor form; merge it instead")
    down, up = found
    lead = () if adapter.batch is None else (adapter.batch,)
    rank = down.shape[-1] if down.dim() else 0
    if tuple(down.shape) != (*lead, adapter.in_features, rank) or tuple(up.shape) != (*lead, rank, adapter.out_features):
        raise InputError(
            f"{adapter.site}: factors {list(down.shape)} and {list(up.shape)} do not fit a matmul of {adapter.in_features} inputs and "
            f"{adapter.out_features} outputs"
        )
    return down, up


def _tensor(value: Any) -> Tensor:
    return value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))


def _name(adapter: Adapter, part: str) -> str:
    return f"{next(iter(adapter.consts.values())).rpartition('.')[0]}.{part}"


def _served(graph: Graph, adapter: Adapter, precision: str, method: SiteMethod) -> tuple[Graph, Slot]:
    factors = consts_of(graph, adapter.consts.values())
    tensors = {short: const.load().detach() for short, const in zip(adapter.consts, factors, strict=True)}
    try:
        down, up = two_factors_of(adapter, tensors, method)
    except InputError as error:
        raise ExportError(f"{adapter.site}: adapters of {adapter.method} cannot be inputs; use export.adapters: inline") from error
    if adapter.starts_at_zero:
        down, up = down[..., :0], up[..., :0, :]
    dtype = _DTYPES.get(precision, factors[0].tensor.dtype)
    if dtype == "bfloat16":
        raise ExportError("export.adapters: inputs needs float32 or float16 factors: numpy has no bfloat16 to give them in")
    b = Builder(graph)
    pair = {part: _input(adapter, part, tensor, factors[0].rule) for part, tensor in zip(PARTS, (down, up), strict=True)}
    ends, tainted = joins(graph, factors)
    write = _as_written if _is_pair(adapter, factors) else _from_rows
    nodes = write(graph, adapter, ends, tainted, pair, b)
    state: list[Const] = []
    for const in graph.state:
        state += list(pair.values()) if const is factors[0] else [] if const in factors else [const]
    result = swept(replace(graph, nodes=nodes, state=tuple(state)), graph)
    entry = Slot(
        adapter.site,
        adapter.method,
        pair["down"].path,
        pair["up"].path,
        adapter.in_features,
        adapter.out_features,
        adapter.batch,
        int(down.shape[-1]),
        dtype,
    )
    return result, entry


def _is_pair(adapter: Adapter, factors: Sequence[Const]) -> bool:
    """Whether the adapter is two factors of the matmul as it stands."""
    axes = 2 if adapter.batch is None else 3
    return set(adapter.consts) == set(PARTS) and all(len(const.tensor.shape) == axes for const in factors)


def _input(adapter: Adapter, part: str, tensor: Tensor, rule: str | None) -> Const:
    """One factor as a weight that `expose_adapters` makes an input."""
    name, held = _name(adapter, part), tensor.contiguous()
    return Const(
        name,
        TensorType(dtype_name(held.dtype), tuple(held.shape)),
        lambda: held,
        (name,),
        trainable=True,
        storage=name,
        rule=rule,
        site=adapter.site,
        method=adapter.method,
        part=f"{_INPUT}{part}",
    )


def _as_written(
    graph: Graph, adapter: Adapter, ends: Sequence[Join], tainted: frozenset[Value], pair: Mapping[str, Const], b: Builder
) -> tuple[Node, ...]:
    """The nodes as they are, over the new factors and without the scale."""
    known: dict[Value, Value] = {const: pair[part] for part in PARTS for const in graph.state if const.path == adapter.consts[part]}
    nodes: list[Node] = []
    for node in graph.nodes:
        if not any(value in tainted for value in node.outputs):
            nodes.append(rewired(node, known))
        elif node.op == "aten.mul.Scalar":
            scaled: Value = node.args[0]
            known[node.output] = known.get(scaled, scaled)
        else:
            nodes += _written(node, b, known)
    return tuple(nodes)


def _written(node: Node, b: Builder, known: dict[Value, Value]) -> list[Node]:
    """The node again over other operands, its types inferred anew."""
    mark, b.origin = len(b.nodes), node.origin
    args, attrs = mapped_arguments(node, lambda value: known.get(value, value))
    outputs = b.many(node.op, *args, name=node.name, **attrs)
    known.update(zip(node.outputs, outputs, strict=True))
    return b.nodes[mark:]


def _from_rows(
    graph: Graph, adapter: Adapter, ends: Sequence[Join], tainted: frozenset[Value], pair: Mapping[str, Const], b: Builder
) -> tuple[Node, ...]:
    """Two matmuls on the rows that the update was computed from, in the place of its last node."""
    producers = graph.producers()
    places = {producers[join.update]: (join.update, _rows(adapter, join.update, producers, tainted)) for join in ends}
    nodes: list[Node] = []
    known: dict[Value, Value] = {}
    for node in graph.nodes:
        if node in places:
            update, rows = places[node]
            mark, b.origin = len(b.nodes), node.origin
            narrow = b("aten.matmul.default", rows, pair["down"], name=f"{node.name}_down")
            known[update] = b("aten.matmul.default", narrow, pair["up"], name=node.name)
            nodes += b.nodes[mark:]
        elif not any(value in tainted for value in node.outputs):
            nodes.append(rewired(node, known))
    return tuple(nodes)


def _rows(adapter: Adapter, update: Value, producers: Mapping[Value, Node], tainted: frozenset[Value]) -> Value:
    """The activation [.., in] whose update [.., out] this is: what the train's nodes read, followed back through changes of shape."""
    wanted = (*update.tensor.shape[:-1], adapter.in_features)
    for value in _behind(update, producers, tainted):
        if value.tensor.shape == wanted and not isinstance(value, Const):
            return value
    raise ExportError(
        f"{adapter.site}: the {adapter.method} of a matmul of this form ({adapter.form}) cannot be an input; use adapters: inline"
    )


def _behind(update: Value, producers: Mapping[Value, Node], tainted: frozenset[Value]) -> Iterator[Value]:
    """Values that enter from outside, nearest first, each with what it was reshaped or padded from."""
    waiting, seen = [update], {update}
    while waiting:
        node = producers.get(waiting.pop(0))
        for value in node.inputs() if node is not None else ():
            if value in seen or not hasattr(value.type, "shape"):
                continue
            seen.add(value)
            if value in tainted:
                waiting.append(value)
                continue
            while True:
                yield value
                maker = producers.get(value)
                if maker is None or base_name(maker.op) not in _SHAPES:
                    break
                value = maker.args[0]


_SHAPES = having(of_kind("reshape", "permute", "same"), casts=False) | {"constant_pad_nd"}


# the ONNX graph


def expose_adapters(model: ir.Model, graph: Graph) -> None:
    """Makes the factors of `serve` inputs of the ONNX graph, each pair with a rank of its own; their initializers are the defaults."""
    for down, up in _pairs(graph):
        first, second = (model.graph.initializers[const.path] for const in (down, up))
        rank = ir.SymbolicDim(f"{down.path.rpartition('.')[0]}.rank")
        _set_dim(first, -1, rank)
        _set_dim(second, -2, rank)
        beyond = _spread(second, -2, rank, set())
        _spread(first, -1, rank, beyond)
        model.graph.inputs.extend([first, second])


def _pairs(graph: Graph) -> Iterator[tuple[Const, Const]]:
    halves: dict[str, list[Const]] = {}
    for const in graph.used_state():
        if (const.part or "").startswith(_INPUT):
            halves.setdefault(const.path.rpartition(".")[0], []).append(const)
    for down, up in halves.values():  # noqa: UP028  (pairs, not lists)
        yield down, up


def _spread(value: ir.Value, axis: int, rank: ir.SymbolicDim, stop: set[ir.Node]) -> set[ir.Node]:
    """Gives results that keep the rank as this axis a symbol for it, up to the matmul that sums over it; the matmuls that read it."""
    products: set[ir.Node] = set()
    for user, _ in list(value.uses()):
        if user in stop:
            continue
        if user.op_type in ("MatMul", "Gemm"):
            products.add(user)
        if user.op_type in ("MatMul", "Gemm") and axis == -2:
            continue
        for output in user.outputs:
            if output.shape is not None:
                _set_dim(output, axis, rank)
            products |= _spread(output, axis, rank, stop)
    return products


def _set_dim(value: ir.Value, axis: int, dim: ir.SymbolicDim) -> None:
    dims = list(value.shape or ())
    dims[axis] = dim
    value.shape = ir.Shape(dims)
