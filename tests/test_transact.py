"""transact: a pruned graph is the original with those activations set to zero, in float64, for every layout of heads and fusions."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning import batches, compiled, matrix, positions_of, pruned, run, silenced, spec_of
from rewriting import graph_of, moment, weights_of

from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.text.printing import print_graph
from matmorph.passes.linalg.refit import refit
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.methods.transact.method import Transact, TransactSpec
from matmorph.passes.pruning.axes import WIDTH
from matmorph.passes.pruning.find_blocks import find_blocks
from matmorph.specs.notations import Width


def grid(*more: str) -> list[Any]:
    """The five layouts by default, variants of them in the full grid."""
    variants = ("gpt2-eager", "llama-eager", "bert-eager", "qwen2", "opt", "distilbert", *more)
    return ["gpt2", "llama", "phi3", "bert", "vit", *(pytest.param(name, marks=pytest.mark.full) for name in variants)]


IO = ("gpt2", "gpt2-eager")


def kept_features(model: torch.nn.Module, found: Any, io: bool) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """(input features of last matmuls, output features of producers) that stayed, read off the weights."""
    old, new = model.state_dict(), found.module.state_dict()
    columns, rows = {}, {}
    for row in found.report.sites:
        if row.status != "rewritten":
            continue
        before, after = (matrix(state[f"{row.path}.weight"], io) for state in (old, new))
        if before.shape[0] == after.shape[0] and before.shape[1] != after.shape[1]:
            columns[row.path] = positions_of(after.T, before.T)
        else:
            rows[row.path] = positions_of(after, before)
            if f"{row.path}.bias" in old:
                assert torch.equal(new[f"{row.path}.bias"], old[f"{row.path}.bias"][rows[row.path]])
    return columns, rows


def assert_masked(name: str, model: Any, found: Any, *, producers: bool) -> None:
    """The pruned module gives what the original gives with everything else set to zero."""
    columns, rows = kept_features(model, found, name in IO)
    for inputs in batches(name):
        with silenced(model, columns, rows if producers else {}):
            expected = run(model, inputs)
        given = run(found.module, inputs)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-11)  # float64, values of order 1 to 10, two layers
        assert float((run(model, inputs) - expected).abs().max()) > 1e-3  # something was pruned that matters


@pytest.mark.parametrize("name", grid("mlp"))
def test_mlp_features(name: str) -> None:
    model, found, _ = compiled(name, "mlp", width="50%", multiple_of=2, compensate="none")
    assert_masked(name, model, found, producers=False)


@pytest.mark.parametrize("name", grid("qwen3"))
def test_whole_heads(name: str) -> None:
    model, found, _ = compiled(name, "attention", width="50%", unit="heads", compensate="none")
    assert_masked(name, model, found, producers=False)


@pytest.mark.parametrize("name", grid())
def test_dimensions_of_heads(name: str) -> None:
    """q and k too: silenced where they are made, before any rotation."""
    model, found, _ = compiled(name, "attention", width="50%", unit="head_dims", compensate="none")
    assert_masked(name, model, found, producers=True)


def test_value_dimensions_alone_where_norms_mix_those_of_queries_and_keys() -> None:
    model, found, _ = compiled("qwen3", "attention", width="50%", unit="head_dims", compensate="none")
    assert_masked("qwen3", model, found, producers=False)
    shapes = {name.rsplit(".", 2)[1]: value.shape[0] for name, value in found.module.state_dict().items() if "layers.0" in name}
    assert (shapes["q_proj"], shapes["k_proj"], shapes["v_proj"]) == (48, 24, 12)  # o reads 4 heads of 6, 24 in all: half


# ------------------------------------------------------------------------------------------------------------- index sets


def test_index_sets_are_ascending_and_shared() -> None:
    model, found, _ = compiled("llama", ["attention", "mlp"], width="50%", multiple_of=2, compensate="none")
    columns, rows = kept_features(model, found, io=False)
    for kept in (*columns.values(), *rows.values()):
        assert kept == sorted(kept)
    for layer in range(2):
        path = f"model.layers.{layer}"
        assert rows[f"{path}.mlp.gate_proj"] == rows[f"{path}.mlp.up_proj"] == columns[f"{path}.mlp.down_proj"]
        heads = {row // 8 for row in rows[f"{path}.self_attn.k_proj"]}  # 2 key/value heads of 8, each read by 2 query heads
        assert len(heads) == 1
        assert rows[f"{path}.self_attn.v_proj"] == rows[f"{path}.self_attn.k_proj"]
        queries = [row for head in heads for row in range(16 * head, 16 * head + 16)]
        assert rows[f"{path}.self_attn.q_proj"] == columns[f"{path}.self_attn.o_proj"] == queries


def test_rotary_pairs_stay_together_and_are_those_of_all_heads() -> None:
    model, found, _ = compiled("llama", "attention", width="50%", unit="head_dims", compensate="none")
    _, rows = kept_features(model, found, io=False)
    for layer in range(2):
        pairs = set()
        for part, heads in (("q", 4), ("k", 2)):
            own = rows[f"model.layers.{layer}.self_attn.{part}_proj"]
            for head in range(heads):
                dims = [row - 8 * head for row in own if row // 8 == head]
                assert len(dims) == 4
                assert {(dim + 4) % 8 for dim in dims} == set(dims)
                pairs.add(tuple(dims))
        assert len(pairs) == 1


def test_the_softmax_keeps_its_scale() -> None:
    """nn.MultiheadAttention leaves it to the operator: once the heads are narrower, it is written out."""
    _, found, _ = compiled("mha", "attention", width="50%", unit="head_dims", compensate="none")
    [node] = [node for node in found.graph.nodes if "scaled_dot_product" in node.op]
    assert node.args[0].tensor.shape[-1] == 4
    assert node.attrs["scale"] == pytest.approx(8**-0.5, rel=1e-15)


# ------------------------------------------------------------------------------------------------------------- what stays

MLP = """graph device=cpu
range batch 1..
input %x: float32[batch, 6] "x"
parameter %gate: float32[12, 6] "gate.weight" trainable
parameter %up: float32[12, 6] "up.weight" trainable
parameter %down: float32[6, 12] "down.weight" trainable
%g: float32[batch, 12] = aten.linear.default(%x, %gate)
%a: float32[batch, 12] = aten.silu.default(%g)
%u: float32[batch, 12] = aten.linear.default(%x, %up)
%h: float32[batch, 12] = aten.mul.Tensor(%a, %u)
%d: float32[batch, 6] = aten.linear.default(%h, %down)
%y: float32[batch, 6] = aten.add.Tensor(%x, %d)
output %y "output"
"""


def hidden(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The input of down, in float64."""
    x = x.double()
    return torch.nn.functional.silu(x @ weights["gate.weight"].double().T) * (x @ weights["up.weight"].double().T)


def scored(weights: dict[str, torch.Tensor], x: torch.Tensor, score: str = "activation") -> torch.Tensor:
    [block] = find_blocks(graph := graph_of(MLP, weights), find_sites(graph))
    stats = {block.consumer: moment(hidden(weights, x))}
    return Transact().scores(block, TransactSpec(Width("ratio", 0.5), score=score), stats)[WIDTH]


X = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))


def test_the_graph_before_and_after() -> None:
    """Smaller shapes everywhere and nothing else: no mask, no gather."""
    weights = weights_of(MLP)
    graph = graph_of(MLP, weights)
    result = prune(graph, width="50%", multiple_of=2, compensate="none")
    text = re.sub(r' storage="(gate|up|down).weight#transact"', "", print_graph(result.graph))  # whose bytes they are no more
    assert text == MLP.replace("12", "6")
    kept = positions_of(result.graph.state[2].load().T, weights["down.weight"].T)
    assert kept == sorted(hidden(weights, X).square().sum(0).argsort(descending=True)[:6].tolist())


def prune(graph: Any, **settings: Any) -> Any:
    return pruned(graph, spec_of("mlp", **settings), [(X,)])


@pytest.mark.parametrize("factor", [-3.0, 0.25])
def test_scaling_a_row_of_up_scales_its_score(factor: float) -> None:
    weights = weights_of(MLP)
    before = scored(weights, X)
    weights["up.weight"][4] *= factor
    expected = before.clone()
    expected[4] *= abs(factor)
    torch.testing.assert_close(scored(weights, X), expected, rtol=1e-6, atol=0)  # float32 weights


@pytest.mark.parametrize("score", ["activation", "weight"])
def test_scores_move_with_the_features(score: str) -> None:
    weights = weights_of(MLP)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = {"gate.weight": weights["gate.weight"][order], "up.weight": weights["up.weight"][order]}
    moved["down.weight"] = weights["down.weight"][:, order]
    torch.testing.assert_close(scored(moved, X, score), scored(weights, X, score)[order], rtol=1e-12, atol=0)  # float64 sums


def test_weight_scores_are_norms_of_columns_and_rows() -> None:
    weights = weights_of(MLP)
    w = {name: value.double() for name, value in weights.items()}
    rows = w["gate.weight"].square().sum(1) + w["up.weight"].square().sum(1)
    torch.testing.assert_close(
        scored(weights, X, "weight"), (w["down.weight"].square().sum(0) * rows).sqrt(), rtol=1e-12, atol=0
    )  # float64


def test_what_is_as_narrow_already_stays_as_it_is() -> None:
    graph = graph_of(MLP, weights_of(MLP))
    found = prune(graph, width="100%")
    assert print_graph(found.graph) == print_graph(graph)
    assert found.report.sites[0].reason == "nothing to prune: the mlp block of down is 12 wide, width 100% asks for 12"


# ------------------------------------------------------------------------------------------------------------- least squares


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(1, 30), st.integers(0, 10_000), st.sampled_from([0.0, 1e-6, 1e-2, 1.0]))
def test_least_squares_is_never_worse_than_slicing(width: int, out: int, rows: int, seed: int, damping: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    w = torch.randn(out, width, generator=generator, dtype=torch.float64)
    kept = torch.randperm(width, generator=generator)[: 1 + seed % (width - 1)].sort().values
    fitted, _ = refit(w, x.T @ x, kept, damping, len(x))
    y = x @ w.T
    errors = [float((y - x[:, kept] @ matrix.T).norm()) for matrix in (w[:, kept], fitted)]
    assert errors[1] <= errors[0] * (1 + 1e-6) + 1e-9  # fewer rows than features leave float64 next to nothing to stand on


def test_without_damping_it_is_the_least_squares_solution() -> None:
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = torch.tensor([0, 2, 3, 7])
    expected = np.linalg.lstsq(x[:, kept].numpy(), (x @ w.T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(refit(w, x.T @ x, kept, 0.0, len(x))[0].numpy(), expected, rtol=1e-9)  # well conditioned, float64


def test_both_errors_are_reported_and_are_those_of_the_outputs() -> None:
    weights = weights_of(MLP)
    result = prune(graph_of(MLP, weights), width=6, multiple_of=2)
    row = next(row for row in result.report.sites if row.path == "down")
    h, w = hidden(weights, X[4::5]), weights["down.weight"].double()  # of one batch, every fifth sample is held out
    kept = positions_of(result.graph.state[1].load(), weights["up.weight"])
    y = h @ w.T
    own = float((y - h[:, kept] @ result.graph.state[2].load().double().T).norm() / y.norm())
    sliced = float((y - h[:, kept] @ w[:, kept].T).norm() / y.norm())
    assert row.output_error == pytest.approx(own, rel=1e-4)  # the second moment is summed of float32 products
    assert own < sliced
    assert row.notes[0] == f"output error of down: {sliced:.3g} sliced, {own:.3g} as it is stored"
    assert (row.sample.fitted, row.sample.judged) == (32, 8)


def _stats_of(x: torch.Tensor) -> SiteStats:
    """What one batch gives: every fifth sample is held out."""
    fitted, held = (moment(hidden(weights_of(MLP), part)) for part in (x[torch.arange(len(x)) % 5 != 4], x[4::5]))
    return replace(fitted, held_out=held.second_moment, held_rows=held.rows)


def test_all_widths_of_a_block_come_from_one_scoring() -> None:
    weights = weights_of(MLP)
    [block] = find_blocks(graph := graph_of(MLP, weights), find_sites(graph))
    spec = TransactSpec(Width("auto"), multiple_of=2)
    choices = list(Transact().choices(block, spec))
    assert [choice.rank for choice in choices] == [2, 4, 6, 8, 10]
    errors = [error.output_error for error in Transact().errors(block, spec, choices, {block.consumer: _stats_of(X)})]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] == pytest.approx(
        next(r for r in prune(graph, width=6, multiple_of=2).report.sites if r.path == "down").output_error, rel=1e-4
    )
