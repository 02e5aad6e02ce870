"""What has no rule of its own: composites are written out and differentiated part by part, other operators ask torch's autograd.

Both trace a torch function on fake tensors of the graph's own shape environment (`make_fx`), so named axes stay named, and write what was
traced through the Builder.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import _config as shape_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from matmorph.errors import ExportError, MatmorphError
from matmorph.ir.build import Builder
from matmorph.ir.core import Arg, Node, Value, map_values
from matmorph.ir.infer import Inference
from matmorph.ir.ops import normalize, op_name, resolve
from matmorph.ir.tracing.functional import writes, written_out
from matmorph.ir.tracing.normal_form import Same, normal
from matmorph.ir.tracing.trace import quiet
from matmorph.ir.training.adjoints.tape import Cotangents, Tape, TapeStep, composite, is_float

_THE_SAME = frozenset({"aten.detach.default", "aten.alias.default", "aten.lift_fresh_copy.default", "aten.detach_copy.default"})


def traced(t: Tape, node: Node) -> TapeStep:
    """The rule of operators without one. Raises ExportError for those that torch cannot differentiate either."""
    target = resolve(node.op)
    if not isinstance(target, torch._ops.OpOverload):
        raise ExportError(f"{node.op} cannot be differentiated", _where(node))
    if _is_composite(target):
        return composite(t, *_written_out(t, node))
    return _asked(t, node)


def _is_composite(target: torch._ops.OpOverload) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"))  # type: ignore[no-untyped-call]


def _written_out(t: Tape, node: Node) -> tuple[Value, ...]:
    """The results of a composite through the rules of what it is made of."""
    leaves = list(dict.fromkeys(node.inputs()))

    def run(*given: Any) -> Any:
        found = dict(zip(leaves, given, strict=True))
        result = resolve(node.op)(*map_values(node.args, found.__getitem__), **_filled(node.attrs, found))
        return result if isinstance(result, tuple | list) else (result,)

    with _named(node):
        recorded = trace_function(t.inference, run, leaves)
    values = emit(recorded, leaves, partial(_recorded, t), t.b)
    return tuple(cast(Value, value) for value in values)


def _recorded(t: Tape, op: str, *args: Arg, **attrs: Arg) -> tuple[Value, ...]:
    t.b.many(op, *args, **attrs)
    node = t.b.nodes.pop()
    if not any(t.wants(value) for value in node.inputs()) or not any(map(is_float, node.outputs)):
        return t.keep(node)
    return t.record(node)


def _asked(t: Tape, node: Node) -> TapeStep:
    outputs = t.keep(node)

    def pull(found: Cotangents) -> None:
        wanted = [value for value in dict.fromkeys(node.inputs()) if t.wants(value)]
        for value, cotangent in zip(wanted, _gradients(t, node, wanted, found), strict=True):
            if cotangent is not None:
                t.give(value, cotangent)

    return TapeStep(outputs, pull)


def _gradients(t: Tape, node: Node, wanted: Sequence[Value], found: Cotangents) -> Sequence[Value | None]:
    """torch's own cotangents of `wanted`. The results of the forward, which it may use, are the node's."""
    leaves = list(dict.fromkeys(node.inputs()))
    reached = [index for index, value in enumerate(found) if value is not None]
    given = [value for value in found if value is not None]

    def run(*inputs: Any) -> Any:
        values = dict(zip(leaves, inputs, strict=False))
        with torch.enable_grad():
            tracked = {value: values[value].detach().requires_grad_() if value in wanted else values[value] for value in leaves}
            result = resolve(node.op)(*map_values(node.args, tracked.__getitem__), **_filled(node.attrs, tracked))
            results = result if isinstance(result, tuple | list) else (result,)
            chosen = [results[index] for index in reached]
            gradients = torch.autograd.grad(chosen, [tracked[value] for value in wanted], inputs[len(leaves) :], allow_unused=True)
        return tuple(results), tuple(gradients)

    with _named(node):
        recorded = trace_function(t.inference, run, [*leaves, *given])
    results, _ = _outputs(recorded)
    known = {item: value for item, value in zip(results, node.outputs, strict=True) if isinstance(item, torch.fx.Node)}
    values = emit(recorded, [*leaves, *given], t.b.many, t.b, known)
    return values[len(node.outputs) :]


def trace_function(inference: Inference, function: Callable[..., Any], inputs: Sequence[Value]) -> torch.fx.Graph:
    """The ATen operators of a torch function on values of these types. Raises whatever the function raises."""
    fakes = [inference.fresh(value.type) for value in inputs]
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    if mode is None:
        raise ExportError("a function of no tensors has no gradient")
    patched = shape_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    plain = torch.backends.mkldnn.flags(enabled=False)  # its fused layers (LSTM) have a backward that nothing but torch runs
    with quiet(), patched, plain, mode, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH):
        module = written_out(function, fakes)
    module.graph.eliminate_dead_code()
    return module.graph


def emit(
    graph: torch.fx.Graph,
    inputs: Sequence[Value],
    write: Callable[..., tuple[Value, ...]],
    b: Builder,
    known: Mapping[torch.fx.Node, Value] | None = None,
) -> list[Value | None]:
    """Writes a traced graph on these inputs; its flat results. `known`: nodes whose values exist already, with what only they read."""
    env: dict[torch.fx.Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    env.update(known or {})
    needed = _needed(graph, env)
    for node in graph.nodes:
        if node in env or node not in needed or node.op == "output":
            continue
        env[node] = _constant(graph, node, b) if node.op == "get_attr" else _call(node, env, write)
    flat = [item for group in _outputs(graph) for item in group]
    return [env[item] if isinstance(item, torch.fx.Node) else item for item in flat]


def _outputs(graph: torch.fx.Graph) -> tuple[Sequence[Any], Sequence[Any]]:
    """(results, gradients), or (results, ()) of a function that gives one tuple."""
    found: Any = next(iter(graph.find_nodes(op="output"))).args[0]
    nested = len(found) == 2 and all(isinstance(item, tuple | list) for item in found)
    return (found[0], found[1]) if nested else (found, ())


def _needed(graph: torch.fx.Graph, env: Mapping[torch.fx.Node, Any]) -> set[torch.fx.Node]:
    needed: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        if (node.op == "output" or node in needed) and node not in env:
            needed.update(node.all_input_nodes)
    return needed


def _call(node: torch.fx.Node, env: Mapping[torch.fx.Node, Any], write: Callable[..., tuple[Value, ...]]) -> Any:
    if node.target is operator.getitem:
        return env[cast(torch.fx.Node, node.args[0])][cast(int, node.args[1])]
    op = op_name(node.target)
    form = normal(node)
    if isinstance(form, Same) or op in _THE_SAME:
        return env[form.value if isinstance(form, Same) else cast(torch.fx.Node, node.args[0])]
    if writes(node):
        raise ExportError(f"the gradient uses {op}, which writes to its operand")
    op, raw, named = (form.op, form.args, form.attrs) if form is not None else (op, node.args, node.kwargs)
    result: Any = node.meta.get("val")
    several = isinstance(result, tuple | list)
    if several and any(item is None for item in result):
        # The IR has no results that are None: an operator that was asked for some of its gradients gives them all.
        raw = tuple([True] * len(arg) if isinstance(arg, tuple | list) and _is_mask(arg) else arg for arg in raw)
    args, attrs = normalize(op, _filled(tuple(raw), env), {name: _filled(arg, env) for name, arg in named.items()})
    outputs = write(op, *args, **attrs)
    return outputs if several else outputs[0]


def _is_mask(arg: Sequence[Any]) -> bool:
    return bool(arg) and all(isinstance(item, bool) for item in arg)


def _filled(arg: Any, env: Mapping[Any, Any]) -> Any:
    """A nest with its fx nodes, or Values, replaced."""
    if isinstance(arg, torch.fx.Node | Value):
        return env[arg]
    if isinstance(arg, Mapping):
        return {name: _filled(item, env) for name, item in arg.items()}
    if isinstance(arg, tuple | list):
        return type(arg)(_filled(item, env) for item in arg) if type(arg) in (tuple, list) else [_filled(item, env) for item in arg]
    return arg


def _constant(graph: torch.fx.Graph, node: torch.fx.Node, b: Builder) -> Value:
    tensor = getattr(graph.owning_module, str(node.target))
    return b.const(f"gradient.constant_{len(b.consts)}", tensor.detach(), kind="constant")


@contextmanager
def _named(node: Node) -> Iterator[None]:
    """Turns what torch raises while an operator is differentiated into an ExportError that names it."""
    try:
        yield
    except MatmorphError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(f"{node.op} cannot be differentiated: {reason}", _where(node)) from error


def _where(node: Node) -> list[str]:
    return [f"in {node.origin.path}"] if node.origin.path else []
