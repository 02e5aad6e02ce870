"""From a compiled graph to an artefact folder: check vectors, export, parity on this machine's ONNX Runtime, report, manifest."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from matmorph.errors import CheckError, ExportError
from matmorph.exporters.adapters import Served, serve
from matmorph.exporters.artifact import Artifact, WrittenReport, graph_bytes, json_bytes, write_artifact
from matmorph.exporters.attention_form import WrittenForm, written_form
from matmorph.exporters.cache_info import cache_info
from matmorph.exporters.compact_vectors import compact_vectors
from matmorph.exporters.data_file import DataFile, weights_sha256
from matmorph.exporters.last_logits import last_logits, last_note, last_rows, logits_output
from matmorph.exporters.onnx.onnx_model import OnnxInfo
from matmorph.exporters.onnx.rounding import ORDERS, rounds_activations, run_apart, runs_rounded
from matmorph.exporters.staging import refuse_existing
from matmorph.exporters.training.prepare_training import prepare_training
from matmorph.exporters.training.training import Training, write_training
from matmorph.exporters.vectors import Vectors, answered, check_vectors, widened
from matmorph.folders.beside import beside_model
from matmorph.folders.job import Job
from matmorph.ir.core import Graph, Node
from matmorph.ir.crossing import Halves, find_halves
from matmorph.ir.evaluate import Runner
from matmorph.ir.randomness import drawing
from matmorph.memory import peak
from matmorph.passes.adapters.inference import inference_graph
from matmorph.passes.attention.coded_cache import coded_examples
from matmorph.passes.methods import all_methods
from matmorph.progress import Progress, Step, tell
from matmorph.report.html import html_page
from matmorph.report.model import Parity, Report
from matmorph.report.reading import read_context
from matmorph.runtime.check import check
from matmorph.runtime.difference import difference
from matmorph.runtime.format.artifact import GRAPH, MANIFEST, SOURCE_GRAPH, SPEC, FileRecord
from matmorph.runtime.format.cases import Array, Case
from matmorph.runtime.format.reading import read_json
from matmorph.runtime.format.version import __version__
from matmorph.runtime.targets import chosen_targets
from matmorph.specs.dump import dump_resolved, entries
from matmorph.specs.schema import Spec
from matmorph.specs.tree import read

ROUNDING_FACTOR = 2.0
"""The kernel rounds where torch does, but not to the same codes once an earlier layer differs: two samples of one
distribution (decision E5)."""

FELT, ROUNDING_AT_MOST = 4.0, 1e-2
"""As of gradients (decision E7): ONNX Runtime and torch both round, each in its own order. What is off by more is no rounding."""

PACKAGES = ("matmorph", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy", "transformers")


def save(folder: Path, job: Job, force: bool, progress: Progress) -> Report:
    """Writes the folder, whole or not at all, and gives the report with its parity.

    Raises InputError (folder exists, cannot be written, disk full), ExportError, CheckError where ONNX Runtime and torch disagree, and what
    `prepare_training` raises.
    """
    refuse_existing(folder, force)
    started = time.perf_counter()
    served = _served(job)
    plain = inference_graph(job.graph, all_methods()) if served is None else served.graph
    _refuse_random(plain)
    form = written_form(plain, job.spec.export, job.max_length)
    exported = last_logits(form.graph) if job.spec.export.logits == "last" else form.graph  # behind the proofs, which want every row
    vectors = _vectors(plain, form, job)
    unchecked = _unchecked(job.spec)
    precision = job.spec.export.precision
    cache = cache_info(form.traced, precision, job.max_length, form.fused.compact, form.fused.shared and precision != "bf16")
    beside = beside_model(job, form.traced, cache)
    spec = dump_resolved(job.spec)
    written = _relocated(exported, job.spec, spec)
    halves, whole = _cut(written)
    found = (*job.report.notes, *form.notes, *vectors.notes, *unchecked, *beside.notes, *whole)
    report = replace(job.report, versions=versions(), notes=tuple(dict.fromkeys(found)))  # a second save has the notes already
    graph = _relocated(job.graph, job.spec, spec)
    training = _training(graph, job, progress)
    final: list[Report] = []

    def describe(staging: Path, info: OnnxInfo) -> WrittenReport:
        progress("checking", 0, 1)
        exact = replace(report.totals, bytes=(report.totals.bytes[0], info.bytes))
        wider = partial(_felt, form, job, vectors) if info.precision == "fp32" else None
        parity = None if unchecked else _parity(staging, info, vectors, wider)
        final.append(replace(report, totals=exact, parity=parity, placements=info.placements))
        progress("checking", 1, 1)
        held = info.tolerance if parity is None else parity.tolerance
        return WrittenReport(final[0].to_dict(), html_page(final[0], read_context(staging)), held)

    artifact = Artifact(
        graph=written,
        export=form.export,
        version=__version__,
        source_sha256=job.source_sha256 or weights_sha256(job.source.state),
        spec=spec,
        describe=describe,
        cases=vectors.cases,
        more={**job.more, **_graphs(job.source, graph, training), **beside.files},
        join=training is None and not job.adapters,
        companions=None if training is None else partial(_companions, training, job),
        run=lambda: _run_info(job, time.perf_counter() - started),
        notes=report.notes,
        adapters=None if served is None else served.to_dict(),
        cache=cache,
        onnx_lowerings=job.onnx_lowerings or None,
        tolerance=_rounding(plain, form, job, vectors),
        halves=halves,
    )
    total = len(job.graph.used_state())
    numbers, step = iter(range(1, total + 1)), Step(progress, "exporting")
    write_artifact(folder, artifact, force, progress=lambda path, size: tell(step, path, next(numbers, total), total))
    return final[0]


def _cut(graph: Graph) -> tuple[Halves | None, tuple[str, ...]]:
    """The encoder and the decoder of a graph that has both, or a note where they cannot be told apart."""
    found = find_halves(graph)
    return (None, (f"in one piece, with no encoder of its own: {found}",)) if isinstance(found, str) else (found, ())


def _refuse_random(graph: Graph) -> None:
    """ExportError naming what draws random numbers: the file could not be held against torch."""
    found = list(drawing(graph))
    if found:
        where = [f"in {node.origin.path or 'the model itself'}: {node.op}" for node in found[1:5]]
        raise ExportError(
            f"the model draws random numbers when it runs ({found[0].op} in {found[0].origin.path or 'the model itself'}), so its file "
            "would answer otherwise each time",
            [*where, "give a dropout the module's training flag (F.dropout(x, p, self.training)), or take noise as an input"],
        )


def _served(job: Job) -> Served | None:
    """The graph with adapters as inputs, where the spec asks for that."""
    export = job.spec.export
    return serve(job.graph, job.remaining, export.precision, all_methods()) if export.adapters == "inputs" else None


def _training(graph: Graph, job: Job, progress: Progress) -> Training | None:
    if job.training is None:
        return None
    progress("differentiating", 0, 1)
    training = prepare_training(graph, job.training, job.examples, all_methods(), job.remaining, job.spec.seed)
    progress("differentiating", 1, 1)
    return training


def _graphs(source: Graph, graph: Graph, training: Training | None) -> dict[str, bytes]:
    """What `matmorph diff` reads. Training files have the rewritten graph among them."""
    return {SOURCE_GRAPH: graph_bytes(source), **({GRAPH: graph_bytes(graph)} if training is None else {})}


def _companions(training: Training, job: Job, folder: Path, data: DataFile) -> Mapping[str, FileRecord]:
    return write_training(folder, data, training, job.spec.export, __version__, job.onnx_lowerings or None)


def _relocated(graph: Graph, spec: Spec, text: str) -> Graph:
    """The graph whose inserted nodes come from lines of the artefact's own spec.yaml (`text`): it lies beside the model wherever that goes,
    and where the spec was read from does not change the file."""
    tree = read(text, SPEC)
    rules = [rule for stage in entries(tree, "stages") or (tree,) for rule in entries(stage, "rules")]
    places: dict[tuple[str, str | None], str] = {}
    for rule, written in zip(spec.rules, rules, strict=True):
        if written.at is not None:
            old = f"{rule.at.file}:{rule.at.line}" if rule.at is not None else None
            places.setdefault((rule.name, old), f"{SPEC}:{written.at.line}")

    def moved(node: Node) -> Node:
        place = places.get((node.origin.rule or "", node.origin.location))
        return node if place is None else replace(node, origin=replace(node.origin, location=place))

    return replace(graph, nodes=tuple(map(moved, graph.nodes)))


def _unchecked(spec: Spec) -> tuple[str, ...]:
    """A note where the file is not meant for this machine, so that its outputs cannot be held against torch here."""
    obstacles: list[str] = []
    for target in chosen_targets(spec.export.target):
        obstacle = target.obstacle()
        if obstacle is None:
            return ()
        obstacles.append(obstacle)
    where = " and ".join(spec.export.target)
    return (f"outputs not checked: export.target is {where} alone, which this machine does not have ({'; '.join(obstacles)})",)


def _vectors(graph: Graph, form: WrittenForm, job: Job, run: Runner | None = None) -> Vectors:
    """Of the graph with its attention as it was traced, so that what is cut and fused for the file is held against what is not."""
    if form.fused.compact:
        found = compact_vectors(graph, job.examples, form.fused.windowed, job.spec.export.precision, run)
    else:
        examples = coded_examples(graph, job.examples) if job.spec.export.cache == "int8" else job.examples
        found = check_vectors(form.traced, examples, job.spec.export.precision, run)
    if job.spec.export.logits == "all":
        return found
    name = logits_output(graph)
    return Vectors(tuple(last_rows(case, name) for case in found.cases), (*found.notes, last_note(name)))


def _rounding(graph: Graph, form: WrittenForm, job: Job, exact: Vectors) -> float:
    """The tolerance that 8-bit activations need: ROUNDING_FACTOR times what they do in torch, 0 where there are none."""
    integer = job.spec.export.integer_products
    if job.spec.export.activations != "int8" or not rounds_activations(graph, integer):
        return 0.0
    rounded = _vectors(graph, form, job, runs_rounded(integer))
    found = [off for before, after in zip(exact.cases, rounded.cases, strict=True) for off in _offs(after, before, before.compared)]
    return ROUNDING_FACTOR * max(filter(math.isfinite, found), default=0.0)


def _felt(form: WrittenForm, job: Job, vectors: Vectors) -> float:
    """The tolerance of a model that feels float32's rounding: FELT times what torch's own answers are off by beside float64, in whichever
    order of summing up that is most; 0 where the cases are not those of the graph as it was traced."""
    if form.fused.compact or job.spec.export.logits != "all":
        return 0.0
    graph, plain = widened(form.traced, torch.float64), widened(form.traced)
    found = [0.0]
    for case in vectors.cases:
        given = [torch.from_numpy(case.inputs[entry.name]) for entry in graph.signature.inputs if entry.value is not None]
        exact = answered(graph, [tensor.double() if tensor.is_floating_point() else tensor for tensor in given], None)
        others = (answered(plain, given, partial(run_apart, chosen)) for chosen in ORDERS)
        found += [off for rounded in (case, *others) for off in _offs(rounded, exact, case.compared)]
    return min(FELT * max(filter(math.isfinite, found)), ROUNDING_AT_MOST)


def _offs(found: Case, exact: Case, compared: Mapping[str, Array]) -> list[float]:
    """How far each floating-point output is off, where it is compared."""
    outputs = ((name, array) for name, array in found.outputs.items() if array.dtype.kind == "f")
    return [difference(array, exact.outputs[name], compared.get(name)) for name, array in outputs]


def _widen(staging: Path, tolerance: float) -> None:
    """Another tolerance into the manifest of a folder that is being written."""
    path = staging / MANIFEST
    path.write_bytes(json_bytes({**read_json(path, lambda data: data), "tolerance": tolerance}))


def _parity(staging: Path, info: OnnxInfo, vectors: Vectors, wider: Callable[[], float] | None) -> Parity:
    """The check that `matmorph verify` will make, made before the folder takes its name. `wider`: the tolerance where that of the precision
    does not hold, which takes a run in float64."""
    result, tolerance = check(staging), info.tolerance
    worst = None if result.max_difference is None else max(result.max_difference, result.training_apart / 2)
    if not result.ok and wider is not None and worst is not None and tolerance < worst <= (wide := wider()):
        tolerance = wide
        _widen(staging, tolerance)
        result = check(staging)
    if not result.ok or result.max_difference is None:
        raise CheckError(
            "ONNX Runtime does not answer as torch does, so nothing was written",
            [problem.replace(str(staging), "") for problem in result.problems],
        )
    return Parity(result.max_difference, tolerance, len(vectors.cases), result.provider or "")


def versions() -> dict[str, str]:
    """Installed versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _run_info(job: Job, saving: float) -> dict[str, Any]:
    """What differs from run to run: times, machine, threads, memory."""
    seconds = {**job.seconds, "save": saving}
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "machine": platform.machine(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "peak_memory_bytes": peak(),
    }
