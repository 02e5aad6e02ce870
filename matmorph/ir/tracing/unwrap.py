"""Models that come wrapped: compiled, parallel, averaged. The trace sees what is inside, under its own plain paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_WRAPPERS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): ("_orig_mod", "torch.compile"),
    ("torch.nn.parallel.data_parallel", "DataParallel"): ("module", "DataParallel"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): ("module", "DistributedDataParallel"),
    ("torch.optim.swa_utils", "AveragedModel"): ("module", "AveragedModel"),
}
"""By module and name of the class: the attribute that holds the model, and what people call the wrapper. By name, because importing
torch._dynamo takes longer than a trace, and whoever has such an object has imported its class."""


def unwrapped(model: Any) -> tuple[Any, tuple[str, ...]]:
    """What the wrappers around a model hold, and a note that names them; the model itself and no note where it has none."""
    names: list[str] = []
    while (found := _wrapper(model)) is not None:
        attribute, name = found
        names.append(name)
        model = getattr(model, attribute)
    return model, (f"{' and '.join(names)} taken off for the trace: paths are those of the model inside",) if names else ()


def _wrapper(model: Any) -> tuple[str, str] | None:
    return next((_WRAPPERS[key] for kind in type(model).__mro__ if (key := (kind.__module__, kind.__name__)) in _WRAPPERS), None)


@contextmanager
def plain_parts(model: torch.nn.Module) -> Iterator[tuple[str, ...]]:
    """Wrapped parts of a model replaced by what they hold, and compiled calls switched off, until the end; yields notes."""
    with ExitStack() as stack:
        notes: list[str] = []
        for module in list(model.modules()):
            for name, child in list(module._modules.items()):
                inner, said = unwrapped(child)
                if said:
                    module._modules[name] = inner
                    stack.callback(module._modules.__setitem__, name, child)
                    notes.append(f"{name}: {said[0]}")
        for module in model.modules():
            call = getattr(module, "_compiled_call_impl", None)
            if call is not None:
                module._compiled_call_impl = None
                stack.callback(setattr, module, "_compiled_call_impl", call)
        yield tuple(notes)
