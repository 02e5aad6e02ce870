"""Which parameters of a rewritten graph train: words for what methods inserted, `all`, or globs over parameter names.

A training graph holds them in one flat vector: segments in the order in which the spec names them, the parameters of a segment in `state`
order, each row-major.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import get_args

from matmorph.errors import SpecError, alternatives
from matmorph.ir.core import Const, Graph, Value
from matmorph.passes.methods.protocol import Methods, Trains, names_of
from matmorph.specs.globs import Glob, GlobError
from matmorph.specs.schema import ParameterSelector

NEAREST = 5
ALL = "all"


@dataclass(frozen=True, slots=True)
class Trainable:
    """A parameter that trains. `segment`: the word or glob that chose it first."""

    const: Const
    segment: str


def resolve(
    graph: Graph,
    methods: Methods,
    trainable: Sequence[ParameterSelector],
    frozen: Sequence[ParameterSelector] = (),
    reached: Collection[Value] | None = None,
) -> tuple[Trainable, ...]:
    """The parameters that train, segment after segment, each in `state` order.

    `reached`: values that the loss depends on, None = all that the graph reads; the others are left out, as their gradient is zero.
    `all` is all but what is frozen. SpecError for a selector that chooses nothing, a parameter that holds no floating-point numbers and one
    that both lists choose otherwise.
    """
    used = graph.used_state()
    live = frozenset[Value](used if reached is None else reached)
    kept = {const: selector for selector in frozen for const in _chosen(graph.state, methods, selector)}
    found: dict[Const, Trainable] = {}
    for selector in trainable:
        chosen = _chosen(used, methods, selector)
        if selector.text == ALL:
            chosen = _or_refused([const for const in chosen if const not in kept], selector, "everything is frozen: nothing trains")
        _refuse_both(chosen, selector, kept)
        alive = [const for const in chosen if const in live]
        if not alive:
            names = ", ".join(const.path for const in chosen[:NEAREST])
            raise _error(selector, f"the loss does not depend on what {selector.text} chooses", [f"chosen: {names}"])
        for const in alive:
            found.setdefault(const, Trainable(const, selector.text))
    if not found:
        raise SpecError("train.trainable is empty: nothing trains")
    return tuple(found.values())


def selectors(words: Sequence[str], keypath: str) -> tuple[ParameterSelector, ...]:
    """Selectors of a list given in Python, whose errors name `keypath`."""
    return tuple(ParameterSelector(word, None, f"{keypath}[{index}]") for index, word in enumerate(words))


def _chosen(consts: Sequence[Const], methods: Methods, selector: ParameterSelector) -> list[Const]:
    """Parameters of a selector; SpecError where there are none, naming the nearest."""
    parameters = [const for const in consts if const.kind == "parameter"]
    if selector.text == ALL:
        return _or_refused([const for const in parameters if _trains(const)], selector, "the model has no parameter")
    word = next((trains for trains in get_args(Trains) if trains == selector.text), None)
    if word is not None:
        names = names_of(methods, word)
        return _or_refused(
            [const for const in parameters if const.trainable and const.method in names],
            selector,
            f"the model has no {word}: no rule put in {alternatives(names)}",
            "trainable: all takes the model's own parameters; compile --no-train writes no training graphs",
        )
    return _matching(consts, parameters, selector)


def _trains(const: Const) -> bool:
    """Whether `all` takes it: a floating-point parameter that no method froze."""
    return const.tensor.torch_dtype.is_floating_point and (const.rule is None or const.trainable)


def _or_refused(found: list[Const], selector: ParameterSelector, reason: str, *details: str) -> list[Const]:
    if not found:
        raise _error(selector, reason, details)
    return found


def _matching(consts: Sequence[Const], parameters: Sequence[Const], selector: ParameterSelector) -> list[Const]:
    try:
        glob = Glob(selector.text)
    except GlobError as error:
        raise _error(selector, f"{selector.text!r} is no glob: {error}") from error
    found = [const for const in parameters if any(map(glob.matches, const.names))]
    integers = [const for const in found if not const.tensor.torch_dtype.is_floating_point]
    if integers:
        raise _error(selector, f"{integers[0].path} holds {integers[0].tensor.dtype}, which does not train")
    if found:
        return found
    buffers = [const for const in consts if any(map(glob.matches, const.names))]
    if buffers:
        raise _error(selector, f"{buffers[0].path} is a {buffers[0].kind} ({buffers[0].tensor.dtype}), not a parameter: it does not train")
    names = [name for const in parameters for name in const.names]
    details = [f"groups: {', '.join(selector.GROUPS)}"]
    near = _nearest(selector.text, names)
    if near:
        details.insert(0, f"nearest: {', '.join(near)}")
    raise _error(selector, f"no parameter is called {selector.text}", details)


def _nearest(text: str, names: Sequence[str]) -> list[str]:
    """Names like the text; its wildcards are left out of the comparison."""
    bare = ".".join(part for part in text.split(".") if part != "**") or text
    return get_close_matches(bare, names, n=NEAREST, cutoff=0.3)


def _refuse_both(chosen: Sequence[Const], selector: ParameterSelector, kept: Mapping[Const, ParameterSelector]) -> None:
    for const in chosen:
        if const in kept:
            raise _error(
                selector,
                f"{const.path} is matched by both train.trainable ({selector.text}) and train.frozen ({kept[const].text})",
                ["name more exactly what trains; frozen only makes sure that nothing of it does"],
            )


def _error(selector: ParameterSelector, message: str, details: Sequence[str] = ()) -> SpecError:
    return SpecError(message, at=selector.at, keypath=selector.keypath, details=details)
