"""loha: eq. 4 of FedPara, its rank, parameters; mutants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mutating import Mutant, mutated, unmutated
from rewriting import LINEAR, graph_of, rewritten, rule_of
from updating import Case, Parts, Roberta, judged, noticed, trainable

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.ir.text.printing import print_graph
from matmorph.passes.methods.loha.method import Loha
from matmorph.passes.methods.loha.settings import LohaSpec
from matmorph.specs.schema import MethodUse


def formula(w: np.ndarray, b: np.ndarray | None, parts: Parts, scale: float) -> tuple[np.ndarray, np.ndarray | None]:
    """W + s (B1 A1) o (B2 A2)."""
    return w + scale * np.einsum("or,ri,os,si->oi", parts["up_1"], parts["down_1"], parts["up_2"], parts["down_2"]), b


CASE = Case({"rank": 2, "alpha": 4}, formula, scale=2.0, inside=True)
METHODS = {"loha": Loha()}


def use(**settings: Any) -> MethodUse:
    return MethodUse("loha", LohaSpec(**settings))


def test_golden_nodes() -> None:
    result, _ = rewritten(graph_of(LINEAR), rule_of(use(**CASE.settings)), methods=METHODS)
    lines = [line.split(" @", 1)[0] for line in print_graph(result).splitlines() if line.startswith("%")]
    assert lines == [
        "%matmul: float32[10, 12] = aten.matmul.default(%fc.loha.up_1, %fc.loha.down_1)",
        "%matmul_1: float32[10, 12] = aten.matmul.default(%fc.loha.up_2, %fc.loha.down_2)",
        "%mul: float32[10, 12] = aten.mul.Tensor(%matmul, %matmul_1)",
        "%mul_1: float32[10, 12] = aten.mul.Scalar(%mul, 2.0)",
        "%add: float32[10, 12] = aten.add.Tensor(%fc.weight, %mul_1)",
        "%linear: float32[batch, 10] = aten.linear.default(%x, %add, %fc.bias)",
        "%relu: float32[batch, 10] = aten.relu.default(%linear)",
    ]


def test_the_rank_is_that_of_the_square() -> None:
    rng = np.random.default_rng(0)
    shapes = {"up_1": (10, 2), "down_1": (2, 12), "up_2": (10, 2), "down_2": (2, 12)}
    parts = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    assert np.linalg.matrix_rank(formula(np.zeros((10, 12)), None, parts, 1.0)[0]) == 4


def test_parameters_are_twice_those_of_lora() -> None:
    assert trainable(Roberta, {"loha": {"rank": 8}}, "query", "value") == 2 * 294_912
    with pytest.raises(SpecError, match=r"fc: rank 11 is above min\(in, out\) = 10"):
        rewritten(graph_of(LINEAR), rule_of(use(rank=11)), methods=METHODS)
    with pytest.raises(SpecError, match="did you mean rank"):
        mm.load_spec({"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"loha": {"rnak": 2}}}]})


MUTANTS = {
    "scale dropped from the graph": Mutant("Loha.weight", "times(b, product, scale)", "product"),
    "scale dropped from the merge": Mutant("Loha.merge", "float(parts.get('scale', 1.0))", "1.0"),
    "a sum for a product": Mutant("Loha.weight", "b('aten.mul.Tensor', first, second)", "b('aten.add.Tensor', first, second)"),
    "the same pair twice": Mutant(
        "Loha.merge", "float(parts.get('scale', 1.0)) * first * second", "float(parts.get('scale', 1.0)) * first * first"
    ),
    "drawn instead of zero": Mutant("Loha.parts", "constant(0)", "constant(1)"),
}


def test_the_checks_pass_on_the_real_code() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert all(judged(m, "Loha", CASE))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str) -> None:
    with mutated(MUTANTS[name]) as m:
        assert noticed(m, "Loha", CASE), name
