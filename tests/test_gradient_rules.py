"""Every rule of differentiation against torch.autograd in float64, at two shapes; the same in ONNX Runtime in the full grid."""

from __future__ import annotations

from pathlib import Path

import pytest
from differentiating import AXES, Op, check, check_onnx, x_of
from gradient_cases import CASES, SHAPES

from matmorph.ir.training.losses import Loss

MSE = Loss("mse")
IN_DEFAULT = {"relu", "softmax", "log softmax", "slices", "select", "embedding padded", "attention forbidden"}
"""Also run in ONNX Runtime by default: each operator that has an ONNX form of its own."""

ONLY_FULL = {
    *(
        "attention",
        "attention scaled",
        "attention few keys",
        "attention causal masked",
        "conv dilated",
        "conv strided",
        "maximum",
        "largest",
        "cumsum",
        "index",
    ),
    *("activations", "hard activations", "glu", "spread", "normalize", "erf", "flip", "max pool", "matmul by vectors", "broadcast matmul"),
}
"""Variants of other cases, and operators without a rule of their own, of which einsum and group norm stay."""


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.full) if case in ONLY_FULL else case for case in CASES])
def test_rule(case: str) -> None:
    f, *shapes = CASES[case]
    check(Op(f, *shapes), [(x_of(*size),) for size in SHAPES], AXES, MSE)


@pytest.mark.parametrize("case", [case if case in IN_DEFAULT else pytest.param(case, marks=pytest.mark.full) for case in CASES])
def test_rule_in_onnx_runtime(case: str, tmp_path: Path) -> None:
    f, *shapes = CASES[case]
    check_onnx(Op(f, *shapes), [(x_of(*size),) for size in SHAPES], AXES, MSE, tmp_path)
