"""Check vectors: inputs of several shapes and what torch answers to them, against which ONNX Runtime is held here and on any machine later.

The inputs are the example's own values, cropped or repeated along the dynamic axes, so that token ids stay token ids. A model in half
precision answers in float32, as its export does: torch's own rounding to 3 digits would hide the export's errors behind its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import sympy
import torch

from matmorph.errors import InputError
from matmorph.ir.core import Const, Graph, Node, Range, Value
from matmorph.ir.evaluate import Runner, evaluate
from matmorph.ir.ops import resolve
from matmorph.ir.sites.attention_masks import attention_masks
from matmorph.ir.types import Dim, TensorType, dim_symbols, symbol
from matmorph.runtime.format.cases import Case

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """`cases`, the example's shape first; `notes`: shapes at which the model itself fails."""

    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()


def check_vectors(graph: Graph, examples: Sequence[torch.Tensor], precision: str = "fp32", run: Runner | None = None) -> Vectors:
    """Cases at up to three shapes: the example's, the smallest first axis with half of every other, and a larger one; where inputs are
    attention masks, the example once more with rows that are padded on the left and on the right.

    examples: flat tensor inputs in `graph.inputs` order, on the graph's device. precision: of the export; under "keep" a model in half
    precision answers in it. run: what computes a node in place of torch's own operator. A static model has one shape. Raises InputError for
    a graph whose weights are on the meta device.
    """
    if graph.device == "meta":
        raise InputError("the model is on the meta device and has no weights: it can be planned, not compiled")
    own = example_sizes(graph.inputs, examples)
    running = graph if precision == "keep" else widened(graph)
    examples = [tensor.float() if running is not graph and tensor.dtype in HALVES else tensor for tensor in examples]
    answer = partial(answered, running, run=run)
    _, *others = check_shapes(own, graph.ranges)
    cases = [answer(examples)]
    notes: list[str] = []
    for sizes in others:
        inputs = [resized(tensor, value, sizes) for tensor, value in zip(examples, graph.inputs, strict=True)]
        try:
            cases.append(answer(inputs))
        except (RuntimeError, IndexError) as error:
            at = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            notes.append(f"not checked at {at}: the model itself fails there ({str(error).splitlines()[0]})")
    for inputs in padded_examples(graph, examples):
        case = answer(inputs)
        if _is_finite(case) or not _is_finite(cases[0]):
            cases.append(case)
        else:
            notes.append("not checked with padding: the model itself answers NaN or infinity there")
    return Vectors(tuple(cases), tuple(notes))


def answered(graph: Graph, inputs: Sequence[torch.Tensor], run: Runner | None) -> Case:
    """The inputs and what the graph makes of them, by name."""
    with torch.no_grad():
        results = evaluate(graph, inputs, run=run)
    named = zip((entry.name for entry in graph.signature.inputs if entry.value is not None), inputs, strict=True)
    outputs = zip(graph.signature.outputs, results, graph.outputs, strict=True)
    return Case({n: _array(t) for n, t in named}, {n: _array(t) for n, t, output in outputs if isinstance(output, Value)})


def _is_finite(case: Case) -> bool:
    return all(np.isfinite(array).all() for array in case.outputs.values() if array.dtype.kind == "f")


def padded_examples(graph: Graph, examples: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The examples with half of each row masked, every other row on its left, the rest on the right; a lone row once each. Nothing where no
    input is an attention mask of zeros and ones."""
    masks = [value for value in attention_masks(graph) if _is_binary(dict(zip(graph.inputs, examples, strict=True))[value])]
    if not masks:
        return
    rows = max(tensor.shape[0] for tensor, value in zip(examples, graph.inputs, strict=True) if value in masks)
    for start in (0, 1) if rows == 1 else (0,):
        yield [_padded(tensor, start) if value in masks else tensor for tensor, value in zip(examples, graph.inputs, strict=True)]


def _is_binary(tensor: torch.Tensor) -> bool:
    return tensor.shape[-1] > 1 and bool(((tensor == 0) | (tensor == 1)).all())


def _padded(mask: torch.Tensor, start: int) -> torch.Tensor:
    """What most of the mask says means visible; a boolean one may be either way round."""
    hidden = 0 if mask.float().mean() >= 0.5 else 1
    half = mask.shape[-1] // 2
    padded = mask.clone()
    padded[start::2, ..., :half] = hidden
    padded[1 - start :: 2, ..., -half:] = hidden
    return padded


def example_sizes(values: Sequence[Value], examples: Sequence[torch.Tensor]) -> dict[str, int]:
    """Sizes of the examples of some inputs by symbol, in order of first use; none where they do not follow from the shapes."""
    shapes = [(value.tensor.shape, tensor.shape) for value, tensor in zip(values, examples, strict=True)]
    pairs = [(dim, int(size)) for dims, given in shapes for dim, size in zip(dims, given, strict=True)]
    sizes: dict[str, int] = {}
    for dim, size in sorted(pairs, key=lambda pair: not isinstance(pair[0], sympy.Symbol)):  # "seq" before "2*seq"
        unknown = dim_symbols([dim]) - sizes.keys()
        if len(unknown) == 1:
            equation = sympy.Eq(sympy.sympify(dim).subs({symbol(name): known for name, known in sizes.items()}), size)
            solved = sympy.solve(equation, symbol(*unknown))
            sizes.update({name: int(found) for name in unknown for found in solved[:1] if found.is_integer})
    return sizes if all(dim_symbols([dim]) <= sizes.keys() for dim, _ in pairs) else {}


def check_shapes(own: Mapping[str, int], ranges: Mapping[str, Range]) -> list[dict[str, int]]:
    """The example's sizes, smaller and larger ones within `ranges`; where an axis may be empty, the example's with nothing there, and
    with one of everything beside it but of the first axis (one token and its past). One empty dict where nothing is dynamic."""
    if not own:
        return [{}]
    limits = {name: ranges.get(name, Range()) for name in own}
    first = next(iter(own))
    small = {name: limits[name].low if name == first else max(size // 2, limits[name].low) for name, size in own.items()}
    large = {name: min(size + 1 + 2 * (name != first), limits[name].high or size + 3) for name, size in own.items()}
    shapes = [dict(own), small, large]
    empty = [name for name in own if limits[name].low == 0]
    if empty:
        shapes.append({**own, **dict.fromkeys(empty, 0)})
        shapes.append({name: size if name == first or name in empty else limits[name].low for name, size in own.items()})
    return [dict(shape) for shape in dict.fromkeys(tuple(shape.items()) for shape in shapes)]


def resized(tensor: torch.Tensor, value: Value, sizes: Mapping[str, int]) -> torch.Tensor:
    """An input's example cropped or repeated to `sizes`."""
    for axis, dim in enumerate(value.tensor.shape if sizes else ()):
        wanted = concrete(dim, sizes)
        if wanted != tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.arange(wanted, device=tensor.device) % tensor.shape[axis])
    return tensor


def concrete(dim: Dim, sizes: Mapping[str, int]) -> int:
    """A dim at given sizes of the symbols."""
    return dim if isinstance(dim, int) else int(dim.subs({symbol(name): size for name, size in sizes.items()}))


def widened(graph: Graph, to: torch.dtype = torch.float32) -> Graph:
    """The graph with `to` (float32 or float64) in the place of every narrower floating type, for `evaluate`: stored types stay. The graph
    itself where it has none."""
    narrow = HALVES if to is torch.float32 else (*HALVES, torch.float32)
    known = {const: _wide(const, to) for const in graph.used_state() if const.tensor.torch_dtype in narrow}
    values = (*graph.inputs, *(value for node in graph.nodes for value in node.outputs))
    if not known and not any(isinstance(value.type, TensorType) and value.type.torch_dtype in narrow for value in values):
        return graph

    def change(arg: Any) -> Any:
        if isinstance(arg, tuple | list):
            return type(arg)(map(change, arg))
        if isinstance(arg, Graph):
            return widened(arg, to)
        if isinstance(arg, torch.dtype):
            return to if arg in narrow else arg
        return known.get(arg, arg) if isinstance(arg, Const) else arg

    def rewritten(node: Node) -> Node:
        made = {"dtype": to} if _makes(node, narrow) else {}
        return replace(node, args=change(node.args), attrs={**{name: change(arg) for name, arg in node.attrs.items()}, **made})

    return replace(graph, nodes=tuple(map(rewritten, graph.nodes)), outputs=change(graph.outputs))


def _makes(node: Node, narrow: Sequence[torch.dtype]) -> bool:
    """Whether the node makes a tensor of a narrow type out of nothing and says no type: `zeros` has torch's default one."""
    if "dtype" in node.attrs or any(isinstance(value.type, TensorType) for value in node.inputs()):
        return False
    types = [value.type for value in node.outputs]
    if not any(isinstance(kind, TensorType) and kind.torch_dtype in narrow for kind in types):
        return False
    schema = getattr(resolve(node.op), "_schema", None)
    return schema is not None and any(argument.name == "dtype" and argument.kwarg_only for argument in schema.arguments)


def _wide(const: Const, to: torch.dtype) -> Const:
    return replace(const, load=lambda: const.load().to(to))


def _array(value: object) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    plain = value.detach().cpu()
    return plain.float().numpy() if plain.dtype == torch.bfloat16 else plain.numpy()
