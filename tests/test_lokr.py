"""lokr: the Kronecker product by its definition, factors that do not fit, parameters; mutants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mutating import Mutant, mutated, unmutated
from rewriting import LINEAR, graph_of, rewritten, rule_of
from updating import Case, Parts, Roberta, judged, noticed, trainable

from matmorph.errors import SpecError
from matmorph.ir.text.printing import print_graph
from matmorph.passes.methods.lokr.method import Lokr
from matmorph.passes.methods.lokr.settings import LokrSpec
from matmorph.specs.schema import MethodUse


def formula(w: np.ndarray, b: np.ndarray | None, parts: Parts, scale: float) -> tuple[np.ndarray, np.ndarray | None]:
    """W + s left (x) right, block by block: block (i, j) is left[i, j] right."""
    right = (parts["right"] if "right" in parts else parts["down"] @ parts["up"]).T
    return w + scale * np.block([[entry * right for entry in row] for row in parts["left"]]), b


CASE = Case({"rank": 1, "alpha": 2}, formula, scale=2.0)
WHOLE = Case({"rank": 4, "alpha": 2, "factor": 2}, formula, scale=0.5)
METHODS = {"lokr": Lokr()}


def use(**settings: Any) -> MethodUse:
    return MethodUse("lokr", LokrSpec(**settings))


def test_golden_nodes() -> None:
    result, _ = rewritten(graph_of(LINEAR), rule_of(use(**CASE.settings)), methods=METHODS)
    lines = [line.split(" @", 1)[0] for line in print_graph(result).splitlines() if line.startswith("%")]
    assert lines == [
        "%linear_dense: float32[batch, 10] = aten.linear.default(%x, %fc.weight, %fc.bias)",
        "%reshape: float32[batch, 3, 4] = aten.reshape.default(%x, [-1, 3, 4])",
        "%matmul: float32[batch, 3, 1] = aten.matmul.default(%reshape, %fc.lokr.down)",
        "%matmul_1: float32[batch, 3, 5] = aten.matmul.default(%matmul, %fc.lokr.up)",
        "%mul: float32[2, 3] = aten.mul.Scalar(%fc.lokr.left, 2.0)",
        "%matmul_2: float32[batch, 2, 5] = aten.matmul.default(%mul, %matmul_1)",
        "%reshape_1: float32[batch, 10] = aten.reshape.default(%matmul_2, [-1, 10])",
        "%linear: float32[batch, 10] = aten.add.Tensor(%linear_dense, %reshape_1)",
        "%relu: float32[batch, 10] = aten.relu.default(%linear)",
    ]


def test_factors_that_do_not_fit() -> None:
    with pytest.raises(SpecError, match="factor 5 divides not both 12 inputs and 10 outputs; the nearest that does is 2"):
        rewritten(graph_of(LINEAR), rule_of(use(rank=1, factor=5)), methods=METHODS)


def test_a_rank_that_saves_nothing_leaves_the_matrix_whole() -> None:
    result, _ = rewritten(graph_of(LINEAR), rule_of(use(**WHOLE.settings)), methods=METHODS)
    shapes = {const.path: tuple(const.tensor.shape) for const in result.state if "lokr" in const.path}
    assert shapes == {"fc.lokr.left": (2, 2), "fc.lokr.right": (6, 5)}
    with unmutated(MUTANTS.values()) as m:
        assert all(judged(m, "Lokr", WHOLE))


def test_parameters_by_the_even_factors() -> None:
    """768 = 24 * 32: a left matrix of 24 x 24 and factors of 32 x 8, as PEFT makes them."""
    assert trainable(Roberta, {"lokr": {"rank": 8}}, "query", "value") == 24 * (24 * 24 + 2 * 32 * 8)
    assert trainable(Roberta, {"lokr": {"rank": 16, "factor": 8}}, "fc1") == 12 * (8 * 8 + 16 * (96 + 384))


MUTANTS = {
    "scale dropped from the graph": Mutant("Lokr.update", "times(b, left, scale)", "left"),
    "scale dropped from the merge": Mutant("Lokr.merge", "float(parts.get('scale', 1.0))", "1.0"),
    "factors in the other order": Mutant(
        "Lokr.merge",
        "torch.kron(widened(parts['left']), widened(right).T.contiguous())",
        "torch.kron(widened(right).T.contiguous(), widened(parts['left']))",
    ),
    "left drawn instead of zero": Mutant("Lokr.parts", "constant(0)", "constant(1)"),
    "scale dropped from the pair": Mutant("Lokr.two_factor", "float(parts.get('scale', 1.0))", "1.0"),
    "pair of the other order": Mutant("Lokr.two_factor", "torch.kron(one, down.contiguous())", "torch.kron(down.contiguous(), one)"),
}


def test_the_checks_pass_on_the_real_code() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert all(judged(m, "Lokr", CASE))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str) -> None:
    with mutated(MUTANTS[name]) as m:
        assert noticed(m, "Lokr", CASE), name
