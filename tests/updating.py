"""What the tests of updates of one matrix share: each method's formula in numpy and float64, and what has to hold of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from rewriting import LINEAR, graph_of, only_site, rule_of, run, weights_of
from torch import nn

import matmorph as mm
from matmorph.ir.text.printing import print_graph
from matmorph.specs.schema import MethodUse

Parts: TypeAlias = Mapping[str, np.ndarray]
Formula: TypeAlias = Callable[[np.ndarray, "np.ndarray | None", Parts, float], "tuple[np.ndarray, np.ndarray | None]"]
"""(W [out, in], b [out], the tensors, the scale) to (W', b'), term by term as the paper has it."""

EXACT = 1e-12
"""Of float64 layers with sums of some 24 terms: roundings of 1e-16, with room for the sums."""
WEIGHTS = {name: value.double() for name, value in weights_of(LINEAR).items()}
LINEAR64 = LINEAR.replace("float32", "float64")
X64 = torch.randn(7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A method with settings that exercise all of it on 24 -> 16 and 12 -> 10 features. `inside`: it makes another weight. `scale`: of
    the update."""

    settings: Mapping[str, Any]
    formula: Formula
    scale: float = 1.0
    inside: bool = False


def randomised(shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


def judged(m: Any, method: str, case: Case) -> list[bool]:
    """What must hold of one linear under a method that may have a mutant in it, by the formula alone: start, trained numbers, merging."""
    found = m[method]()
    use = MethodUse(found.name, found.Spec(**case.settings))
    graph = graph_of(LINEAR64, WEIGHTS)
    result, (outcome,) = m.rewrite(graph, [(only_site(graph), rule_of(use))], {found.name: found})
    w, bias = WEIGHTS["fc.weight"].numpy(), WEIGHTS["fc.bias"].numpy()
    plain = np.maximum(X64.numpy() @ w.T + bias, 0)
    label = f"fc.{found.name}."
    state = {const.path: const for const in result.state}
    own = {path.removeprefix(label): const.load().detach() for path, const in state.items() if path.startswith(label)}
    values = randomised({name: tuple(tensor.shape) for name, tensor in own.items()})
    new, shift = case.formula(w, bias, {name: value.numpy() for name, value in values.items()}, case.scale)
    put = {**{path: const.load() for path, const in state.items()}, **{f"{label}{name}": value for name, value in values.items()}}
    changed = run(graph_of(print_graph(result), put), X64)[0].numpy()
    wanted = np.maximum(X64.numpy() @ new.T + (0 if shift is None else shift), 0)
    given = {**values, "scale": torch.tensor(case.scale, dtype=torch.float64)}
    merged, moved = found.merge({**given, "base": WEIGHTS["fc.weight"], "bias": WEIGHTS["fc.bias"]})
    checks = [
        bool(np.abs(run(result, X64)[0].numpy() - plain).max() < 100 * EXACT),
        outcome.weight_error < EXACT,
        bool(np.abs(wanted - plain).max() > 0.1),  # the update is felt
        bool(np.abs(changed - wanted).max() < 100 * EXACT),  # results are of size 10
        bool(np.abs(merged.numpy() - new).max() < 100 * EXACT),
        moved is None or bool(np.abs(moved.numpy() - shift).max() < EXACT),
    ]
    pair = None if case.inside else found.two_factor({**given, "in_features": torch.tensor(12)})
    if pair is not None:
        checks.append(bool(np.abs((pair[0] @ pair[1]).T.numpy() + w - new).max() < 100 * EXACT))
    return checks


def noticed(m: Any, method: str, case: Case) -> bool:
    try:
        return not all(judged(m, method, case))
    except Exception:
        return True


class Llama2(nn.Module):
    """The matmuls of a layer of LLaMA-2-7B, for the meta device."""

    WIDTH, LAYERS = 4096, 32

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(4096, 4096, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(4096, 11008, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(11008, 4096, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


class Roberta(nn.Module):
    """The same of RoBERTa-base."""

    WIDTH, LAYERS = 768, 12

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(768, 768) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(768, 3072), nn.Linear(3072, 768)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(self.dense(self.query(x) + self.key(x) + self.value(x))).relu())


def trainable(model: type[Llama2 | Roberta], rewrite: Mapping[str, Any], *modules: str) -> int:
    """How many numbers train where these modules of all layers are rewritten; a layer stands for all."""
    with torch.device("meta"):
        net, x = model(), torch.empty(2, model.WIDTH)
    rule = {"match": {"path": list(modules)}, "expect": len(modules), "rewrite": rewrite}
    return model.LAYERS * mm.plan(net, {"version": 1, "rules": [rule]}, (x,), ({0: "batch"},)).totals.trainable
