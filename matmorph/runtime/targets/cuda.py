"""ONNX Runtime's CUDA provider. Its kernels were read, not measured."""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matmorph.runtime.targets.kernels import shipped
from matmorph.runtime.targets.rates import Rates
from matmorph.runtime.targets.target import KernelCost, Limits, Target

_PROVIDER = "CUDAExecutionProvider"


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


def _uneven_pads(attributes: Mapping[str, Any]) -> str | None:
    pads: Sequence[int] = attributes.get("pads", ())
    half = len(pads) // 2
    return None if list(pads[:half]) == list(pads[half:]) else "with other padding at the end than at the beginning"


def _last_index(attributes: Mapping[str, Any]) -> str | None:
    return "with select_last_index" if attributes.get("select_last_index") else None


def _text(attributes: Mapping[str, Any]) -> str | None:
    return "that makes text" if attributes.get("to") == _STRING else None


def _recurrent(*activations: str, resets: bool = False) -> Callable[[Mapping[str, Any]], str | None]:
    def declined(attributes: Mapping[str, Any]) -> str | None:
        for name in ("activation_alpha", "activation_beta", "clip"):
            if name in attributes:
                return f"with {name}"
        if attributes.get("input_forget"):
            return "with input_forget"
        if resets and not attributes.get("linear_before_reset"):
            return "with linear_before_reset 0"
        chosen = tuple(str(one).lower() for one in attributes.get("activations", ()))
        return None if chosen == activations[: len(chosen)] else "with other activations than its own"

    return declined


_STRING = 8
_DECLINES: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = {
    "ConvTranspose": _uneven_pads,
    "ArgMax": _last_index,
    "ArgMin": _last_index,
    "Cast": _text,
    "RNN": _recurrent("tanh", "tanh"),
    "LSTM": _recurrent("sigmoid", "tanh", "tanh", "sigmoid", "tanh", "tanh"),
    "GRU": _recurrent("sigmoid", "tanh", "sigmoid", "tanh", resets=True),
}
"""Read in `CUDAExecutionProvider::GetCapability`, which looks at these before it takes a node."""

CUDA = Target(
    name="cuda",
    provider=_PROVIDER,
    title="CUDA",
    memory="cuda",
    obstacle=cuda_obstacle,
    default=True,
    kernels=partial(shipped, "cuda"),
    hands_back=True,
    declines=_DECLINES,
    limits={"MatMulNBits": Limits(), "MatMulBnb4": Limits(bits=(4,)), "GatherBlockQuantized": Limits()},
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
