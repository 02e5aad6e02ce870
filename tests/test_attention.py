"""Attention in ONNX against torch's own kernel: every kind of mask, rows without any key, every opset, sizes that the trace did not see."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exporting import randn
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from matmorph.errors import ExportError
from matmorph.exporters.onnx.onnx_model import skeleton
from matmorph.ir.tracing.trace import trace
from matmorph.specs.schema import Export

ROUNDING = 2e-6
"""Of results of size 1: a softmax and two products of at most 16 terms, each rounded to 6e-8."""

AXES = {0: "batch", 2: "rows"}
KEYS = {0: "batch", 2: "keys"}


def run(model: ir.Model, inputs: tuple[Tensor, ...], optimised: bool = True) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)})


def qkv(batch: int, rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(batch, 4, rows, 8), randn(batch, 4, keys, 8) + 0.5, randn(batch, 4, keys, 8) - 0.5


def allowed(batch: int, rows: int, keys: int) -> Tensor:
    """bool [batch, 1, rows, keys]: a third hidden; the first example hides everything from its first row, the last from its last two."""
    seen = torch.rand(batch, 1, rows, keys, generator=torch.Generator().manual_seed(3)) > 0.35
    seen[..., 0] |= ~seen.any(-1)
    seen[0, :, 0] = False
    seen[-1, :, -2:] = False
    return seen


class Masks(nn.Module):
    """Every form of mask that broadcasts to the scores, from one boolean one."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> dict[str, Tensor]:
        bias = torch.where(seen, q[..., :1].mean(1, keepdim=True), -torch.inf)
        heads = torch.linspace(-1, 1, 4).view(4, 1, 1)
        lowest = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        return {
            "none": sdpa(q, k, v),
            "scaled": sdpa(q, k, v, scale=0.3),
            "causal": sdpa(q, k, v, is_causal=True),
            "boolean": sdpa(q, k, v, attn_mask=seen),
            "boolean, one row for all": sdpa(q, k, v, attn_mask=seen[:, :, :1], scale=1.0),
            "boolean, one for the batch": sdpa(q, k, v, attn_mask=seen[0, 0]),
            "boolean, whole rows": sdpa(q, k, v, attn_mask=seen[..., :1]),
            "boolean and causal": sdpa(q, k, v, attn_mask=seen, is_causal=True),
            "float": sdpa(q, k, v, attn_mask=bias),
            "float by heads": sdpa(q, k, v, attn_mask=bias + heads, scale=0.3),
            "float and causal": sdpa(q, k, v, attn_mask=bias, is_causal=True),
            "lowest number": sdpa(q, k, v, attn_mask=lowest),
        }


SIZES = ((2, 5, 7), (1, 4, 4), (3, 9, 6))


@pytest.mark.parametrize("opset", [18, 21, 23, *(pytest.param(opset, marks=pytest.mark.full) for opset in (19, 20, 22))])
def test_every_mask(opset: int) -> None:
    example = (*qkv(*SIZES[0]), allowed(*SIZES[0]))
    axes = (AXES, KEYS, KEYS, {0: "batch", 2: "rows", 3: "keys"})
    model = skeleton(trace(Masks(), example, axes), Export(opset=opset))
    for size in SIZES:
        inputs = (*qkv(*size), allowed(*size))
        expected = Masks()(*inputs)
        assert not expected["boolean"][0, :, 0].any(), "torch gives 0 for a row without a key"
        for optimised in (False, True):
            for (name, wanted), actual in zip(expected.items(), run(model, inputs, optimised), strict=True):
                np.testing.assert_allclose(actual, wanted.numpy(), atol=ROUNDING, rtol=0, err_msg=f"{name} at {size}")


class Grouped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        k, v = k[:, :2], v[:, :2]
        return (
            sdpa(q, k, v, enable_gqa=True),
            sdpa(q, k, v, attn_mask=seen, enable_gqa=True),
            sdpa(q, k, k, is_causal=True, enable_gqa=True),
        )


@pytest.mark.parametrize("opset", [18, 23])
def test_few_heads_of_keys(opset: int) -> None:
    example = (*qkv(*SIZES[0]), allowed(*SIZES[0]))
    model = skeleton(trace(Grouped(), example, (AXES, KEYS, KEYS, {0: "batch", 2: "rows", 3: "keys"})), Export(opset=opset))
    for size in SIZES[1:]:
        inputs = (*qkv(*size), allowed(*size))
        for actual, wanted in zip(run(model, inputs), Grouped()(*inputs), strict=True):
            np.testing.assert_allclose(actual, wanted.numpy(), atol=ROUNDING, rtol=0)


class Ranks(nn.Module):
    """Heads alone, and neither heads nor batch."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        three = [x[:, 0] for x in (q, k, v)]
        return sdpa(*three, attn_mask=seen[:, 0]), sdpa(*(x[0] for x in three), attn_mask=seen[0, 0]), sdpa(*three, is_causal=True)


@pytest.mark.parametrize("opset", [21, pytest.param(23, marks=pytest.mark.full)])
def test_other_ranks(opset: int) -> None:
    example = (*qkv(*SIZES[0]), allowed(*SIZES[0]))
    model = skeleton(trace(Ranks(), example, (AXES, KEYS, KEYS, {0: "batch", 2: "rows", 3: "keys"})), Export(opset=opset))
    inputs = (*qkv(*SIZES[2]), allowed(*SIZES[2]))
    for actual, wanted in zip(run(model, inputs), Ranks()(*inputs), strict=True):
        np.testing.assert_allclose(actual, wanted.numpy(), atol=ROUNDING, rtol=0)


class Plain(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, **self.how)


def test_an_unmasked_attention_pays_nothing() -> None:
    def operators(opset: int, **how: Any) -> list[str]:
        return [node.op_type for node in skeleton(trace(Plain(**how), qkv(2, 5, 7), (AXES, KEYS, KEYS)), Export(opset=opset)).graph]

    assert operators(21) == ["Mul", "Transpose", "MatMul", "Softmax", "MatMul"]
    assert operators(21, scale=1.0) == ["Transpose", "MatMul", "Softmax", "MatMul"]
    assert operators(23) == operators(23, is_causal=True) == ["Attention"]
    assert "Where" not in operators(21, is_causal=True)


class Kernels(nn.Module):
    """What a program names that was decomposed before."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        bias = torch.where(seen, 0.0, -torch.inf)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)[0]


def test_the_kernel_of_a_decomposed_program() -> None:
    inputs = (*qkv(2, 5, 7), allowed(2, 5, 7))
    graph = trace(Kernels(), inputs, (AXES, KEYS, KEYS, {0: "batch", 2: "rows", 3: "keys"}))
    for size in SIZES[:2]:
        inputs = (*qkv(*size), allowed(*size))
        np.testing.assert_allclose(run(skeleton(graph, Export()), inputs)[0], Kernels()(*inputs).numpy(), atol=ROUNDING, rtol=0)


def test_dropout_is_refused() -> None:
    graph = trace(Plain(dropout_p=0.5), qkv(2, 5, 7))
    with pytest.raises(ExportError, match=r"attention with dropout 0.5 has no fixed result"):
        skeleton(graph, Export())
