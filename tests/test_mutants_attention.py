"""Mutants of attention's translation: each plants one plausible mistake, and torch's own kernel must show it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mutating import Mutant, killer, mutated, unmutated
from test_attention import AXES, KEYS, ROUNDING, SIZES, Grouped, Masks, allowed, qkv, run

from matmorph.ir.tracing.trace import trace
from matmorph.specs.schema import Export

MUTANTS = {
    "a row without keys has a mean": Mutant("attention._attention", "mask is None", "True", nth=2),
    "dead by the last key": Mutant("attention._alive", "'ReduceMax'", "'ReduceMin'", nth=1),
    "finite masks are dead": Mutant("attention._alive", "-math.inf", "_lowest(mask)"),
    "scaled twice": Mutant("attention._written_out", "_turned(k)", "_turned(_scaled(k, scale))"),
    "a given scale is forgotten": Mutant("attention._written_out", "_scaled(q, scale)", "_scaled(q, None)"),
    "the diagonal is hidden": Mutant("attention._triangle", "emit.scalar(1)", "emit.scalar(0)"),
    "heads interleaved": Mutant("attention._repeated", "emit.ints(rank - 2)", "emit.ints(rank - 3)"),
    "causal forgets the mask": Mutant("attention._below", "[mask, _triangle(q, k, -math.inf)]", "[_triangle(q, k, -math.inf)] * 2"),
}


def graph_of(module: Any) -> Any:
    axes = (AXES, KEYS, KEYS, {0: "batch", 2: "rows", 3: "keys"})
    return trace(module, (*qkv(*SIZES[0]), allowed(*SIZES[0])), axes)


MASKS, GROUPED = Masks(), Grouped()


def check_masks(m: Any) -> None:
    compare(m, MASKS, list(MASKS(*qkv(*SIZES[2]), allowed(*SIZES[2])).values()))


def check_groups(m: Any) -> None:
    compare(m, GROUPED, list(GROUPED(*qkv(*SIZES[2]), allowed(*SIZES[2]))))


def compare(m: Any, module: Any, expected: list[Any]) -> None:
    inputs = (*qkv(*SIZES[2]), allowed(*SIZES[2]))
    for actual, wanted in zip(run(m.skeleton(graph_of(module), Export()), inputs), expected, strict=True):
        np.testing.assert_allclose(actual, wanted.numpy(), atol=ROUNDING, rtol=0)


CHECKS = (check_groups, check_masks)


@pytest.mark.full
def test_the_checks_pass_on_the_code_as_it_is() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mistake_is_seen(mutant: Mutant) -> None:
    assert killer(mutated(mutant), CHECKS), "no check noticed"
