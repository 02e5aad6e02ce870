"""Calibration: second moments against their definition on activations recorded by torch hooks, masks, experts, limits, bad data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from rewriting import graph_of, weights_of
from torch import nn
from zoo import ZOO

from matmorph.errors import InputError
from matmorph.ir.core import Graph
from matmorph.ir.site import Site, Statistic
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace
from matmorph.passes.statistics.calibrate import calibrate

MOMENT = frozenset({Statistic.INPUT_SECOND_MOMENT})

NET = """graph device=cpu
range batch 1..
range seq 1..
input %input_ids: int64[batch, seq] "input_ids"
input %attention_mask: int64[batch, seq] "attention_mask"
parameter %table: float32[11, 6] "table"
parameter %q: float32[4, 6] "q.weight"
parameter %k: float32[6, 6] "k.weight"
%h: float32[batch, seq, 6] = aten.embedding.default(%table, %input_ids)
%flat: float32[batch*seq, 6] = aten.view.default(%h, [-1, 6])
%a: float32[batch, seq, 4] = aten.linear.default(%h, %q)
%b: float32[batch*seq, 6] = aten.linear.default(%flat, %k)
%c: float32[batch*seq, 6] = aten.linear.default(%b, %k)
output %a "output_0"
output %c "output_1"
"""


def needs(graph: Graph) -> list[tuple[Site, frozenset[Statistic]]]:
    return [(site, MOMENT) for site in find_sites(graph) if site.form != "embedding" and not site.listed]


def by_path(graph: Graph, batches: Any, samples: int = 10**6, **more: Any) -> dict[str, Any]:
    return {site.path: stats for site, stats in calibrate(graph, needs(graph), batches, samples, **more).items()}


@pytest.fixture(scope="module")
def net() -> Graph:
    return graph_of(NET)


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, dict[str, torch.Tensor], Graph]:
    """(model, two named inputs, graph)."""
    model, inputs, axes = ZOO["bert"].build()
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return model, inputs, trace(model, inputs, {name: axes[name] for name in inputs})


def batch_of(seed: int, batch: int = 3, seq: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(seq) < torch.randint(1, seq + 1, (batch, 1), generator=g)).long()
    return torch.randint(0, 11, (batch, seq), generator=g), mask


def rows_of(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """What counts of the embedded inputs, in float64."""
    table = weights_of(NET)["table"].double()
    return torch.cat([table[ids][mask.bool()] for ids, mask in batches])


# float32 products of at most 75 rows of size about 1, summed in float64: 75 * 6e-8 of the largest entry
CLOSE = {"rtol": 0, "atol": 1e-4}


def test_padding_is_left_out_and_applications_add_up(net: Graph) -> None:
    batches = [batch_of(k) for k in range(5)]
    found = by_path(net, batches)
    x = rows_of(batches)
    assert found["q"].rows == len(x)
    torch.testing.assert_close(found["q"].second_moment, x.T @ x, **CLOSE)
    y = x @ weights_of(NET)["k.weight"].double().T  # the second application of k reads the first one's result
    assert found["k"].rows == 2 * len(x)
    torch.testing.assert_close(found["k"].second_moment, x.T @ x + y.T @ y, rtol=1e-5, atol=1e-3)
    assert found["q"].second_moment.dtype == torch.float64


def test_one_accumulator_per_distinct_input(bert: Any) -> None:
    _, inputs, graph = bert
    found = by_path(graph, [inputs])
    q, k, v = (next(s for p, s in found.items() if p.endswith(f"layer.0.attention.self.{n}")) for n in ("query", "key", "value"))
    assert q.second_moment is k.second_moment is v.second_moment


@pytest.mark.parametrize("name", ["bert", "cnn"])
def test_moments_are_those_of_hooked_modules(name: str, bert: Any) -> None:
    """Oracle: the inputs of the modules of an eager run; bert has a mask, the network of convolutions 1x1 ones."""
    if name == "bert":
        model, inputs, graph = bert
    else:
        model, inputs, axes = ZOO[name].build()
        graph = trace(model, inputs, axes)
    seen: dict[str, torch.Tensor] = {}
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None

    def record(path: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0]
        if isinstance(module, nn.Conv2d):
            x = x[..., :: module.stride[0], :: module.stride[1]].movedim(1, -1)
        x = x[mask.bool()] if mask is not None and x.shape[:-1] == mask.shape else x
        rows = x.reshape(-1, x.shape[-1]).double()
        seen[path] = seen.get(path, 0) + rows.T @ rows

    sites = [site for site, _ in needs(graph)]
    modules = dict(model.named_modules())
    hooked = [site.path for site in sites if isinstance(modules.get(site.path), nn.Module)]
    handles = [modules[path].register_forward_pre_hook(partial(record, path)) for path in hooked]
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    for handle in handles:
        handle.remove()
    found = by_path(graph, [inputs])
    assert len(hooked) >= 4
    for path in hooked:
        scale = float(seen[path].diagonal().max())
        # float32 activations of another executor: 1e-5 of the largest entry
        torch.testing.assert_close(found[path].second_moment, seen[path], rtol=0, atol=1e-5 * scale)


PICKED = """graph device=cpu
range b 1..
input %x: float32[b, 6] "x"
input %i: int64[b] "i"
parameter %w: float32[3, 5, 6] "experts"
%u: float32[b, 6, 1] = aten.unsqueeze.default(%x, -1)
%p: float32[b, 5, 6] = aten.index.Tensor(%w, [%i])
%m: float32[b, 5, 1] = aten.bmm.default(%p, %u)
output %m "output"
"""
ALL = """graph device=cpu
range b 1..
input %x: float32[SHAPE] "x"
parameter %w: float32[3, 6, 5] "experts"
%y: float32[3, b, 5] = aten.matmul.default(%x, %w)
output %y "output"
"""


def test_rows_go_to_the_expert_that_picked_them() -> None:
    x, i = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 2, 0, 0, 2, 2])
    found = by_path(graph_of(PICKED), [(x, i)])["experts"]
    for expert in range(3):
        rows = x[i == expert].double()
        torch.testing.assert_close(found.second_moment[expert], rows.T @ rows, **CLOSE)
    assert found.rows.tolist() == [3, 0, 4]


@pytest.mark.parametrize("shape", ["3, b, 6", "b, 6"])
def test_a_whole_stack_reads_its_own_rows_or_the_same(shape: str) -> None:
    x = torch.randn([4 if part == "b" else int(part) for part in shape.split(", ")], generator=torch.Generator().manual_seed(0))
    found = by_path(graph_of(ALL.replace("SHAPE", shape)), [(x,)])["experts"]
    for expert, rows in enumerate(x.double().expand(3, 4, 6)):
        torch.testing.assert_close(found.second_moment[expert], rows.T @ rows, **CLOSE)
    assert found.rows.tolist() == [4, 4, 4]


# how much is read


def test_samples_cut_the_last_batch_and_leave_the_rest_unread(net: Graph) -> None:
    batches = [batch_of(k) for k in range(4)]
    read = []

    def stream() -> Iterator[Any]:
        for k, batch in enumerate(batches):
            read.append(k)
            yield batch

    steps: list[tuple[int, int | None]] = []
    found = by_path(net, stream(), samples=4, progress=lambda done, total: steps.append((done, total)))
    assert read == [0, 1]
    assert (steps[-1], {total for _, total in steps}) == ((4, 4), {4})
    ids, mask = batches[1]
    x = rows_of([batches[0], (ids[:1], mask[:1])])
    torch.testing.assert_close(found["q"].second_moment, x.T @ x, **CLOSE)


def test_progress_grows_to_the_number_of_samples(net: Graph) -> None:
    """Once per batch and block, samples by the share of the blocks behind them: three blocks here."""
    steps: list[tuple[int, int | None]] = []
    by_path(net, iter([batch_of(0), batch_of(1)]), progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]


def test_nothing_needed_reads_nothing(net: Graph) -> None:
    def never() -> Iterator[Any]:
        raise AssertionError("a batch was read")
        yield

    assert calibrate(net, [(site, frozenset()) for site, _ in needs(net)], never(), 10) == {}


def test_the_order_of_batches_changes_only_rounding(net: Graph) -> None:
    batches = [batch_of(k) for k in range(6)]
    once, again, backwards = (by_path(net, order)["q"].second_moment for order in (batches, batches, batches[::-1]))
    assert torch.equal(once, again)
    torch.testing.assert_close(once, backwards, rtol=1e-13, atol=1e-13)  # the float64 sum alone


def test_large_accumulators_go_to_disk_and_give_the_same(net: Graph) -> None:
    batches = [batch_of(k) for k in range(3)]
    memory, disk = by_path(net, batches), by_path(net, batches, spill_above=0)
    assert torch.equal(memory["k"].second_moment, disk["k"].second_moment)


def test_numpy_batches_and_single_tensors() -> None:
    graph = graph_of(ALL.replace("SHAPE", "b, 6"))
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    first, second, third = (by_path(graph, [batch])["experts"] for batch in ((x,), x, torch.from_numpy(x)))
    assert torch.equal(first.second_moment, second.second_moment)
    assert torch.equal(first.second_moment, third.second_moment)


# bad data


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 6),)], iter(())], ids=["empty list", "empty batch", "empty iterator"])
def test_nothing_to_read(batches: Any) -> None:
    graph = graph_of(ALL.replace("SHAPE", "b, 6").replace("range b 1..", "range b 0.."))
    with pytest.raises(InputError, match="the calibration data yields nothing"):
        by_path(graph, batches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"ids": b["input_ids"], "attention_mask": b["attention_mask"]}, "no input is named ids"),
        (lambda b: {"input_ids": b["input_ids"]}, "input attention_mask is missing"),
        (lambda b: b | {"input_ids": b["input_ids"].float()}, "input input_ids must be int64"),
        (lambda b: b | {"input_ids": b["input_ids"][0]}, "input input_ids must be int64"),
        (lambda b: b | {"attention_mask": b["attention_mask"][:, 1:]}, "seq is "),
        (lambda b: b | {"input_ids": [1, 2]}, "nested differently"),
    ],
)
def test_wrong_batches_say_which_and_name_both_sets(change: Any, message: str, bert: Any) -> None:
    _, inputs, graph = bert
    with pytest.raises(InputError, match=rf"calibration batch 2: .*{message}") as caught:
        by_path(graph, [inputs, change(inputs)])
    assert "the model's inputs: input_ids, attention_mask" in caught.value.details


def test_nan_activations_are_named() -> None:
    graph = graph_of(ALL.replace("SHAPE", "b, 6"))
    with pytest.raises(InputError, match="NaN or infinity at the input of experts"):
        by_path(graph, [(torch.full((2, 6), float("nan")),)])
