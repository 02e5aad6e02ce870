"""Names of operators: from a traced target to the name that a `Node` holds and back, and arguments in their schema order."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

import matmorph.ir.attention_ops
import matmorph.ir.cache_ops
import matmorph.ir.quantised.ops  # noqa: F401  (they register the torch library `matmorph`)
from matmorph.errors import VerifyError, did_you_mean
from matmorph.ir.core import Arg

# What a trace may call on sizes. A closed set, so that text can name nothing else of these modules.
_SIZE_FUNCTIONS: Mapping[str, tuple[Any, str]] = {
    "operator": (operator, "add sub mul truediv floordiv mod neg pow abs pos eq ne lt le gt ge and_ or_ xor not_ lshift rshift"),
    "math": (math, "ceil floor trunc sqrt pow prod exp log log2 cos sin tan cosh sinh tanh acos asin atan"),
    "torch": (torch, "sym_max sym_min sym_int sym_float sym_ite sym_not sym_sum _sym_sqrt _sym_log2 _sym_exp _sym_log _sym_cos _sym_sin"),
    "builtins": (builtins, "abs round pow max min int float bool"),
}
_BY_NAME: Mapping[str, Callable[..., Any]] = {
    f"{module}.{name}": getattr(source, name)
    for module, (source, names) in _SIZE_FUNCTIONS.items()
    for name in names.split()
    if hasattr(source, name)
}
_BY_FUNCTION: Mapping[Callable[..., Any], str] = {function: name for name, function in reversed(list(_BY_NAME.items()))}


def op_name(target: Any) -> str:
    """The name of a traced target: "aten.linear.default", "higher_order.cond", "operator.mul", "math.ceil", "torch.sym_max".

    Raises VerifyError on a target that the IR has no name for.
    """
    if isinstance(target, OpOverload):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.__name__}"
    found = _BY_FUNCTION.get(target)
    if found is None:
        raise VerifyError(f"the IR has no name for the operation {target!r}")
    return found


@cache
def resolve(op: str) -> Callable[..., Any]:
    """The callable of an operator name, the inverse of `op_name`. Raises VerifyError where there is none."""
    if op in _BY_NAME:
        return _BY_NAME[op]
    namespace, _, rest = op.partition(".")
    if namespace == "higher_order":
        return _attribute(torch.ops.higher_order, rest, op)
    packet_name, _, overload = rest.rpartition(".")
    if namespace in _SIZE_FUNCTIONS or not packet_name:
        raise VerifyError(f"unknown operator {op!r}{did_you_mean(op, _BY_NAME)}")
    packet = _attribute(getattr(torch.ops, namespace), packet_name, op)
    return _attribute(packet, overload, op)


def _attribute(holder: Any, name: str, op: str) -> Callable[..., Any]:
    found: Any = getattr(holder, name, None) if name.isidentifier() else None
    if not isinstance(found, OpOverload | HigherOrderOperator | torch._ops.OpOverloadPacket):
        raise VerifyError(f"unknown operator {op!r}")
    return found


def base_name(op: str) -> str:
    """The name without namespace and overload: "linear" of "aten.linear.default", "mul" of "operator.mul"."""
    parts = op.split(".")
    return parts[1] if len(parts) > 1 else op


def is_overload(op: str) -> bool:
    """Whether the operator has a schema, which size functions and higher-order operators have not."""
    return isinstance(resolve(op), OpOverload)


@cache
def _positional(op: str) -> tuple[tuple[str, Any], ...] | None:
    """(name, default) of the arguments that may be given by position, or None for an operator without a schema."""
    target = resolve(op)
    if not isinstance(target, OpOverload):
        return None
    return tuple((argument.name, argument.default_value) for argument in target._schema.arguments if not argument.kwarg_only)


def normalize(op: str, args: Sequence[Arg], kwargs: Mapping[str, Arg]) -> tuple[tuple[Arg, ...], dict[str, Arg]]:
    """Arguments in the one form that the IR keeps: what the schema takes by position is given by position, every list is a tuple.

    Positions that a moved keyword skips get the schema's default; trailing defaults that the call left out stay out.
    """
    placed: list[Arg] = [_tuples(arg) for arg in args]
    attrs = {name: _tuples(arg) for name, arg in kwargs.items()}
    names = _positional(op)
    if names is None:
        return tuple(placed), attrs
    moved = [k for k, (name, _) in enumerate(names) if name in attrs]
    for k in range(len(placed), moved[-1] + 1 if moved else 0):
        name, default = names[k]
        placed.append(attrs.pop(name) if name in attrs else _tuples(default))
    return tuple(placed), attrs


def _tuples(arg: Arg) -> Arg:
    return tuple(_tuples(item) for item in arg) if isinstance(arg, tuple | list) else arg
