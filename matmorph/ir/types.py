"""Types of values: element type and shape, where a dim is an int or a canonical integer expression over named symbols.

Expressions are sympy; floor division, modulo and friends are torch's own sympy functions, because that is what a trace yields and
what the shape environment of `ir.infer` takes back. `parse_dim(format_dim(d)) == d` for every dim.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import sympy
import torch
from sympy.printing.str import StrPrinter
from torch.utils._sympy import functions as torch_functions

from matmorph.ir.size_algebra import normal_form

Dim: TypeAlias = "int | sympy.Expr"
ScalarKind = Literal["int", "float", "bool"]


def symbol(name: str) -> sympy.Symbol:
    """The symbol of a dynamic axis; two calls with one name give equal symbols."""
    return sympy.Symbol(name, integer=True, positive=True)


def as_dim(value: Any) -> Dim:
    """Canonical form: a plain int where the expression is a number, else its normal form."""
    expression = sympy.sympify(value)
    if expression.is_Integer or expression.is_Symbol:
        return int(expression) if expression.is_Integer else expression
    found = normal_form(expression)
    return int(found) if found.is_Integer else found


_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.FloorDiv: torch_functions.FloorDiv,
    ast.Mod: torch_functions.Mod,
    ast.Div: operator.truediv,
}
_FUNCTION_NAMES = """FloorDiv Mod PythonMod ModularIndexing CleanDiv CeilDiv Where Max Min IntTrueDiv FloatTrueDiv FloatPow PowByNatural
ToFloat TruncToInt TruncToFloat FloorToInt CeilToInt RoundToInt RoundDecimal LShift RShift OpaqueUnaryFn_sqrt OpaqueUnaryFn_exp
OpaqueUnaryFn_log OpaqueUnaryFn_log2 OpaqueUnaryFn_sin OpaqueUnaryFn_cos"""
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    name: getattr(torch_functions, name) for name in _FUNCTION_NAMES.split() if hasattr(torch_functions, name)
}


def parse_dim(text: str) -> Dim:
    """Reads what `format_dim` prints. Raises ValueError on anything else; nothing is evaluated but arithmetic."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not a dimension: {text!r}") from error
    return as_dim(_evaluate(tree, text))


def _evaluate(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return sympy.sympify(node.value)
    if isinstance(node, ast.Name):
        return symbol(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, text)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left, text), _evaluate(node.right, text))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        return _FUNCTIONS[node.func.id](*(_evaluate(arg, text) for arg in node.args))
    raise ValueError(f"not a dimension: {text!r}")


class _DimPrinter(StrPrinter):  # type: ignore[misc]
    def _print_Float(self, expr: sympy.Float) -> str:  # noqa: N802  (sympy's naming)
        return repr(float(expr))  # all digits, where sympy's own prints 15


def format_dim(dim: Dim) -> str:
    """`16*seq`, `batch*seq`, `((seq + 3)//4)`: no spaces outside sums, readable, and parseable by `parse_dim`."""
    return str(_DimPrinter().doprint(dim))


def dim_symbols(dims: Iterable[Dim]) -> frozenset[str]:
    """Names of all symbols in these dims."""
    return frozenset(str(s) for d in dims if not isinstance(d, int) for s in d.free_symbols)


@dataclass(frozen=True, slots=True)
class TensorType:
    """`dtype` is torch's name without the prefix ("float32"); a scalar tensor has shape ()."""

    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(format_dim, self.shape))}]"

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"not a torch dtype: {self.dtype}")
        return found


@dataclass(frozen=True, slots=True)
class ScalarType:
    """A Python number at run time (a size, a scale). `value` is its expression where it is known, as it is for every size."""

    kind: ScalarKind
    value: Dim | None = None

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}({format_dim(self.value)})"


Type: TypeAlias = "TensorType | ScalarType"


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def element_size(dtype: str) -> int:
    """Bytes of one element."""
    return TensorType(dtype, ()).torch_dtype.itemsize
