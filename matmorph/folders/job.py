"""What a folder is written from, and what a folder that is opened again becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from matmorph.exporters.training.prepare_training import TrainRequest
from matmorph.ir.adapter import Adapter, present
from matmorph.ir.core import Graph
from matmorph.passes.budget.account import Decision
from matmorph.report.model import Report
from matmorph.specs.schema import Spec


@dataclass(frozen=True, slots=True)
class Job:
    """What is saved: the graphs before and after, the spec and report they belong to, and the example's tensors in `graph.inputs` order.

    `training`: what training files are asked for, None = none. `decisions`: of the budgets. `adapters`: what the rules put in to be
    trained; merged ones have left the graph. `more`: further files.
    `source_sha256`: of the source's weights, None = those of `source`. `max_length`: tokens that a model with a cache has positions for,
    None = it does not say. `source_files`: the source folder's configurations and tokenizer, by name.
    """

    spec: Spec
    source: Graph
    graph: Graph
    report: Report
    examples: Sequence[torch.Tensor]
    onnx_lowerings: Mapping[Any, Callable[..., Any]]
    seconds: Mapping[str, float]
    training: TrainRequest | None = None
    source_sha256: str | None = None
    decisions: tuple[Decision, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    more: Mapping[str, bytes] = field(default_factory=dict)
    max_length: int | None = None
    source_files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def remaining(self) -> tuple[Adapter, ...]:
        """The adapters that are not merged, in order of their sites."""
        return present(self.adapters, self.graph)
