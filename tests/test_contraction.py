"""Contraction plans: every plan of a train gives x @ W^T, W by an einsum over the cores, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from contracting import Array, OnnxOps, TorchOps, matrix_weight, random_cores, vector_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from matmorph.errors import InputError
from matmorph.passes.linalg.contraction import (
    ALL_GROUPINGS,
    MAX_GROUPS,
    ContractionPlan,
    TrainShape,
    candidate_plans,
    contract,
    matrix_train,
    vector_train,
)

EXACT = 1e-12
"""Relative to the largest value: float64 sums of at most some thousand products of order one, of either sign."""
OPS = TorchOps()


def weight(train: TrainShape, cores: list[Array], boundary: int = 0) -> Array:
    return matrix_weight(cores) if train.form == "matrix" else vector_weight(cores, boundary)


def run(plan: ContractionPlan, x: Array, cores: list[Array], leading: tuple[int, ...] = (-1,)) -> Array:
    tensors = [torch.from_numpy(core) for core in cores]
    return np.asarray(contract(plan, torch.from_numpy(x), tensors, OPS, leading).numpy())


def deviation(found: Array, wanted: Array) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max(initial=0) / max(np.abs(wanted).max(initial=0), 1e-300))


def check_all(train: TrainShape, w: Array, cores: list[Array], tokens: int) -> None:
    x = np.random.default_rng(tokens).standard_normal((tokens, train.in_features))
    for plan in candidate_plans(train):
        assert deviation(run(plan, x, cores), x @ w.T) <= EXACT, plan.name


# ---- every plan computes the product


@st.composite
def matrix_trains(draw: st.DrawFn) -> TrainShape:
    count = draw(st.integers(2, 6))
    sizes = st.integers(1, 4 if count < 5 else 2)
    modes = [draw(st.lists(sizes, min_size=count, max_size=count)) for _ in range(2)]
    inner = draw(st.lists(st.integers(1, 3), min_size=count - 1, max_size=count - 1))
    return matrix_train(modes[0], modes[1], (1, *inner, 1))


@st.composite
def vector_trains(draw: st.DrawFn) -> tuple[TrainShape, int]:
    count = draw(st.integers(2, 6))
    shape = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    boundary = draw(st.integers(1, count - 1))
    inner = draw(st.lists(st.integers(1, 3), min_size=count - 1, max_size=count - 1))
    return vector_train(shape, boundary, (1, *inner, 1)), boundary


@settings(max_examples=40, deadline=None)
@given(train=matrix_trains(), tokens=st.sampled_from((0, 1, 3)))
def test_every_plan_of_a_tt_matrix(train: TrainShape, tokens: int) -> None:
    cores = random_cores(train.core_shapes)
    check_all(train, matrix_weight(cores), cores, tokens)


@settings(max_examples=60, deadline=None)
@given(pair=vector_trains(), tokens=st.sampled_from((0, 1, 3)))
def test_every_plan_of_a_tt_vector(pair: tuple[TrainShape, int], tokens: int) -> None:
    train, boundary = pair
    cores = random_cores(train.core_shapes)
    check_all(train, vector_weight(cores, boundary), cores, tokens)


@pytest.mark.parametrize(
    ("train", "boundary"),
    [
        (matrix_train((2, 3, 4), (5, 1, 3), (1, 2, 3, 1)), 0),
        (matrix_train((6,), (4,), (1, 1)), 0),
        (vector_train((3, 2, 4, 5, 2), 3, (1, 2, 3, 2, 2, 1)), 3),
        (vector_train((3, 5), 1, (1, 2, 1)), 1),
    ],
    ids=["matrix", "one core", "vector", "two factors"],
)
def test_leading_sizes_are_kept(train: TrainShape, boundary: int) -> None:
    cores = random_cores(train.core_shapes)
    x = np.random.default_rng(1).standard_normal((2, 3, train.in_features))
    wanted = x @ weight(train, cores, boundary).T
    for plan in candidate_plans(train):
        assert deviation(run(plan, x, cores, leading=(-1, 3)), wanted) <= EXACT, plan.name


@pytest.mark.parametrize("train", [matrix_train((2, 3, 4), (5, 2, 3), (1, 2, 3, 1)), vector_train((3, 2, 4, 5), 2, (1, 2, 3, 2, 1))])
def test_rows_of_the_identity_reconstruct_the_weight(train: TrainShape) -> None:
    cores = random_cores(train.core_shapes)
    for plan in candidate_plans(train):
        assert deviation(run(plan, np.eye(train.in_features), cores), weight(train, cores, 2).T) <= EXACT, plan.name


def test_the_orders_of_modes_are_those_of_the_papers() -> None:
    """Entry by entry, without einsum: [out, in] = (o1, o2), (i1, i2) of a TT-matrix; (n3, n4), (m2, m1) of a TT-vector."""
    train = matrix_train((2, 3), (4, 5), (1, 2, 1))
    g, h = random_cores(train.core_shapes)
    w = run(candidate_plans(train)[0], np.eye(20), [g, h]).T
    assert w[1 * 3 + 2, 3 * 5 + 4] == pytest.approx(float(g[0, 1, 3] @ h[:, 2, 4, 0]), rel=EXACT)
    train = vector_train((4, 5, 2, 3), 2, (1, 2, 2, 2, 1))
    a, b, c, d = random_cores(train.core_shapes)
    w = run(candidate_plans(train)[0], np.eye(20), [a, b, c, d]).T
    assert w[1 * 3 + 2, 4 * 4 + 3] == pytest.approx(float((a[0, 3] @ b[:, 4] @ c[:, 1] @ d[:, 2])[0]), rel=EXACT)


# ---- what plans there are, and of what they consist


def test_all_groupings_of_a_tt_matrix_in_all_orders() -> None:
    train = matrix_train((8, 8, 16), (8, 8, 16), (1, 4, 4, 1))
    names = [plan.name for plan in candidate_plans(train)]
    orders = ("", "_right", "_columns", "_right_columns")
    assert names == [f"{group}{order}" for group in ("chain", "merged_1_2-3", "merged_1-2_3") for order in orders] + ["dense"]


def test_names_of_a_tt_vector() -> None:
    train = vector_train((4, 4, 4, 4), 2, (1, 2, 2, 2, 1))
    names = [plan.name for plan in candidate_plans(train)]
    assert names[0] == "chain"
    assert names[-1] == "dense"
    assert set(names[1:-1]) == {"merged_1_2_3-4", "merged_1_2-3_4", "merged_1-2_3_4", "merged_1_2-3-4", "two_factor", "merged_1-2-3_4"}


def test_a_merged_core_as_large_as_the_weight_is_no_plan() -> None:
    train = matrix_train((8, 8, 16), (8, 8, 16), (1, 64, 64, 1))
    groups = {plan.groups for plan in candidate_plans(train)}
    assert groups == {((0, 1), (1, 2), (2, 3)), ((0, 2), (2, 3)), ((0, 3),)}, "cores 2 and 3 merged: 64 * 128 * 128 = 1024 * 1024 numbers"


@pytest.mark.parametrize("count", [ALL_GROUPINGS, ALL_GROUPINGS + 1])
def test_long_trains_are_cut_into_few_groups(count: int) -> None:
    train = vector_train((2,) * count, 4, (1, *(1,) * (count - 1), 1))
    sizes = {len(plan.groups) for plan in candidate_plans(train)}
    few = {*range(1, MAX_GROUPS + 1), count}
    assert sizes == (few if count > ALL_GROUPINGS else {*range(1, count + 1)})


@given(train=matrix_trains() | vector_trains().map(lambda pair: pair[0]))
@settings(max_examples=30, deadline=None)
def test_steps_are_reshape_and_matmul(train: TrainShape) -> None:
    """On what depends on x: as many products as groups, no transposition (two where the plan's name says so), one -1 per reshape."""
    plans = candidate_plans(train)
    assert len({plan.name for plan in plans}) == len(plans)
    for plan in plans:
        depends = {0}
        live = []
        for index, step in enumerate(plan.steps, len(train.inputs) + 1):
            assert all(operand < index for operand in step.operands)
            if depends & set(step.operands):
                depends.add(index)
                live.append(step)
        operations = [step.op for step in live]
        assert operations.count("matmul") == len(plan.groups)
        assert operations.count("permute") == (2 if plan.name.endswith("columns") else 0)
        assert set(operations) <= {"reshape", "matmul", "permute"}
        assert all(step.sizes.count(-1) == 1 for step in live if step.op == "reshape")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: matrix_train((2, 3), (2,), (1, 2, 1)), "as many modes as cores"),
        (lambda: matrix_train((2, 3), (2, 3), (1, 1)), "as many modes as cores"),
        (lambda: matrix_train((), (), (1,)), "as many modes as cores"),
        (lambda: matrix_train((2, 3), (2, 3), (2, 2, 1)), "both ends"),
        (lambda: matrix_train((2, 3), (2, 3), (1, 2, 2)), "both ends"),
        (lambda: matrix_train((2, 0), (2, 3), (1, 2, 1)), "1 or more"),
        (lambda: matrix_train((2, 2), (2, 3), (1, 0, 1)), "1 or more"),
        (lambda: vector_train((2, 2), 0, (1, 2, 1)), "leaves one side empty"),
        (lambda: vector_train((2, 2), 2, (1, 2, 1)), "leaves one side empty"),
    ],
)
def test_shapes_that_are_no_train(make: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()  # type: ignore[operator]


# ---- under ONNX Runtime


@pytest.mark.parametrize(
    ("train", "boundary"),
    [(matrix_train((4, 4, 6), (4, 3, 5), (1, 3, 2, 1)), 0), (vector_train((4, 3, 5, 4, 2, 6), 3, (1, 2, 3, 3, 2, 2, 1)), 3)],
    ids=["matrix", "vector"],
)
def test_onnx_runtime_folds_what_reads_cores_alone(train: TrainShape, boundary: int, tmp_path: Path) -> None:
    """The session's own graph holds one product per group and nothing else but reshapes (and the transpositions of `columns`)."""
    cores = random_cores(train.core_shapes)
    x = np.random.default_rng(2).standard_normal((5, train.in_features))
    wanted = x @ weight(train, cores, boundary).T
    for plan in candidate_plans(train):
        ops = OnnxOps()
        result = contract(plan, "x", [f"core_{number}" for number in range(len(cores))], ops)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "folded.onnx")
        options.log_severity_level = 3  # it warns that the optimised file is for this machine
        options.intra_op_num_threads = 1
        model = ops.model(result, cores, train.in_features, train.out_features)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        [y] = session.run(None, {"x": x.astype(np.float32)})
        assert deviation(y.astype(np.float64), wanted) <= 1e-5, "float32 products of at most 120 terms of order one"
        kept = [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node]
        assert sum(kind in ("MatMul", "FusedMatMul") for kind in kept) == len(plan.groups)
        assert set(kept) <= {"MatMul", "FusedMatMul", "Reshape", *(("Transpose",) if "columns" in plan.name else ())}
