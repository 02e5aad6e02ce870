"""ONNX Runtime's CUDA provider. Its kernels were read, not measured."""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys

from matmorph.runtime.targets.rates import Rates
from matmorph.runtime.targets.target import Kernel, KernelCost, Target

_PROVIDER = "CUDAExecutionProvider"
_ALL_FLOATS = ("float32", "float16", "bfloat16")


def cuda_obstacle() -> str | None:
    """Why CUDA cannot be used here, or None when nothing stands in its way.

    Cheap and quiet, from the outside in: the provider, the driver, a device, the libraries. A session that is created without this check
    prints pages on a machine without a GPU. What only shows when a session is created (a device too old, no memory) is left to that.
    """
    import onnxruntime  # on use: the compiler reads the record without it

    if _PROVIDER not in onnxruntime.get_available_providers():
        return "this onnxruntime was built without it"
    return _driver_obstacle() or _library_obstacle()


def _driver_obstacle() -> str | None:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver on this machine"
    status = driver.cuInit(0)
    if status != 0:
        return f"the NVIDIA driver finds no usable device (cuInit error {status})"
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no device"
    return None


def _library_obstacle() -> str | None:
    """Loads CUDA's libraries from the nvidia packages or the system, as ONNX Runtime recommends; it reports failures by printing."""
    import onnxruntime

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    lines = said.getvalue().splitlines()
    # The closing advice is printed only when a required library is in none of the places; a single failed place is no obstacle.
    if not any("to install CUDA" in line for line in lines):
        return None
    return lines[0].partition(": ")[2] or lines[0]


_READ = "read in the kernel, not measured"
_UNIFORM = KernelCost("packed for few rows, else unpacked on every call for a dense product", basis=_READ)
_NF4 = KernelCost("packed for one row, else unpacked on every call for a dense product", basis=_READ)
_LOOK_UP = KernelCost("a look-up of all codes on every call, then a dense product", basis="not measured")

CUDA = Target(
    name="cuda",
    provider=_PROVIDER,
    title="CUDA",
    memory="cuda",
    obstacle=cuda_obstacle,
    default=True,
    # As registered in ONNX Runtime 1.31.
    kernels={
        "MatMulNBits": Kernel(_ALL_FLOATS),
        "MatMulBnb4": Kernel(_ALL_FLOATS, bits=(4,)),
        "GatherBlockQuantized": Kernel(_ALL_FLOATS),
        "SkipSimplifiedLayerNormalization": Kernel(_ALL_FLOATS),
    },
    # A launch of some microseconds, 20 TFLOP/s of float32, 2 TB/s; batches run at once.
    rates=Rates(
        source="estimate, not measured: a launch per node, 20 TFLOP/s in float32, 2 TB/s",
        measured=False,
        node=5e-6,
        view=0.0,
        call=0.0,
        work=1e-13,
        panel=0.0,
        copy=0.0,
        left=2e-12,
        result=2e-12,
        moved=4e-12,
        constants=((0, 2e-12),),
        values=(),
        cache=2**23,
        lanes=32,
    ),
    costs={
        **{(f"uniform_{bits}", activations): _UNIFORM for bits in (2, 4, 8) for activations in ("fp32", "int8")},
        ("nf4", ""): _NF4,
        **{(table, "packed"): _LOOK_UP for table in ("nf2", "nf3")},
    },
)
