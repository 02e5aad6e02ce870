"""A torch model to a Graph: `torch.export` (non-strict) with named axes, then `run_decompositions({})`, then `from_export`.

Manners: the model keeps its device; train mode, `config.use_cache` and the experts implementation of Hugging Face models are switched for
the trace and restored, each with a note. A range that the model itself demands ("seq <= 512") is adopted after one retry, with a note.
"""

from __future__ import annotations

import inspect
import io
import itertools
import logging
import re
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch.export import ExportedProgram
from torch.fx.experimental import _config as fx_config
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from matmorph.errors import InputError, MatmorphError, TraceError
from matmorph.ir.core import Const, Graph
from matmorph.ir.evaluate import bind
from matmorph.ir.to_torch import CompiledModule
from matmorph.ir.tracing.call import by_name, call_names, check_call, flat_names, input_names, read_examples, without_stars
from matmorph.ir.tracing.dynamic import DynamicAxes, demands, entry_key, read_dynamic_shapes, suggested_ranges
from matmorph.ir.tracing.from_export import Names, constant, read_program
from matmorph.ir.tracing.normal_form import is_functional
from matmorph.ir.tracing.unwrap import plain_parts, unwrapped
from matmorph.ir.types import Dim, format_dim, symbol

_BY_VALUE = "a branch or a size depends on tensor values: use torch.where or torch.cond, or decide it outside of the model"
ADVICE: tuple[tuple[str, str], ...] = (
    (
        "in _detect_is_causal_mask",
        "torch compares the mask with a causal one: say whether it is one, as tgt_is_causal (memory_is_causal) of a TransformerDecoder, "
        "as is_causal of a TransformerEncoder",
    ),
    ("GuardOnDataDependent", _BY_VALUE),
    ("data-dependent", _BY_VALUE),
    (".item()", "a tensor is turned into a Python number: keep it a tensor, or compute the number before the call"),
    ("Unsupported input type", "an input is of a type torch.export does not know: pass tensors, numbers, lists, tuples or dicts"),
    ("pytree", "an input or output is of an unregistered type: torch.utils._pytree.register_dataclass, or return plain tuples and dicts"),
    ("shape", "check the example inputs against what the model expects"),
)
"""What to change, by a word of the reason, or "in" a function that raised it; the first that fits is shown."""


def trace(model: Any, example_inputs: Any, dynamic_shapes: Any = None, *, kwargs: Mapping[str, Any] | None = None) -> Graph:
    """The Graph of an nn.Module, an fx.GraphModule or an ExportedProgram.

    example_inputs: a dict (keyword arguments) or a tuple (positional); a lone tensor is a tuple of one. kwargs: keyword arguments beside
    positional ones. dynamic_shapes: `{axis: name}` of each input, in a dict by input or a tuple over all of them, None = static; a name is
    a text, `{name: seq, max: 512}` or a `torch.export.Dim`. For an ExportedProgram, which is already traced, all may be None;
    `dynamic_shapes` then only names its symbols. A CompiledModule is its graph with the weights that it holds now; its axes are those of
    its first trace. A wrapper (torch.compile, DataParallel) is taken off, with a note.

    Raises InputError for inputs that do not fit and TraceError (source line, reason, what to change) for a model that cannot be traced.
    """
    model, taken_off = unwrapped(model)
    if isinstance(model, ExportedProgram):
        return _trace_program(model, dynamic_shapes)
    if isinstance(model, CompiledModule):
        return _traced_before(model, example_inputs, dynamic_shapes, kwargs)
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"expected an nn.Module, a GraphModule or an ExportedProgram, got {type(model).__name__}")
    device = _device(model)
    args, kwargs = read_examples(example_inputs, device, kwargs)
    check_call(model, args, kwargs)
    signature = inspect.signature(model.forward)
    given = without_stars(signature, dynamic_shapes)
    axes = read_dynamic_shapes(args, kwargs, given, call_names(signature, args, kwargs))
    with ExitStack() as stack:
        notes = (*taken_off, *stack.enter_context(plain_parts(model)), *stack.enter_context(_manners(model)))
        names_of_inputs = input_names(model, args, kwargs)
        stack.enter_context(by_name(model, args, kwargs))
        if axes.hints:
            axes = axes.settled(_sizes(_export(model, args, kwargs, axes)[0], (args, kwargs), axes))
        program, axes, adopted = _export(model, args, kwargs, axes)
        names = Names(_symbols(program, (args, kwargs), axes), _state(model), names_of_inputs, axes.empty)
        return read_program(_functional(program), names, str(device), (*notes, *adopted))


def _traced_before(model: CompiledModule, example_inputs: Any, dynamic_shapes: Any, kwargs: Mapping[str, Any] | None) -> Graph:
    """InputError where the examples do not fit, or where `dynamic_shapes` names an axis that is fixed or has another name."""
    graph = model.current_graph()
    if example_inputs is None and kwargs is None:
        return graph
    args, kwargs = read_examples(example_inputs, torch.device(graph.device), kwargs)
    values = {id(tensor): value for tensor, value in zip(bind(graph, args, kwargs), graph.inputs, strict=True)}
    names = tuple(entry.name.partition(".")[0] for entry in graph.signature.inputs)
    axes = read_dynamic_shapes(args, kwargs, dynamic_shapes, tuple(dict.fromkeys(names)))
    for name, tensor, named in axes.leaves((args, kwargs)):
        for axis, label in named.items():
            dim = values[id(tensor)].tensor.shape[axis]
            known = format_dim(dim)
            if label in axes.hints and (axes.may_be_fixed(label) or not isinstance(dim, int)):
                continue  # nothing was asked of the name
            if known != label:
                raise InputError(f"axis {axis} of {name} was {known} when this compiled model was traced; it cannot become {label}")
    return replace(graph, ranges=axes.within(graph.ranges))


_META = "weights on the meta device have no numbers: weights=FOLDER says which files have them"


def _device(model: torch.nn.Module) -> torch.device:
    devices: dict[torch.device, str] = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        where = [f"{name} is on {device}" for device, name in devices.items()]
        where += [_META] if torch.device("meta") in devices else []
        raise InputError(f"the model's parameters are on {len(devices)} devices; move them to one with model.to(...)", where)
    return next(iter(devices), torch.device("cpu"))


@contextmanager
def _manners(model: torch.nn.Module) -> Iterator[tuple[str, ...]]:
    """Eval mode, no cache and gathered experts while tracing; everything is put back, also after an error."""
    notes: list[str] = []
    training = [module for module in model.modules() if module.training]
    configs: list[Any] = [
        module.config for module in model.modules() if getattr(getattr(module, "config", None), "use_cache", None) is True
    ]
    caching = list({id(config): config for config in configs}.values())
    # The default grouped form is a custom operator without a translation (decision T10).
    experts = getattr(getattr(model, "config", None), "_experts_implementation", None)
    switch = getattr(model, "set_experts_implementation", None) if experts is not None and experts != "batched_mm" else None
    try:
        if training:
            model.eval()
            notes.append("train mode switched to eval for the trace, and restored")
        for config in caching:
            config.use_cache = False
        if caching:
            notes.append("config.use_cache switched off for the trace, and restored: the compiled model keeps no key/value cache")
        if switch is not None:
            switch("batched_mm")
        yield tuple(notes)
    finally:
        for module in training:
            module.training = True
        for config in caching:
            config.use_cache = True
        if switch is not None:
            switch(experts)


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: DynamicAxes
) -> tuple[ExportedProgram, DynamicAxes, tuple[str, ...]]:
    try:
        return _export_once(model, args, kwargs, axes), axes, ()
    except Exception as error:
        found = suggested_ranges(str(error), axes)
        if not found:
            return _export_special(model, args, kwargs, axes, error), axes, ()
    narrowed = axes.narrowed(found)
    notes = tuple(f"{name} must be in {r.low}..{r.high or ''}: the model itself demands it" for name, r in found.items())
    try:
        return _export_once(model, args, kwargs, narrowed), narrowed, notes
    except Exception as error:
        return _export_special(model, args, kwargs, narrowed, error), narrowed, notes


def _export_special(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: DynamicAxes, error: Exception
) -> ExportedProgram:
    """Once more, with guards deferred that only say that a size is not 1: where an axis may be empty no branch was taken for such a size,
    and the checks of a file run it at one (decision T13). Raises what `error`, of the trace before, says, where that was another."""
    if not axes.empty or not _only_not_one(str(error)):
        raise _explain(error, axes) from error
    try:
        return _export_once(model, args, kwargs, axes, deferred=True)
    except Exception as again:
        raise _explain(again, axes) from again


_GUARD = re.compile(r"the generated guard (.*?)\.?$", re.MULTILINE)
_NOT_ONE = re.compile(r"\(?(?:(\d+)\*)?L\[.*\]\.size\(\)\[\d+\]\)? != (\d+)")


def _only_not_one(message: str) -> bool:
    """Whether torch complains of nothing but guards that a size, or so many times it, is not 1 (that many)."""
    guards = [_NOT_ONE.fullmatch(guard.strip()) for guard in _GUARD.findall(message)]
    return bool(guards) and all(found is not None and (found[1] or "1") == found[2] for found in guards)


def _export_once(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: DynamicAxes, deferred: bool = False
) -> ExportedProgram:
    # An axis that may be empty needs a trace to which sizes 0 and 1 are no special cases: else its limits are the trace's, not the model's.
    plain = fx_config.patch(backed_size_oblivious=True) if axes.empty else nullcontext()  # type: ignore[attr-defined]
    dims = axes.for_export(inspect.signature(model.forward))
    with quiet(), torch.no_grad(), plain:
        return torch.export.export(
            model, args, kwargs, dynamic_shapes=dims, strict=False, prefer_deferred_runtime_asserts_over_guards=deferred
        )


def _functional(program: ExportedProgram) -> ExportedProgram:
    """A program without in-place operators and composites that alias. The second trace costs as much as the first, and most need none."""
    if is_functional(program):
        return program
    try:
        # An axis of size 1 is no special case.
        with quiet(), fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            functional: ExportedProgram = program.run_decompositions({})
            return functional
    except Exception as error:
        raise _explain(error, None) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silences torch's own chatter (deprecations between its modules, logged tracebacks, a graph printed to stderr where an export fails):
    an error still raises, and we say what it means."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx", "torch._dynamo", "torch.onnx", "torch._subclasses")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _explain(error: Exception, axes: DynamicAxes | None) -> MatmorphError:
    """TraceError with the model's own source line, torch's reason in one line, and what to change."""
    if isinstance(error, MatmorphError):
        return error
    text = str(error).strip() or type(error).__name__
    wanted = demands(text, axes) if axes is not None else ()
    reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    told = f"{type(error).__name__} {text}"
    told += "".join(f" in {frame.name}" for frame in traceback.extract_tb(error.__traceback__))
    advice = next((words for key, words in ADVICE if key in told), "see that the model runs on the example inputs")
    details = [f"at {line}"] if (line := _own_line(error)) else []
    details += list(wanted) or [f"what to change: {advice}"]
    return TraceError(f"the model cannot be traced: {reason}", details)


def _own_line(error: BaseException) -> str:
    """The innermost frame that belongs to the model: not to torch, to Python's own library or to us."""
    standard = sysconfig.get_path("stdlib")
    frames = []
    for frame in traceback.extract_tb(error.__traceback__):
        name = frame.filename.replace("\\", "/")
        own_library = frame.filename.startswith(standard) and "site-packages" not in name
        if not (own_library or "/torch/" in name or "/matmorph/ir/" in name or name.startswith("<")):
            frames.append(frame)
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _state(model: torch.nn.Module) -> tuple[Const, ...]:
    """Every parameter and buffer once, with all its names, in state_dict order (non-persistent buffers in their place)."""
    tensors: dict[int, tuple[torch.Tensor, list[str], str, bool]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        hidden = module._non_persistent_buffers_set
        entries = [(name, tensor, "parameter", True) for name, tensor in module._parameters.items()]
        entries += [(name, tensor, "buffer", name not in hidden) for name, tensor in module._buffers.items()]
        for name, tensor, kind, persistent in entries:
            if tensor is not None:
                tensors.setdefault(id(tensor), (tensor, [], kind, persistent))[1].append(dot + name)
    return tuple(constant(tensor, tuple(names), kind, persistent) for tensor, names, kind, persistent in tensors.values())


def _symbols(program: ExportedProgram, examples: Any, axes: DynamicAxes) -> dict[str, Dim]:
    """By the program's symbol, what it is in the IR; read off the placeholders that carry it."""
    found: dict[str, Dim] = {}
    for node, axis, label, size in _placed(program, examples, axes):
        if isinstance(size, int):
            raise TraceError(
                f"the model works only with {label} = {size}: it fixes that axis of {node.name}",
                [f"leave axis {axis} of {node.name} out of dynamic_shapes, or change the model to accept any size"],
            )
        found[size] = axes.symbol(label)
    return found


def _sizes(program: ExportedProgram, examples: Any, axes: DynamicAxes) -> dict[str, int | str]:
    """By axis name, the size or the symbol that the program has there."""
    return {label: size for _, _, label, size in _placed(program, examples, axes)}


def _placed(program: ExportedProgram, examples: Any, axes: DynamicAxes) -> Iterator[tuple[torch.fx.Node, int, str, int | str]]:
    """(placeholder, axis, name, size or symbol) of every named axis."""
    inputs = set(_user_inputs(program))
    user = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    for node, entry in zip(user, _flat_axes(examples, axes.shapes), strict=True):
        for axis, label in (entry or {}).items():
            size = node.meta["val"].shape[axis]
            fixed = isinstance(size, int) or size.node.expr.is_number
            yield node, axis, label, int(size) if fixed else str(size.node.expr)


def _user_inputs(program: ExportedProgram) -> list[str]:
    return [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]


def _flat_axes(examples: Any, shapes: Any) -> list[Mapping[int, str] | None]:
    """Axis names per flat leaf of (args, kwargs)."""
    found: list[Mapping[int, str] | None] = []
    for path, _ in tree_flatten_with_path(examples)[0]:
        axes = shapes
        for key in path:
            axes = axes[entry_key(key)] if axes is not None else None
        found.append(axes)
    return found


def _trace_program(program: ExportedProgram, dynamic_shapes: Any) -> Graph:
    """An ExportedProgram as the user brings it; its symbols keep their names unless `dynamic_shapes` renames them."""
    args, kwargs = program.example_inputs if program.example_inputs is not None else ((), {})
    labels: dict[str, Dim] = {name: symbol(name) for name in _program_symbols(program)}
    if dynamic_shapes is not None:
        axes = read_dynamic_shapes(args, kwargs, dynamic_shapes, (*_positional_names(program, args), *kwargs))
        axes = axes.settled(_sizes(program, (args, kwargs), axes)) if axes.hints else axes
        labels.update(_symbols(program, (args, kwargs), axes))
    state = _program_state(program)
    device = next((const.load().device for const in state), torch.device("cpu"))
    flat = _user_inputs(program)
    inputs = (*flat[: len(flat) - len(tree_leaves(kwargs))], *flat_names(kwargs))
    return read_program(_functional(program), Names(labels, state, inputs), str(device), ())


def _positional_names(program: ExportedProgram, args: Sequence[Any]) -> list[str]:
    """Of each positional argument, the name of its first tensor."""
    flat = iter(_user_inputs(program))
    return [next(iter([next(flat) for _ in tree_leaves(arg)]), f"input_{i}") for i, arg in enumerate(args)]


def _program_symbols(program: ExportedProgram) -> list[str]:
    """Symbols of the placeholders' shapes, in order of first use."""
    values = (node.meta.get("val") for node in program.graph.find_nodes(op="placeholder"))
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    sizes: list[Any] = [size for shape in shapes for size in shape if isinstance(size, torch.SymInt)]
    return list(dict.fromkeys(str(s) for size in sizes for s in sorted(size.node.expr.free_symbols, key=str)))


def _program_state(program: ExportedProgram) -> tuple[Const, ...]:
    """Parameters and buffers once each; two names of one tensor are aliases."""
    signature = program.graph_signature
    parameters = set(signature.inputs_to_parameters.values())
    hidden = {name: tensor for name, tensor in program.constants.items() if name in signature.non_persistent_buffers}
    groups: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, tensor in {**program.state_dict, **hidden}.items():
        groups.setdefault(id(tensor), (tensor, []))[1].append(name)
    return tuple(
        constant(tensor, tuple(names), "parameter" if parameters & set(names) else "buffer", names[0] not in hidden)
        for tensor, names in groups.values()
    )
