"""What the text of an exported program may say. torch evaluates its expressions as Python, writes its names into code that it then runs,
looks its operators up attribute by attribute and imports what a pytree names; so each of these strings is judged before torch sees it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._export.serde.serialize import _SYM_OPS
from torch._functorch import predispatch
from torch.utils._sympy import functions

from matmorph.errors import InputError
from matmorph.runtime.format.reading import entries

_NAME = re.compile(r"\w*")
"""Of a node, an input, an argument: it becomes a variable in generated code."""
_PATH = re.compile(r"[^\"'\\\n\r\x00-\x1f(){};]*")
"""Of a parameter or module: it is looked up, and stands between quotes in generated code."""
_SYMBOL = re.compile(r"[A-Za-z_]+\d{1,6}")
_DECIMAL = re.compile(r"[-+]?[\d.]{1,60}(e[-+]?\d{1,4})?")
_LARGEST, _LARGEST_POWER = 1 << 63, 16
_LONGEST, _DEEPEST, _DEEPEST_POWER = 20_000, 200, 3
"""Characters of an expression, its levels, and powers inside each other: what it takes to evaluate it is bounded."""

_SYMPY = frozenset(
    "Add Mul Integer Rational Max Min Abs Mod floor ceiling sqrt And Or Not Piecewise ExprCondPair Tuple Eq Ne Lt Le Gt Ge "
    "Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan BooleanTrue BooleanFalse".split()
)
_FUNCTIONS = _SYMPY | {*functions.__all__, *(name for name in vars(functions) if name.startswith("OpaqueUnaryFn_"))}
_POWERS = frozenset({"Pow", "LShift", "RShift", "PowByNatural", "FloatPow"})
"""Functions whose value outgrows their arguments."""
_VALUES = frozenset({"true", "false", "True", "False", "oo", "int_oo", "zoo", "nan"})
_NODES = (
    *(ast.Constant, ast.Name, ast.Load, ast.Call, ast.Tuple, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)

_READS_FILES = frozenset({"filename", "path"})
"""Arguments of operators that open what they name (`aten.from_file`, `aten.save`)."""
_REFUSED_SPACES = frozenset({"debugprims"})

_WITHOUT = ("source_fn_stack", "from_node")
"""Metadata of a node that torch looks up and matmorph does not read."""


def judge_program(data: Any, member: str) -> dict[str, Any]:
    """The program's data with what is not needed left out. InputError names `member` and the string that was refused."""
    if not isinstance(data, dict) or not isinstance(data.get("graph_module"), dict):
        raise InputError(f"{member}: no exported program")
    for where, value in entries(data):
        judge = _JUDGES.get(where)
        if judge is not None and value is not None:
            reason = judge(value)
            if reason is not None:
                raise InputError(f"{member}: {where}: {value!r:.120} {reason}")
    ranges = data.get("range_constraints", {})
    odd = [name for name in ranges if _SYMBOL.fullmatch(name) is None] if isinstance(ranges, dict) else ["range_constraints"]
    if odd:
        raise InputError(f"{member}: range_constraints: {odd[0]!r:.120} is no symbol")
    return {**_trimmed(data), "guards_code": []}  # they are Python, and say no more than the ranges do


def judge_payloads(data: Any, member: str, folder: str, members: list[str]) -> None:
    """Of weights_config.json and its like: every payload is the raw bytes of a tensor, and a member of the archive."""
    table = data.get("config") if isinstance(data, dict) else None
    if not isinstance(table, dict):
        raise InputError(f"{member}: lists no payloads")
    for name, payload in table.items():
        entry = payload if isinstance(payload, dict) else {}
        place, about = entry.get("path_name"), entry.get("tensor_meta")
        if entry.get("use_pickle") is not False:
            raise InputError(f"{member}: {name!r:.80} is pickled (a tensor of a class of its own), and is not unpickled")
        if not isinstance(place, str) or _NAME.fullmatch(place) is None or f"{folder}{place}" not in members:
            raise InputError(f"{member}: {name!r:.80} lies in {place!r:.80}, which is no member of the archive")
        if not isinstance(about, dict):
            raise InputError(f"{member}: {name!r:.80} has no size and type")


def _trimmed(data: Any) -> Any:
    """The data without the metadata that is looked up."""
    if isinstance(data, list):
        return [_trimmed(item) for item in data]
    if not isinstance(data, dict):
        return data
    found = {key: _trimmed(value) for key, value in data.items()}
    if isinstance(found.get("metadata"), dict):
        found["metadata"] = {key: value for key, value in found["metadata"].items() if key not in _WITHOUT}
    return found


# ---- one string; the reason why it is refused


def _judge_name(value: Any) -> str | None:
    if isinstance(value, dict):
        return None  # a table of this name, whose entries are judged
    return None if isinstance(value, str) and _NAME.fullmatch(value) else "is no name"


def _judge_path(value: Any) -> str | None:
    if isinstance(value, dict):
        return None
    return None if isinstance(value, str) and _PATH.fullmatch(value) else "is no path of a module or parameter"


def _judge_names(value: Any) -> str | None:
    return None if isinstance(value, list) and all(_judge_name(one) is None for one in value) else "are no names"


def _judge_expression(value: Any) -> str | None:
    if not isinstance(value, str) or len(value) > _LONGEST:
        return "is no expression of sizes"
    try:
        tree = ast.parse(value.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "is no expression of sizes"
    return None if _is_arithmetic(tree.body, _DEEPEST) else "is more than arithmetic over sizes, and is not evaluated"


def _is_arithmetic(node: ast.AST, depth: int, powers: int = _DEEPEST_POWER) -> bool:
    """Numbers, symbols, and functions that torch and sympy write; in sympy's short form or as constructors."""
    if not isinstance(node, _NODES) or not depth:
        return False
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool | int | float) and abs(node.value) < _LARGEST
    if isinstance(node, ast.Name):
        return node.id in _VALUES or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Call):
        return _is_known_call(node, depth, powers)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift | ast.RShift):
        return _is_power([node.left, node.right], depth, powers)
    return all(_is_arithmetic(child, depth - 1, powers) for child in ast.iter_child_nodes(node))


def _is_known_call(node: ast.Call, depth: int, powers: int) -> bool:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in ("Symbol", "Float"):
        written = _SYMBOL if name == "Symbol" else _DECIMAL
        text = node.args[0].value if len(node.args) == 1 and isinstance(node.args[0], ast.Constant) else None
        settings = [keyword.value for keyword in node.keywords if keyword.arg is not None]
        plain = len(settings) == len(node.keywords) and all(isinstance(one, ast.Constant) and _is_small(one.value) for one in settings)
        return plain and isinstance(text, str) and written.fullmatch(text) is not None
    if node.keywords or name not in _FUNCTIONS | _POWERS:
        return False
    return _is_power(node.args, depth, powers) if name in _POWERS else all(_is_arithmetic(one, depth - 1, powers) for one in node.args)


def _is_power(arguments: list[ast.expr], depth: int, powers: int) -> bool:
    """Of anything by a small number or a symbol."""
    if len(arguments) != 2 or not powers:
        return False
    base, exponent = arguments
    number = _number(exponent)
    fine = _is_symbol(exponent) if number is None else abs(number) <= _LARGEST_POWER
    return fine and _is_arithmetic(exponent, depth - 1, 0) and _is_arithmetic(base, depth - 1, powers - 1)


def _is_symbol(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Symbol")


def _is_small(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, int) and 0 < value < 1000)


def _number(node: ast.AST) -> float | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _number(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Integer" and len(node.args) == 1:
        return _number(node.args[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, int | float) else None


_PREDISPATCH = "torch._functorch.predispatch"
_ON_SIZES = frozenset(f"{op.__module__}.{op.__name__}" for op in _SYM_OPS) | {"_operator.getitem", "torch._sym_sqrt"}


def _judge_operator(value: Any) -> str | None:
    """Operators of torch's registry and arithmetic on sizes; nothing else that has a name in torch is called."""
    if isinstance(value, dict):
        return None  # a table of this name, whose entries are judged
    if not isinstance(value, str) or not all(part.isidentifier() for part in value.split(".")):
        return "is no operator"
    if value.startswith("torch.ops."):
        return _judge_registered(value.split(".")[2:])
    if value.startswith(f"{_PREDISPATCH}."):
        found = getattr(predispatch, value.removeprefix(f"{_PREDISPATCH}."), None)
        return None if getattr(found, "__module__", None) == _PREDISPATCH else "is no operator"
    return None if value in _ON_SIZES else "is no operator"


def _judge_registered(parts: list[str]) -> str | None:
    if parts[0] in _REFUSED_SPACES or len(parts) not in (2, 3):
        return "is no operator that is read"
    found: Any = torch.ops
    for part in parts:
        found = getattr(found, part, None)
    if found is None:
        return "is an operator that is not registered here; a package.module:factory can import the package that brings it"
    if not isinstance(found, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return "is no operator"
    arguments = found._schema.arguments if isinstance(found, torch._ops.OpOverload) else ()
    files = [argument.name for argument in arguments if argument.name in _READS_FILES]
    return "opens the file that it is given" if files else None


def _judge_tree(value: Any) -> str | None:
    """A pytree in torch's JSON: classes that torch knows, and no context that makes it import something."""
    if isinstance(value, dict) or value == "":
        return None
    if not isinstance(value, str):
        return "is no pytree"
    try:
        data = json.loads(value)
    except (ValueError, RecursionError):
        return "is no pytree"
    for key, entry in entries(data):
        if key in ("default_factory_module", "__enum__", "fqn"):
            return "names a class to import"
        if key == "context" and isinstance(entry, str) and ("__enum__" in entry or "default_factory" in entry or "\\u" in entry):
            return "names a class to import"
    return _judge_call(data)


def _judge_call(data: Any) -> str | None:
    """Keyword arguments become variables of generated code: ((args), {kwargs}) with names that are some."""
    top = data[1] if isinstance(data, list) and len(data) == 2 else None
    children = top.get("children_spec") if isinstance(top, dict) else None
    keywords = children[1] if isinstance(children, list) and len(children) == 2 else None
    if not isinstance(keywords, dict) or keywords.get("type") != "builtins.dict" or not isinstance(keywords.get("context"), str):
        return None
    try:
        names = json.loads(keywords["context"])
    except ValueError:
        return "is no pytree"
    return _judge_names(names)


_JUDGES: Mapping[str, Callable[[Any], str | None]] = {
    "name": _judge_name,
    "as_name": _judge_name,
    "graph_name": _judge_name,
    "user_input_name": _judge_name,
    "forward_arg_names": _judge_names,
    "fqn": _judge_path,
    "parameter_name": _judge_path,
    "buffer_name": _judge_path,
    "tensor_constant_name": _judge_path,
    "custom_obj_name": _judge_path,
    "expr_str": _judge_expression,
    "target": _judge_operator,
    "as_operator": _judge_operator,
    "in_spec": _judge_tree,
    "out_spec": _judge_tree,
}
"""By the key under which a string stands, wherever that is."""
