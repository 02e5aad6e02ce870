"""How a model is called: its example inputs as (args, kwargs), and the names of all that goes in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_map

from matmorph.errors import InputError
from matmorph.ir.tracing.dynamic import entry_key


def read_examples(
    example_inputs: Any, device: torch.device, beside: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) on the model's device; the call mirrors the examples. `beside`: keyword arguments beside positional ones."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = _keywords(beside)
    if isinstance(example_inputs, Mapping):
        if kwargs:
            raise InputError("example inputs given as a dict are keyword arguments, and kwargs are given too: put all of them into one")
        if not example_inputs or not all(isinstance(key, str) for key in example_inputs):
            raise InputError("example inputs given as a dict must be non-empty and keyed by argument name")
        kwargs = dict(example_inputs)
    elif example_inputs is None and kwargs:
        pass  # nothing positional
    elif isinstance(example_inputs, torch.Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, tuple | list):
        args = tuple(example_inputs)
    else:
        raise InputError(f"example inputs must be a dict (keyword arguments) or a tuple (positional), got {type(example_inputs).__name__}")
    moved = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
    return cast("tuple[tuple[Any, ...], dict[str, Any]]", moved)


def _keywords(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise InputError(f"kwargs must be a dict keyed by argument name, got {type(given).__name__}")
    return dict(given)


def check_call(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        wanted = ", ".join(str(p) for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_KEYWORD)
        raise InputError(f"the example inputs do not fit the model: {error}", [f"forward takes ({wanted})"]) from None


def call_names(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of all inputs: the positional ones, then the keyword ones in the order of the signature."""
    bound = signature.bind(*args, **kwargs)
    positional: list[str] = []
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            positional += [f"{name}_{i}" for i in range(len(value))]
        elif name not in kwargs:
            positional.append(name)
    ordered = [name for name in signature.parameters if name in kwargs]
    return (*positional[: len(args)], *ordered, *(name for name in kwargs if name not in ordered))


@contextmanager
def by_name(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[inspect.Signature]:
    """The signature of `forward` with a parameter of its own for all that `*args` and `**kwargs` take in this call, as torch.export reads
    it until the end: it takes no dynamic axes there otherwise."""
    signature, forward = inspect.signature(model.forward), model.forward
    bound = signature.bind(*args, **kwargs).arguments
    names = call_names(signature, args, kwargs)
    if not any(signature.parameters[name].kind in _STARS for name in bound) or len(set(names)) < len(names):
        yield signature
        return

    def plain(*given: Any, **named: Any) -> Any:
        return forward(*given, **named)

    explicit = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    plain.__signature__ = explicit  # type: ignore[attr-defined]
    had = model.__dict__.get("forward")
    model.__dict__["forward"] = plain
    try:
        yield explicit
    finally:
        if had is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = had


_STARS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def without_stars(signature: inspect.Signature, given: Any) -> Any:
    """`dynamic_shapes` by argument, where torch.export has what `*args` and `**kwargs` take under those names."""
    if not isinstance(given, Mapping):
        return given
    found: dict[Any, Any] = {}
    for name, entry in given.items():
        kind = signature.parameters[name].kind if name in signature.parameters else None
        if kind is inspect.Parameter.VAR_POSITIONAL and isinstance(entry, tuple | list):
            found |= {f"{name}_{i}": one for i, one in enumerate(entry)}
        elif kind is inspect.Parameter.VAR_KEYWORD and isinstance(entry, Mapping):
            found |= entry
        else:
            found[name] = entry
    return found


def input_names(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """A name per flat input: the argument's, joined with keys and indices where an argument is a nest."""
    names = call_names(inspect.signature(model.forward), args, kwargs)
    return tuple(flat_names(dict(zip(names, args, strict=False)) | kwargs))


def flat_names(named: Mapping[str, Any]) -> list[str]:
    """`{"x": tensor, "past": [a, b]}` -> ["x", "past.0", "past.1"], in flattening order."""
    found = []
    for name, value in named.items():
        for path, _ in tree_flatten_with_path(value)[0]:
            parts = [name, *(str(entry_key(key)) for key in path)]
            found.append(".".join(parts))
    return found
