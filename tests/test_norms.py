"""RMS norms as one operator: found in every form that models write, kept out where it is not one. Oracle: the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import difference, feeds, randn, session
from torch import Tensor, nn

from matmorph.exporters.onnx.norms import RMS, SKIP
from matmorph.exporters.onnx.onnx_model import export_onnx, skeleton
from matmorph.ir.core import Graph
from matmorph.ir.tracing.trace import trace
from matmorph.runtime.format.artifact import MODEL
from matmorph.runtime.targets import TARGETS
from matmorph.runtime.targets.target import Target
from matmorph.specs.schema import Export

EPS = 1e-2  # large enough that one that is lost or applied elsewhere shows
ROUNDING = 4e-6
"""Of results of size 1 to 4: two norms of 16 terms and two products of 16, each rounded to 6e-8."""

Norm = Callable[[Tensor, Tensor], Tensor]


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


FORMS: dict[str, Norm] = {
    "llama": lambda x, w: w * (x * torch.rsqrt(mean_square(x) + EPS)),
    "gemma": lambda x, w: x * torch.rsqrt(mean_square(x) + EPS) * (1.0 + w),
    "quotient": lambda x, w: x / torch.sqrt(EPS + mean_square(x)) * w,
    "product": lambda x, w: torch.rsqrt((x * x).mean(x.dim() - 1, keepdim=True) + EPS) * x * w,
    "torch": lambda x, w: nn.functional.rms_norm(x, (16,), w, EPS),
}
OTHERS: dict[str, Norm] = {
    "another axis": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS)),
    "another power": lambda x, w: w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS)),
    "another square": lambda x, w: w * (x * torch.rsqrt((x * x.relu()).mean(-1, keepdim=True) + EPS)),
    "another numerator": lambda x, w: w * (x.flip(-1) * torch.rsqrt(mean_square(x) + EPS)),
    "a gain per row": lambda x, w: w[:3, None] * (x * torch.rsqrt(mean_square(x) + EPS)),
    "one gain for all": lambda x, w: w[:1] * (x * torch.rsqrt(mean_square(x) + EPS)),
    "an eps per feature": lambda x, w: w * (x * torch.rsqrt(mean_square(x) + w.abs())),
}


class Block(nn.Module):
    """A norm, a product, a sum, a norm of the sum, which is read once more."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.first, self.second = nn.Parameter(randn(16) + 1), nn.Parameter(randn(16) - 1)
        self.lin = nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            self.lin.weight.copy_(randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Any:
        middle = x + self.lin(self.norm(x, self.first))
        return {"y": self.norm(middle, self.second) + middle}


def graph_of(module: nn.Module, x: Tensor | None = None) -> Graph:
    return trace(module.eval(), (randn(2, 3, 16) if x is None else x,), ({0: "batch"},))


def operators(graph: Graph, **export: Any) -> list[str]:
    return [node.op_type for node in skeleton(graph, Export(**export)).graph if node.op_type in (RMS, SKIP, "Pow", "ReduceMean")]


def exact(module: nn.Module, x: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        found = module.double()(x.double())
    module.float()
    return [value.numpy() for value in found.values()]


def ran(graph: Graph, folder: Path, x: Tensor, level: str = "optimised", **export: Any) -> list[np.ndarray]:
    export_onnx(graph, folder, Export(**export))
    made = session(folder / MODEL, level)
    return list(made.run(None, feeds(made, (x,))))


@pytest.mark.parametrize("level", ["plain", "optimised"])
@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_one_operator_with_the_same_result(name: str, opset: int, level: str, tmp_path: Path) -> None:
    module, x = Block(FORMS[name]), 2 * randn(4, 3, 16)
    graph = graph_of(module)
    # before opset 23 ONNX has no norm of what is no sum
    assert operators(graph, opset=opset)[-2:] == ([RMS, SKIP] if opset == 23 else ["ReduceMean", SKIP])
    assert difference(ran(graph, tmp_path, x, level, opset=opset), exact(module, x)) <= ROUNDING


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_norm_stays(name: str, tmp_path: Path) -> None:
    module, x = Block(OTHERS[name]), randn(4, 3, 16)
    graph = graph_of(module)
    assert not {RMS, SKIP} & set(operators(graph, opset=23))
    assert difference(ran(graph, tmp_path, x, opset=23), exact(module, x)) <= ROUNDING


class Inside(nn.Module):
    """A norm that gives its scale away too."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(randn(16) + 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scale = torch.rsqrt(mean_square(x) + EPS)
        return {"y": x * scale * self.gain, "scale": scale}


def test_a_norm_whose_inside_is_read_elsewhere_stays(tmp_path: Path) -> None:
    module, x = Inside(), randn(4, 3, 16)
    graph = graph_of(module)
    assert operators(graph, opset=23) == ["Pow", "ReduceMean"]
    assert difference(ran(graph, tmp_path, x, opset=23), exact(module, x)) <= ROUNDING


class Sums(nn.Module):
    """Norms of sums that broadcast, of one sum read by two norms, of a sum that is a result, of rows without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.other, self.place = nn.Parameter(randn(16)), nn.Parameter(randn(16) + 2), nn.Parameter(randn(3, 16))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        norm = FORMS["llama"]
        both, shown = x + x.flip(0), x + x.flip(1)
        return {
            "broadcast": norm(x + self.place, self.gain),
            "two": norm(both, self.gain) - norm(both, self.other),
            "shown": norm(shown, self.gain),
            "sum": shown,
            "rows": norm(x[0] + x[1], self.gain),
        }


def test_only_sums_of_equal_shapes_are_taken_in(tmp_path: Path) -> None:
    module, x = Sums(), randn(4, 3, 16)
    graph = graph_of(module)
    assert sorted(operators(graph, opset=23)) == [RMS] * 4 + [SKIP]
    assert difference(ran(graph, tmp_path, x, opset=23), exact(module, x)) <= ROUNDING


def test_none_leaves_norms_written_out() -> None:
    assert operators(graph_of(Block(FORMS["llama"])), opset=23, fuse="none") == ["Pow", "ReduceMean"] * 2


def test_weights_and_results_keep_their_names() -> None:
    graph = graph_of(Block(FORMS["llama"]))
    fused, plain = (skeleton(graph, Export(opset=23, fuse=fuse)) for fuse in ("auto", "none"))
    weights = ["first", "second", "lin.weight"]
    assert [name for name in fused.graph.initializers if name in weights] == [n for n in plain.graph.initializers if n in weights]
    ends = [value.name for node in fused.graph for value in node.outputs if value.name]
    assert set(ends) <= {value.name for node in plain.graph for value in node.outputs}


def test_a_target_without_the_kernel_keeps_the_sum_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Target(name="npu", provider="CPUExecutionProvider", title="NPU", memory="cpu", obstacle=lambda: None)
    monkeypatch.setitem(TARGETS, "npu", other)
    graph = graph_of(Block(FORMS["llama"]))
    assert operators(graph, opset=23, target=("cpu", "npu")) == [RMS, RMS]  # of ONNX itself, so it has a meaning everywhere
    assert operators(graph, target=("cpu", "npu")) == ["Pow", "ReduceMean"] * 2


class Half(nn.Module):
    """As transformers write it: the norm in float32, its result and the gain in the model's type."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.lin = nn.Parameter(randn(16) + 1), nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            self.lin.weight.copy_(randn(16, 16) / 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x + self.lin(x)
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return {"y": self.lin(self.gain * (wide * torch.rsqrt(mean_square(wide) + EPS)).to(x.dtype))}


@pytest.mark.parametrize("precision", ["keep", "fp16"])
def test_half_precision(precision: str, tmp_path: Path) -> None:
    x, module = randn(4, 3, 16), Half()
    expected = exact(module, x.half().float())
    if precision == "keep":
        module, x = module.half(), x.half()
    graph = graph_of(module, x[:2])
    assert operators(graph, opset=23, precision=precision) == [SKIP]
    # two products of 16 terms, a sum and a norm, each rounded to 5e-4, with results of size 4
    assert difference(ran(graph, tmp_path, x, opset=23, precision=precision), expected) <= 4e-3
