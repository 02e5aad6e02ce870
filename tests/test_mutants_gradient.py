"""Wrong derivatives: each mutant of a rule, or of an ONNX form, must be told from the real one by the tests' own comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from differentiating import AXES, Op, check, check_onnx, x_of
from gradient_cases import CASES, SHAPES
from mutating import Mutant, mutated, unmutated

from matmorph.errors import VerifyError
from matmorph.exporters.onnx import onnx_model
from matmorph.ir.training import gradient
from matmorph.ir.training.adjoints.table import ADJOINT_RULES
from matmorph.ir.training.losses import Loss

MSE = Loss("mse")


# (case, table of rules, what is changed)
RULE_MUTANTS = {
    "softmax term dropped": ("attention", "norms.NORMS", Mutant("norms._attention", "t.b('aten.sub.Tensor', dp, d)", "dp")),
    "attention scaled once too little": (
        "attention",
        "norms.NORMS",
        Mutant("norms._attention", "scaled(t, product(t, ds, k), factor)", "product(t, ds, k)"),
    ),
    "hidden rows have gradients": (
        "attention masked",
        "norms.NORMS",
        Mutant("norms._attention", "do if alive is None else _mul(t, do, alive)", "do"),
    ),
    "norm without its second term": (
        "layer norm",
        "norms.NORMS",
        Mutant("norms._layer_norm", "t.b('aten.sub.Tensor', centred, along)", "centred"),
    ),
    "transposed weight": (
        "shared linear",
        "products.PRODUCTS",
        Mutant("products.linear", "t.give_product(x, dy_rows, weight)", "t.give_product(x, dy_rows, t.b('aten.t.default', weight))"),
    ),
    "transposed factor": (
        "shared linear",
        "products.PRODUCTS",
        Mutant(
            "products.linear",
            "t.b('aten.mm.default', t.b('aten.t.default', dy_rows), rows)",
            "t.b('aten.mm.default', t.b('aten.t.default', rows), dy_rows)",
        ),
    ),
    "density without x": ("gelu", "pointwise.POINTWISE", Mutant("_gelu", "_mul(t, u, density)", "density")),
    "slope of tanh": (
        "gelu tanh",
        "pointwise.POINTWISE",
        Mutant("_gelu_tanh", "_mul(t, square, 6 * k * cubic)", "_mul(t, square, 2 * k * cubic)"),
    ),
    "quotient's sign": (
        "div",
        "pointwise.POINTWISE",
        Mutant("pointwise._divide", "t.b('aten.neg.default', _mul(t, da, y))", "_mul(t, da, y)"),
    ),
    "missing 1 / count": (
        "means",
        "layout.LAYOUT",
        Mutant("_averaged", "t.b('aten.mul.Tensor', dy, 1.0 / known)", "t.b('aten.mul.Tensor', dy, 1.0)"),
    ),
    "missing 1 / length": ("means", "layout.LAYOUT", Mutant("_averaged", "t.b('aten.div.Tensor', scaled, size)", "scaled")),
    "permuted again": ("layout", "layout.LAYOUT", Mutant("_permuted", "[order.index(axis) for axis in range(len(order))]", "order")),
    "first part for all": (
        "cat",
        "layout.LAYOUT",
        Mutant("layout._joined", "start += int(size)", "start += 0 if part is parts[0] else int(size)"),
    ),
    "stride as dilation": (
        "conv strided",
        "convolutions.CONVOLUTIONS",
        Mutant(
            "_weight_gradient",
            "t.b('aten.convolution.default', *swapped, None, shape.dilation, shape.padding, shape.stride, False, (0,) * shape.rank, 1)",
            "t.b('aten.convolution.default', *swapped, None, shape.stride, shape.padding, shape.dilation, False, (0,) * shape.rank, 1)",
        ),
    ),
}


CASES_OF_ALL = sorted({case for case, *_ in RULE_MUTANTS.values()})
DEFAULT = {"softmax term dropped", "transposed factor", "transposed weight", "missing 1 / count", "density without x", "padding trains"}


def some(names: Iterable[str]) -> list[Any]:
    return [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", some(RULE_MUTANTS))
def test_a_wrong_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, table, mutant = RULE_MUTANTS[name]
    with mutated(mutant) as m:
        wrong = m[table]
    monkeypatch.setattr(gradient, "ADJOINT_RULES", replace(ADJOINT_RULES, table={**ADJOINT_RULES.table, **wrong}))
    f, *shapes = CASES[case]
    with pytest.raises((AssertionError, VerifyError)):  # a wrong number, or shapes that do not fit
        check(Op(f, *shapes), [(x_of(*size),) for size in SHAPES], AXES, MSE)


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case == "shared linear" else pytest.mark.full) for case in CASES_OF_ALL])
def test_the_rules_loaded_anew_pass(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with unmutated(mutant for *_, mutant in RULE_MUTANTS.values()) as m:
        rules = {name: rule for table in {table for _, table, _ in RULE_MUTANTS.values()} for name, rule in m[table].items()}
    assert rules.items().isdisjoint(ADJOINT_RULES.table.items())
    monkeypatch.setattr(gradient, "ADJOINT_RULES", replace(ADJOINT_RULES, table={**ADJOINT_RULES.table, **rules}))
    f, *shapes = CASES[case]
    check(Op(f, *shapes), [(x_of(*size),) for size in SHAPES], AXES, MSE)


# (case, what is changed)
ONNX_MUTANTS = {
    "softmax term dropped": ("softmax", Mutant("gradient_ops._softmax", "_sub(dy, _total(_mul(dy, y), dim))", "dy")),
    "log-softmax term dropped": (
        "log softmax",
        Mutant(
            "gradient_ops._log_softmax",
            "_mul(emit.node('Exp', [y], y.dtype), _total(dy, dim))",
            "_sub(emit.node('Exp', [y], y.dtype), _total(dy, dim))",
        ),
    ),
    "padded at the other end": ("slices", Mutant("gradient_ops._padded", "[before, behind]", "[behind, before]")),
    "rows overwrite each other": ("embedding padded", Mutant("_embedding", "reduction='add'", "reduction='none'")),
    "padding trains": ("embedding padded", Mutant("_embedding", "padding_idx >= 0", "padding_idx > 0")),
}


@pytest.mark.parametrize("name", some(ONNX_MUTANTS))
def test_a_wrong_onnx_form_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case, mutant = ONNX_MUTANTS[name]
    with mutated(mutant) as m:
        monkeypatch.setattr(onnx_model, "backward_lowerings", m.backward_lowerings)
    f, *shapes = CASES[case]
    with pytest.raises(AssertionError):
        check_onnx(Op(f, *shapes), [(x_of(*size),) for size in SHAPES], AXES, MSE, tmp_path)
