"""Mutants of the cut between encoder and decoder: each leaves a half with too much, too little or another's name."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from cached_models import built
from mutating import Mutant, killer, mutated, unmutated
from test_encoder_decoder import bart, read_by, texts
from torch import Tensor

from matmorph.ir.core import Graph
from matmorph.ir.tracing.trace import trace
from matmorph.models.cached_call import cached_call

MUTANTS = {
    "the number of rows moves": Mutant("_moving", "reads_size(node)", "False"),
    "what is read moves": Mutant("_moving", "axes & dim_symbols(value.tensor.shape)", "dim_symbols(value.tensor.shape)"),
    "sizes off what is gone": Mutant("_resized", "replace(node, args=found)", "node"),
    "all inputs stay": Mutant("_half", "entry.value in read", "True"),
    "all weights stay": Mutant("_half", "const in read", "True"),
    "all nodes stay": Mutant("_half", "needed(graph.nodes, outputs)", "graph.nodes"),
    "another's name": Mutant("_crossings", "f'{past}.{rest}'", "f'{past}.{name}'"),
    "computed again": Mutant("find_halves", "again is not None", "False"),
    "the decoder gives it too": Mutant("find_halves", "name not in made", "True"),
}


@cache
def example() -> tuple[Graph, tuple[Tensor, ...]]:
    module = built(bart)
    with cached_call(module, {**read_by("bart"), "decoder_input_ids": texts(2, 8, 2)}) as call:
        graph = trace(module, call.examples, call.axes)
    return graph, tuple(call.examples_of(graph))


def check_halves(m: Any) -> None:
    graph, examples = example()
    halves = m.find_halves(graph)
    found = dict(zip((entry.name for entry in graph.signature.inputs), examples, strict=True))
    wanted = dict(zip(graph.signature.outputs, m.evaluate(graph, list(examples)), strict=True))
    taken = []
    for half in (halves.encoder, halves.decoder):
        taken.append({entry.name for entry in half.signature.inputs})
        answer = m.evaluate(half, [found[entry.name] for entry in half.signature.inputs])
        made = dict(zip(half.signature.outputs, answer, strict=True))
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in made.items())
        found |= {one.taken: made[one.made] for one in halves.crossings if one.made in made}
        assert {const.path for const in half.state} == {const.path for const in half.used_state()}
    assert taken[0] == {"input_ids", "attention_mask"}
    pasts = {f"past_key_values.{k}.{side}.{part}" for k in range(2) for side in ("decoder", "encoder") for part in ("key", "value")}
    assert taken[1] == {"attention_mask", "decoder_input_ids", *pasts}
    assert len(halves.encoder.nodes) + len(halves.decoder.nodes) < 1.2 * len(graph.nodes)  # but for a mask and sizes, none is in both
    assert set(halves.encoder.signature.outputs).isdisjoint(halves.decoder.signature.outputs)


def check_what_is_computed_again(m: Any) -> None:
    graph, _ = example()
    kept = [k for k, name in enumerate(graph.signature.outputs) if name != "present.0.encoder.key"]
    outputs, names = tuple(graph.outputs[k] for k in kept), tuple(graph.signature.outputs[k] for k in kept)
    assert isinstance(m.find_halves(replace(graph, outputs=outputs, signature=replace(graph.signature, outputs=names))), str)


CHECKS = (check_halves, check_what_is_computed_again)


@pytest.mark.full
def test_the_checks_pass_on_the_code_as_it_is() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mistake_is_seen(mutant: Mutant) -> None:
    assert killer(mutated(mutant), CHECKS), "no check noticed"
