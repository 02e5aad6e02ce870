"""ONNX Runtime's CPU provider: it is always there."""

from __future__ import annotations

from functools import partial

from matmorph.runtime.targets.kernels import shipped
from matmorph.runtime.targets.rates import Rates
from matmorph.runtime.targets.target import KernelCost, Limits, Target

_UNPACKED = "no float32 kernel: the matrix is unpacked on every call"

CPU_RATES = Rates(
    source="ONNX Runtime 1.31.1, CPU provider, one thread, AMD EPYC (Zen 4, AVX512, 1 MiB L2, 32 MiB L3)",
    measured=True,
    node=4e-7,
    view=2.5e-7,
    call=1.17e-7,
    work=1.55e-11,
    panel=2.39e-11,
    copy=1.31e-10,
    left=2.4e-11,
    result=3.2e-11,
    moved=4e-10,
    constants=((2**16, 8.9e-12), (3 * 2**20, 1.59e-10)),
    values=((2**19, 1.94e-11), (3 * 2**20, 3.15e-10)),
)
"""Fitted by benchmarks/product_rates.py to 1511 nodes, those of all plans of 29 trains at 1, 16 and 256 rows: half of them lie within 7 %,
nine tenths within 24 %. On two threads the order of the plans is the same, as far as a busy machine could tell."""

CPU = Target(
    name="cpu",
    provider="CPUExecutionProvider",
    title="CPU",
    memory="cpu",
    obstacle=lambda: None,
    default=True,
    kernels=partial(shipped, "cpu"),
    casts={"float16": "float32"},
    limits={"MatMulNBits": Limits(), "MatMulBnb4": Limits(bits=(4,)), "GatherBlockQuantized": Limits()},
    lacks={"bf16": "ONNX Runtime has no bfloat16 MatMul or Gemm there"},
    rates=CPU_RATES,
    # Measured with ONNX Runtime 1.31.1, one thread, AVX512-VNNI, at 1024 x 1024 and 4096 x 4096; products in integers at seven shapes
    # from 384 x 384, where one row takes as long as dense, to 2048 x 2048, on a CPU with AMX.
    costs={
        ("uniform_4", "fp32"): KernelCost("MatMulNBits, 4 bits, float32 activations", ((0.25, 0.7), (1.5, 1.6), (0.6, 1.0))),
        ("uniform_4", "int8"): KernelCost("MatMulNBits, 4 bits, int8 activations", ((0.08, 0.26), (0.43, 0.81), (0.9, 1.1))),
        ("uniform_8", "fp32"): KernelCost(f"MatMulNBits, 8 bits, float32 activations, {_UNPACKED}", ((7, 16), (5, 12), (1.5, 1.8))),
        ("uniform_8", "int8"): KernelCost("MatMulNBits, 8 bits, int8 activations", ((0.36, 0.36), (0.78, 0.78), (0.73, 0.73))),
        ("uniform_8_channel", "integers"): KernelCost(
            "DynamicQuantizeLinear and MatMulIntegerToFloat, 8 bits and a scale per output channel (384 to 2048 wide, AMX)",
            ((0.28, 1.03), (0.23, 0.47), (0.11, 0.33)),
        ),
        ("uniform_2", "fp32"): KernelCost(f"MatMulNBits, 2 bits, float32 activations, {_UNPACKED}", ((17, 20), (13, 14), (1.7, 1.7))),
        ("uniform_2", "int8"): KernelCost("MatMulNBits, 2 bits, int8 activations", ((0.07, 0.22), (0.29, 0.85), (1.1, 1.5))),
        ("nf4", ""): KernelCost("MatMulBnb4 (NF4), the matrix is unpacked on every call", ((3.5, 7.1), (3.6, 3.7), (1.2, 1.5))),
        ("nf3", "packed"): KernelCost("table look-up of 4-bit wide codes on every call", ((48, 51), (36, 36), (2.9, 2.9))),
        ("nf2", "packed"): KernelCost("table look-up of 2-bit codes on every call", ((22, 28), (16, 21), (1.6, 2.3))),
    },
    int8_blocks={"uniform_2": (32, 64, 128)},
)
