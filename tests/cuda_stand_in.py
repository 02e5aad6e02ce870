"""ONNX Runtime's own CUDA provider on a machine without a GPU: where it would place the nodes of a file.

The provider's library wants a driver and CUDA's libraries. Here each function of theirs that it names is made anew: memory lies on the CPU,
there is one device, and nothing is ever computed. A session then goes through all that ONNX Runtime does before it runs anything, and its
log says of each node whether a CUDA kernel was found and where it was placed. `python cuda_stand_in.py FILE...` prints that as JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_TAKEN = "(void **place, size_t size) { *place = aligned_alloc(256, (size + 511) / 256 * 256); return 0; }"
_MADE = "(void **place) { *place = malloc(64); return 0; }"
_SAID = '() { return "a stand-in"; }'
_FILLED = "(void *to, int value, size_t size) { memset(to, value, size); return 0; }"
_COPIED = "(void *to, const void *from, size_t size) { memcpy(to, from, size); return 0; }"
_FREED = "(void *place) { free(place); return 0; }"
# Of cudaDeviceProp of CUDA 13: name, memory, shared memory, registers, warp, threads of a block, version, processors.
_DEVICE = """(char *it) {
  memset(it, 0, 1008); strcpy(it, "a stand-in");
  *(size_t *)(it + 288) = 80ul << 30; *(size_t *)(it + 296) = 49152;
  *(int *)(it + 304) = 65536; *(int *)(it + 308) = 32; *(int *)(it + 320) = 1024;
  *(int *)(it + 360) = 9; *(int *)(it + 384) = 132;
  return 0; }"""
BODIES: Mapping[str, str] = {
    **dict.fromkeys(("cudaMalloc", "cudaMallocHost", "cudaHostAlloc"), f"int NAME{_TAKEN}"),
    **dict.fromkeys(("cudaFree", "cudaFreeHost"), f"int NAME{_FREED}"),
    **dict.fromkeys(("cudaMemcpy", "cudaMemcpyAsync"), f"int NAME{_COPIED}"),
    **dict.fromkeys(("cudaMemset", "cudaMemsetAsync"), f"int NAME{_FILLED}"),
    **dict.fromkeys(
        "cudaStreamCreate cudaStreamCreateWithFlags cudaEventCreate cudaEventCreateWithFlags cublasCreate_v2 cublasLtCreate".split(),
        f"int NAME{_MADE}",
    ),
    **dict.fromkeys("cudaGetErrorString cudaGetErrorName cublasGetStatusName cublasGetStatusString".split(), f"const char *NAME{_SAID}"),
    **dict.fromkeys(("cudaDriverGetVersion", "cudaRuntimeGetVersion"), "int NAME(int *it) { *it = 13000; return 0; }"),
    "cudaGetDeviceCount": "int NAME(int *it) { *it = 1; return 0; }",
    "cudaGetDevice": "int NAME(int *it) { *it = 0; return 0; }",
    "cudaGetDeviceProperties": f"int NAME{_DEVICE}",
    "cudaDeviceGetAttribute": "int NAME(int *it, int what) { *it = what == 75 ? 9 : what == 76 ? 0 : what == 16 ? 132 : 1024; return 0; }",
    "cudaMemGetInfo": "int NAME(size_t *left, size_t *all) { *left = *all = 80ul << 30; return 0; }",
}
"""What a function must do for a session to be made; all others say that all is well."""


@dataclass(frozen=True)
class Placed:
    """Names of nodes: those without a CUDA kernel, those that the provider declined although it has one, by provider where each lies;
    `error` of a session that was not made."""

    without: frozenset[str]
    declined: frozenset[str]
    on: Mapping[str, frozenset[str]]
    error: str = ""


def provider_library() -> Path | None:
    found = find_spec("onnxruntime")
    path = None if found is None or found.origin is None else Path(found.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"
    return path if path is not None and path.is_file() else None


def obstacle() -> str | None:
    """Why there is none here."""
    if provider_library() is None:
        return "the installed onnxruntime has no CUDA provider for Linux"
    missing = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    return f"no {missing[0]} to build CUDA's stand-in with" if missing else None


def build(folder: Path) -> Path:
    """Libraries in the place of those that the provider needs, with the functions that it names."""
    library = str(provider_library())
    wanted = re.findall(r"\[(lib(?:cu|nv)\w+\.so[.\d]*)\]", _said("readelf", "-d", library))
    names: dict[str, set[str]] = {one: set() for one in wanted}
    for line in _said("nm", "-D", "--undefined-only", library).splitlines():
        name, _, where = line.split()[-1].partition("@")
        if where in names:
            names[where].add(name)
        elif not where and re.match(r"cu[A-Z]", name):
            names["libcuda.so.1"].add(name)
    for one, functions in names.items():
        source = folder / f"{one}.c"
        bodies = [BODIES.get(name, "int NAME() { return 0; }").replace("NAME", name) for name in sorted(functions)]
        source.write_text("\n".join(["#include <stdlib.h>", "#include <string.h>", *bodies]))
        (folder / "versions").write_text(f"{one} {{ global: *; }};\n")
        versions = [f"-Wl,--version-script={folder / 'versions'}"] if one != "libcuda.so.1" else []
        subprocess.run(
            ["gcc", "-w", "-shared", "-fPIC", "-o", folder / one, source, f"-Wl,-soname,{one}", *versions], check=True, capture_output=True
        )
    return folder


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def placed(libraries: Path, files: Sequence[Path]) -> list[Placed]:
    """Where the provider of the installed ONNX Runtime places the nodes of each file, nothing optimised."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run([sys.executable, __file__, *map(str, files)], capture_output=True, text=True, env=environment, check=False)
    found = [json.loads(line.removeprefix("placed: ")) for line in done.stdout.splitlines() if line.startswith("placed: ")]
    logs = re.split(r"^----.*\n", done.stderr, flags=re.MULTILINE)[1:]
    if len(found) != len(files) or len(logs) != len(files):
        raise AssertionError(f"the stand-in ended early ({done.returncode}): {done.stderr[-2000:]}")
    return [_read(log, error) for log, error in zip(logs, found, strict=True)]


def _read(log: str, error: str) -> Placed:
    on: dict[str, set[str]] = {}
    provider = ""
    for line in log.splitlines():
        if (found := re.search(r"Node\(s\) placed on \[(\w+)\]", line)) or (found := re.search(r"All nodes placed on \[(\w+)\]", line)):
            provider = found[1]
        elif (found := re.search(r"VerifyEachNodeIsAssignedToAnEp\]   \w+ \((.*)\)$", line)) and provider:
            on.setdefault(provider, set()).add(found[1])
    return Placed(
        frozenset(re.findall(r"CUDA kernel not found in registries for Op type: \S+ node name: (.*)$", log, re.MULTILINE)),
        frozenset(re.findall(r"Fallback to CPU execution provider for Op type: \S+ node name: (.*?)(?:\x1b.*)?$", log, re.MULTILINE)),
        {name: frozenset(nodes) for name, nodes in on.items()},
        error,
    )


def main() -> None:
    import onnxruntime

    for file in sys.argv[1:]:
        print(f"---- {file}", file=sys.stderr, flush=True)
        options: Any = onnxruntime.SessionOptions()
        options.log_severity_level = 0
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            onnxruntime.InferenceSession(file, options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
            error = ""
        except Exception as caught:
            error = str(caught)
        print(f"placed: {json.dumps(error)}", flush=True)


if __name__ == "__main__":
    main()
