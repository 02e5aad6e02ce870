"""Shape inference: an operator's result types, found by running it on fake tensors under a shape environment of our own.

Every named axis is one backed symbol whose hint is a prime that no model dim is likely to equal, so that an operator which wrongly relies
on a concrete size fails or specialises the symbol, and both are errors (decision T4). Fakes are interned: two values of equal type,
strides and offset share one fake, which makes an operator's cache key cheap and a repeated layer nearly free.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import sympy
import torch
import torch.fx.experimental._config as shape_config
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from matmorph.errors import VerifyError
from matmorph.ir.core import Arg, Const, Graph, Node, Range, Value
from matmorph.ir.ops import resolve
from matmorph.ir.size_algebra import agree
from matmorph.ir.types import Dim, ScalarType, TensorType, Type, as_dim, dtype_name, symbol

_FIRST_HINT = 1009
_DATA_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Inference:
    """Types of operator results over the symbols of one graph.

    `symbols`: range of each named axis. `device`: where the traced module lives ("cpu", "cuda:0", "meta"); the machine need not have it.
    """

    def __init__(self, symbols: Mapping[str, Range], device: str = "cpu") -> None:
        asked = torch.device(device)
        # Types do not depend on the device; a few operators look for the real one, so where it is missing the CPU stands in.
        self._absent = asked.type if asked.type == "cuda" and not torch.cuda.is_available() else None
        self.device = torch.device("cpu") if self._absent else asked
        with _oblivious():
            self._env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
            self._mode = FakeTensorMode(shape_env=self._env)
            self._inner: dict[sympy.Symbol, sympy.Symbol] = {}  # named symbol -> the environment's own
            self._outer: dict[sympy.Symbol, sympy.Symbol] = {}
            for (name, bounds), hint in zip(symbols.items(), _hints(symbols.values()), strict=True):
                self._bind(symbol(name), self._backed(name, bounds, hint))
        self._bounds = {name: (bounds.low, bounds.high) for name, bounds in symbols.items()}
        self._interned: dict[Any, FakeTensor] = {}
        self._private: dict[int, Any] = {}
        self._types: dict[int, TensorType] = {}
        self._results: dict[Any, tuple[Any, ...]] = {}

    # fakes

    def fake(self, type: Type) -> Any:
        """A contiguous fake tensor of this type, or a (symbolic) number for a scalar type."""
        with _oblivious():
            if isinstance(type, ScalarType):
                return self._scalar(type)
            with self._mode:
                return self._intern(torch.empty([self._size(d) for d in type.shape], dtype=type.torch_dtype, device=self.device))

    def fresh(self, type: Type) -> Any:
        """Like `fake`, but an object of its own: for the inputs of a program, which another trace tells apart by identity."""
        made = self.fake(type)
        if not isinstance(made, FakeTensor):
            return made
        with _oblivious(), self._mode:
            return made.clone()

    def value_ranges(self) -> Mapping[sympy.Symbol, ValueRanges[Any]]:
        """Limits of the environment's own symbols, as an ExportedProgram carries them."""
        return {inner: self._env.var_to_range[inner] for inner in self._outer if inner in self._env.var_to_range}

    def _scalar(self, type: ScalarType) -> Any:
        if type.value is None:
            unknown: Mapping[str, Callable[[], Any]] = {
                "int": self._env.create_unbacked_symint,
                "float": self._env.create_unbacked_symfloat,
                "bool": self._env.create_unbacked_symbool,
            }
            return unknown[type.kind]()
        if type.kind == "int":
            return self._size(type.value)
        if type.kind == "bool":
            return bool(type.value)
        expression = sympy.sympify(type.value)
        if expression.is_number:
            return float(expression)
        return self._env.create_symfloatnode(self._to_inner(expression), hint=None)

    def _size(self, dim: Dim) -> Any:
        return dim if isinstance(dim, int) else self._size_of_inner(self._to_inner(dim))

    def _size_of_inner(self, dim: Dim) -> Any:
        return dim if isinstance(dim, int) else self._env.create_symintnode(dim, hint=None)

    def _intern(self, result: Any) -> Any:
        if not isinstance(result, FakeTensor):
            return result
        key = (result.dtype, result.device, _freeze(result.shape), _freeze(result.stride()), _freeze(result.storage_offset()))
        return self._interned.setdefault(key, result)

    def private(self, fake: Any) -> Any:
        """A fake of the same type that no other value shares (torch remembers data-dependent sizes on the fake itself)."""
        if not isinstance(fake, FakeTensor) or id(fake) in self._private:
            return fake
        with _oblivious(), self._mode:
            found = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
        self._private[id(found)] = found
        return found

    # running

    def run(self, op: str, args: Sequence[Any], attrs: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """Results of one operator on fakes and literals: a tuple, one entry per result (split has several, an assertion none).

        A sub-Graph among the arguments of a higher-order operator is propagated with the operands. Raises VerifyError if the operator
        is unknown, refuses these operands, or would fix or unify a named symbol.
        """
        attrs = attrs or {}
        if op in _BODIES:
            return _call(self, op, *_BODIES[op](args)[0])
        key = (op, _freeze(tuple(args)), _freeze(tuple(attrs.items())))
        found = self._results.get(key)
        if found is None:
            with _oblivious():
                found = self._execute(op, args, attrs)
            # A data-dependent size is a new symbol each time.
            if not any(self._unbacked_of(result) for result in found):
                self._results[key] = found
        return found

    def _execute(self, op: str, args: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Any, ...]:
        function = resolve(op)
        if self._absent:
            args, attrs = self._present(args), {name: self._present(arg) for name, arg in attrs.items()}
        try:
            with self._mode, torch.no_grad(), enable_python_dispatcher(), _quiet():  # as torch.export runs them: pad needs it
                result = function(*args, **attrs)
        except Exception as error:
            raise VerifyError(f"{op} refuses these operands: {self._reason(error)}", [f"({self._describe(args)})"]) from error
        self._check_symbols(op)
        if result is None:
            return ()
        return tuple(self._intern(self._plain(item)) for item in (result if isinstance(result, tuple | list) else (result,)))

    def _plain(self, result: Any) -> Any:
        """A result with its sizes in normal form: what reads it compares them as they are written."""
        if isinstance(result, torch.SymInt):
            return self._plain_size(result)
        if not isinstance(result, FakeTensor) or self._unbacked_of(result):
            return result
        sizes, strides = ([self._plain_size(size) for size in found] for found in (result.shape, result.stride()))
        if all(new is old for new, old in zip((*sizes, *strides), (*result.shape, *result.stride()), strict=True)):
            return result
        with self._mode:
            return torch.empty_strided(sizes, strides, dtype=result.dtype, device=result.device)

    def _plain_size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        found = as_dim(size.node.expr)
        return size if found == size.node.expr else self._size_of_inner(found)

    def _check_symbols(self, op: str) -> None:
        """No named symbol may have become a number or another symbol."""
        for inner, replacement in self._env.replacements.items():
            if inner in self._outer:
                fixed = self._to_outer(replacement)
                raise VerifyError(f"{op} works only if {self._outer[inner]} == {fixed}, but {self._outer[inner]} is a dynamic axis")

    def _present(self, arg: Any) -> Any:
        """Device literals moved to the device that stands in."""
        if isinstance(arg, tuple | list):
            return [self._present(item) for item in arg]
        return self.device if isinstance(arg, torch.device) and arg.type == self._absent else arg

    def _reason(self, error: Exception) -> str:
        """The first line of torch's message, with our names for the symbols."""
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        names = {str(inner): str(outer) for inner, outer in self._outer.items()}
        return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), line)

    def _describe(self, arg: Any) -> str:
        if isinstance(arg, FakeTensor | torch.SymInt | torch.SymFloat):
            return str(self.type_of(arg))
        if isinstance(arg, tuple | list):
            return ", ".join(self._describe(item) for item in arg)
        return repr(arg)

    # types

    def type_of(self, result: Any) -> Type:
        """The IR type of a result of `run`; dims are canonical expressions over the named symbols."""
        if isinstance(result, FakeTensor):
            found = self._types.get(id(result))
            if found is None:
                found = TensorType(dtype_name(result.dtype), tuple(self._dim(d) for d in result.shape))
                if self._intern(result) is result:  # kept alive, so its id is not used again
                    self._types[id(result)] = found
            return found
        if isinstance(result, bool | torch.SymBool):
            return ScalarType("bool")
        if isinstance(result, int | torch.SymInt):
            return ScalarType("int", self._dim(result))
        if isinstance(result, float | torch.SymFloat):
            return ScalarType("float", self._dim(result))
        raise VerifyError(f"a result of type {type(result).__name__} has no place in the IR")

    def _dim(self, size: Any) -> Dim:
        if isinstance(size, _SYMBOLIC):
            return as_dim(self._to_outer(size.node.expr))
        return as_dim(size)

    def equal(self, left: Type, right: Type) -> bool:
        """Whether two types are the same: equal, or with dims that are equal within the ranges though they are written differently."""
        if left == right:
            return True
        if isinstance(left, ScalarType) or isinstance(right, ScalarType):
            return isinstance(left, ScalarType) and isinstance(right, ScalarType) and self._equal_scalars(left, right)
        if left.dtype != right.dtype or len(left.shape) != len(right.shape):
            return False
        return all(self._equal_dims(a, b) for a, b in zip(left.shape, right.shape, strict=True))

    def _equal_scalars(self, left: ScalarType, right: ScalarType) -> bool:
        if left.kind != right.kind:
            return False
        if left.value is None or right.value is None:
            return left.value is right.value or left.kind == "bool"
        return self._equal_dims(left.value, right.value)

    def _equal_dims(self, left: Dim, right: Dim) -> bool:
        if left == right:
            return True
        one, other = sympy.sympify(left), sympy.sympify(right)
        claim = sympy.Eq(self._to_inner(one), self._to_inner(other))
        if claim is sympy.true or self._env._maybe_evaluate_static(claim) is sympy.true:
            return True
        return agree(one, other, self._bounds)

    # symbols

    def _backed(self, name: str, bounds: Range, hint: int) -> sympy.Symbol:
        from torch._dynamo.source import ConstantSource  # a second of imports, which only a symbol needs

        # A range of one number would make the environment drop the symbol; the type keeps its name.
        high = int_oo if bounds.high is None else max(bounds.high, bounds.low + 1)
        constraint = StrictMinMaxConstraint(vr=ValueRanges(bounds.low, high), warn_only=False)
        return self._env.create_symbol(hint, ConstantSource(name), DimDynamic.DYNAMIC, constraint, do_not_specialize_zero_one=True)

    def _bind(self, named: sympy.Symbol, inner: sympy.Symbol) -> None:
        self._inner[named] = inner
        self._outer[inner] = named

    def _to_inner(self, expression: sympy.Expr) -> sympy.Expr:
        for unknown in sorted(expression.free_symbols - self._inner.keys(), key=str):
            # Not an axis of the inputs: a size that depended on data in the trace.
            self._bind(unknown, self._env.create_unbacked_symint().node.expr)
        return expression.xreplace(self._inner)

    def _to_outer(self, expression: sympy.Expr) -> sympy.Expr:
        for unknown in sorted(expression.free_symbols - self._outer.keys(), key=str):
            self._bind(self._fresh(), unknown)
        return expression.xreplace(self._outer)

    def _fresh(self) -> sympy.Symbol:
        k = 0
        while symbol(f"u{k}") in self._inner:
            k += 1
        return symbol(f"u{k}")

    def _unbacked_of(self, result: Any) -> frozenset[sympy.Symbol]:
        """Symbols of a result that no name stands for yet."""
        sizes = result.shape if isinstance(result, FakeTensor) else (result,)
        used = {s for size in sizes if isinstance(size, _SYMBOLIC) for s in size.node.expr.free_symbols}
        return frozenset(used - self._env.backed_var_to_val.keys())

    def adopt(self, result: Any, type: Type) -> None:
        """Names data-dependent sizes of `result` as `type`, the stored one, names them, so that names survive a re-inference."""
        if not self._unbacked_of(result) - self._outer.keys():
            return
        if isinstance(result, FakeTensor):
            pairs = list(zip(result.shape, type.shape if isinstance(type, TensorType) else (), strict=False))
        else:
            pairs = [(result, type.value if isinstance(type, ScalarType) else None)]
        for size, dim in pairs:
            inner = size.node.expr if isinstance(size, _SYMBOLIC) else None
            if isinstance(inner, sympy.Symbol) and isinstance(dim, sympy.Symbol) and inner not in self._outer and dim not in self._inner:
                self._bind(dim, inner)


def propagate(graph: Graph, inference: Inference | None = None) -> dict[Value, Any]:
    """Fakes of all values: inputs, constants that are read, results; each operator gets the fakes of the ones before, strides included.

    Raises VerifyError if an operator refuses its operands or a value is read before it is bound.
    """
    inference = inference or Inference(graph.ranges, graph.device)
    return _bind_nodes(inference, graph, {value: inference.fake(value.type) for value in graph.inputs})


def _bind_nodes(inference: Inference, graph: Graph, fakes: dict[Value, Any]) -> dict[Value, Any]:
    for node in graph.nodes:
        results = infer_node(inference, node, fakes)
        if len(results) != len(node.outputs):
            raise VerifyError(f"{node.op} has {len(results)} results, but the node binds {len(node.outputs)}: %{node.name}")
        fakes.update(zip(node.outputs, results, strict=True))
    for value in graph.outputs:
        if isinstance(value, Const):
            _read(inference, value, fakes)
    return fakes


def infer_node(inference: Inference, node: Node, fakes: dict[Value, Any]) -> tuple[Any, ...]:
    """Results of one node, given the fakes of its operands (a Const gets its own when it is met first)."""
    if node.inputs() and _depends_on_data(node.op):
        # Equal types are not equal data: such sizes belong to this very value.
        fakes.update({value: inference.private(_read(inference, value, fakes)) for value in node.inputs()})
    args = [substitute(inference, arg, fakes) for arg in node.args]
    attrs = {name: substitute(inference, arg, fakes) for name, arg in node.attrs.items()}
    results = inference.run(node.op, args, attrs)
    for result, value in zip(results, node.outputs, strict=False):
        inference.adopt(result, value.type)
    return results


def _depends_on_data(op: str) -> bool:
    return bool(_DATA_TAGS.intersection(getattr(resolve(op), "tags", ())))


def substitute(inference: Inference, arg: Arg, fakes: dict[Value, Any]) -> Any:
    """An argument nest with its Values replaced by their fakes."""
    if isinstance(arg, Value):
        return _read(inference, arg, fakes)
    if isinstance(arg, tuple | list):
        return [substitute(inference, item, fakes) for item in arg]
    return arg


def _read(inference: Inference, value: Value, fakes: dict[Value, Any]) -> Any:
    if value not in fakes:
        if not isinstance(value, Const):
            raise VerifyError(f"%{value.name} is read before it is bound")
        fakes[value] = inference.fake(value.type)
    return fakes[value]


# Higher-order operators: their sub-graphs, each with the operands it is called with. The first gives the results.
_BODIES: Mapping[str, Callable[[Sequence[Any]], tuple[tuple[Any, Sequence[Any]], ...]]] = {
    "higher_order.cond": lambda a: ((a[1], a[3] if len(a) > 3 else ()), (a[2], a[3] if len(a) > 3 else ())),
    "higher_order.while_loop": lambda a: ((a[1], (*a[2], *a[3])), (a[0], (*a[2], *a[3]))),
    "higher_order.wrap_with_set_grad_enabled": lambda a: ((a[1], a[2:]),),
    "higher_order.wrap_with_autocast": lambda a: ((a[4], a[5:]),),
}


def called_bodies(inference: Inference, node: Node, fakes: dict[Value, Any]) -> tuple[tuple[Graph, Sequence[Any]], ...]:
    """The sub-graphs that a node runs, each with the fakes of its operands; () for an ordinary operator."""
    if node.op not in _BODIES:
        return ()
    return _BODIES[node.op]([substitute(inference, arg, fakes) for arg in node.args])


def _call(inference: Inference, op: str, graph: Graph, operands: Sequence[Any]) -> tuple[Any, ...]:
    if len(graph.inputs) != len(operands):
        raise VerifyError(f"{op} calls a sub-graph of {len(graph.inputs)} inputs with {len(operands)} operands")
    fakes = _bind_nodes(inference, graph, dict(zip(graph.inputs, operands, strict=True)))
    return tuple(substitute(inference, value, fakes) for value in graph.outputs)


def _hints(ranges: Iterable[Range]) -> list[int]:
    """A number in each range, all distinct where the ranges allow it, primes where they are wide enough."""
    found: list[int] = []
    for bounds in ranges:
        start = max(_FIRST_HINT, bounds.low)
        if bounds.high is None or start < bounds.high:
            candidates: Iterable[int] = range(start, min(bounds.high or start + 10_000, start + 10_000) + 1)
        else:
            candidates = range(bounds.high, max(bounds.low, bounds.high - 10_000) - 1, -1)
        free = [k for k in candidates if k not in found]
        found.append(next(filter(_is_prime, free), next(iter(free), bounds.low)))
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, int(number**0.5) + 1))


def _oblivious() -> AbstractContextManager[None]:
    """Axes of size 1 are no special case: an operator may not look at the hint to tell a broadcast from a full axis."""
    patched: AbstractContextManager[None] = shape_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from logging the traceback of an error that we raise anyway."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _freeze(arg: Any) -> Any:
    """A hashable key; fakes are interned, so their identity stands for their metadata."""
    if isinstance(arg, torch.Tensor):
        return ("tensor", id(arg))
    if isinstance(arg, _SYMBOLIC):
        return (type(arg), arg.node.expr)
    if isinstance(arg, tuple | list):
        return tuple(_freeze(item) for item in arg)
    return (type(arg), arg)
