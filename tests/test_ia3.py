"""ia3: section 3.3 of the paper on both sides, biases, parameters; mutants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mutating import Mutant, mutated, unmutated
from rewriting import LINEAR, graph_of, rewritten, rule_of
from updating import Case, Llama2, Parts, judged, noticed, trainable

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.ir.text.printing import print_graph
from matmorph.passes.methods.ia3.method import IA3
from matmorph.passes.methods.ia3.settings import IA3Spec
from matmorph.specs.schema import MethodUse


def formula(w: np.ndarray, b: np.ndarray | None, parts: Parts, scale: float) -> tuple[np.ndarray, np.ndarray | None]:
    """diag(l) W and l o b, or W diag(l)."""
    if "inputs" in parts:
        return w @ np.diag(parts["inputs"]), b
    return np.diag(parts["outputs"]) @ w, None if b is None else parts["outputs"] * b


CASE = Case({}, formula, inside=True)
INPUTS = Case({"of": "inputs"}, formula, inside=True)
METHODS = {"ia3": IA3()}


def use(**settings: Any) -> MethodUse:
    return MethodUse("ia3", IA3Spec(**settings))


def test_golden_nodes() -> None:
    result, _ = rewritten(graph_of(LINEAR), rule_of(use(**CASE.settings)), methods=METHODS)
    lines = [line.split(" @", 1)[0] for line in print_graph(result).splitlines() if line.startswith("%")]
    assert lines == [
        "%unsqueeze: float32[10, 1] = aten.unsqueeze.default(%fc.ia3.outputs, 1)",
        "%mul: float32[10, 12] = aten.mul.Tensor(%fc.weight, %unsqueeze)",
        "%mul_1: float32[10] = aten.mul.Tensor(%fc.bias, %fc.ia3.outputs)",
        "%linear: float32[batch, 10] = aten.linear.default(%x, %mul, %mul_1)",
        "%relu: float32[batch, 10] = aten.relu.default(%linear)",
    ]


def test_inputs_are_scaled_too() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert all(judged(m, "IA3", INPUTS))
    with pytest.raises(SpecError, match="inputs"):
        mm.load_spec({"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"ia3": {"of": "input"}}}]})


def test_parameters_of_the_formula() -> None:
    """A number per key, value and inner feature: 32 (2 * 4096 + 11008) of LLaMA-2-7B."""
    outputs = trainable(Llama2, {"ia3": {}}, "k_proj", "v_proj")
    assert outputs + trainable(Llama2, {"ia3": {"of": "inputs"}}, "down_proj") == 614_400


MUTANTS = {
    "the other side": Mutant("IA3.weight", "b('aten.unsqueeze.default', factor, 1)", "b('aten.unsqueeze.default', factor, 0)"),
    "bias not scaled": Mutant("IA3.bias", "b('aten.mul.Tensor', own, parts['outputs'])", "own"),
    "bias not scaled in the merge": Mutant("IA3.merge", "widened(b) * factor", "widened(b)"),
    "columns in the merge": Mutant("IA3.merge", "w * factor[:, None]", "w * factor.sum()"),
    "starts at zero": Mutant("IA3.parts", "constant(1)", "constant(0)"),
}


def test_the_checks_pass_on_the_real_code() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert all(judged(m, "IA3", CASE))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str) -> None:
    with mutated(MUTANTS[name]) as m:
        assert noticed(m, "IA3", CASE), name
