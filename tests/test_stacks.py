"""Layers in two stacks: each counts for itself, and `stack` tells encoder and decoder by dataflow."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from handmade import rules, stage_of
from test_zoo_sites import Renaming, renamed
from torch import nn
from zoo import BART, PAIR_AXES, hugging_face, pair

from matmorph.errors import SpecError
from matmorph.ir.core import Graph
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace
from matmorph.passes.selection.explain import explain
from matmorph.passes.selection.select import select
from matmorph.passes.selection.survey import Survey


@cache
def bart() -> Graph:
    """Two encoder layers and four decoder layers."""
    torch.manual_seed(0)
    made = hugging_face("BartForConditionalGeneration", "BartConfig", **{**BART, "encoder_layers": 2, "decoder_layers": 4})()
    return trace(made.eval(), pair(3, 7, torch.Generator().manual_seed(1)), PAIR_AXES)


def stacks_of(paths: list[str]) -> set[str]:
    """Stack and layer of Hugging Face's names."""
    return {".".join(path.split(".")[1:4]) for path in paths}


def owned(match: str, tmp_path, graph: Graph | None = None) -> set[str]:
    stage = stage_of(rules(f"name: a, match: {match}"), tmp_path)
    return stacks_of([claim.site.path for claim in select(stage, Survey.of(graph or bart())).claims if claim.rule is not None])


ENCODER, DECODER = ([f"{name}.layers.{k}" for k in range(n)] for name, n in (("encoder", 2), ("decoder", 4)))


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("{layer: last 1}", {ENCODER[1], DECODER[3]}),
        ("{layer: last 3}", {*ENCODER, *DECODER[1:]}),
        ("{layer: 2..3}", set(DECODER[2:])),
        ("{layer: 0}", {ENCODER[0], DECODER[0]}),
        ("{layer: last 1, stack: encoder}", {ENCODER[1]}),
        ("{layer: last 1, stack: decoder}", {DECODER[3]}),
        ("{stack: encoder}", set(ENCODER)),
        ("{stack: [encoder, decoder]}", {*ENCODER, *DECODER}),
        ("{layer: every 2, not: {stack: encoder}}", {DECODER[0], DECODER[2]}),
    ],
)
def test_layers_count_per_stack(match: str, expected: set[str], tmp_path) -> None:
    assert owned(match, tmp_path) == expected


def test_stacks_do_not_come_from_names() -> None:
    """Not even in the order of the state: everything has a new name."""
    rename = Renaming()
    before, after = find_sites(bart()), find_sites(renamed(bart(), rename))
    assert [(site.stack, site.layer) for site in after] == [(site.stack, site.layer) for site in before]
    assert {site.stack for site in before} == {"encoder", "decoder", None}


class Crossed(nn.Module):
    """A stack that reads a memory that the caller gives, and one beside it that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 2)
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.first(x, memory, tgt_is_causal=False) + self.second(x)


def test_a_decoder_alone_and_a_stack_apart() -> None:
    torch.manual_seed(0)
    sites = find_sites(trace(Crossed().eval(), (torch.randn(2, 3, 8), torch.randn(2, 5, 8))))
    assert {(site.container, site.stack) for site in sites} == {("first.layers", "decoder"), ("second", None)}


def test_torchs_own_transformer(tmp_path) -> None:
    torch.manual_seed(0)
    module = nn.Transformer(8, 2, 1, 3, 12, batch_first=True).eval()
    graph = trace(module, (torch.randn(2, 3, 8), torch.randn(2, 5, 8)), kwargs={"tgt_is_causal": False})
    found = {(site.stack, site.layer) for site in find_sites(graph)}
    assert found == {("encoder", 0), *(("decoder", k) for k in range(3))}


def test_a_weight_of_both_stacks_has_no_layer() -> None:
    graph = bart()
    (first, *_), (second, *_) = (
        [n for n in graph.nodes if n.op == "aten.linear.default" and n.origin.container == f"model.{side}.layers"]
        for side in ("encoder", "decoder")
    )
    shared = replace(second, args=(second.args[0], *first.args[1:]))
    graph = replace(graph, nodes=tuple(shared if node is second else node for node in graph.nodes))
    site = next(site for site in find_sites(graph) if site.const is first.args[1])
    assert (len(site.applications), site.layer, site.container, site.stack) == (2, None, None, None)


def test_what_is_said_of_stacks(tmp_path) -> None:
    with pytest.raises(SpecError) as error:
        select(stage_of(rules("name: a, match: {layer: 7}"), tmp_path), Survey.of(bart()))
    assert error.value.details[0].endswith("; layers here: 0..1 of model.encoder.layers, 0..3 of model.decoder.layers")
    with pytest.raises(SpecError, match=r"unknown stack 'decodr'; did you mean decoder\?"):
        stage_of(rules("name: a, match: {stack: decodr}"), tmp_path)
    stage = stage_of(rules("name: a, match: {layer: last 1}"), tmp_path)
    lines = explain(stage, bart(), find_sites(bart()), "model.encoder.layers.0.fc1").lines()
    assert lines[-1] == "  no  layer: last 1  [layer 0 of 2 (encoder)]"


def test_a_model_of_one_stack_has_neither(tmp_path) -> None:
    torch.manual_seed(0)
    one = trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), (torch.randn(2, 8),))
    with pytest.raises(SpecError) as error:
        select(stage_of(rules("name: a, match: {stack: encoder}"), tmp_path), Survey.of(one))
    assert error.value.details[0] == "stack: encoder: excludes 2 of 2 sites; no stack of layers attends to another"
