"""Mutants of the contraction planner: each plants one plausible mistake, and the checks below must notice.

The checks are a digest of the planner's tests, against einsum over the cores and hand formulas; unmutated code passes them all.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from contracting import TorchOps, matrix_weight, random_cores, vector_weight
from mutating import UNCHANGED, Check, killer

MODULES = ("linalg.contraction", "linalg.contraction_rates", "linalg.contraction_cost")
"""In the order of their imports."""

PLANS, RATES, COST = MODULES
MUTANTS: dict[str, tuple[str, str, str]] = {
    "inputs of a TT-vector in order": (
        PLANS,
        '"j": [2 + 2 * core for core in reversed(range(cores))]',
        '"j": [2 + 2 * c for c in range(cores)]',
    ),
    "inputs of a TT-matrix in reverse": (
        PLANS,
        '"i": [2 + 2 * core for core in range(cores)]',
        '"i": [2 + 2 * c for c in reversed(range(cores))]',
    ),
    "outputs in reverse": (PLANS, '"o": [1 + 2 * core for core in range(cores)]', '"o": [1 + 2 * c for c in reversed(range(cores))]'),
    "outputs and inputs swapped": (
        PLANS,
        "for size in (train.outputs[core], train.inputs[core]))",
        "for size in (train.inputs[core], train.outputs[core]))",
    ),
    "permutation dropped": (PLANS, "        if moved != kept:", "        if False:"),
    "permutation inverted": (PLANS, "*(kept.index(axis) for axis in moved)", "*(moved.index(axis) for axis in kept)"),
    "merge forgets the rank before": (PLANS, "ranks[low] * prod(sizes[low:core]), ranks[core]", "prod(sizes[low:core]), -1"),
    "merge leaves out the last core": (
        PLANS,
        "for core in range(low + 1, high):\n            left",
        "for core in range(low + 1, max(high - 1, low + 1)):\n            left",
    ),
    "from the left, rank behind the inputs": (
        PLANS,
        'writer.matmul(writer.merged(group).matrix("os", "ri"), value)\n    last',
        'writer.matmul(writer.merged(group).matrix("os", "ir"), value)\n    last',
    ),
    "from the left, rank before the outputs": (
        PLANS,
        'writer.matmul(writer.merged(group).matrix("os", "ri"), value)\n    last',
        'writer.matmul(writer.merged(group).matrix("so", "ri"), value)\n    last',
    ),
    "from the right, outputs before the rank": (PLANS, '.matrix("i", "ros")', '.matrix("i", "ors")'),
    "from the right, in the order of the left": (PLANS, "for group in reversed(groups[:-1]):", "for group in groups[:-1]:"),
    "columns never turned back": (
        PLANS,
        "writer.permute(writer.reshape(value, writer.train.out_features, -1), 1, 0)",
        "writer.reshape(value, -1, writer.train.out_features)",
    ),
    "columns of x not turned": (
        PLANS,
        "writer.permute(writer.reshape(writer.x, -1, writer.train.in_features), 1, 0)",
        "writer.reshape(writer.x, writer.train.in_features, -1)",
    ),
    "rank before the inputs of a TT-vector": (PLANS, '.matrix("jr", "os"))\n        last', '.matrix("rj", "os"))\n        last'),
    "leading sizes ignored": (PLANS, "leading if number == len(plan.steps) - 1 else None", "None"),
    "a fold that is not undone": (PLANS, "    if folded or last != train.out_features:", "    if last != train.out_features:"),
    "merged cores above dense kept": (PLANS, "_elements(train, group) < dense for", "True for"),
    "half of the FLOPs": (COST, 'flop_count("bmkn", True, 2, sizes)', 'flop_count("bmkn", False, 2, sizes)'),
    "folded products are charged": (COST, "        if not result.constant:", "        if True:"),
    "a batch counts once": (COST, "Product(prod(batch), left", "Product(1, left"),
    "transpositions are free": (COST, "            self.permuted.append(prod(value.shape))", "            pass"),
    "dense not compared with": (COST, "force or max(_over(item, dense)) <= MARGIN", "True"),
    "force ignored": (COST, "force or max(_over(item, dense))", "max(_over(item, dense))"),
    "best regret instead of worst": (COST, "regrets = [max(", "regrets = [min("),
    "the slowest plan": (COST, "fastest = [min(", "fastest = [max("),
    "an estimate decides over a measurement": (COST, "if RATES[name].measured)", "if not RATES[name].measured)"),
    "lanes ignored": (RATES, "-(-item.columns // self.lanes) * self.lanes", "item.columns"),
    "nodes are free": (RATES, "            self.node,\n", ""),
}

ORDERS = (
    ("matrix", (2, 3, 4), (5, 2, 3), (1, 2, 3, 1)),
    ("matrix", (3, 2, 2, 3), (2, 3, 3, 2), (1, 2, 3, 2, 1)),
    ("vector", (3, 2, 4, 5, 2), 3, (1, 2, 3, 2, 2, 1)),
    ("vector", (2, 2, 3), 1, (1, 2, 3, 1)),
)


def train_of(m: dict[str, ModuleType], form: str, first: Any, second: Any, ranks: tuple[int, ...]) -> Any:
    make = m[PLANS].matrix_train if form == "matrix" else m[PLANS].vector_train
    return make(first, second, ranks)


def check_products(m: dict[str, ModuleType]) -> None:
    for form, first, second, ranks in ORDERS:
        train = train_of(m, form, first, second, ranks)
        cores = random_cores(train.core_shapes)
        w = matrix_weight(cores) if form == "matrix" else vector_weight(cores, second)
        x = np.random.default_rng(0).standard_normal((2, 3, train.in_features))
        tensors = [torch.from_numpy(core) for core in cores]
        for plan in m[PLANS].candidate_plans(train):
            y = m[PLANS].contract(plan, torch.from_numpy(x), tensors, TorchOps(), (-1, 3)).numpy()
            assert y.shape == (2, 3, train.out_features)
            assert np.abs(y - x @ w.T).max() <= 1e-12 * np.abs(x @ w.T).max()  # float64


def check_candidates(m: dict[str, ModuleType]) -> None:
    train = m[PLANS].matrix_train((8, 8, 16), (8, 8, 16), (1, 64, 64, 1))
    assert {len(plan.groups) for plan in m[PLANS].candidate_plans(train)} == {1, 2, 3}
    assert not any("2-3" in plan.name for plan in m[PLANS].candidate_plans(train))


def check_counts(m: dict[str, ModuleType]) -> None:
    train = m[PLANS].matrix_train((2, 5, 3), (4, 3, 7), (1, 2, 2, 1))
    rates = m[RATES].RATES["cpu"]
    found = {plan.name: m[COST].estimate(plan, train, 6, rates) for plan in m[PLANS].candidate_plans(train)}
    assert found["chain"].flops == 2 * 6 * (84 * 2 * 2 + 7 * 2 * 3 * 5 * 4 + 10 * 2 * 7 * 3)
    assert found["merged_1-2_3"].flops == 2 * 6 * (84 * 10 * 2 + 10 * 2 * 7 * 3)
    assert found["dense"].flops == 2 * 6 * 84 * 30
    assert found["chain_columns"].bytes == found["chain"].bytes + 4 * 2 * 6 * (84 + 30)
    tiny = m[RATES].Product(1, 1, 1, 1, True)
    assert rates.product(tiny) >= rates.node
    assert rates.product(m[RATES].Product(1, 12, 64, 4, True)) > 0.9 * rates.product(m[RATES].Product(1, 12, 64, 16, True))


def check_choice(m: dict[str, ModuleType]) -> None:
    def square(rank: int) -> Any:
        return m[PLANS].matrix_train((8, 8, 16), (8, 8, 16), (1, rank, rank, 1))

    plan = m[COST].plan_contraction
    assert [plan(square(rank), (256,)).plan.name for rank in (4, 64)] == ["merged_1-2_3", "dense"]
    assert plan(square(64), (256,), force=True).plan.name == "merged_1-2_3"
    assert m[COST].planning_target(("cuda", "cpu")) == "cpu"


def check_regret(m: dict[str, ModuleType]) -> None:
    """Three plans at two counts: the compromise is taken, not the one that is best at one of them."""

    def candidate(name: str, *seconds: float) -> Any:
        estimates = tuple(m[COST].Estimate(k, each, 0, 0, 0) for k, each in enumerate(seconds))
        return m[COST].Candidate(m[PLANS].Plan(name, ((0, 1), (1, 2)), "", ()), estimates)

    offered = [candidate("first", 1, 5), candidate("second", 5, 1), candidate("both", 1.5, 1.5), candidate("dense", 10, 10)]
    assert m[COST].choose(offered).plan.name == "both"
    assert m[COST].choose([*offered[:2], candidate("dense", 4, 4)]).plan.name == "dense"
    assert m[COST].choose([candidate("near", 1, 4), candidate("far", 3, 3), offered[-1]]).plan.name == "near"


CHECKS: tuple[Check, ...] = (check_products, check_candidates, check_counts, check_choice, check_regret)


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(MODULES, CHECKS, *UNCHANGED) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed(name: str) -> None:
    assert killer(MODULES, CHECKS, *MUTANTS[name]), "no check noticed"
