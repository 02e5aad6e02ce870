"""Random scalars of an output whose squares are, in the mean, a change of it to second order; no labels are needed.

output: v . z / |z| with v of independent standard normal entries. The mean square over v of what an error dz does is |dz|^2 / |z|^2: the
relative change of what the model answers to a sample, here in the mean over the samples.

kl: for logits z of classes with probabilities p = softmax(z), the divergence KL(p, softmax(z + dz)) is dz^T F dz / 2 to second order, with
F = diag(p) - p p^T. One root of F is S = (I - p 1^T) diag(sqrt(p)), as S S^T = diag(p) - p p^T. So for v as above the mean square of
(S v) . dz / sqrt(2) is that divergence; here summed over rows, each with a v of its own, and divided by their number. It does not see what
softmax does not: a shift of all logits of a row.

Under `output` an output over the words that the model itself looks up counts as logits: what a language model answers is a distribution.

Numbers are drawn entry by entry along the first axis, so that they do not depend on how many samples are differentiated at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from matmorph.errors import SpecError, did_you_mean
from matmorph.ir.core import Graph, Value
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.training.losses import tensor_outputs
from matmorph.specs.schema import Calibration

Draw = Callable[[Tensor, Tensor | None, torch.Generator], tuple[Tensor, float]]
"""From an output z [.., n], which of its rows count (None: all), and a generator: the gradient of the scalar by z, and what its square is
divided by in the end, summed over the calls."""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Scalars of one output of the model."""

    output: Value
    draw: Draw


def probe_of(graph: Graph, calibration: Calibration) -> Probe:
    """What the calibration asks for. SpecError where the model has no such output."""
    _, output = output_of(graph, calibration.output)
    shape = output.tensor.shape
    if calibration.sensitivity == "kl" and not (shape and shape[-1] != 1):
        raise SpecError("kl compares distributions over classes, and the output has no axis of them", keypath="calibration.sensitivity")
    return Probe(output, divergence if calibration.sensitivity == "kl" or is_vocabulary(graph, output) else relative_change)


def output_of(graph: Graph, name: str | None) -> tuple[str, Value]:
    """The floating-point output of that name, the first where none is given. SpecError where there is none."""
    found = {key: value for key, value in tensor_outputs(graph).items() if value.tensor.torch_dtype.is_floating_point}
    if name is None and found:
        return next(iter(found.items()))
    if name is not None and name in found:
        return name, found[name]
    problem = "no output of floating-point numbers" if name is None else f"no output of floating-point numbers called {name}"
    hint = did_you_mean(name or "", list(found)) or (f"; it has {', '.join(found)}" if found else "")
    raise SpecError(f"the model has {problem}{hint}", keypath="calibration.output")


def is_vocabulary(graph: Graph, output: Value) -> bool:
    """Whether an output has a number for each row of a table that the model looks its integer inputs up in."""
    given = {value for value in graph.inputs if not value.tensor.torch_dtype.is_floating_point}
    tables = (site for site in find_sites(graph) if any(not given.isdisjoint(node.inputs()) for node in site.gathers))
    return bool(output.tensor.shape) and output.tensor.shape[-1] in {site.out_features for site in tables}


_NUMBERS = 1 << 21
"""Logits that are turned into probabilities at a time."""


def relative_change(z: Tensor, kept: Tensor | None, generator: torch.Generator) -> tuple[Tensor, float]:
    """`Draw` of output."""
    v = _normal(z, generator)
    if not z.dim():
        return v / z.abs().clamp_min(torch.finfo(z.dtype).tiny), 1.0
    for number, (row, answer) in enumerate(zip(v, z, strict=True)):
        rows = None if kept is None else kept[number].unsqueeze(-1)
        size = torch.linalg.vector_norm(answer if rows is None else answer * rows).clamp_min(torch.finfo(z.dtype).tiny)
        row.div_(size).mul_(1 if rows is None else rows)
    return v, float(len(z))


def divergence(z: Tensor, kept: Tensor | None, generator: torch.Generator) -> tuple[Tensor, float]:
    """`Draw` of kl."""
    v = _normal(z, generator)
    parts = (torch.split(one.reshape(-1, z.shape[-1]), max(_NUMBERS // z.shape[-1], 1)) for one in (v, z))
    for row, logits in zip(*parts, strict=True):
        p = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
        row.mul_(p.sqrt().to(row.dtype))
        row.sub_(p.mul_(row.sum(-1, keepdim=True)).to(row.dtype)).mul_(sqrt(0.5))
    if kept is None:
        return v, float(z[..., 0].numel())
    return v.mul_(kept.unsqueeze(-1)), float(kept.sum())


def _normal(z: Tensor, generator: torch.Generator) -> Tensor:
    v = torch.empty(z.shape, dtype=torch.float32)
    for row in v if v.dim() else (v,):
        row.normal_(generator=generator)
    return v.to(z)
