"""Inferred types are those of real tensors, at every size in range, and no symbol is ever fixed behind our back."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given
from random_graphs import RANGES, graph_of, graphs, run

from matmorph.errors import VerifyError
from matmorph.ir.build import Builder
from matmorph.ir.core import Const, Graph, Range, Value
from matmorph.ir.infer import Inference, propagate
from matmorph.ir.text.printing import parse_graph
from matmorph.ir.types import ScalarType, TensorType, format_dim, parse_dim, symbol

BATCH, SEQ = symbol("batch"), symbol("seq")


def tensor(*shape: object, dtype: str = "float32") -> TensorType:
    return TensorType(dtype, tuple(parse_dim(str(dim)) for dim in shape))


@pytest.fixture
def inference() -> Inference:
    return Inference({"batch": Range(), "seq": Range(2, 512)})


def types(inference: Inference, op: str, *args: object, **attrs: object) -> list[str]:
    fakes = [inference.fake(arg) if isinstance(arg, TensorType | ScalarType) else arg for arg in args]
    return [str(inference.type_of(result)) for result in inference.run(op, fakes, attrs)]


def at(dim: object, sizes: dict[str, int]) -> int:
    return int(sympy.sympify(dim).subs({symbol(name): size for name, size in sizes.items()}))


@given(graphs())
def test_types_are_those_of_real_tensors(graph: Graph) -> None:
    for sizes in ({"batch": 1, "seq": 1}, {"batch": 1, "seq": 5}, {"batch": 3, "seq": 4}):
        x = torch.ones(sizes["batch"], sizes["seq"], 8)
        for value, result in run(graph, [x]).items():
            if isinstance(value.type, TensorType):
                assert tuple(result.shape) == tuple(at(dim, sizes) for dim in value.tensor.shape), value
                assert result.dtype == value.tensor.torch_dtype
            else:
                assert result == at(value.type.value, sizes)


@given(graphs())
def test_strides_are_carried_along(graph: Graph) -> None:
    fakes = propagate(graph)
    real = run(graph, [torch.ones(3, 5, 8)])
    assert set(real) <= set(fakes) | set(graph.state)
    for value, fake in fakes.items():
        # An axis of size 1 may have any stride in either, so only larger ones are compared.
        if isinstance(fake, torch.Tensor) and all(size > 1 for size in real[value].shape):
            assert fake.is_contiguous() == real[value].is_contiguous()


@pytest.mark.parametrize(
    ("op", "args", "attrs", "expected"),
    [
        ("aten.linear.default", (tensor("batch", "seq", 8), tensor(4, 8), None), {}, ["float32[batch, seq, 4]"]),
        ("aten.view.default", (tensor("batch", "seq", 8), (-1, 8)), {}, ["float32[batch*seq, 8]"]),
        ("aten.split.Tensor", (tensor("batch", 7), 3, 1), {}, ["float32[batch, 3]", "float32[batch, 3]", "float32[batch, 1]"]),
        ("aten.topk.default", (tensor("batch", 9), 2), {}, ["float32[batch, 2]", "int64[batch, 2]"]),
        ("aten.cat.default", ((tensor(2), tensor(3)),), {}, None),
        ("aten.arange.default", (ScalarType("int", SEQ),), {"device": torch.device("cpu"), "pin_memory": False}, ["int64[seq]"]),
        ("aten.sym_size.int", (tensor("batch", "4*seq"), 1), {}, ["int(4*seq)"]),
        ("aten.sym_size.int", (tensor("batch", 3), 1), {}, ["int(3)"]),
        ("aten.mul.Tensor", (tensor("seq"), ScalarType("int", SEQ)), {}, ["float32[seq]"]),
        ("aten._to_copy.default", (tensor("seq"),), {"dtype": torch.float16}, ["float16[seq]"]),
        ("aten.bmm.default", (tensor("batch", "seq", 8), tensor("batch", 8, "seq")), {}, ["float32[batch, seq, seq]"]),
        ("aten.nonzero.default", (tensor("seq"),), {}, ["int64[u0, 1]"]),
        ("aten._assert_async.default", (tensor(dtype="bool"),), {}, []),
        ("operator.floordiv", (ScalarType("int", SEQ + 3), 4), {}, ["int(((seq + 3)//4))"]),
        ("operator.mod", (ScalarType("int", SEQ), 4), {}, ["int(Mod(seq, 4))"]),
        ("operator.truediv", (ScalarType("int", SEQ), 4), {}, ["float(IntTrueDiv(seq, 4))"]),
        ("operator.eq", (ScalarType("int", SEQ), 4), {}, ["bool"]),
        ("math.ceil", (ScalarType("float", parse_dim("IntTrueDiv(seq, 4)")),), {}, ["int(CeilToInt(IntTrueDiv(seq, 4)))"]),
        ("torch.sym_max", (ScalarType("int", SEQ), 4), {}, ["int(Max(4, seq))"]),
        ("torch.sym_float", (ScalarType("int", SEQ),), {}, ["float(ToFloat(seq))"]),
    ],
)
def test_operators(inference: Inference, op: str, args: tuple, attrs: dict, expected: list[str] | None) -> None:
    if expected is None:
        args, expected = ([inference.fake(item) for item in args[0]],), ["float32[5]"]
    assert types(inference, op, *args, **attrs) == expected


def test_an_axis_of_size_one_is_no_special_case(inference: Inference) -> None:
    assert types(inference, "aten.add.Tensor", tensor("batch", 8), tensor(1, 8)) == ["float32[batch, 8]"]
    assert types(inference, "aten.view.default", tensor("batch", "seq", 8), (-1, 1, 8)) == ["float32[batch*seq, 1, 8]"]
    assert types(inference, "aten.squeeze.dim", tensor(1, "batch"), 0) == ["float32[batch]"]


def test_an_operator_may_not_unify_axes(inference: Inference) -> None:
    with pytest.raises(VerifyError, match=r"aten\.add\.Tensor refuses .*\(seq\) must match .*\(batch\)") as caught:
        types(inference, "aten.add.Tensor", tensor("batch", "seq"), tensor("seq", "batch"))
    assert caught.value.details == ("(float32[batch, seq], float32[seq, batch])",)


def test_an_operator_may_not_fix_an_axis(inference: Inference) -> None:
    with pytest.raises(VerifyError, match=r"math\.sqrt works only if seq == \d+, but seq is a dynamic axis"):
        types(inference, "math.sqrt", ScalarType("int", SEQ))


def test_a_view_that_the_strides_forbid_is_refused(inference: Inference) -> None:
    (swapped,) = inference.run("aten.transpose.int", (inference.fake(tensor("batch", "seq", 8)), 1, 2))
    with pytest.raises(VerifyError, match=r"aten\.view\.default refuses"):
        inference.run("aten.view.default", (swapped, (-1, 8)))
    assert types(inference, "aten.clone.default", tensor(2)) == ["float32[2]"]


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda:0"])
def test_no_device_is_needed(device: str) -> None:
    inference = Inference(RANGES, device)
    heads = tensor("batch", 2, "seq", 4)
    assert types(inference, "aten.scaled_dot_product_attention.default", heads, heads, heads) == [str(heads)]
    assert types(inference, "aten.zeros.default", (3,), device=torch.device(device), pin_memory=False) == ["float32[3]"]


def test_hints_are_distinct_and_in_range() -> None:
    ranges = {"a": Range(), "b": Range(), "c": Range(2, 3), "d": Range(2, 3), "e": Range(5, 5), "f": Range(4000, None), "g": Range(1, 64)}
    inference = Inference(ranges)
    sizes = {name: inference.fake(ScalarType("int", symbol(name))).node.hint for name in ranges}
    assert all(bounds.low <= sizes[name] <= (bounds.high or sizes[name]) for name, bounds in ranges.items())
    assert len({sizes[name] for name in "abcdfg"}) == 6
    assert str(inference.type_of(inference.fake(tensor("e")))) == "float32[e]"


def test_the_same_work_is_done_once(inference: Inference) -> None:
    first, second = (inference.fake(tensor("batch", 8)) for _ in range(2))
    assert first is second
    weight = inference.fake(tensor(4, 8))
    assert inference.run("aten.linear.default", (first, weight))[0] is inference.run("aten.linear.default", (second, weight))[0]
    # Equal numbers of another type are another operand.
    assert types(inference, "aten.full.default", (2,), 1, pin_memory=False) == ["int64[2]"]
    assert types(inference, "aten.full.default", (2,), 1.0, pin_memory=False) == ["float32[2]"]
    assert types(inference, "aten.full.default", (2,), True, pin_memory=False) == ["bool[2]"]


def test_equal_types_may_be_written_differently(inference: Inference) -> None:
    assert inference.equal(tensor("seq//1 + 0*batch"), tensor("seq"))
    assert inference.equal(tensor("Max(seq, 1)"), tensor("seq"))  # seq >= 2
    assert not inference.equal(tensor("Max(seq, 3)"), tensor("seq"))
    assert not inference.equal(tensor("seq"), tensor("batch"))
    assert not inference.equal(tensor("seq"), tensor("seq", dtype="int64"))
    assert not inference.equal(ScalarType("int", SEQ), tensor("seq"))


COND = """graph device=cpu
range batch 1..
input %x: float32[batch, 8] "x"
input %c: bool[] "c"
%y: float32[8, batch] = higher_order.cond(%c, graph device=cpu {
    input %h: float32[batch, 8] "h"
    %r: float32[8, batch] = aten.t.default(%h)
    output %r "output"
}, graph device=cpu {
    input %h: float32[batch, 8] "h"
    %s: float32[8, batch] = aten.t.default(%h)
    output %s "output"
}, [%x])
output %y "output"
"""


def test_a_sub_graph_gives_the_type_of_its_operator() -> None:
    graph = parse_graph(COND)
    fake = propagate(graph)[graph.nodes[0].output]
    assert [format_dim(d) for d in graph.nodes[0].output.tensor.shape] == ["8", "batch"]
    assert not fake.is_contiguous()


def test_a_data_dependent_size_keeps_its_name_and_belongs_to_its_value() -> None:
    text = """graph device=cpu
    range seq 1..
    input %x: float32[seq] "x"
    input %y: float32[seq] "y"
    %first: int64[rows, 1] = aten.nonzero.default(%x)
    %second: int64[others, 1] = aten.nonzero.default(%y)
    %third: int64[rows, 1] = aten.nonzero.default(%x)
    %view: int64[rows] = aten.view.default(%first, [-1])
    output %view "output"
    """
    graph = parse_graph(text)
    inference = Inference(graph.ranges)
    fakes = propagate(graph, inference)
    assert [inference.type_of(fakes[node.output]) for node in graph.nodes] == [node.output.type for node in graph.nodes]


def test_reading_an_unbound_value_is_an_error() -> None:
    b = Builder(RANGES)
    x, stranger = Value("x", tensor("batch")), Value("stranger", tensor("batch"))
    b("aten.add.Tensor", x, stranger)
    with pytest.raises(VerifyError, match="%stranger is read before it is bound"):
        propagate(graph_of(b, [x], [x]))


def test_builder_names_types_and_origins() -> None:
    b = Builder(RANGES, {"matmul"})
    x = Value("x", tensor("batch", "seq", 8))
    down = b.const("query.low_rank.down", torch.zeros(8, 2), trainable=True)
    later = b.const("query.low_rank.up", lambda: torch.ones(2, 4), TensorType("float32", (2, 4)), rule="mlp")
    first = b("aten.matmul.default", x, down)
    second = b("aten.matmul.default", first, later)
    halves = b.many("aten.split.Tensor", second, 2, dim=-1, name="half")
    assert [value.name for value in (down, first, second, *halves)] == ["query.low_rank.down", "matmul_1", "matmul_2", "half", "half_1"]
    assert str(second.type) == "float32[batch, seq, 4]"
    assert (down.names, down.storage, down.trainable, later.rule) == (("query.low_rank.down",), "query.low_rank.down", True, "mlp")
    assert torch.equal(later.load(), torch.ones(2, 4))
    assert b.nodes[-1].args == (second, 2, -1)
    assert b.size(x, 2) == 8
    assert str(b.size(x, -2).type) == "int(seq)"
    assert all(isinstance(const, Const) for const in b.consts)


def test_builder_refuses_what_it_cannot_infer() -> None:
    b = Builder(RANGES)
    x = Value("x", tensor("batch", 8))
    with pytest.raises(VerifyError, match="type must be given"):
        b.const("w", lambda: torch.ones(2))
    with pytest.raises(VerifyError, match="has 2 results where one is expected"):
        b("aten.split.Tensor", x, 4, 1)
    with pytest.raises(VerifyError, match="refuses"):
        b("aten.linear.default", x, b.const("w", torch.ones(4, 9)))
