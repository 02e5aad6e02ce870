"""Labels of calibration batches: what is taken, what is refused before anything is computed with it, and who is given them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rewriting import LINEAR, graph_of
from torch import Tensor

from matmorph.errors import InputError, Position, SpecError
from matmorph.ir.core import Graph, Value
from matmorph.ir.training.losses import label_inputs
from matmorph.passes.budget.decide import without_labels
from matmorph.passes.methods import method_table
from matmorph.passes.methods.low_rank.method import LowRank
from matmorph.passes.statistics.loss_gradients import classes_of, dropped, labelled_batch, loss_of
from matmorph.specs.load import load_spec
from matmorph.specs.schema import Train

METHODS: dict[str, Any] = {"low_rank": LowRank()}
CLASSES, VALUES = Train(loss="cross_entropy"), Train(loss="mse")  # LINEAR has 10 outputs


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(LINEAR)


def read(graph: Graph, batch: Any, train: Train = CLASSES) -> tuple[list[Tensor], dict[str, Tensor]]:
    labels = {name: Value(name, kind) for name, kind in label_inputs(loss_of(train), graph)}

    def unlabelled(what: str, hint: str) -> SpecError:
        return SpecError(what, at=Position("s.yaml", 1, 1), details=(hint,))

    return labelled_batch(graph, labels, classes_of(graph, train), batch, 1, unlabelled)


def x(rows: int = 4) -> Tensor:
    return torch.arange(rows * 12, dtype=torch.float32).reshape(rows, 12)


@pytest.mark.parametrize(("given", "train", "expected"), [
    (torch.tensor([0, 9, -100, 3]), CLASSES, torch.tensor([0, 9, -100, 3])),
    (torch.tensor([0, 9, 1, 3], dtype=torch.int32), CLASSES, torch.tensor([0, 9, 1, 3])),
    (np.array([0, 9, 1, 3], np.uint8), CLASSES, torch.tensor([0, 9, 1, 3])),
    ([0, 9, 1, 3], CLASSES, torch.tensor([0, 9, 1, 3])),
    (torch.tensor([0, 9, 7, 3]), Train(loss="cross_entropy", ignore_index=7), torch.tensor([0, 9, 7, 3])),
    (np.full((4, 10), 0.5), VALUES, torch.full((4, 10), 0.5)),  # float64
    (torch.full((4, 10), 0.5, dtype=torch.float16), VALUES, torch.full((4, 10), 0.5)),
])  # fmt: skip
def test_labels_come_in_the_type_of_the_loss(graph: Graph, given: Any, train: Train, expected: Tensor) -> None:
    inputs, labels = read(graph, {"labels": given, "x": x()}, train)
    assert len(inputs) == 1
    assert torch.equal(inputs[0], x())
    assert labels["labels"].dtype == expected.dtype
    assert torch.equal(labels["labels"], expected)


@pytest.mark.parametrize(("labels", "train", "message"), [
    (torch.zeros(4), CLASSES, "input labels must be int64[batch], got float32[4]"),
    (torch.zeros(4, dtype=torch.bool), CLASSES, "input labels must be int64[batch], got bool[4]"),
    (torch.zeros(4, 10, dtype=torch.int64), CLASSES, "input labels must be int64[batch], got int64[4, 10]"),
    (torch.zeros(3, dtype=torch.int64), CLASSES, "batch is 4 in x but 3 in labels"),
    (torch.tensor([0, 1, 10, 2]), CLASSES, "labels are classes, 0 to 9, or -100, which does not count; found 10"),
    (torch.tensor([0, 1, -1, 2]), CLASSES, "labels are classes, 0 to 9, or -100, which does not count; found -1"),
    (torch.zeros(4, dtype=torch.int64), VALUES, "input labels must be float32[batch, 10], got int64[4]"),
    (torch.zeros(4, 9), VALUES, "axis 1 of input labels must be 10, got 9"),
])  # fmt: skip
def test_labels_that_do_not_fit(graph: Graph, labels: Tensor, train: Train, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(graph, {"x": x(), "labels": labels}, train)
    assert caught.value.message == f"calibration batch 2: {message}"


@pytest.mark.parametrize("batch", [{"x": x()}, (x(),), x()])
def test_labels_that_are_missing(graph: Graph, batch: Any) -> None:
    with pytest.raises(SpecError, match="calibration batch 2 has no labels") as caught:
        read(graph, batch)
    assert caught.value.details == ("a batch is a mapping of the model's inputs and labels",)


def test_a_list_stays_one_and_an_iterable_is_read_when_it_is_asked() -> None:
    data = [{"x": 1, "labels": 2}, (3,)]
    assert dropped(data, {"labels"}) == [{"x": 1}, (3,)]
    asked = []

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            for batch in data:
                asked.append(batch)
                yield batch

    lazy = dropped(Batches(), {"labels"})
    assert asked == []
    assert next(iter(lazy)) == {"x": 1}
    assert len(asked) == 1
    assert list(lazy) == list(lazy) == [{"x": 1}, (3,)]


def spec(**more: Any) -> Any:
    rule = {"match": {"op": "linear"}, "rewrite": {"low_rank": {"rank": 2, "whiten": True}}}
    return load_spec({"version": 1, "rules": [rule], **more}, method_table())


@pytest.mark.parametrize("more", [{}, {"train": {"loss": "mse", "trainable": "all"}}])
def test_a_spec_that_reads_no_labels_takes_labelled_data(graph: Graph, more: dict[str, Any]) -> None:
    plain = without_labels([{"x": x(), "labels": 0}], spec(**more), graph, METHODS)
    assert [list(batch) for batch in plain or ()] == [["x"]]


def test_an_input_of_the_model_is_no_label() -> None:
    renamed = graph_of(LINEAR.replace('"x"', '"labels"'))
    plain = without_labels([{"labels": x()}], spec(), renamed, METHODS)
    assert [list(batch) for batch in plain or ()] == [["labels"]]
