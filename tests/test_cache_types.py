"""Which types of a key/value cache ONNX Runtime's CPU kernels take: what docs/reference/kernels.md says. Oracle: attention in float64 over
the cache before it was rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

HEADS, PAIRS, HEAD, PAST = 4, 2, 16, 5
Array = np.ndarray[Any, Any]
KINDS = {np.dtype("float32"): TensorProto.FLOAT, np.dtype("float16"): TensorProto.FLOAT16, np.dtype("int8"): TensorProto.INT8}
KINDS |= {np.dtype("uint8"): TensorProto.UINT8, np.dtype("int32"): TensorProto.INT32}


@dataclass(frozen=True)
class Call:
    """One new token after PAST others. `past`: keys and values [1, PAIRS, PAST, HEAD]."""

    q: Array
    k: Array
    v: Array
    past: tuple[Array, Array]

    def expected(self) -> Array:
        heads = []
        for head in range(HEADS):
            pair = head // (HEADS // PAIRS)
            both = zip(self.past, (self.k, self.v), strict=True)
            keys, values = (
                np.concatenate([past[0, pair], new.reshape(PAIRS, HEAD)[pair : pair + 1]]).astype(np.float64) for past, new in both
            )
            scores = keys @ self.q.reshape(HEADS, HEAD)[head].astype(np.float64) / np.sqrt(HEAD)
            weights = np.exp(scores - scores.max())
            heads.append(weights @ values / weights.sum())
        found: Array = np.concatenate(heads)
        return found

    def grouped(self, kind: str, past: tuple[Array, Array], scales: tuple[Array, ...] = (), **attributes: Any) -> Array:
        """GroupQueryAttention that computes in `kind`, on this cache."""
        feeds = {name: getattr(self, name).reshape(1, 1, -1).astype(kind) for name in ("q", "k", "v")}
        feeds |= {"past_k": past[0], "past_v": past[1], "last": np.array([PAST], np.int32), "total": np.array(PAST + 1, np.int32)}
        names = [*feeds, *([""] * 5 if scales else [])]
        feeds |= dict(zip(("scale_k", "scale_v"), scales, strict=False))
        names += ["scale_k", "scale_v"] if scales else []
        node = helper.make_node(
            "GroupQueryAttention", names, ["y", "present_k", "present_v"], domain="com.microsoft", num_heads=HEADS, **attributes
        )
        node.attribute.append(helper.make_attribute("kv_num_heads", PAIRS))
        return ran(node, feeds, past[0].dtype)

    def standard(self, kind: str, opset: int) -> Array:
        """Attention of ONNX, cache and computing in one type: it has one for both."""
        feeds = {name: getattr(self, name).reshape(1, -1, 1, HEAD).astype(kind) for name in ("q", "k", "v")}
        feeds |= {"past_k": self.past[0].astype(kind), "past_v": self.past[1].astype(kind)}
        node = helper.make_node("Attention", ["q", "k", "v", "", "past_k", "past_v"], ["y", "present_k", "present_v"])
        return ran(node, feeds, np.dtype(kind), opset)


def ran(node: Any, feeds: dict[str, Array], cache: np.dtype[Any], opset: int = 21) -> Array:
    inputs = [helper.make_tensor_value_info(name, KINDS[array.dtype], array.shape) for name, array in feeds.items()]
    kinds = {"y": feeds["q"].dtype, "present_k": cache, "present_v": cache}
    outputs = [helper.make_tensor_value_info(name, KINDS[kind], None) for name, kind in kinds.items()]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=imports, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answer, present, _ = session.run(None, feeds)
    assert present.shape[2] == PAST + 1
    assert present.dtype == cache
    found: Array = answer.astype(np.float64).reshape(-1)
    return found


@pytest.fixture(scope="module")
def call() -> Call:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(heads * HEAD).astype(np.float32) for heads in (HEADS, PAIRS, PAIRS))
    past = tuple(rng.standard_normal((1, PAIRS, PAST, HEAD)).astype(np.float32) for _ in range(2))
    return Call(q, k, v, (past[0], past[1]))


def far(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# Bounds: a few roundings of the type, at most four times the error that was met.
@pytest.mark.parametrize(("kind", "bound"), [("float32", 1e-6), ("float16", 2e-3)])
def test_caches_of_the_type_that_computes(call: Call, kind: str, bound: float) -> None:
    expected = call.expected()
    assert far(call.grouped(kind, (call.past[0].astype(kind), call.past[1].astype(kind))), expected) < bound
    assert far(call.standard(kind, 23), expected) < bound
    assert far(call.standard(kind, 24), expected) < bound


def coded(call: Call, bits: int, axes: tuple[int, ...] | None) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The cache in codes, and one scale of keys and of values, or one per channel; the new token fits in too."""
    top = 2 ** (bits - 1) - 1
    codes, scales = [], []
    for past, new in zip(call.past, (call.k, call.v), strict=True):
        whole = np.concatenate([past, new.reshape(1, PAIRS, 1, HEAD)], axis=2)
        scale = (np.abs(whole).max(axis=axes, keepdims=True) / top).astype(np.float32)
        code = np.clip(np.rint(past / scale), -top - 1, top).astype(np.int8)
        raised = (code + 8).astype(np.uint8)
        codes.append(code if bits == 8 else raised[..., 0::2] | (raised[..., 1::2] << 4))
        scales.append(scale.reshape(-1))
    return (codes[0], codes[1]), (scales[0], scales[1])


# Half a step of a scale is 1/254 of the largest entry with 8 bits and 1/14 with 4, and a key's error enters the exponent: bounds are some
# six of them for one scale, half of that for one per channel.
@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize(("bits", "by", "bound"), [(8, "TENSOR", 0.03), (8, "CHANNEL", 0.015), (4, "TENSOR", 0.45), (4, "CHANNEL", 0.25)])
def test_caches_in_codes(call: Call, kind: str, bits: int, by: str, bound: float) -> None:
    codes, scales = coded(call, bits, None if by == "TENSOR" else (0, 2))
    attributes = {"k_quant_type": f"PER_{by}", "v_quant_type": f"PER_{by}", "kv_cache_bit_width": bits}
    assert 1e-4 < far(call.grouped(kind, codes, scales, **attributes), call.expected()) < bound
