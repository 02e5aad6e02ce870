"""Mutants of the contraction planner: each plants one plausible mistake, and the checks below must notice.

The checks are a digest of the planner's tests, against einsum over the cores and hand formulas; unmutated code passes them all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contracting import TorchOps, matrix_weight, random_cores, vector_weight
from mutating import Check, Mutant, killer, mutated, unmutated

MUTANTS = {
    "inputs of a TT-vector in order": Mutant(
        "_Merged.matrix", "[2 + 2 * core for core in reversed(range(cores))]", "[2 + 2 * c for c in range(cores)]"
    ),
    "inputs of a TT-matrix in reverse": Mutant(
        "_Merged.matrix", "[2 + 2 * core for core in range(cores)]", "[2 + 2 * c for c in reversed(range(cores))]"
    ),
    "outputs in reverse": Mutant(
        "_Merged.matrix", "[1 + 2 * core for core in range(cores)]", "[1 + 2 * c for c in reversed(range(cores))]"
    ),
    "outputs and inputs swapped": Mutant(
        "_Merged.matrix", "(train.outputs[core], train.inputs[core])", "(train.inputs[core], train.outputs[core])"
    ),
    "permutation dropped": Mutant("_Merged.matrix", "moved != kept", "False"),
    "permutation inverted": Mutant("_Merged.matrix", "(kept.index(axis) for axis in moved)", "(moved.index(axis) for axis in kept)"),
    "merge forgets the rank before": Mutant(
        "_Writer.merged",
        "self.reshape(value, ranks[low] * prod(sizes[low:core]), ranks[core])",
        "self.reshape(value, prod(sizes[low:core]), -1)",
    ),
    "merge leaves out the last core": Mutant("_Writer.merged", "range(low + 1, high)", "range(low + 1, max(high - 1, low + 1))"),
    "from the left, rank behind the inputs": Mutant(
        "_from_left", "writer.merged(group).matrix('os', 'ri')", "writer.merged(group).matrix('os', 'ir')"
    ),
    "from the left, rank before the outputs": Mutant(
        "_from_left", "writer.merged(group).matrix('os', 'ri')", "writer.merged(group).matrix('so', 'ri')"
    ),
    "from the right, outputs before the rank": Mutant(
        "_from_right", "writer.merged(last).matrix('i', 'ros')", "writer.merged(last).matrix('i', 'ors')"
    ),
    "from the right, in the order of the left": Mutant("_from_right", "reversed(groups[:-1])", "groups[:-1]"),
    "columns never turned back": Mutant(
        "_back",
        "writer.permute(writer.reshape(value, writer.train.out_features, -1), 1, 0)",
        "writer.reshape(value, -1, writer.train.out_features)",
    ),
    "columns of x not turned": Mutant(
        "contraction._columns",
        "writer.permute(writer.reshape(writer.x, -1, writer.train.in_features), 1, 0)",
        "writer.reshape(writer.x, writer.train.in_features, -1)",
    ),
    "rank before the inputs of a TT-vector": Mutant(
        "contraction._along", "writer.merged(group).matrix('jr', 'os')", "writer.merged(group).matrix('rj', 'os')"
    ),
    "leading sizes ignored": Mutant("contract", "leading if number == len(plan.steps) - 1 else None", "None"),
    "a fold that is not undone": Mutant("contraction._along", "folded or last != train.out_features", "last != train.out_features"),
    "merged cores above dense kept": Mutant("_groupings", "_elements(train, group) < dense", "True"),
    "half of the FLOPs": Mutant("_Meter._note", "flop_count('bmkn', True, 2, sizes)", "flop_count('bmkn', False, 2, sizes)"),
    "folded products are charged": Mutant("_Meter.matmul", "not result.constant", "True"),
    "a batch counts once": Mutant("_Meter.matmul", "prod(batch)", "1"),
    "transpositions are free": Mutant("_Meter.permute", "self.permuted.append(prod(value.shape))", "pass"),
    "dense not compared with": Mutant("choose", "force or max(_over(item, dense)) <= MARGIN", "True"),
    "force ignored": Mutant("choose", "force or max(_over(item, dense)) <= MARGIN", "max(_over(item, dense)) <= MARGIN"),
    "best regret instead of worst": Mutant(
        "choose",
        "max((each.seconds / least for each, least in zip(item.estimates, fastest, strict=True)))",
        "min((each.seconds / least for each, least in zip(item.estimates, fastest, strict=True)))",
    ),
    "the slowest plan": Mutant("choose", "min((each.seconds for each in column))", "max((each.seconds for each in column))"),
    "an estimate decides over a measurement": Mutant("_planned_for", "rates[name].measured", "not rates[name].measured"),
    "lanes ignored": Mutant("Rates.product", "-(-item.columns // self.lanes) * self.lanes", "item.columns"),
    "nodes are free": Mutant("Rates.product", "self.node", "0.0"),
}

ORDERS = (
    ("matrix", (2, 3, 4), (5, 2, 3), (1, 2, 3, 1)),
    ("matrix", (3, 2, 2, 3), (2, 3, 3, 2), (1, 2, 3, 2, 1)),
    ("vector", (3, 2, 4, 5, 2), 3, (1, 2, 3, 2, 2, 1)),
    ("vector", (2, 2, 3), 1, (1, 2, 3, 1)),
)


def train_of(m: Any, form: str, first: Any, second: Any, ranks: tuple[int, ...]) -> Any:
    make = m.matrix_train if form == "matrix" else m.vector_train
    return make(first, second, ranks)


def check_products(m: Any) -> None:
    for form, first, second, ranks in ORDERS:
        train = train_of(m, form, first, second, ranks)
        cores = random_cores(train.core_shapes)
        w = matrix_weight(cores) if form == "matrix" else vector_weight(cores, second)
        x = np.random.default_rng(0).standard_normal((2, 3, train.in_features))
        tensors = [torch.from_numpy(core) for core in cores]
        for plan in m.candidate_plans(train):
            y = m.contract(plan, torch.from_numpy(x), tensors, TorchOps(), (-1, 3)).numpy()
            assert y.shape == (2, 3, train.out_features)
            assert np.abs(y - x @ w.T).max() <= 1e-12 * np.abs(x @ w.T).max()  # float64


def check_candidates(m: Any) -> None:
    train = m.matrix_train((8, 8, 16), (8, 8, 16), (1, 64, 64, 1))
    assert {len(plan.groups) for plan in m.candidate_plans(train)} == {1, 2, 3}
    assert not any("2-3" in plan.name for plan in m.candidate_plans(train))


def check_counts(m: Any) -> None:
    train = m.matrix_train((2, 5, 3), (4, 3, 7), (1, 2, 2, 1))
    rates = m.TARGETS["cpu"].rates
    found = {plan.name: m.estimate(plan, train, 6, rates) for plan in m.candidate_plans(train)}
    assert found["chain"].flops == 2 * 6 * (84 * 2 * 2 + 7 * 2 * 3 * 5 * 4 + 10 * 2 * 7 * 3)
    assert found["merged_1-2_3"].flops == 2 * 6 * (84 * 10 * 2 + 10 * 2 * 7 * 3)
    assert found["dense"].flops == 2 * 6 * 84 * 30
    assert found["chain_columns"].bytes == found["chain"].bytes + 4 * 2 * 6 * (84 + 30)
    tiny = m["rates.Product"](1, 1, 1, 1, True)
    assert rates.product(tiny) >= rates.node
    assert rates.product(m["rates.Product"](1, 12, 64, 4, True)) > 0.9 * rates.product(m["rates.Product"](1, 12, 64, 16, True))


def check_choice(m: Any) -> None:
    def square(rank: int) -> Any:
        return m.matrix_train((8, 8, 16), (8, 8, 16), (1, rank, rank, 1))

    plan = m.plan_contraction
    assert [plan(square(rank), (256,)).plan.name for rank in (4, 64)] == ["merged_1-2_3", "dense"]
    assert plan(square(64), (256,), force=True).plan.name == "merged_1-2_3"
    assert m.planning_target(("cuda", "cpu")) == "cpu"


def check_regret(m: Any) -> None:
    """Three plans at two counts: the compromise is taken, not the one that is best at one of them."""

    def candidate(name: str, *seconds: float) -> Any:
        estimates = tuple(m.Estimate(k, each, 0, 0, 0) for k, each in enumerate(seconds))
        return m.PlanCandidate(m.ContractionPlan(name, ((0, 1), (1, 2)), "", ()), estimates)

    offered = [candidate("first", 1, 5), candidate("second", 5, 1), candidate("both", 1.5, 1.5), candidate("dense", 10, 10)]
    assert m.choose(offered).plan.name == "both"
    assert m.choose([*offered[:2], candidate("dense", 4, 4)]).plan.name == "dense"
    assert m.choose([candidate("near", 1, 4), candidate("far", 3, 3), offered[-1]]).plan.name == "near"


CHECKS: tuple[Check, ...] = (check_products, check_candidates, check_counts, check_choice, check_regret)


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed(name: str) -> None:
    assert killer(mutated(MUTANTS[name]), CHECKS), "no check noticed"
