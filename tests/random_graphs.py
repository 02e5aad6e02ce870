"""Small random graphs for property tests, and a plain way to run them that shares nothing with the package's own executors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st

from matmorph.ir.build import Builder
from matmorph.ir.core import Const, Graph, Input, Origin, Range, Signature, Value
from matmorph.ir.infer import Inference
from matmorph.ir.text.tree import default_specs
from matmorph.ir.types import TensorType, symbol

RANGES = {"batch": Range(), "seq": Range(1, 64)}
ORIGINS = (
    Origin(),
    Origin((("", "Net"),)),
    Origin((("", "Net"), ("encoder.layer.0", "Layer"), ("encoder.layer.0.fc", "Linear")), layer=0, source='net.py:3: x = f("a")'),
    Origin((("a", "A"), ("shared:b/c", "B=%"), ("shared:b/c", "C")), layer=12, rule="mlp", location="spec.yaml:7"),
)


def graph_of(builder: Builder, inputs: Sequence[Value], outputs: Sequence[Any], ranges: Mapping[str, Range] = RANGES, **rest: Any) -> Graph:
    """The graph of all that a builder collected, called with positional inputs."""
    names = ("output",) if len(outputs) == 1 else tuple(f"output_{k}" for k in range(len(outputs)))
    in_spec, out_spec = default_specs(len(inputs), len(outputs))
    signature = Signature(tuple(Input(value.name, value) for value in inputs), in_spec, names, out_spec)
    return Graph(signature, tuple(builder.nodes), tuple(outputs), tuple(builder.consts), dict(ranges), **rest)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """One to eight operators over `x: float32[batch, seq, 8]`, with weights and origins."""
    b = Builder(RANGES, {"x"}, inference=_inference())
    x = Value("x", TensorType("float32", (symbol("batch"), symbol("seq"), 8)))
    pool = [x]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for _ in range(draw(st.integers(1, 8))):
        b.origin = draw(st.sampled_from(ORIGINS))
        value = draw(st.sampled_from(pool))
        step = draw(st.sampled_from([name for name, (fits, _) in STEPS.items() if fits(value)]))
        pool += STEPS[step][1](b, value, generator)
    outputs = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3))
    return graph_of(b, [x], outputs)


@cache
def _inference() -> Inference:
    """Shared by all examples, which repeat the same few operators."""
    return Inference(RANGES)


def _last(value: Value) -> Any:
    return value.tensor.shape[-1]


def _weight(b: Builder, name: str, generator: torch.Generator, *shape: int) -> Const:
    return b.const(name, torch.randn(shape, generator=generator) / 8, trainable=True)


def _linear(b: Builder, x: Value, generator: torch.Generator) -> list[Value]:
    place = f"fc{len(b.consts)}"
    weight = _weight(b, f"{place}.weight", generator, 6, _last(x))
    return [b("aten.linear.default", x, weight, _weight(b, f"{place}.bias", generator, 6))]


def _reshape(b: Builder, x: Value, generator: torch.Generator) -> list[Value]:
    return [b("aten.reshape.default", x, [b.size(x, 0), -1, 1, _last(x)])]


STEPS: Mapping[str, tuple[Callable[[Value], bool], Callable[[Builder, Value, torch.Generator], list[Value]]]] = {
    "linear": (lambda v: isinstance(_last(v), int), _linear),
    "reshape": (lambda v: isinstance(_last(v), int) and len(v.tensor.shape) < 4, _reshape),
    "flatten": (lambda v: isinstance(_last(v), int), lambda b, v, _: [b("aten.reshape.default", v, [-1, _last(v)])]),
    "add": (lambda v: True, lambda b, v, _: [b("aten.add.Tensor", v, b("aten.relu.default", v), alpha=0.1)]),
    "softmax": (lambda v: True, lambda b, v, _: [b("aten.softmax.int", v, dim=-1)]),
    "transpose": (lambda v: True, lambda b, v, _: [b("aten.transpose.int", v, -1, -2, name="swapped")]),
    "cat": (lambda v: True, lambda b, v, _: [b("aten.cat.default", [v, v], 0)]),
    "split": (lambda v: _last(v) in (6, 8), lambda b, v, _: list(b.many("aten.split.Tensor", v, 4, dim=-1))),
    "matmul": (lambda v: True, lambda b, v, _: [b("aten.matmul.default", v, b("aten.transpose.int", v, -1, -2))]),
    "mask": (
        lambda v: not isinstance(_last(v), int),
        lambda b, v, _: [b("aten.add.Tensor", v, b("aten.arange.default", b.size(v, -1), device=torch.device("cpu"), pin_memory=False))],
    ),
}


def run(graph: Graph, inputs: Sequence[torch.Tensor]) -> dict[Value, Any]:
    """Every value of a graph without sub-graphs, computed by calling torch's operators one after the other."""
    found: dict[Value, Any] = {const: const.load() for const in graph.state} | dict(zip(graph.inputs, inputs, strict=True))

    def read(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return [read(item) for item in arg]
        return found[arg] if isinstance(arg, Value) else arg

    for node in graph.nodes:
        function: Any = torch.ops
        for part in node.op.split("."):
            function = getattr(function, part)
        result = function(*read(node.args), **{key: read(arg) for key, arg in node.attrs.items()})
        found.update(zip(node.outputs, result if isinstance(result, tuple | list) else (result,), strict=True))
    return found
