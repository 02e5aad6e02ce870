"""A model of three matmuls that compiles in a second, for tests of what is kept and of who works."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import matmorph as mm
from matmorph.ir.core import Graph
from matmorph.ir.tracing.trace import trace
from matmorph.passes.methods import all_methods
from matmorph.passes.pipeline import Compilation, compile_graph
from matmorph.passes.work.hiring import hired, keeping
from matmorph.specs.schema import Spec

METHODS = all_methods()
LOFTQ = {"loftq": {"quantizer": "uniform", "bits": 4, "block_size": 16, "rank": 2, "iterations": 2, "whiten": True, "scale": "search"}}
ANY = {"any_of": [{"low_rank": {"rank": "auto"}}, {"quantize": {"quantizer": "uniform", "bits": "auto", "block_size": 16}}]}
SPECS: dict[str, dict[str, Any]] = {
    "loftq": {"rules": [{"name": "r", "match": {"op": "linear"}, "rewrite": LOFTQ}]},
    "parts": {"rules": [{"name": "r", "match": {"op": "linear"}, "rewrite": [{"low_rank": {"rank": 4}}, {"lora": {"rank": 2}}]}]},
    "qlora": {"rules": [{"name": "r", "match": {"op": "linear"}, "rewrite": {"qlora": {"quantizer": "nf4", "block_size": 16, "rank": 2}}}]},
    "budget": {
        "rules": [{"name": "r", "match": {"op": "linear"}, "rewrite": ANY}],
        "budget": {"bytes": "40%", "of": "matched"},
        "calibration": {"sensitivity": "output"},
    },
    "sequential": {"rules": [{"name": "r", "match": {"op": "linear"}, "rewrite": LOFTQ}], "calibration": {"order": "sequential"}},
}


SHORT = ("parts", "budget")
"""Those that a test in the default run takes."""
NAMES = [name if name in SHORT else pytest.param(name, marks=pytest.mark.full) for name in SPECS]


def network(seed: int = 0, width: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width), nn.GELU(), nn.Linear(width, 16)).eval()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def samples() -> list[tuple[torch.Tensor, ...]]:
    return [(drawn(24, 32, seed=number),) for number in range(10)]


def traced(model: nn.Module) -> Graph:
    return trace(model, (drawn(4, 32),), ({0: "batch"},))


@cache
def spec_and_graph(name: str) -> tuple[Spec, Graph]:
    return mm.load_spec({"version": 1, "name": name, **SPECS[name]}), traced(network())


def compiled(
    name: str = "loftq", model: nn.Module | None = None, work: Path | None = None, workers: int | str | None = None
) -> Compilation:
    spec, graph = spec_and_graph(name)
    graph = graph if model is None else traced(model)
    with hired(workers, METHODS) as hands, keeping(work, graph, "Sequential", hands, METHODS) as (helped, kept):
        return compile_graph(graph, spec, METHODS, "Sequential", calibration=samples(), hands=helped, work=kept)


def fingerprint(made: Compilation) -> str:
    """Of all that a folder would hold: the graph, the numbers of its weights, and the report."""
    digest = hashlib.sha256(str(made.report.to_dict()).encode())
    for const in made.graph.state:
        tensor = const.load().detach().contiguous()
        digest.update(f"{const.path} {const.type}".encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
