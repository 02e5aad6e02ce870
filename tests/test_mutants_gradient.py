"""Wrong derivatives: each mutant of a rule, or of an ONNX form, must be told from the real one by the tests' own comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from differentiating import AXES, Op, check, check_onnx, x_of
from gradient_cases import CASES, SHAPES

import matmorph
from matmorph.errors import VerifyError
from matmorph.exporters.onnx import onnx_model
from matmorph.ir.training import gradient
from matmorph.ir.training.adjoints.table import RULES
from matmorph.ir.training.losses import Loss

MSE = Loss("mse")
ROOT = Path(matmorph.__file__).parent


def mutant(path: str, old: str, new: str) -> ModuleType:
    """A module of the package with one text exchanged, apart from the real one."""
    source = (ROOT / path).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"the mutant no longer fits: {old!r}"
    module = ModuleType("mutant")
    module.__dict__["__name__"] = "matmorph." + path.removesuffix(".py").replace("/", ".")
    exec(compile(source.replace(old, new), path, "exec"), module.__dict__)
    return module


# (case, file, table, what is exchanged)
RULE_MUTANTS = {
    "softmax term dropped": ("attention", "norms", "NORMS", 't.b("aten.sub.Tensor", dp, d)', "dp"),
    "attention scaled once too little": ("attention", "norms", "NORMS", "scaled(t, product(t, ds, k), factor)", "product(t, ds, k)"),
    "hidden rows have gradients": ("attention masked", "norms", "NORMS", "do = do if alive is None else _mul(t, do, alive)", "do = do"),
    "norm without its second term": ("layer norm", "norms", "NORMS", 't.b("aten.sub.Tensor", centred, along), r', "centred, r"),
    "transposed weight": ("shared linear", "products", "PRODUCTS", "dy_rows, weight)", 'dy_rows, t.b("aten.t.default", weight))'),
    "transposed factor": (
        "shared linear",
        "products",
        "PRODUCTS",
        't.b("aten.t.default", dy_rows), rows',
        't.b("aten.t.default", rows), dy_rows',
    ),
    "density without x": ("gelu", "pointwise", "POINTWISE", "_mul(t, u, density)", "density"),
    "slope of tanh": ("gelu tanh", "pointwise", "POINTWISE", "6 * k * cubic", "2 * k * cubic"),
    "quotient's sign": ("div", "pointwise", "POINTWISE", 't.b("aten.neg.default", _mul(t, da, y))', "_mul(t, da, y)"),
    "missing 1 / count": ("means", "layout", "LAYOUT", "1.0 / known", "1.0"),
    "missing 1 / length": ("means", "layout", "LAYOUT", 't.b("aten.div.Tensor", scaled, size) if', "scaled if"),
    "permuted again": ("layout", "layout", "LAYOUT", "[order.index(axis) for axis in range(len(order))]", "order"),
    "first part for all": ("cat", "layout", "LAYOUT", "start += int(size)", "start += 0 if part is parts[0] else int(size)"),
    "stride as dilation": (
        "conv strided",
        "convolutions",
        "CONVOLUTIONS",
        "None, shape.dilation, shape.padding, shape.stride,",
        "None, shape.stride, shape.padding, shape.dilation,",
    ),
}


DEFAULT = {"softmax term dropped", "transposed factor", "transposed weight", "missing 1 / count", "density without x", "padding trains"}


def some(names: Iterable[str]) -> list[Any]:
    return [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", some(RULE_MUTANTS))
def test_a_wrong_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, file, table, old, new = RULE_MUTANTS[name]
    wrong = getattr(mutant(f"ir/adjoints/{file}.py", old, new), table)
    monkeypatch.setattr(gradient, "RULES", replace(RULES, table={**RULES.table, **wrong}))
    f, *shapes = CASES[case]
    with pytest.raises((AssertionError, VerifyError)):  # a wrong number, or shapes that do not fit
        check(Op(f, *shapes), [(x_of(*size),) for size in SHAPES], AXES, MSE)


# (case, what is exchanged)
ONNX_MUTANTS = {
    "softmax term dropped": ("softmax", "_mul(y, _sub(dy, _total(_mul(dy, y), dim)))", "_mul(y, dy)"),
    "log-softmax term dropped": ("log softmax", "_sub(dy, _mul(", "_sub(dy, _sub("),
    "padded at the other end": ("slices", "pads = _vector([before, behind])", "pads = _vector([behind, before])"),
    "rows overwrite each other": ("embedding padded", 'dy.dtype, reduction="add")', 'dy.dtype, reduction="none")'),
    "padding trains": ("embedding padded", "if padding_idx >= 0:", "if padding_idx > 0:"),
}


@pytest.mark.parametrize("name", some(ONNX_MUTANTS))
def test_a_wrong_onnx_form_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case, old, new = ONNX_MUTANTS[name]
    monkeypatch.setattr(onnx_model, "backward_lowerings", mutant("exporters/gradient_ops.py", old, new).backward_lowerings)
    f, *shapes = CASES[case]
    with pytest.raises(AssertionError):
        check_onnx(Op(f, *shapes), [(x_of(*size),) for size in SHAPES], AXES, MSE, tmp_path)
