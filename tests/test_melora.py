"""melora: eq. 3 of the paper, groups that do not fit, parameters; mutants."""

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
from matmorph.passes.methods.melora.method import Melora
from matmorph.passes.methods.melora.settings import MeloraSpec
from matmorph.specs.schema import MethodUse


def formula(w: np.ndarray, b: np.ndarray | None, parts: Parts, scale: float) -> tuple[np.ndarray, np.ndarray | None]:
    """W + s diag(B_1 A_1, .., B_n A_n)."""
    new = w.copy()
    rows, columns = parts["up"].shape[2], parts["down"].shape[1]
    for k, (down, up) in enumerate(zip(parts["down"], parts["up"], strict=True)):
        new[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns] += scale * up.T @ down.T
    return new, b


CASE = Case({"rank": 2, "groups": 2, "alpha": 4}, formula, scale=2.0)
METHODS = {"melora": Melora()}


def use(**settings: Any) -> MethodUse:
    return MethodUse("melora", MeloraSpec(**settings))


def test_golden_nodes() -> None:
    result, _ = rewritten(graph_of(LINEAR), rule_of(use(**CASE.settings)), methods=METHODS)
    lines = [line.split(" @", 1)[0] for line in print_graph(result).splitlines() if line.startswith("%")]
    assert lines == [
        "%linear_dense: float32[batch, 10] = aten.linear.default(%x, %fc.weight, %fc.bias)",
        "%reshape: float32[batch, 2, 6] = aten.reshape.default(%x, [-1, 2, 6])",
        "%transpose: float32[2, batch, 6] = aten.transpose.int(%reshape, -3, -2)",
        "%matmul: float32[2, batch, 2] = aten.matmul.default(%transpose, %fc.melora.down)",
        "%mul: float32[2, batch, 2] = aten.mul.Scalar(%matmul, 2.0)",
        "%matmul_1: float32[2, batch, 5] = aten.matmul.default(%mul, %fc.melora.up)",
        "%transpose_1: float32[batch, 2, 5] = aten.transpose.int(%matmul_1, -3, -2)",
        "%reshape_1: float32[batch, 10] = aten.reshape.default(%transpose_1, [-1, 10])",
        "%linear: float32[batch, 10] = aten.add.Tensor(%linear_dense, %reshape_1)",
        "%relu: float32[batch, 10] = aten.relu.default(%linear)",
    ]


def test_groups_that_do_not_fit() -> None:
    for settings, message in (
        ({"rank": 1, "groups": 5}, "5 groups divide 12 inputs and 10 outputs not evenly; the nearest number that does is 2"),
        ({"rank": 6, "groups": 2}, "rank 6 is above the 5 features of the smaller side of a group"),
    ):
        with pytest.raises(SpecError, match=message):
            rewritten(graph_of(LINEAR), rule_of(use(**settings)), methods=METHODS)
    with pytest.raises(SpecError, match="groups"):
        mm.load_spec({"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"melora": {"rank": 2}}}]})


def test_parameters_of_the_paper() -> None:
    """Eight pairs of rank 1 have the rank of LoRA's 8 and an eighth of its numbers (abstract; RoBERTa-base, queries and values)."""
    lora = trainable(Roberta, {"lora": {"rank": 8}}, "query", "value")
    small = trainable(Roberta, {"melora": {"rank": 1, "groups": 8}}, "query", "value")
    assert (lora, small) == (294_912, 36_864)


MUTANTS = {
    "scale dropped from the graph": Mutant("Melora.update", "times(b, narrow, scale)", "narrow"),
    "scale dropped from the merge": Mutant("Melora.merge", "float(parts.get('scale', 1.0))", "1.0"),
    "groups strided": Mutant(
        "Melora.update",
        "b('aten.transpose.int', b('aten.matmul.default', scaled, parts['up']), -3, -2)",
        "b('aten.transpose.int', b('aten.transpose.int', b('aten.matmul.default', scaled, parts['up']), -3, -2), -2, -1)",
    ),
    "block not transposed": Mutant("Melora.merge", "_diagonal(blocks).T", "_diagonal(blocks.transpose(1, 2)).T"),
    "up drawn instead of zero": Mutant("Melora.parts", "constant(0)", "constant(1)"),
    "scale dropped from the pair": Mutant("Melora.two_factor", "float(parts.get('scale', 1.0))", "1.0"),
}


def test_the_checks_pass_on_the_real_code() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert all(judged(m, "Melora", CASE))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str) -> None:
    with mutated(MUTANTS[name]) as m:
        assert noticed(m, "Melora", CASE), name
