"""A functional ExportedProgram made ready for translation to ONNX: checks removed, operators without a translation decomposed one by one,
dtypes made explicit.

`torch.onnx.export` does the same by retracing the whole program, which is most of its time; here only the nodes that need it are touched.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx
from torch._decomp import decomposition_table
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.onnx._internal.fx.passes import type_promotion
from torch.utils._pytree import tree_map_only

from matmorph.ir.tracing.functional import written_out

_CHECKS = frozenset(
    {
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
        torch.ops.aten._assert_async.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_tensor_metadata.default,
    }
)

Known = Callable[[Any], bool]
"""Says whether an operator has a translation of its own."""


def remove_checks(module: torch.fx.GraphModule) -> None:
    """Drops run-time assertions and what only they read, in place and in bodies of higher-order operators too."""
    for part in _graph_modules(module):
        for node in reversed(part.graph.nodes):
            if node.op == "call_function" and (node.target in _CHECKS or not (node.users or node.is_impure())):
                part.graph.erase_node(node)


def decompose_unknown(module: torch.fx.GraphModule, known: Known) -> tuple[torch.fx.Node, ...]:
    """Replaces, in place, each node that has no translation by its decomposition; returns the nodes that stay without one.

    Decompositions are torch's own table and its composite kernels (`aten.__and__` is `bitwise_and`), traced on fake values of the node's
    types that lie in memory row by row: ONNX knows no other layout, and some kernels answer in the layout they were given. What a
    decomposition writes in place is made functional, what it only checks is dropped.
    """
    stuck = []
    table: dict[Any, Callable[..., Any]] | None = None
    for part in _graph_modules(module):
        for node in list(part.graph.nodes):
            if node.op != "call_function" or node.target is operator.getitem or known(node.target):
                continue
            if table is None:
                table = {op: function for op, function in decomposition_table.items() if not known(op)}
            if not _replace(node, table, known):
                stuck.append(node)
    return tuple(stuck)


def _replace(node: torch.fx.Node, table: dict[Any, Callable[..., Any]], known: Known) -> bool:
    leaves: list[torch.fx.Node] = list(node.all_input_nodes)
    if not isinstance(node.target, torch._ops.OpOverload) or any("val" not in leaf.meta for leaf in leaves):
        return False
    body = _decomposed(node, leaves, table)
    if body is None or any(
        inner.op == "get_attr" or (inner.op == "call_function" and inner.target is not operator.getitem and not known(inner.target))
        for inner in body.nodes
    ):
        return False
    _splice(node, body, leaves)
    return True


def _decomposed(node: torch.fx.Node, leaves: list[torch.fx.Node], table: dict[Any, Callable[..., Any]]) -> torch.fx.Graph | None:
    """The node as a graph of what it is made of; None where torch cannot write it out for these operands."""
    target: Any = node.target

    def run(*values: Any) -> Any:
        given = dict(zip(leaves, values, strict=True))
        args, kwargs = tree_map_only(torch.fx.Node, given.__getitem__, (node.args, dict(node.kwargs)))
        return target(*args, **kwargs)

    with _fake_mode(node.graph), enable_python_dispatcher():
        # The tracer tells arguments apart by identity, and two nodes of one type may share their fake value.
        fresh = [_in_rows(leaf.meta["val"]) for leaf in leaves]
        try:
            traced = written_out(run, fresh, table)
        except Exception:  # whatever a formula of torch raises: the operator is named as one without a translation
            return None
    remove_checks(traced)
    return traced.graph


def _in_rows(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _splice(node: torch.fx.Node, body: torch.fx.Graph, leaves: list[torch.fx.Node]) -> None:
    """Copies `body` before `node` and lets its result take the node's place, and its name where it is a single tensor."""
    env: dict[torch.fx.Node, torch.fx.Node] = dict(zip(body.find_nodes(op="placeholder"), leaves, strict=True))
    scope = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")}
    result: Any = next(iter(body.find_nodes(op="output"))).args[0]
    with node.graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "call_function":
                env[inner] = node.graph.node_copy(inner, env.__getitem__)
                env[inner].meta = {**scope, "val": inner.meta.get("val")}
    if isinstance(result, torch.fx.Node):
        new = env[result]
        node.replace_all_uses_with(new)
        if new not in leaves:
            name = node.name
            node.graph.erase_node(node)
            new.name = name
            return
    else:
        for user in list(node.users):  # getitem of a multi-output operator
            user.replace_all_uses_with(env[result[user.args[1]]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def promote_types(module: torch.fx.GraphModule) -> None:
    """Makes torch's implicit type promotion explicit, in place, at the nodes that use it; ONNX operators want equal types."""
    table = type_promotion.TypePromotionTable()
    for part in _graph_modules(module):
        waiting = [(node, rule) for node, rule in _ruled(part, table) if _promotes(node, rule)]
        if not waiting:
            continue
        interpreter = type_promotion._TypePromotionInterpreter(part, table)
        with _fake_mode(part.graph), enable_python_dispatcher(), fx_traceback.preserve_node_meta():
            for node, rule in waiting:
                interpreter.env = {known: known.meta["val"] for known in part.graph.nodes if "val" in known.meta}
                with interpreter._set_current_node(node):
                    interpreter._maybe_promote_node(node, rule)


def _ruled(module: torch.fx.GraphModule, table: Any) -> Iterator[tuple[torch.fx.Node, Any]]:
    for node in module.graph.nodes:
        rule = type_promotion.get_type_promotion_rule(node, table) if node.op == "call_function" else None
        if rule is not None:
            yield node, rule


def _promotes(node: torch.fx.Node, rule: Any) -> bool:
    """Whether the rule asks for another dtype than an argument has."""
    args, kwargs = tree_map_only(torch.fx.Node, lambda leaf: leaf.meta["val"], (node.args, dict(node.kwargs)))
    wanted = rule.preview_type_promotion(args, kwargs)
    pairs = [(args[i], dtype) for i, dtype in wanted.args_dtypes.items() if i < len(args)]
    pairs += [(kwargs[name], dtype) for name, dtype in wanted.kwargs_dtypes.items() if name in kwargs]
    return any(dtype is not None and _dtype(value) not in (None, dtype) for value, dtype in pairs)


_SCALAR_DTYPES: tuple[tuple[tuple[type, ...], torch.dtype], ...] = (
    ((bool, torch.SymBool), torch.bool),
    ((int, torch.SymInt), torch.int64),
    ((float, torch.SymFloat), torch.float32),
)


def _dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, torch.Tensor):
        return value.dtype
    return next((dtype for types, dtype in _SCALAR_DTYPES if isinstance(value, types)), None)


def _fake_mode(graph: torch.fx.Graph) -> FakeTensorMode:
    """The mode that the graph's own fake values live in; a graph without any has only sizes, for which a new one does."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode()


def _graph_modules(module: torch.fx.GraphModule) -> Iterator[torch.fx.GraphModule]:
    return (part for part in module.modules() if isinstance(part, torch.fx.GraphModule))
