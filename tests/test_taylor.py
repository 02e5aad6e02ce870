"""score: taylor. |gradient x activation| against torch's autograd on the original module, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pruning import batches, planned, positions_of, pruned, spec_of, traced
from rewriting import graph_of, weights_of
from test_transact import MLP, X, hidden
from torch.nn import functional

from matmorph.errors import InputError, SpecError
from matmorph.ir.core import Graph
from matmorph.ir.site import Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.methods.transact.scores import block_scores
from matmorph.passes.pruning.axes import HEADS, QK, WIDTH, V
from matmorph.passes.pruning.find_blocks import find_blocks
from matmorph.passes.statistics.taylor import taylor
from matmorph.specs.schema import MethodUse, Train

USE = MethodUse("transact", None)
PADDING = -100


def causal(name: str) -> list[dict[str, torch.Tensor]]:
    """Batches with labels, the first token of every row without one."""
    found = []
    for batch in batches(name):
        assert isinstance(batch, dict)
        labels = batch["input_ids"].clone()
        labels[:, :2] = PADDING
        found.append({**batch, "labels": labels})
    return found


class Probe:
    """Inputs and outputs of some modules of one forward, with their gradients kept."""

    def __init__(self, model: torch.nn.Module, paths: list[str]) -> None:
        self.seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.handles = [model.get_submodule(path).register_forward_hook(self.keep(path)) for path in paths]

    def keep(self, path: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            args[0].retain_grad()
            output.retain_grad()
            self.seen[path] = (args[0], output)

        return hook


def oracle(model: torch.nn.Module, paths: list[str], data: list[dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """Sums over tokens of |x dL/dx| with L the cross entropy summed over all labelled tokens."""
    sums: dict[str, list[torch.Tensor]] = {}
    for batch in data:
        probe = Probe(model, paths)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs)[0][:, :-1]
        labels = batch["labels"][:, 1:]
        functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PADDING, reduction="sum").backward()
        for path, pair in probe.seen.items():
            each = [(x * x.grad).detach().abs().flatten(0, 1).sum(0) for x in pair]
            sums[path] = [a + b for a, b in zip(sums.get(path, [0, 0]), each, strict=True)]
        for handle in probe.handles:
            handle.remove()
        model.zero_grad()
    return sums


def blocks_and_scores(name: str) -> tuple[Any, Graph, list[Any], dict[Site, SiteStats], dict[str, list[torch.Tensor]]]:
    model, _, graph = traced(name)
    blocks = list(find_blocks(graph, find_sites(graph)))
    sites = [site for block in blocks for site in block.sites]
    found = taylor(graph, sites, causal(name), 100, Train("causal_lm"), USE)
    nothing = torch.zeros(0)
    stats = {site: SiteStats(nothing, 0, input_taylor=pair[0], output_taylor=pair[1]) for site, pair in found.items()}
    return model, graph, blocks, stats, oracle(model, [site.path for site in sites], causal(name))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_scores_are_gradients_times_activations(name: str) -> None:
    _, _, blocks, stats, expected = blocks_and_scores(name)
    assert len(expected) == len(stats) == sum(len(block.sites) for block in blocks)
    for site, found in stats.items():
        for own, other in zip((found.input_taylor, found.output_taylor), expected[site.path], strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-14)  # float64, sums in another order


def test_units_add_up_their_features() -> None:
    """Llama: 2 key/value heads of 8, 4 query heads, rotary pairs (j, j + 4)."""
    _, _, blocks, stats, expected = blocks_and_scores("llama")
    for block in blocks:
        features = expected[block.consumer.path][0]
        if block.kind == "mlp":
            torch.testing.assert_close(block_scores(block, "taylor", (WIDTH,), stats)[WIDTH], features, rtol=1e-9, atol=0)
            continue
        scores = block_scores(block, "taylor", (HEADS, V, QK), stats)
        heads = features.reshape(4, 8)
        each = heads.mean(1) + 10 / 8 * heads.amax(1)  # TransAct's score of a head
        torch.testing.assert_close(scores[HEADS], each.reshape(2, 2).sum(1), rtol=1e-9, atol=0)
        torch.testing.assert_close(scores[V], heads.reshape(2, 2, 8).sum(1), rtol=1e-9, atol=0)
        sides = {site.role[-1]: expected[site.path][1].reshape(-1, 2, 4).sum((0, 1)) for site in block.sites}
        torch.testing.assert_close(scores[QK], (sides["q"] * sides["k"]).sqrt(), rtol=1e-9, atol=0)


def test_how_the_samples_are_divided_does_not_matter() -> None:
    _, _, graph = traced("llama")
    sites = [block.consumer for block in find_blocks(graph, find_sites(graph))]
    whole = causal("llama")[0]
    parts = [{key: value[rows].numpy() for key, value in whole.items()} for rows in (slice(0, 1), slice(1, 3))]
    one, two = (taylor(graph, sites, data, 100, Train("causal_lm"), USE) for data in ([whole], parts))
    first = taylor(graph, sites, [whole], 1, Train("causal_lm"), USE)
    for site in sites:
        torch.testing.assert_close(two[site][0], one[site][0], rtol=1e-9, atol=1e-15)  # float64
        assert float(first[site][0].sum()) < float(one[site][0].sum()), "one sample of three"


def test_what_stays_is_what_the_loss_feels_most() -> None:
    text = MLP.replace("float32", "float64")
    weights = weights_of(text)
    target = torch.randn(len(X), 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    spec = {**spec_of("mlp", width=6, multiple_of=2, score="taylor", compensate="none"), "train": {"loss": "mse"}}
    result = pruned(graph_of(text, weights), spec, [{"x": X.double(), "labels": target}])
    h = hidden(weights, X).requires_grad_()
    y = X.double() + h @ weights["down.weight"].T
    (y - target).square().sum().backward()
    effects = (h * h.grad).detach().abs().sum(0)
    expected = sorted(effects.argsort(descending=True)[:6].tolist())
    assert positions_of(result.graph.state[2].load().T, weights["down.weight"].T) == expected
    energies = hidden(weights, X).square().sum(0)
    assert expected != sorted(energies.argsort(descending=True)[:6].tolist()), "activations alone would keep others"


def test_shots_differentiate_the_pruned_model() -> None:
    text = MLP.replace("float32", "float64")
    graph = graph_of(text)
    spec = {**spec_of("mlp", width=6, multiple_of=2, score="taylor", shots=3), "train": {"loss": "mse"}}
    data = [{"x": X.double(), "labels": torch.zeros(len(X), 6, dtype=torch.float64)}]
    row = next(row for row in pruned(graph, spec, data).report.sites if row.path == "down")
    assert (row.shape, row.rank, row.parameters) == ((6, 12), 6, (72, 36))
    assert row.output_error is not None
    assert 0 < row.output_error < 1


# ------------------------------------------------------------------------------------------------------------- bad input

TAYLOR = spec_of("mlp", width=6, multiple_of=2, score="taylor")
LABELS = torch.zeros(len(X), 6)


def test_the_spec_has_no_loss() -> None:
    graph = graph_of(MLP)
    with pytest.raises(SpecError, match="rule prune: score taylor is made of gradients of a loss, and the spec has none"):
        pruned(graph, TAYLOR, [{"x": X, "labels": LABELS}])
    assert planned(graph, TAYLOR).sites[0].status == "rewritten"  # a plan needs neither


@pytest.mark.parametrize("batch", [{"x": X}, (X,), X])
def test_batches_have_no_labels(batch: Any) -> None:
    with pytest.raises(SpecError, match="transact with score taylor needs labels, and calibration batch 1 has no labels") as caught:
        pruned(graph_of(MLP), {**TAYLOR, "train": {"loss": "mse"}}, [batch])
    assert caught.value.details == ("a batch is a mapping of the model's inputs and labels",)


def test_there_is_no_data() -> None:
    wanted = r"transact needs calibration data \(input_second_moment, taylor\) and none was given"
    with pytest.raises(SpecError, match=wanted):
        pruned(graph_of(MLP), {**TAYLOR, "train": {"loss": "mse"}}, None)


def test_the_loss_does_not_depend_on_the_block() -> None:
    """Every label is ignored, so nothing has a gradient."""
    _, _, graph = traced("llama")
    data = [{**batch, "labels": torch.full_like(batch["labels"], PADDING)} for batch in causal("llama")]
    spec = {**spec_of("mlp", width="50%", score="taylor"), "train": {"loss": "causal_lm"}}
    with pytest.raises(InputError, match=r"the loss does not depend on model\.layers\.0\.mlp\.\w+ on the calibration data"):
        pruned(graph, spec, data)


def test_gradients_that_are_no_numbers() -> None:
    labels = LABELS.clone()
    labels[3, 1] = np.nan
    with pytest.raises(InputError, match="the calibration data makes gradients of NaN or infinity at down"):
        pruned(graph_of(MLP), {**TAYLOR, "train": {"loss": "mse"}}, [{"x": X, "labels": labels}])
