"""What the tests of quantised methods share: the matrix that packed weights stand for, in numpy and float64, and graphs with it put in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from matmorph.ir.core import Const, Graph, map_values
from matmorph.ir.site import Site
from matmorph.passes.methods.loftq.method import LoftQ, LoftQSpec
from matmorph.passes.methods.qlora.method import QLora, QLoraSpec
from matmorph.passes.methods.quantize.method import Quantize, QuantizeSpec
from matmorph.passes.rewriting.rewrite import Outcome
from matmorph.specs.schema import MethodUse, Rank

METHODS = {"quantize": Quantize(), "loftq": LoftQ(), "qlora": QLora()}

NF4 = """-1 -0.6961928 -0.52507305 -0.3949175 -0.28444138 -0.18477343 -0.091050036 0 0.0795803 0.1609302 0.2461123 0.33791524 0.44070983
0.562617 0.72295684 1"""
NF3 = "-1 -0.4786291601 -0.2171418178 0 0.1609301727 0.3379151935 0.5626169701 1"
NF2 = "-1 0 0.3379151935 1"
TABLES = {name: np.array([float(word) for word in text.split()]) for name, text in (("nf4", NF4), ("nf3", NF3), ("nf2", NF2))}
"""The published levels."""

QUANTIZERS: tuple[dict[str, Any], ...] = (
    {"quantizer": "nf4"},
    {"quantizer": "nf3"},
    {"quantizer": "nf2", "block_size": 32},
    {"quantizer": "nf4", "double_quant": True},
    *({"quantizer": "uniform", "bits": bits} for bits in (2, 4, 8)),
    {"quantizer": "uniform", "bits": 2, "zero_point": True, "scale": "search", "block_size": 16},
    {"quantizer": "uniform", "bits": 4, "zero_point": True, "block_size": 32},
    {"quantizer": "uniform", "bits": 8, "zero_point": True, "scale": "search"},
    *({"quantizer": "uniform_clipped", "bits": bits} for bits in (2, 4, 8)),
)


def names_of(settings: Mapping[str, Any]) -> str:
    """A test id."""
    return "-".join(str(value) for value in settings.values())


def quantize(**settings: Any) -> MethodUse:
    return MethodUse("quantize", QuantizeSpec(**settings))


def loftq(rank: int = 3, **settings: Any) -> MethodUse:
    return MethodUse("loftq", LoftQSpec(rank=Rank("fixed", rank), **settings))


def qlora(rank: int = 3, **settings: Any) -> MethodUse:
    return MethodUse("qlora", QLoraSpec(rank=Rank("fixed", rank), **settings))


def unpack(packed: np.ndarray, width: int, high_first: bool = False) -> np.ndarray:
    """Codes [.., bytes * 8 / width] of bytes [.., bytes]."""
    shifts = np.arange(0, 8, width)
    codes = packed[..., None] >> (shifts[::-1] if high_first else shifts) & 2**width - 1
    return codes.reshape(*packed.shape[:-1], -1)


def parts_of(consts: Sequence[Const]) -> dict[str, np.ndarray]:
    """Arrays by their short names."""
    return {const.path.rpartition(".")[2]: const.load().detach().numpy() for const in consts}


def dense(parts: Mapping[str, np.ndarray], shape: tuple[int, int], spec: Any) -> np.ndarray:
    """float64 [out, in]: what the packed weights say, from the layouts that ONNX Runtime documents (the offset of uniform_clipped is in
    no array and is left out)."""
    n, k = shape
    block, scales = spec.block_size, parts["scales"].astype(np.float64)
    if spec.quantizer in TABLES:
        width = {"nf4": 4, "nf3": 4, "nf2": 2}[spec.quantizer]
        flat = unpack(parts["codes"].reshape(-1), width, high_first=spec.quantizer == "nf4")[: n * k]
        return (TABLES[spec.quantizer][flat] * scales[np.arange(n * k) // block]).reshape(n, k)
    bits = spec.bits
    codes = unpack(parts["codes"].reshape(n, -1), bits)[:, :k].astype(np.float64)
    zeros = unpack(parts["zero_points"], bits)[:, : scales.shape[1]] if "zero_points" in parts else np.full(scales.shape, 2 ** (bits - 1))
    of = np.arange(k) // block
    return (codes - zeros[:, of]) * scales[:, of]


def stands_for(outcome: Outcome, scale: float = 1.0) -> np.ndarray:
    """float64 [out, in]: codes and factors of a rewritten site."""
    parts, site, spec = parts_of(outcome.consts), outcome.site, outcome.parts[0].use.spec
    matrix = dense(parts, (site.out_features, site.in_features), spec)
    if "down" in parts:
        matrix = matrix + scale * (parts["down"].astype(np.float64) @ parts["up"].astype(np.float64)).T
    return matrix


def put_in(graph: Graph, sites: Mapping[Site, np.ndarray]) -> Graph:
    """The graph with other weights: the same nodes, dense, so that its outputs say what a rewrite must compute."""
    weights: dict[Const, torch.Tensor] = {}
    for site, matrix in sites.items():
        stored = weights.setdefault(site.const, site.const.load().detach().clone())
        site.read(stored).copy_(torch.from_numpy(matrix))
    fresh = {const: replace(const, load=lambda tensor=tensor: tensor) for const, tensor in weights.items()}

    def change(value: Any) -> Any:
        return fresh.get(value, value)

    nodes = tuple(replace(node, args=map_values(node.args, change)) for node in graph.nodes)
    return replace(graph, nodes=nodes, state=tuple(map(change, graph.state)))


def relative(w: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(w - other) / np.linalg.norm(w))
