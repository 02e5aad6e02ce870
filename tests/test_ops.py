"""Operator names lead back to the operator, and arguments have one form."""

from __future__ import annotations

import math
import operator

import pytest
import torch

from matmorph.errors import VerifyError
from matmorph.ir.ops import base_name, is_overload, normalize, op_name, resolve

NAMES = {
    "aten.linear.default": torch.ops.aten.linear.default,
    "aten.add.Tensor": torch.ops.aten.add.Tensor,
    "aten.__and__.Tensor": torch.ops.aten.__and__.Tensor,
    "prims.convert_element_type.default": torch.ops.prims.convert_element_type.default,
    "higher_order.cond": torch.ops.higher_order.cond,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "math.ceil": math.ceil,
    "torch.sym_max": torch.sym_max,
    "torch._sym_sqrt": torch._sym_sqrt,
}


@pytest.mark.parametrize("name", NAMES)
def test_name_and_target_are_inverse(name: str) -> None:
    assert op_name(NAMES[name]) == name
    assert resolve(name) is NAMES[name]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "linear",
        "aten.linear",
        "aten.lineer.default",
        "aten.linear.other",
        "operator.attrgetter",
        "os.system",
        "os.path.join",
        "higher_order.x",
    ],
)
def test_an_unknown_name_is_an_error(name: str) -> None:
    with pytest.raises(VerifyError, match="unknown operator"):
        resolve(name)


def test_a_near_miss_is_named() -> None:
    with pytest.raises(VerifyError, match=r"did you mean operator\.floordiv"):
        resolve("operator.floor_div")


def test_a_target_without_a_name_is_an_error() -> None:
    with pytest.raises(VerifyError, match="no name for the operation"):
        op_name(torch.nn.functional.linear)


def test_base_names() -> None:
    assert [base_name(name) for name in ("aten.linear.default", "operator.mul", "higher_order.cond", "linear")] == [
        "linear",
        "mul",
        "cond",
        "linear",
    ]
    assert (is_overload("aten.linear.default"), is_overload("operator.mul"), is_overload("higher_order.cond")) == (True, False, False)


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "expected"),
    [
        ("aten.add.Tensor", ("a",), {"other": "b", "alpha": 2}, (("a", "b"), {"alpha": 2})),
        ("aten.softmax.int", (), {"dim": -1, "self": "a"}, (("a", -1), {})),
        ("aten.linear.default", ("x",), {"weight": "w"}, (("x", "w"), {})),
        ("aten.cumsum.default", ("x", 1), {"dtype": torch.float64}, (("x", 1), {"dtype": torch.float64})),
        ("aten.split.Tensor", ("x",), {"split_size": 2, "dim": 1}, (("x", 2, 1), {})),
        ("aten.conv2d.default", ("x", "w"), {"padding": [1, 1]}, (("x", "w", None, (1, 1), (1, 1)), {})),
        ("aten.view.default", ("x", [1, [2, 3]]), {}, (("x", (1, (2, 3))), {})),
        ("operator.mul", ("a", 2), {}, (("a", 2), {})),
        ("higher_order.cond", ("p", "t", "f", ["x"]), {}, (("p", "t", "f", ("x",)), {})),
    ],
)
def test_arguments_go_to_their_schema_position(op: str, args: tuple, kwargs: dict, expected: tuple) -> None:
    assert normalize(op, args, kwargs) == expected
