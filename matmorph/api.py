"""The public functions: plan, compile, inspect_model, explain, trace (load_spec: `matmorph.spec`).

import matmorph as mm
compiled = mm.compile(model, "low-rank-60", example_inputs, dynamic_shapes=..., calibration=batches)
compiled.save("out/")
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from matmorph.compiled import Compiled
from matmorph.errors import InputError
from matmorph.exporters.attention_form import written_form
from matmorph.folders.job import Job
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import bind
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.call import read_examples
from matmorph.ir.tracing.trace import trace
from matmorph.ir.tracing.unwrap import unwrapped
from matmorph.models.cached_call import CachedCall, cached_call
from matmorph.models.companions import read_companions
from matmorph.models.meta_model import WeightSource, with_weights
from matmorph.models.resolve import Model, open_folder
from matmorph.passes.methods import all_methods
from matmorph.passes.pipeline import compile_graph, inspect_graph, plan_graph
from matmorph.passes.selection.explain import Explanation
from matmorph.passes.selection.explain import explain as explain_site
from matmorph.passes.work.hiring import hired, keeping, read_workers
from matmorph.progress import Progress, silent
from matmorph.report.model import Report
from matmorph.spec import SpecSource, load_spec
from matmorph.specs.schema import Spec

__all__ = ["Compiled", "Model", "Report", "compile", "explain", "inspect_model", "load_spec", "open_folder", "plan", "trace"]

Kwargs: TypeAlias = Mapping[str, Any] | None


def _name(model: Any) -> str:
    return type(unwrapped(model)[0]).__name__


def inspect_model(
    model: Any,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    *,
    kwargs: Kwargs = None,
    cache: bool = False,
    weights: WeightSource | None = None,
) -> Report:
    """Every matmul site as it is: rows of status "unclaimed". `cache` and `weights` as `compile` has them."""
    return inspect_graph(_traced(model, example_inputs, dynamic_shapes, kwargs, cache, weights)[0], _name(model))


def plan(
    model: Any,
    spec: SpecSource,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    *,
    kwargs: Kwargs = None,
    cache: bool = False,
    weights: WeightSource | None = None,
) -> Report:
    """What `compile` would do and what it would cost; needs no weights (a model on the meta device will do), calibration or labels.

    The rows are those of compile's report; errors are None, and `rank_at_most` marks ranks that the data decides.
    """
    loaded = load_spec(spec)
    graph, call = _traced(model, example_inputs, dynamic_shapes, kwargs, cache, weights)
    planned = plan_graph(graph, loaded, all_methods(), _name(model))
    form = written_form(graph, loaded.export, None if call is None else call.max_length)
    return replace(planned, notes=(*planned.notes, *form.notes))


def explain(
    model: Any,
    spec: SpecSource,
    example_inputs: Any,
    dynamic_shapes: Any,
    path: str,
    *,
    kwargs: Kwargs = None,
    cache: bool = False,
    weights: WeightSource | None = None,
) -> Explanation:
    """Why the site at `path` is or is not claimed: each rule of the first stage, condition by condition. Raises InputError for a path
    that is no site (with the nearest)."""
    loaded = load_spec(spec)
    graph, _ = _traced(model, example_inputs, dynamic_shapes, kwargs, cache, weights)
    return explain_site(loaded.stages[0], graph, find_sites(graph), path)


def compile(
    model: Any,
    spec: SpecSource,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    calibration: Iterable[Any] | None = None,
    seed: int | None = None,
    *,
    kwargs: Kwargs = None,
    cache: bool = False,
    progress: Progress | None = None,
    onnx_lowerings: Mapping[Any, Callable[..., Any]] | None = None,
    hf_folder: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    workers: int | str | None = None,
    weights: WeightSource | None = None,
) -> Compiled:
    """Rewrites the model's matmuls by the spec.

    model: nn.Module, fx.GraphModule or ExportedProgram. example_inputs: a dict = keyword arguments, a tuple = positional; kwargs: keyword
    arguments beside positional ones. dynamic_shapes: names of axes by input ({"input_ids": {0: "batch", 1: "seq"}}) or in a tuple over all
    inputs, None = static; an axis may be a `torch.export.Dim` too. calibration: batches like the example inputs (beside kwargs a pair of
    args and kwargs, or all inputs by name), for methods that need data; where given, every claimed site's output error is measured. seed:
    None = the spec's. cache: a causal language model of transformers with its key/value cache as inputs and outputs
    (`models.cached_call`); example inputs and calibration are its tokens and their mask, axes get their names by themselves, and training
    graphs have none. onnx_lowerings: translations of your own operators for the export (torch operator -> onnxscript function).
    hf_folder: a Hugging Face folder; its configurations, tokenizer and chat template go into the folder that `save` writes.
    work: a folder where what is finished is kept, so that the same call goes on after it was ended. workers: a number of processes that the
    sites are worked on in, "ray" or "ray://HOST:PORT"; None = the threads of this process.
    weights: of a model on the meta device, `open_folder(...).weights` or a folder with safetensors files: they stay in their files, and
    each is read when it is needed.

    Raises SpecError, InputError, TraceError, RewriteError (exit code 2 on the command line) and CheckError (a tolerance that does not
    hold, 1). The model itself is not changed.
    """
    loaded = _seeded(load_spec(spec), seed)
    files = {} if hf_folder is None else read_companions(Path(hf_folder))
    read_workers(workers)
    show = progress or silent
    started = time.perf_counter()
    show("tracing", 0, 1)
    graph, call = _traced(model, example_inputs, dynamic_shapes, kwargs, cache, weights)
    show("tracing", 1, 1)
    if graph.device == "meta":
        raise InputError("the model is on the meta device and has no weights: it can be planned, not compiled")
    examples = _flat_examples(model, graph, example_inputs if call is None else call.examples, kwargs)
    traced = time.perf_counter()
    methods, name, folder = all_methods(), _name(model), None if work is None else Path(work)
    with hired(workers, methods) as hands, keeping(folder, graph, name, hands, methods) as (helped, kept):
        done = compile_graph(
            graph, loaded, methods, name, calibration=calibration, seed=loaded.seed, progress=show, hands=helped, work=kept
        )
    seconds = {"trace": traced - started, "compile": time.perf_counter() - traced}
    examples = examples if call is None else tuple(call.examples_of(done.graph))
    job = Job(
        loaded,
        done.source,
        done.graph,
        done.report,
        examples,
        onnx_lowerings or {},
        seconds,
        decisions=done.decisions,
        adapters=done.adapters,
        max_length=None if call is None else call.max_length,
        source_files=files,
    )
    return Compiled(job, show)


def _traced(
    model: Any, example_inputs: Any, dynamic_shapes: Any, kwargs: Kwargs, cache: bool, weights: WeightSource | None
) -> tuple[Graph, CachedCall | None]:
    """The model's graph, and how it is called where it keeps its cache."""
    if weights is None:
        return _traced_as_it_is(model, example_inputs, dynamic_shapes, kwargs, cache, nullcontext())
    module, found = with_weights(model, weights)
    with found.filled(module) as filled:
        graph, call = _traced_as_it_is(module, example_inputs, dynamic_shapes, kwargs, cache, filled.frugal())
    return found.referred(graph), call


def _traced_as_it_is(
    model: Any, example_inputs: Any, dynamic_shapes: Any, kwargs: Kwargs, cache: bool, running: AbstractContextManager[None]
) -> tuple[Graph, CachedCall | None]:
    """running: entered while the model itself runs, which a trace does not."""
    if not cache:
        return trace(model, example_inputs, dynamic_shapes, kwargs=kwargs), None
    module, _ = unwrapped(model)
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"cache=True is for a model of transformers, and this is a {type(module).__name__}")
    if dynamic_shapes is not None or kwargs is not None:
        raise InputError("a model with cache=True takes neither dynamic_shapes nor kwargs: its axes get their names by themselves")
    with ExitStack() as stack:
        with running:
            call = stack.enter_context(cached_call(module, example_inputs))
        return trace(model, call.examples, call.axes), call


def _seeded(spec: Spec, seed: int | None) -> Spec:
    """The spec with the seed that is used, so that the spec.yaml of an artefact makes the same one again."""
    return spec if seed is None else replace(spec, seed=seed, resolved={**spec.resolved, "seed": seed})


def _flat_examples(model: Any, graph: Graph, example_inputs: Any, beside: Kwargs) -> tuple[torch.Tensor, ...]:
    """The example's tensors in `graph.inputs` order; an ExportedProgram brings its own where none are given."""
    if example_inputs is None and beside is None and isinstance(model, torch.export.ExportedProgram):
        if model.example_inputs is None:
            raise InputError("the exported program was saved without its example inputs: give example_inputs")
        args, kwargs = model.example_inputs
    else:
        args, kwargs = read_examples(example_inputs, torch.device(graph.device), beside)
    return tuple(bind(graph, args, kwargs))
