"""What makes two tasks the same: a hash of all that goes into one, each tensor hashed once."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matmorph.passes.work.nest import taken_apart
from matmorph.runtime.format.version import __version__


class Digests:
    """`of(value)`: of a nest. A tensor's own hash is kept for as long as the tensor is there: sites that read the same rows share a
    moment."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._lock = threading.Lock()

    def of(self, value: Any) -> str:
        """Raises NotANestError."""
        skeleton, tensors = taken_apart(value, compared=True)
        whole = hashlib.sha256(json.dumps(skeleton, sort_keys=True).encode())
        for tensor in tensors:
            whole.update(self.of_tensor(tensor).encode())
        return whole.hexdigest()

    def of_tensor(self, tensor: Tensor) -> str:
        key = id(tensor)
        with self._lock:
            known = self._known.get(key)
        if known is not None and known[0]() is tensor:
            return known[1]
        found = tensor_sha256(tensor)
        with self._lock:
            self._known[key] = (weakref.ref(tensor, lambda _: self._known.pop(key, None)), found)
        return found


def tensor_sha256(tensor: Tensor) -> str:
    """Of its type, shape and numbers."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    data = tensor.detach().cpu().contiguous()
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()


@cache
def code_sha256(package: str = "matmorph") -> str:
    """Of the source that computes: a result of other code is another one, whatever its version says."""
    folder = Path(str(sys.modules[package].__file__)).parent
    digest = hashlib.sha256(f"{__version__} {torch.__version__}\n".encode())
    for room in ("ir", "passes", "specs"):
        for path in sorted((folder / room).rglob("*.py")):
            digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def class_sha256(kind: type) -> str:
    """Of the file that a class stands in; of its name where it stands in none."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    code = Path(file).read_bytes() if file is not None and Path(file).is_file() else b""
    return hashlib.sha256(f"{kind.__module__}.{kind.__qualname__}\n".encode() + code).hexdigest()
