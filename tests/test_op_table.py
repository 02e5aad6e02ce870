"""The table of operators against torch itself: what runs in torch and what torch's schemas say, not what a pass makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import quantizing
import rewriting
import torch
from handmade import graph_of
from pruning import pruned, spec_of
from torch import Tensor, nn

from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.ir import op_table
from matmorph.ir.core import Node, Value
from matmorph.ir.evaluate import evaluate
from matmorph.ir.op_reading import axes_over, operands_of, permutation
from matmorph.ir.op_table import BARE_PRODUCTS, BROADCASTING, LAYOUT_OPS, OPERATORS, PRODUCTS, having, of_kind
from matmorph.ir.ops import base_name, resolve
from matmorph.ir.sites import matmul_forms, roles, weight_view
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.text.printing import print_graph
from matmorph.ir.tracing.trace import trace
from matmorph.ir.training import cleanup_rules, narrowing
from matmorph.ir.training.adjoints.table import ADJOINT_RULES as ADJOINTS
from matmorph.ir.training.gradient_cleanup import simplify_gradient
from matmorph.ir.training.narrowing import narrow
from matmorph.ir.types import TensorType, dtype_name
from matmorph.ir.verify import verify
from matmorph.passes import sizes
from matmorph.passes.pruning import axis_rules, axis_walk
from matmorph.passes.rewriting import row_view
from matmorph.passes.rewriting.rewrite import rewrite
from matmorph.specs.schema import Export

ROUNDING = 1e-6  # of float32, which torch makes of integers: its vector and its scalar loops differ in the last place
ELEMENTWISE = of_kind("elementwise")
SHAPES = ((3, 4, 5), (4, 1), (3, 1, 5))  # of the operands in order: leading axes that are not there, axes of size 1


def overloads(name: str) -> Iterator[Any]:
    """Those on tensors that give a new one."""
    packet = getattr(torch.ops.aten, name)
    for overload in (getattr(packet, label) for label in packet.overloads()):
        arguments = overload._schema.arguments
        if arguments and str(arguments[0].type) == "Tensor" and not any(argument.is_out for argument in arguments):
            yield overload


def tensors(overload: Any) -> list[int]:
    return [k for k, argument in enumerate(overload._schema.arguments) if str(argument.type) in ("Tensor", "Optional[Tensor]")]


def value(tensor: Tensor, name: str = "v") -> Value:
    return Value(name, TensorType(dtype_name(tensor.dtype), tuple(tensor.shape)))


def node(op: str, *args: Any) -> Node:
    """The node of this call, its types as torch has them."""
    held = tuple(value(arg) if isinstance(arg, Tensor) else arg for arg in args)
    result = resolve(op)(*args)
    results = result if isinstance(result, tuple | list) else (result,)
    return Node(op, held, tuple(value(item) for item in results))


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    numbers = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))) + 0.25
    return numbers > 0.7 if dtype == torch.bool else (numbers * (8 if dtype == torch.int64 else 1)).to(dtype)


# the table itself


def test_every_operator_exists() -> None:
    ours = torch.ops.matmorph
    assert {name for name in OPERATORS if not hasattr(torch.ops.aten, name) and not hasattr(ours, name)} == set()


def test_an_operator_has_one_kind() -> None:
    assert sorted(name for names, _ in op_table._FAMILIES for name in names.split()) == sorted(OPERATORS)


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_the_operands_of_an_elementwise_operator_are_its_tensors(name: str) -> None:
    found = {k for overload in overloads(name) for k in tensors(overload)}
    assert found <= set(OPERATORS[name].operands)
    assert 0 in found
    assert len(found) > 1 or len(OPERATORS[name].operands) == 1


def arguments(overload: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments by position: broadcasting tensors, numbers where the schema has no default."""
    shapes = iter(SHAPES)
    found: list[Any] = []
    for argument in overload._schema.arguments:
        kind = str(argument.type)
        if argument.kwarg_only:
            break
        if kind == "Tensor" and argument.name in ("mask", "condition"):
            found.append(filled(next(shapes), torch.bool))
        elif kind == "Tensor" and overload.name() == "aten::masked_fill.Tensor" and argument.name == "value":
            found.append(torch.tensor(2, dtype=dtype))  # a number, as a tensor
        elif kind in ("Tensor", "Optional[Tensor]"):
            found.append(filled(next(shapes), dtype))
        elif argument.has_default_value():
            found.append(argument.default_value)
        else:
            found.append(2)
    return tuple(found)


def calls(name: str) -> Iterator[tuple[Any, tuple[Any, ...], Tensor]]:
    """(overload, arguments, result) for every overload and number type that torch takes."""
    for overload in overloads(name):
        for dtype in (torch.float64, torch.int64, torch.bool):
            given = arguments(overload, dtype)
            try:
                result = overload(*given)
            except (RuntimeError, TypeError):
                continue
            if isinstance(result, Tensor):
                yield overload, given, result


def cut(tensor: Any, rank: int, axis: int, index: int) -> Any:
    """One index of an axis of the broadcast, in an operand."""
    own = axis - (rank - tensor.dim()) if isinstance(tensor, Tensor) else -1
    return tensor if own < 0 or tensor.shape[own] == 1 else tensor.narrow(own, index, 1)


@pytest.mark.parametrize("name", sorted(BROADCASTING - having(BROADCASTING, random=True)))
def test_a_part_of_the_result_is_the_result_of_parts(name: str) -> None:
    """What narrowing, pruning and the clean-up of gradients rely on, for every axis: operands are aligned at their last."""
    seen = 0
    for overload, given, result in calls(name):
        for axis, size in enumerate(result.shape):
            parts = tuple(cut(arg, result.dim(), axis, size - 1) for arg in given)
            torch.testing.assert_close(overload(*parts), result.narrow(axis, size - 1, 1), rtol=ROUNDING, atol=0, equal_nan=True)
            seen += 1
    assert seen


def test_the_slopes_of_prelu_are_not_aligned_at_the_last_axis() -> None:
    assert not OPERATORS["prelu"].aligned
    x, slope = -torch.ones(2, 3, 3), torch.tensor([1.0, 2.0, 3.0])
    result = torch.ops.aten.prelu.default(x, slope)
    assert not torch.equal(result, x * slope)
    assert torch.equal(result, x * slope[:, None])


ORDERS = {
    "t": ("aten.t.default", (2, 3), ()),
    "t of a vector": ("aten.t.default", (3,), ()),
    "transpose": ("aten.transpose.int", (2, 3, 4), (0, -1)),
    "swapaxes": ("aten.swapaxes.default", (2, 3, 4), (-3, 1)),
    "swapdims": ("aten.swapdims.default", (2, 3, 4), (2, 1)),
    "permute": ("aten.permute.default", (2, 3, 4), ([2, 0, -2],)),
    "movedim": ("aten.movedim.int", (2, 3, 4, 5), (0, 2)),
    "movedim of several": ("aten.movedim.intlist", (2, 3, 4, 5), ([0, -1], [2, 0])),
    "numpy_T": ("aten.numpy_T.default", (2, 3, 4), ()),
    "mT": ("aten.mT.default", (2, 3, 4), ()),
    "mH": ("aten.mH.default", (2, 3, 4), ()),
    "adjoint": ("aten.adjoint.default", (2, 3, 4), ()),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.filterwarnings("ignore:The use of .x.T. on tensors:UserWarning")
def test_a_permutation_is_what_torch_does(name: str) -> None:
    op, shape, args = ORDERS[name]
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    assert torch.equal(resolve(op)(x, *args), x.permute(permutation(node(op, x, *args))))


def test_every_permutation_is_tried() -> None:
    assert {base_name(op) for op, _, _ in ORDERS.values()} == of_kind("permute")


OVER = {
    "softmax": ("aten.softmax.int", (-1,), (2,)),
    "_softmax": ("aten._softmax.default", (1, False), (1,)),
    "_safe_softmax": ("aten._safe_softmax.default", (0,), (0,)),
    "log_softmax": ("aten.log_softmax.int", (2,), (2,)),
    "layer_norm": ("aten.layer_norm.default", ([4, 5],), (1, 2)),
    "rms_norm": ("aten.rms_norm.default", ([5],), (2,)),
    "native_layer_norm": ("aten.native_layer_norm.default", ([5], None, None, 1e-5), (2,)),
    "sum of all": ("aten.sum.default", (), (0, 1, 2)),
    "sum": ("aten.sum.dim_IntList", ([0, -1],), (0, 2)),
    "sum of no list": ("aten.sum.dim_IntList", ((),), (0, 1, 2)),
    "amax": ("aten.amax.default", ([1],), (1,)),
    "prod": ("aten.prod.dim_int", (1,), (1,)),
    "std, unbiased": ("aten.std.default", (True,), (0, 1, 2)),
    "any": ("aten.any.default", (), (0, 1, 2)),
}


@pytest.mark.parametrize("name", OVER)
def test_axes_that_are_computed_over(name: str) -> None:
    """Named by the table, and felt: another number somewhere changes results elsewhere along these axes and no others."""
    op, args, wanted = OVER[name]
    x = filled((3, 4, 5), torch.float64)
    assert axes_over(node(op, x, *args)) == wanted
    result = resolve(op)(x, *args)
    first = result[0] if isinstance(result, tuple) else result
    if first.shape == x.shape:
        y = x.clone()
        y[0, 0, 0] += 1
        after = resolve(op)(y, *args)
        felt = ((after[0] if isinstance(after, tuple) else after) != first).nonzero()
        assert tuple(axis for axis in range(3) if len(felt[:, axis].unique()) > 1) == wanted


def test_a_group_norm_is_over_no_whole_axes() -> None:
    with pytest.raises(ValueError, match=r"aten\.group_norm\.default names no axes"):
        axes_over(node("aten.group_norm.default", torch.ones(2, 4, 3), 2))


def test_operands_are_tensors_by_position() -> None:
    x, other = torch.ones(2, 3), torch.ones(5)
    assert list(operands_of(node("aten.add.Tensor", x, torch.ones(3)))) == [0, 1]
    assert list(operands_of(node("aten.add.Scalar", x, 2))) == [0]
    assert list(operands_of(node("aten.clamp.Tensor", x, None, torch.ones(3)))) == [0, 2]
    assert list(operands_of(node("aten.type_as.default", x, other))) == [0]  # which has another shape


def test_places_of_products() -> None:
    a, b, added = torch.rand(2, 3, 4), torch.rand(2, 4, 5), torch.rand(2, 3, 5)
    given = {"mm": (a[0], b[0]), "bmm": (a, b), "matmul": (a, b), "baddbmm": (added, a, b)}
    assert given.keys() == PRODUCTS.keys()
    for name, args in given.items():
        left, right = (args[k] for k in PRODUCTS[name])
        result = getattr(torch.ops.aten, name)(*args)
        torch.testing.assert_close(result - (0 if name in BARE_PRODUCTS else added), left @ right)


# what is derived

FORMS_ONLY = {
    "repeat_interleave": "the axis rules' own",
    "slice_backward": "the gradient of a part",
    "select_backward": "the gradient of a part",
}
DERIVED = {
    "narrowing": narrowing._RULES,
    "axis rules": {**axis_rules.AXIS_RULES, **axis_walk._SPECIAL},
    "clean-up": cleanup_rules.CLEANUP_RULES,
    "weight views": weight_view._LAYOUT,
    "matmul forms": matmul_forms._FORMS,
    "row views": row_view._FORMS,
    "roles": roles.ACTIVATIONS | roles.NEAR | roles.TABLES | roles.PICKS | roles.FUSED | roles.CONVOLUTIONS,
    "sizes": sizes.WEIGHED | sizes.LOOKUPS,
}


@pytest.mark.parametrize("table", DERIVED)
def test_no_pass_knows_an_operator_that_the_table_does_not(table: str) -> None:
    assert set(DERIVED[table]) - OPERATORS.keys() <= FORMS_ONLY.keys()


def test_adjoints_of_elementwise_operators_are_of_operators_in_the_table() -> None:
    """But for those that only take a shape, and read no element."""
    known = {base_name(op) for op in ADJOINTS.broadcasting}
    made = {name for name in known if name.startswith("new_") or name.endswith("_like")}
    assert known - made <= BROADCASTING | of_kind("same")


def test_every_elementwise_operator_is_known_to_every_pass_or_left_out_for_a_reason() -> None:
    slope, draws = "a slope per channel lies along axis 1", "one row draws other numbers than all"
    several = {name for name in ELEMENTWISE if len(OPERATORS[name].operands) > 1}
    reasons = {"narrowing": {"prelu": slope, "rrelu": draws}, "axis rules": {"prelu": slope}, "clean-up": {"prelu": slope}}
    assert ELEMENTWISE - narrowing._RULES.keys() == reasons["narrowing"].keys()
    assert ELEMENTWISE - axis_rules.AXIS_RULES.keys() == reasons["axis rules"].keys()
    assert several - cleanup_rules.CLEANUP_RULES.keys() == reasons["clean-up"].keys()


def test_every_layout_operator_is_known_to_every_pass_or_left_out_for_a_reason() -> None:
    shape_of_another = having(LAYOUT_OPS, like=True)
    assert LAYOUT_OPS - DERIVED["axis rules"].keys() == shape_of_another == {"view_as", "reshape_as", "expand_as"}
    assert LAYOUT_OPS - weight_view._LAYOUT.keys() == set()
    assert of_kind("same", "permute") - narrowing._RULES.keys() == set()


# operators that joining the tables made known: each pass does with them what torch does

HEAD = """
input %x: float32[2, 5, 8] "x"
input %o: float32[2, 5, 1] "o"
input %s: float64[3] "s"
"""
NARROWED = {
    "maximum": ("%y: float32[2, 5, 8] = aten.maximum.default(%x, %o)", True),
    "lerp": ("%y: float32[2, 5, 8] = aten.lerp.Tensor(%x, %o, %o)", True),
    "fmod": ("%y: float32[2, 5, 8] = aten.fmod.Scalar(%x, 0.5)", True),
    "log_sigmoid": ("%y: float32[2, 5, 8] = aten.log_sigmoid.default(%x)", True),
    "rms_norm": ("%y: float32[2, 5, 8] = aten.rms_norm.default(%x, [8])", True),
    "rms_norm over rows": ("%y: float32[2, 5, 8] = aten.rms_norm.default(%x, [5, 8])", False),
    "_safe_softmax": ("%y: float32[2, 5, 8] = aten._safe_softmax.default(%x, -1)", True),
    "swapaxes": ("%t: float32[5, 2, 8] = aten.swapaxes.default(%x, 0, 1)\n%y: float32[2, 5, 8] = aten.swapdims.default(%t, -3, 1)", True),
    "movedim": ("%t: float32[5, 8, 2] = aten.movedim.int(%x, 0, 2)\n%y: float32[2, 5, 8] = aten.movedim.int(%t, -1, 0)", True),
    "type_as": ("%y: float64[2, 5, 8] = aten.type_as.default(%x, %s)", True),
    "prelu": ("%w: float32[5] = aten.select.int(%t, 0, 0)\n%y: float32[2, 5, 8] = aten.prelu.default(%x, %w)", False),
    "dropout": ("%y: float32[2, 5, 8] = aten.dropout.default(%x, 0.0, False)", False),
    "group_norm": ("%y: float32[2, 5, 8] = aten.group_norm.default(%x, 1)", False),
}


@pytest.mark.parametrize("name", NARROWED)
def test_narrowing(name: str) -> None:
    text, narrower = NARROWED[name]
    if name == "prelu":
        text = "%t: float32[1, 5] = aten.full.default([1, 5], 0.5)\n" + text
    last = text.splitlines()[-1].split(" = ")[0].split(": ")[1].replace("[2, 5, 8]", "[2, 8]")
    lines = (HEAD, "%n: float32[2, 5, 8] = aten.neg.default(%x)", text.replace("%x", "%n"))
    graph = graph_of("\n".join(lines) + f'\n%z: {last} = aten.select.int(%y, 1, -1)\noutput %z "z"')
    verify(graph)
    small = narrow(graph, ["z"])
    verify(small)
    made = {node.output.name: node for node in small.nodes}
    assert (made["n"].output.tensor.shape[1] == 1) is narrower
    inputs = [filled((2, 5, 8), torch.float32), filled((2, 5, 1), torch.float32), filled((3,), torch.float64)]
    torch.testing.assert_close(evaluate(small, inputs)[0], evaluate(graph, inputs)[0], rtol=1e-6, atol=1e-6)  # float32


class Mlp(nn.Module):
    def __init__(self, step: Any, hidden: int = 6) -> None:
        super().__init__()
        self.up, self.down, self.step = nn.Linear(4, hidden), nn.Linear(hidden, 3), step

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.step(torch.relu(self.up(x))))


PRUNED = {
    "sin": torch.sin,
    "floor": torch.floor,
    "atan2": lambda h: torch.atan2(h, h + 1),
    "lerp": lambda h: torch.lerp(h, h.cos(), 0.25),
    "logical_xor": lambda h: torch.logical_xor(h > 0.5, h > 0.1).to(h.dtype) * h,
    "movedim": lambda h: h.movedim(-1, 0).exp().movedim(0, -1),
    "broadcast_to": lambda h: h * h.mean(0, keepdim=True).broadcast_to((2, 5, h.shape[-1])),
}


@pytest.mark.parametrize("name", PRUNED)
def test_pruning_through(name: str) -> None:
    """The narrower graph is the same module with fewer hidden features, given the weights that stayed."""
    torch.manual_seed(0)
    model, x = Mlp(PRUNED[name]).double(), torch.rand(2, 5, 4, dtype=torch.float64)
    found = pruned(trace(model, (x,)), spec_of("mlp", width=4, multiple_of=1, compensate="none"), [(x,)])
    narrower = Mlp(PRUNED[name], hidden=4).double()
    narrower.load_state_dict(found.module.state_dict())
    torch.testing.assert_close(found.module(x), narrower(x), rtol=0, atol=1e-12)  # float64


@pytest.mark.parametrize("slopes", [1, 5])
def test_pruning_stops_at_slopes_per_channel(slopes: int) -> None:
    weight = torch.full((slopes,), 0.25, dtype=torch.float64)
    model, x = Mlp(lambda h: torch.ops.aten.prelu(h, weight)).double(), torch.rand(2, 5, 4, dtype=torch.float64)
    found = pruned(trace(model, (x,)), spec_of("mlp", width=4, multiple_of=1, compensate="none"), [(x,)])
    assert found.module.get_parameter("up.weight").shape == (6, 4)


def test_the_clean_up_reads_what_was_expanded_for_an_operator_of_three() -> None:
    graph = graph_of(
        f"{HEAD}%e: float32[2, 5, 8] = aten.broadcast_to.default(%o, [2, 5, 8])\n"
        '%y: float32[2, 5, 8] = aten.addcmul.default(%x, %x, %e, value=2)\noutput %y "y"'
    )
    small = simplify_gradient(graph)
    assert [line for line in print_graph(small).splitlines() if line.startswith("%")] == [
        "%addcmul: float32[2, 5, 8] = aten.addcmul.default(%x, %x, %o, value=2)"
    ]
    inputs = [filled((2, 5, 8), torch.float32), filled((2, 5, 1), torch.float32), filled((3,), torch.float64)]
    assert torch.equal(evaluate(small, inputs)[0], evaluate(graph, inputs)[0])


def test_a_weight_is_seen_through_a_moved_axis() -> None:
    graph = graph_of(
        'input %x: float32[2, 4] "x"\nparameter %w: float32[4, 3] "w"\n%t: float32[3, 4] = aten.movedim.int(%w, 0, 1)\n'
        '%y: float32[2, 3] = aten.linear.default(%x, %t)\noutput %y "y"'
    )
    (site,) = find_sites(graph)
    assert (site.layout, site.in_features, site.out_features) == ("io", 4, 3)


def test_a_quantised_table_is_a_table_for_roles() -> None:
    """In a model without blocks the last matmul behind weights is the head, whether the table's codes or its numbers are looked up."""
    text = (
        'graph device=cpu\ninput %i: int64[3] "ids"\n'
        'parameter %w: float32[30, 16] "table.weight"\nparameter %v: float32[4, 16] "fc.weight"\n'
        '%e: float32[3, 16] = aten.embedding.default(%w, %i)\n%y: float32[3, 4] = aten.linear.default(%e, %v, None)\noutput %y "output"'
    )
    graph = rewriting.graph_of(text)
    sites = find_sites(graph)
    table = next(site for site in sites if site.gathers)
    use = quantizing.quantize(quantizer="uniform", bits=4, block_size=16)
    quantised, _ = rewrite(graph, [(table, rewriting.rule_of(use, force=True))], quantizing.METHODS)
    assert "gather_nbits" in {base_name(made.op) for made in quantised.nodes}
    assert {site.path: site.role for site in find_sites(quantised)} == {"fc": "head"}
    assert {site.path: site.role for site in sites} == {"table": "embedding", "fc": "head"}


def test_parts_that_are_not_safe_split_too() -> None:
    """gate and up out of one matmul, cut by the operator that older exporters write."""
    graph = rewriting.graph_of(
        'graph device=cpu\ninput %x: float32[3, 4] "x"\nparameter %a: float32[16, 4] "a"\nparameter %b: float32[4, 8] "b"\n'
        "%h: float32[3, 16] = aten.linear.default(%x, %a, None)\n"
        "%g: float32[3, 8], %u: float32[3, 8] = aten.unsafe_split.Tensor(%h, 8, 1)\n%s: float32[3, 8] = aten.silu.default(%g)\n"
        '%m: float32[3, 8] = aten.mul.Tensor(%s, %u)\n%y: float32[3, 4] = aten.linear.default(%m, %b, None)\noutput %y "y"'
    )
    assert {site.path: site.role for site in find_sites(graph)} == {"a": "mlp.gate_up", "b": "mlp.down"}


@pytest.mark.parametrize(("op", "half"), [("conv_transpose3d", True), ("einsum", False), ("embedding_bag", False)])
def test_what_reads_weights_in_half_precision(op: str, half: bool) -> None:
    """ConvTranspose runs in half precision, Einsum and the sum of a bag's rows in float32 (`exporters.onnx.precision`)."""
    assert (op in sizes.WEIGHED | sizes.LOOKUPS) is half is OPERATORS[op].half


def test_a_convolution_that_spreads_is_stored_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = trace(nn.ConvTranspose3d(2, 3, 1), (torch.rand(1, 2, 3, 3, 3),))
    export_onnx(graph, tmp_path, Export(precision="fp16", target=("cuda",)))
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    stored = {tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize for tensor in model.graph.initializer}
    foreseen = {const.path: size // const.numel for const, size in sizes.exported_sizes(graph, "fp16").items()}
    assert foreseen == {name: size for name, size in stored.items() if name in foreseen} == {"weight": 2, "bias": 2}
