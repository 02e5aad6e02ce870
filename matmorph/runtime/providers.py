"""Which ONNX Runtime execution providers a session uses: CUDA where it truly loads, else CPU, and never a silent change of mind."""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime

from matmorph.runtime.errors import ProviderError, nearest

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
SHORT: Mapping[str, str] = {"cpu": CPU, "cuda": CUDA}

Provider = str | tuple[str, Mapping[str, Any]]
"""A name ("cuda", "CPUExecutionProvider") or a name with ONNX Runtime's options for it."""


def name_of(provider: Provider) -> str:
    """The name, without the options."""
    return provider if isinstance(provider, str) else provider[0]


def requested(providers: str | Sequence[Provider]) -> list[Provider]:
    """The explicit list with full names. Raises ProviderError for one that this machine cannot load, with the reason."""
    asked = [providers] if isinstance(providers, str) else list(providers)
    if not asked:
        raise ProviderError("providers is an empty list; None lets the session choose")
    full = [SHORT.get(p, p) if isinstance(p, str) else (SHORT.get(p[0], p[0]), p[1]) for p in asked]
    available = onnxruntime.get_available_providers()
    for name in map(name_of, full):
        if name not in available:
            hint = nearest(name, [*available, *SHORT])
            raise ProviderError(f"{name} is not in this onnxruntime; it has {', '.join(available)}{hint}")
    obstacle = cuda_obstacle() if CUDA in map(name_of, full) else None
    if obstacle:
        raise ProviderError(f"{CUDA} was asked for and cannot be used: {obstacle}")
    return full


def cuda_obstacle() -> str | None:
    """Why CUDA cannot be used here, or None when nothing stands in its way.

    Cheap and quiet, from the outside in: the provider, the driver, a device, the libraries. A session that is created without this check
    prints pages on a machine without a GPU. What only shows when a session is created (a device too old, no memory) is left to that.
    """
    if CUDA not in onnxruntime.get_available_providers():
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
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    lines = said.getvalue().splitlines()
    # The closing advice is printed only when a required library is in none of the places; a single failed place is no obstacle.
    if not any("to install CUDA" in line for line in lines):
        return None
    return lines[0].partition(": ")[2] or lines[0]
