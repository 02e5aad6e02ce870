"""Models that come wrapped, and calls through *args and **kwargs: the trace is that of the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_modules import encoder
from torch import nn

import matmorph as mm
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import bind, evaluate
from matmorph.ir.tracing.trace import trace


def model() -> nn.Module:
    torch.manual_seed(0)
    return encoder(8, 2, 12, 2).eval()


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
AXES = ({0: "batch", 1: "seq"},)


def compiled(module: nn.Module) -> nn.Module:
    """By the backend that needs no compiler."""
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def check_plain(wrapped: nn.Module, words: str) -> None:
    plain, found = trace(model(), (X,), AXES), trace(wrapped, (X,), AXES)
    assert [note for note in found.notes if note not in plain.notes] == [
        f"{words} taken off for the trace: paths are those of the model inside"
    ]
    assert [const.names for const in found.state] == [const.names for const in plain.state]
    assert [(n.op, n.origin.path) for n in found.nodes] == [(n.op, n.origin.path) for n in plain.nodes]
    assert torch.equal(evaluate(found, [X])[0], evaluate(plain, [X])[0])


def test_compiled() -> None:
    check_plain(compiled(model()), "torch.compile")


def test_data_parallel() -> None:
    check_plain(nn.DataParallel(model()), "DataParallel")


def test_averaged() -> None:
    check_plain(torch.optim.swa_utils.AveragedModel(model()), "AveragedModel")


def test_distributed_and_compiled(one_process: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(model())
    check_plain(wrapped, "DistributedDataParallel")
    check_plain(compiled(wrapped), "torch.compile and DistributedDataParallel")


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_part_that_is_compiled() -> None:
    """Its place in the model is put back as it was."""
    mixed = Parts()
    part = mixed.first = compiled(mixed.first)
    mixed.second.compile(backend="eager")
    call = mixed.second._compiled_call_impl
    report = mm.inspect_model(mixed, (X,), AXES)
    assert [row.path for row in report.sites] == ["first", "second"]
    assert report.notes[0] == "first: torch.compile taken off for the trace: paths are those of the model inside"
    assert mixed.first is part
    assert mixed.second._compiled_call_impl is call
    assert call is not None


def test_a_wrapped_model_is_compiled_like_the_plain_one() -> None:
    rule = {"name": "a", "match": {"path": "layers.*.linear1"}, "expect": 2, "rewrite": {"low_rank": {"rank": 4}}}
    done = [mm.compile(m, {"version": 1, "rules": [rule]}, (X,), AXES) for m in (model(), nn.DataParallel(compiled(model())))]
    assert done[1].report.name == done[0].report.name == "TransformerEncoder"
    assert torch.equal(done[0](X), done[1](X))
    assert done[0].module.state_dict().keys() == done[1].module.state_dict().keys()


class Starred(nn.Module):
    """All that a signature may have; what goes in is multiplied by the same weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, *rest: torch.Tensor, y: torch.Tensor | None = None, **more: torch.Tensor) -> torch.Tensor:
        given = [x, *rest, *([] if y is None else [y]), *more.values()]
        return torch.stack([self.fc(one).mean(1) for one in given]).sum(0)


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


BY_NAME = {"x": {0: "batch", 1: "seq"}, "rest": ({0: "batch"}, {0: "batch", 1: "other"}), "y": {0: "batch"}, "z": {0: "batch", 1: "far"}}


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        (BY_NAME, ["x", "rest_0", "rest_1", "y", "z"]),
        ({**{k: v for k, v in BY_NAME.items() if k != "z"}, "more": {"z": {0: "batch", 1: "far"}}}, ["x", "rest_0", "rest_1", "y", "z"]),
        (tuple([*[BY_NAME["x"]], *BY_NAME["rest"], BY_NAME["y"], BY_NAME["z"]]), ["x", "rest_0", "rest_1", "y", "z"]),
        (None, ["x", "rest_0", "rest_1", "y", "z"]),
    ],
)
def test_stars_with_dynamic_axes(shapes: object, names: list[str]) -> None:
    starred = Starred()
    args, kwargs = (tensor(3, 5, 8), tensor(3, 6, 8), tensor(3, 7, 8)), {"y": tensor(3, 4, 8), "z": tensor(3, 2, 8)}
    graph = trace(starred, args, shapes, kwargs=kwargs)
    assert [entry.name for entry in graph.signature.inputs] == names
    assert "forward" not in starred.__dict__
    check_stars(graph, starred, args, kwargs)
    if shapes is not None:
        assert graph.symbols() == ("batch", "seq", "other", "far")
        check_stars(graph, starred, (tensor(1, 9, 8), tensor(1, 6, 8), tensor(1, 2, 8)), {"y": tensor(1, 4, 8), "z": tensor(1, 11, 8)})


def check_stars(graph: Graph, starred: Starred, args: tuple, kwargs: dict) -> None:
    (found,) = evaluate(graph, bind(graph, args, kwargs))
    torch.testing.assert_close(found, starred(*args, **kwargs), rtol=0, atol=1e-6)  # float32 sums in another order


def test_keywords_alone_go_through_stars() -> None:
    graph = trace(Starred(), (tensor(3, 5, 8),), ({0: "batch", 1: "seq"}, {0: "batch", 1: "far"}), kwargs={"z": tensor(3, 2, 8)})
    assert graph.symbols() == ("batch", "seq", "far")
    check_stars(graph, Starred(), (tensor(2, 9, 8),), {"z": tensor(2, 1, 8)})
