"""Mutants of the norms' pattern: each takes something for a norm that is none, or loses a part of one."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from exporting import difference, feeds, randn, session
from mutating import Mutant, killer, mutated, unmutated
from test_norms import FORMS, OTHERS, ROUNDING, Block, Inside, Sums, exact, graph_of
from torch import nn

from matmorph.runtime.format.artifact import MODEL
from matmorph.specs.schema import Export

MUTANTS = {
    "any power": Mutant("norms._is_square", "_scalar(power.inputs[1]) == 2.0", "True"),
    "any product is a square": Mutant("norms._is_square", "product.inputs[1] is x", "True"),
    "any axis": Mutant("norms._mean_of", "int(axes.reshape(())) in (-1, len(source.shape) - 1)", "True"),
    "eps is forgotten": Mutant("norms._normalised", "return x, eps", "return x, 0.0"),
    "any gain": Mutant("norms._fits", "gain.shape[0] == x.shape[-1]", "True"),
    "the sum in the place of the mean": Mutant(
        "norms._write", "[_like(y), ir.Value(name=''), ir.Value(name=''), _like(total)]", "[_like(y), _like(total)]"
    ),
    "over the first axis": Mutant("norms.fuse_norms", "{'epsilon': norm.eps, 'axis': -1, 'stash_type': _FLOAT.value}", "{'axis': 0}"),
}


def compare(m: Any, module: nn.Module, opset: int) -> None:
    x = 2 * randn(4, 3, 16)
    with TemporaryDirectory() as folder:
        m.export_onnx(graph_of(module), Path(folder), Export(opset=opset))
        made = session(Path(folder) / MODEL)
        found = list(made.run(None, feeds(made, (x,))))
    assert difference(found, exact(module, x)) <= ROUNDING


def check_forms(m: Any) -> None:
    for name in ("llama", "product"):
        compare(m, Block(FORMS[name]), 23)


def check_others(m: Any) -> None:
    for norm in OTHERS.values():
        compare(m, Block(norm), 23)


def check_neighbours(m: Any) -> None:
    compare(m, Inside(), 23)
    compare(m, Sums(), 21)


CHECKS = (check_forms, check_others, check_neighbours)


@pytest.mark.full
def test_the_checks_pass_on_the_code_as_it_is() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mistake_is_seen(mutant: Mutant) -> None:
    assert killer(mutated(mutant), CHECKS), "no check noticed"
