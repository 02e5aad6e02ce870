"""Which parameters train: words, globs, their order, and what is refused with the place in the spec."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from matmorph.api import load_spec
from matmorph.errors import SpecError
from matmorph.ir.core import Graph
from matmorph.ir.tracing.trace import trace
from matmorph.passes.adapters.trainables import resolve, selectors
from matmorph.passes.methods import all_methods
from matmorph.passes.pipeline import compile_graph
from matmorph.specs.schema import ParameterSelector

METHODS = all_methods()


class Net(nn.Module):
    """Two layers that rules rewrite, a norm, a tied pair, and a head that the loss may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16)
        self.first = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.second = nn.Linear(32, 16)
        self.classifier = nn.Linear(16, 8, bias=False)
        self.classifier.weight = self.table.weight
        self.aside = nn.Linear(16, 2)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.second(torch.relu(self.norm(self.first(self.table(ids)))))
        return {"logits": self.classifier(hidden), "aside": self.aside(hidden) + self.steps.sum()}


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    source = trace(Net().eval(), {"ids": torch.zeros(2, 3, dtype=torch.int64)}, {"ids": {0: "batch", 1: "seq"}})
    quantised = {"quantizer": "uniform", "bits": 8, "block_size": 16, "rank": 2}
    rules = [
        {"match": {"path": "first"}, "rewrite": {"loftq": quantised}, "force": True},
        {"match": {"path": "second"}, "rewrite": {"low_rank": {"rank": 2}}},
    ]
    spec = load_spec({"version": 1, "rules": rules})
    return compile_graph(source, spec, METHODS, "Net").graph


def names(graph: Graph, *words: str, frozen: tuple[str, ...] = ()) -> list[str]:
    found = resolve(graph, METHODS, selectors(words, "trainable"), selectors(frozen, "frozen"))
    return [item.const.path for item in found]


def test_words_stand_for_what_methods_put_in(graph: Graph) -> None:
    assert names(graph, "adapters") == ["first.loftq.down", "first.loftq.up"]
    assert names(graph, "factors") == ["second.low_rank.down", "second.low_rank.up"]


def test_all_is_every_float_parameter_once_in_state_order(graph: Graph) -> None:
    found = names(graph, "all")
    assert found == [const.path for const in graph.used_state() if const.kind == "parameter"]
    assert len(found) == len(set(found)) == 11  # a tied pair counts once; codes, scales and the counter are buffers
    assert "first.bias" in found


def test_segments_come_as_named_and_hold_state_order(graph: Graph) -> None:
    found = resolve(graph, METHODS, selectors(["**.bias", "adapters", "norm.*"], "trainable"))
    assert [(item.segment, item.const.path) for item in found] == [
        ("**.bias", "first.bias"),
        ("**.bias", "norm.bias"),
        ("**.bias", "second.bias"),
        ("**.bias", "aside.bias"),
        ("adapters", "first.loftq.down"),
        ("adapters", "first.loftq.up"),
        ("norm.*", "norm.weight"),  # its bias went to the first that named it
    ]


@pytest.mark.parametrize("glob", ["classifier.weight", "table.*", "{classifier,none}.**"])
def test_a_tied_parameter_answers_to_each_of_its_names(graph: Graph, glob: str) -> None:
    assert names(graph, glob) == ["table.weight"]


def test_what_the_loss_does_not_reach_is_left_out(graph: Graph) -> None:
    reached = [const for const in graph.used_state() if not const.path.startswith("aside")]
    found = resolve(graph, METHODS, selectors(["all"], "trainable"), reached=reached)
    assert [item.const for item in found] == [const for const in reached if const.kind == "parameter"]
    with pytest.raises(SpecError, match=r"trainable\[0\]: the loss does not depend on what aside.\*\* chooses") as caught:
        resolve(graph, METHODS, selectors(["aside.**"], "trainable"), reached=reached)
    assert caught.value.details == ("chosen: aside.weight, aside.bias",)


REFUSED = {
    "no adapters": (["glora.**"], [], "trainable[0]: no parameter is called glora.**"),
    "near": (["clasifier.wieght"], [], "trainable[0]: no parameter is called clasifier.wieght\n  nearest: classifier.weight"),
    "codes": (["first.loftq.*codes*"], [], "trainable[0]: first.loftq.codes is a buffer (uint8), not a parameter: it does not train"),
    "buffer": (["all", "steps"], [], "trainable[1]: steps is a buffer (int64), not a parameter: it does not train"),
    "glob": (["a.{b"], [], "trainable[0]: 'a.{b' is no glob: this { is not closed"),
    "both": (
        ["adapters", "norm.**"],
        ["**.bias"],
        "trainable[1]: norm.bias is matched by both train.trainable (norm.**) and train.frozen (**.bias)\n"
        "  name more exactly what trains; frozen only makes sure that nothing of it does",
    ),
    "dead guard": (["all"], ["nrom.**"], "frozen[0]: no parameter is called nrom.**\n  nearest: norm.bias"),
    "nothing": ([], [], "train.trainable is empty: nothing trains"),
}


@pytest.mark.parametrize(("trainable", "frozen", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(graph: Graph, trainable: list[str], frozen: list[str], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        names(graph, *trainable, frozen=tuple(frozen))
    assert str(caught.value).startswith(message)


def test_no_adapters_in_a_plain_model() -> None:
    plain = trace(nn.Linear(4, 4), (torch.zeros(2, 4),))
    at = load_spec(
        {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}], "train": {"loss": "mse", "trainable": ["adapters"]}}
    )
    assert at.train is not None
    with pytest.raises(SpecError) as caught:
        resolve(plain, METHODS, at.train.trainable)
    said = "the model has no adapters: no rule put in loftq, qlora, tt_lora, lora, dora, loha, lokr, melora, ia3, glora or sparse_grad"
    hint = "trainable: all takes the model's own parameters; compile --no-train writes no training graphs"
    assert str(caught.value) == f"train.trainable[0]: {said}\n  {hint}"


def test_an_error_names_the_place_in_the_spec(graph: Graph, tmp_path: pytest.TempPathFactory) -> None:
    file = tmp_path / "a.yaml"  # type: ignore[operator]
    file.write_text("version: 1\nrules: [{match: {op: matmul}, rewrite: keep}]\ntrain: {loss: mse, trainable: [adapters, 'x.**']}\n")
    train = load_spec(file).train
    assert train is not None
    with pytest.raises(SpecError) as caught:
        resolve(graph, METHODS, train.trainable)
    assert str(caught.value).startswith(f"{file}:3:42: train.trainable[1]: no parameter is called x.**")


def test_the_method_of_a_weight(graph: Graph) -> None:
    found = {const.path: const.method for const in graph.state}
    assert (found["first.loftq.up"], found["second.low_rank.down"], found["norm.bias"]) == ("loftq", "low_rank", None)
    assert ParameterSelector("adapters").GROUPS == ("adapters", "factors", "all")
