"""Tensor trains for tests: random cores, the weight by one einsum over all of them, and operations that a plan runs on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.float64]


def random_cores(shapes: Sequence[Sequence[int]], seed: int = 0) -> list[Array]:
    """Entries of order one over the root of the rank, so that W's are of order one."""
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape) / np.sqrt(shape[0]) for shape in shapes]


def matrix_weight(cores: Sequence[Array]) -> Array:
    """W[(o_1 .. o_d), (i_1 .. i_d)] of cores [r, o, i, r']: one einsum, all outputs first."""
    count = len(cores)
    ranks = range(count + 1)
    outputs, inputs = range(100, 100 + count), range(200, 200 + count)
    return _einsum(cores, [[r, o, i, s] for (r, s), o, i in zip(pairwise(ranks), outputs, inputs, strict=True)], [*outputs], [*inputs])


def vector_weight(cores: Sequence[Array], boundary: int) -> Array:
    """W[(n_{p+1} .. n_d), (m_p .. m_1)] of cores [r, m, r']: outputs in order, inputs in reverse."""
    modes = range(100, 100 + len(cores))
    labels = [[r, mode, s] for (r, s), mode in zip(pairwise(range(len(cores) + 1)), modes, strict=True)]
    return _einsum(cores, labels, [*modes[boundary:]], [*modes[:boundary]][::-1])


def _einsum(cores: Sequence[Array], labels: Sequence[Sequence[int]], outputs: Sequence[int], inputs: Sequence[int]) -> Array:
    """Integer labels, made small: numpy takes 52 of them."""
    used = {label: number for number, label in enumerate(dict.fromkeys(label for group in (*labels, outputs, inputs) for label in group))}
    operands = [item for core, group in zip(cores, labels, strict=True) for item in (core, [used[label] for label in group])]
    whole = np.einsum(*operands, [used[label] for label in (*outputs, *inputs)], optimize="greedy")  # type: ignore[call-overload]
    sizes = {label: size for core, group in zip(cores, labels, strict=True) for label, size in zip(group, core.shape, strict=True)}
    return np.asarray(whole).reshape(int(np.prod([sizes[label] for label in outputs])), -1)


class TorchOps:
    """A plan on torch tensors."""

    def reshape(self, value: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return value.reshape(tuple(sizes))

    def permute(self, value: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        return value.permute(tuple(axes))

    def matmul(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ right


class OnnxOps:
    """A plan as ONNX nodes over value names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.sizes: list[onnx.TensorProto] = []

    def reshape(self, value: str, sizes: Sequence[int]) -> str:
        name = f"sizes_{len(self.sizes)}"
        self.sizes.append(numpy_helper.from_array(np.array(sizes, dtype=np.int64), name))
        return self._node("Reshape", value, name)

    def permute(self, value: str, axes: Sequence[int]) -> str:
        return self._node("Transpose", value, perm=list(axes))

    def matmul(self, left: str, right: str) -> str:
        return self._node("MatMul", left, right)

    def model(self, result: str, cores: Sequence[Array], in_features: int, out_features: int) -> bytes:
        """x [n, in] to y [n, out] in float32."""
        self.nodes.append(helper.make_node("Identity", [result], ["y"]))
        weights = [numpy_helper.from_array(core.astype(np.float32), f"core_{number}") for number, core in enumerate(cores)]
        ends = (("x", in_features), ("y", out_features))
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in ends)
        graph = helper.make_graph(self.nodes, "plan", [x], [y], [*weights, *self.sizes])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()

    def _node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name
