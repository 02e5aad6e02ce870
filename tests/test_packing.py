"""Packed codes: round trips, layouts against the documents' formulas, and ONNX Runtime's kernels against numpy."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from matmorph.passes.linalg import packing
from matmorph.passes.linalg.packing import (
    Packed,
    byte_table,
    pack_bits,
    pack_byte_table,
    pack_gather,
    pack_matmul_bnb4,
    pack_matmul_nbits,
    unpack_bits,
)
from matmorph.passes.linalg.quantize import Quantized, Quantizer, quantize

KERNEL_TOLERANCE = 1e-6
"""Of the largest output: sums of a few hundred float32 products, in another order than numpy's float64 ones."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a: Quantized, b: Quantized) -> None:
    assert a.quantizer == b.quantizer
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)
    assert (a.zero_points is None) == (b.zero_points is None)
    assert a.zero_points is None or torch.equal(a.zero_points, b.zero_points)


# Bits


@given(st.data())
def test_bits_come_back(data: st.DataObject) -> None:
    width, high_first = data.draw(st.sampled_from((2, 4, 8))), data.draw(st.booleans())
    rows, count = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 20))
    codes = torch.randint(0, 2**width, (rows, count), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    packed = pack_bits(codes, width, high_first=high_first)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-count * width // 8))
    assert torch.equal(unpack_bits(packed, width, count, high_first=high_first), codes)


def test_bit_order_is_that_of_the_kernels() -> None:
    codes = torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8)
    # MatMulNBits: q0 | q1 << 2 | q2 << 4 | q3 << 6, and q0 | q1 << 4. bitsandbytes and MatMulBnb4: q0 << 4 | q1.
    assert pack_bits(codes, 2).tolist() == [1 | 2 << 2 | 3 << 4, 2]
    assert pack_bits(codes, 4).tolist() == [1 | 2 << 4, 3, 2]
    assert pack_bits(codes, 4, high_first=True).tolist() == [1 << 4 | 2, 3 << 4, 2 << 4]
    assert pack_bits(codes, 8).tolist() == codes.tolist()


def test_impossible_widths_and_counts_are_refused() -> None:
    codes = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2, 4 or 8 bits wide, not 3"):
        pack_bits(codes, 3)
    with pytest.raises(ValueError, match="hold 16 codes of 4 bits, not 17"):
        unpack_bits(codes, 4, 17)


# Layouts


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (7, 200), (1, 16), (3, 33)])
def test_uniform_layouts_come_back(bits: int, zero_point: bool, shape: tuple[int, int]) -> None:
    quantizer = Quantizer("uniform", bits, block_size=32, zero_point=zero_point)
    q = quantize(normal(*shape), quantizer)
    packed = pack_matmul_nbits(q)
    blocks = -(-shape[1] // 32)
    assert packed.codes.shape == (shape[0], blocks, 32 * bits // 8)
    assert packed.nbytes == q.nbytes == quantizer.nbytes(shape)
    same(packing.unpack_matmul_nbits(packed, quantizer, shape), q)
    if shape[1] * bits % 8 == 0:
        same(packing.unpack_gather(pack_gather(q), quantizer, shape), q)


@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2"])
@pytest.mark.parametrize("shape", [(4, 64), (5, 33), (1, 1), (2, 3, 40)])
def test_table_layouts_come_back(name: str, shape: tuple[int, ...]) -> None:
    quantizer = Quantizer(name, block_size=16, scale_dtype=torch.float16)
    q = quantize(normal(*shape), quantizer)
    packed = pack_byte_table(q)
    same(packing.unpack_byte_table(packed, quantizer, shape), q)
    if name == "nf4":
        bnb4 = pack_matmul_bnb4(q)
        assert bnb4.codes.shape == (-(-q.codes.numel() // 2),)
        assert bnb4.scales.dtype == torch.float32
        assert bnb4.codes.nbytes + packed.scales.nbytes == q.nbytes
        same(packing.unpack_matmul_bnb4(bnb4, quantizer, shape), q)
    else:
        assert packed.nbytes == q.nbytes


@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2"])
def test_gathering_from_the_byte_table_is_dequantising(name: str) -> None:
    quantizer = Quantizer(name, block_size=16)
    q = quantize(normal(6, 32), quantizer)
    packed, table = pack_byte_table(q), byte_table(quantizer)
    width = {"nf4": 4, "nf3": 4, "nf2": 2}[name]
    assert table.shape == (256, 8 // width)
    levels = table[packed.codes.long()].reshape(-1, 16) * packed.scales[:, None]
    assert torch.equal(levels.reshape(6, 32), q.dequantize())


def test_double_quantised_scales_are_expanded_for_kernels() -> None:
    w = normal(8, 64)
    q = quantize(w, Quantizer("nf4", double=True))
    plain = packing.expanded(q)
    assert plain.quantizer == Quantizer("nf4")
    assert torch.equal(plain.dequantize(), q.dequantize())
    assert packing.expanded(plain) is plain


def test_layouts_refuse_what_their_kernel_does_not_take() -> None:
    nf4, uniform = quantize(normal(2, 64), Quantizer("nf4")), quantize(normal(2, 64), Quantizer("uniform", 4))
    with pytest.raises(ValueError, match="MatMulNBits takes a matrix quantised as uniform, not nf4"):
        pack_matmul_nbits(nf4)
    with pytest.raises(ValueError, match=r"not uniform \[2, 2, 64\]"):
        pack_matmul_nbits(quantize(normal(2, 2, 64), Quantizer("uniform", 4)))
    with pytest.raises(ValueError, match="MatMulBnb4 takes nf4, not uniform"):
        pack_matmul_bnb4(uniform)
    with pytest.raises(ValueError, match="a byte table is for nf4, nf3, nf2, not uniform"):
        pack_byte_table(uniform)
    with pytest.raises(ValueError, match="blocks of 16, 32, 64, 128, 256, not 48"):
        pack_matmul_nbits(quantize(normal(2, 64), Quantizer("uniform", 4, block_size=48)))
    with pytest.raises(ValueError, match="33 codes of 4 bits are not"):
        pack_gather(quantize(normal(2, 33), Quantizer("uniform", 4, block_size=16)))


# ONNX Runtime


def answer(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The value "y" on the CPU provider for the input "x"."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    (y,) = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return y


def contrib(op: str, inputs: list[str], **attributes: int) -> list[onnx.NodeProto]:
    return [helper.make_node(op, inputs, ["y"], domain="com.microsoft", **attributes)]


def check_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() <= KERNEL_TOLERANCE * np.abs(expected).max()


def arrays(packed: Packed) -> dict[str, np.ndarray]:
    found = {"codes": packed.codes.numpy(), "scales": packed.scales.numpy()}
    return found if packed.zero_points is None else found | {"zero_points": packed.zero_points.numpy()}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize(("n", "k", "block"), [(32, 128, 32), (7, 200, 64), (5, 48, 16), (3, 20, 16)])
def test_matmul_nbits(bits: int, zero_point: bool, n: int, k: int, block: int) -> None:
    q = quantize(normal(n, k), Quantizer("uniform", bits, block_size=block, zero_point=zero_point))
    x = normal(2, 3, k, seed=1).numpy()
    packed = pack_matmul_nbits(q)
    assert (packed.scales < 0).any() != zero_point  # negative scales are part of the layout
    constants = arrays(packed)
    nodes = contrib("MatMulNBits", ["x", *constants], K=k, N=n, bits=bits, block_size=block, accuracy_level=1)
    check_close(answer(nodes, constants, x), x.astype(np.float64) @ q.dequantize().double().numpy().T)


def test_matmul_nbits_with_bias() -> None:
    q = quantize(normal(5, 72), Quantizer("uniform", 4, block_size=32))
    x, bias = normal(4, 72, seed=1).numpy(), normal(5, seed=2).numpy()
    # 0x88: the packed zero point 8, which is what the kernel uses without that input.
    constants = {**arrays(pack_matmul_nbits(q)), "zero_points": np.full((5, 2), 0x88, np.uint8), "bias": bias}
    nodes = contrib("MatMulNBits", ["x", "codes", "scales", "zero_points", "", "bias"], K=72, N=5, bits=4, block_size=32)
    check_close(answer(nodes, constants, x), x.astype(np.float64) @ q.dequantize().double().numpy().T + bias)


@pytest.mark.parametrize(("n", "k", "block"), [(32, 128, 64), (7, 200, 64), (5, 33, 16)])
def test_matmul_bnb4(n: int, k: int, block: int) -> None:
    q = quantize(normal(n, k), Quantizer("nf4", block_size=block))
    x = normal(2, 3, k, seed=1).numpy()
    nodes = contrib("MatMulBnb4", ["x", "codes", "scales"], K=k, N=n, block_size=block, quant_type=1, transB=1)
    check_close(answer(nodes, arrays(pack_matmul_bnb4(q)), x), x.astype(np.float64) @ q.dequantize().double().numpy().T)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize(("v", "d", "block"), [(11, 128, 32), (7, 200, 64), (5, 48, 16)])
def test_gather_block_quantized(bits: int, zero_point: bool, v: int, d: int, block: int) -> None:
    q = quantize(normal(v, d), Quantizer("uniform", bits, block_size=block, zero_point=zero_point))
    rows = np.array([[0, v - 1], [2, 2]])
    codes, *rest = constants = arrays(pack_gather(q))
    nodes = contrib("GatherBlockQuantized", [codes, "x", *rest], bits=bits, block_size=block, gather_axis=0, quantize_axis=1)
    np.testing.assert_array_equal(answer(nodes, constants, rows), q.dequantize().numpy()[rows])


@pytest.mark.parametrize("name", ["nf3", "nf2"])
def test_byte_table_in_standard_operators(name: str) -> None:
    quantizer = Quantizer(name)
    q = quantize(normal(5, 200), quantizer)
    packed = pack_byte_table(q)
    x = normal(4, 200, seed=1).numpy()
    nodes = [
        helper.make_node("Gather", ["table", "codes"], ["levels"], axis=0),
        helper.make_node("Reshape", ["levels", "blocks"], ["rows"]),
        helper.make_node("Mul", ["rows", "scales"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "flat"], ["all"]),
        helper.make_node("Slice", ["all", "from", "to"], ["weights"]),
        helper.make_node("Reshape", ["weights", "shape"], ["w"]),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    constants = {
        "table": byte_table(quantizer).numpy(),
        "codes": packed.codes.numpy().astype(np.int32),
        "scales": packed.scales.numpy()[:, None],
        "blocks": np.array([-1, 64]),
        "flat": np.array([-1]),
        "from": np.array([0]),
        "to": np.array([5 * 200]),
        "shape": np.array([5, 200]),
    }
    check_close(answer(nodes, constants, x), x.astype(np.float64) @ q.dequantize().double().numpy().T)
