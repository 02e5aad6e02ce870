"""What becomes of a compiled model after training: trained values put in, adapters merged, the report of that, and adapters taken back
out of a merged folder: what its weights have more than the stored base, as factors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from matmorph.errors import InputError
from matmorph.exporters.adapters import adapter_arrays, base_fingerprint, serve
from matmorph.folders.job import Job
from matmorph.folders.open import initializers
from matmorph.ir.adapter import Adapter
from matmorph.ir.core import Const, Graph
from matmorph.ir.site import Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.adapters.merging import Merged, factors_of, lost_notes, merge
from matmorph.passes.adapters.values import with_values
from matmorph.passes.methods import all_methods
from matmorph.passes.methods.protocol import Configuration, Method
from matmorph.passes.reporting import totals
from matmorph.passes.sizes import item_size
from matmorph.report.model import Report, SiteRow, Totals
from matmorph.report.reading import listed_file
from matmorph.runtime.adapters import read_slots, save_adapter
from matmorph.runtime.format.training import PARAMETERS, TRAINABLE
from matmorph.specs.schema import Spec

Found = TypeVar("Found")

Values: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str]"
"""Parameters by dotted name (`Trainer.parameters()`), or where they are: a .safetensors file or a folder that holds one."""

VALUE_FILES = (TRAINABLE, PARAMETERS)
"""What a folder of values keeps them in: a training folder, a checkpoint."""


def read_values(source: Values) -> tuple[Mapping[str, Any], str]:
    """(the values, what errors call them). InputError for a file that is missing, cannot be read, or is not what its folder lists."""
    if isinstance(source, Mapping):
        return source, "the values"
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in VALUE_FILES if (path / name).is_file()]
        if not found:
            raise InputError(f"{path}: no trained values in this folder (neither {' nor '.join(VALUE_FILES)})")
        path = listed_file(path, found[0].name, verify=True)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    from safetensors.torch import load_file

    try:
        return load_file(path), str(path)
    except Exception as error:  # of a header that is damaged, or a type that torch lacks
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error


def loaded_job(job: Job, source: Values) -> Job:
    """The model with trained values in it. InputError for values of another model or rank, and for none at all."""
    values, where = read_values(source)
    if not values:
        raise InputError(f"{where}: there are no values to load")
    return replace(job, graph=with_values(job.graph, values, where))


def configured_job(job: Job, configuration: Configuration) -> Job:
    """The model of a supernet in one configuration. InputError for what is no supernet, and for what it cannot be."""
    return replace(job, graph=_configured(job.graph, job.remaining, configuration))


def _configured(graph: Graph, adapters: Sequence[Adapter], configuration: Configuration) -> Graph:
    return _of_supernet(adapters, lambda method, own: method.configured(graph, own, configuration))


def found_spec(spec: Spec, adapters: Sequence[Adapter], configuration: Configuration) -> dict[str, Any]:
    """The spec that gives the model of a configuration, as plain data. InputError as `configured_job`."""
    return _of_supernet(adapters, lambda method, own: method.spec_of(spec, own, configuration))


def _of_supernet(adapters: Sequence[Adapter], ask: Callable[[Method, Sequence[Adapter]], Found | None]) -> Found:
    """What the method says whose adapters are a supernet. InputError where there is none."""
    for name, method in all_methods().items():
        found = ask(method, [adapter for adapter in adapters if adapter.method == name])
        if found is not None:
            return found
    raise InputError("the model is no supernet: no rule says search: true")


def merged_job(
    job: Job, adapters: Sequence[Adapter], source: Values | None, configuration: Configuration | None = None
) -> tuple[Job, tuple[Merged, ...]]:
    """The model with its adapters in its weights, and a line per site; its report says what merging cost. `configuration`: of a supernet.
    Errors as `merging.merge`."""
    start = job if source is None else loaded_job(job, source)
    start = start if configuration is None else replace(start, graph=_configured(start.graph, adapters, configuration))
    graph, found = merge(start.graph, adapters, all_methods())
    return replace(start, spec=_inline(job.spec), graph=graph, report=merged_report(job, graph, found)), found


def save_adapters(job: Job, adapters: Sequence[Adapter], values: Mapping[str, Any], where: str, path: Path, over: bool = True) -> str:
    """Writes the factors of all adapters as one .onnx_adapter file; the fingerprint of their base.

    values: by dotted name; a factor that they lack is as it was compiled. over False: what has come to that name stays.
    InputError where something beside the factors was trained, which
    the file could not hold; AdapterError for a place that cannot be written.
    """
    own = {name for adapter in adapters for name in adapter.consts.values()}
    others = sorted(name for name, value in values.items() if name not in own and _differs(job, name, value))
    if others:
        raise InputError(
            f"{where}: {others[0]} was trained too, and an adapter file holds factors only",
            ["merge instead, or train the adapters alone (train.trainable: [adapters])"],
        )
    start = {const.path: const.load() for const in job.graph.state if const.path in own}
    methods = all_methods()
    arrays = adapter_arrays(adapters, {**start, **{name: values[name] for name in values if name in own}}, methods)
    served = serve(job.graph, adapters, job.spec.export.precision, methods)
    save_adapter(path, arrays, read_slots(served.to_dict(), where), over)
    return base_fingerprint(job.graph, adapters)


def _differs(job: Job, name: str, value: Any) -> bool:
    const = next((const for const in job.graph.state if const.path == name), None)
    return const is None or not torch.equal(const.load().float(), torch.as_tensor(value).float())


def _inline(spec: Spec) -> Spec:
    """Without adapters there are none to be inputs."""
    if spec.export.adapters == "inline":
        return spec
    export = {**spec.resolved["export"], "adapters": "inline"}
    return replace(spec, export=replace(spec.export, adapters="inline"), resolved={**spec.resolved, "export": export})


def merged_report(job: Job, graph: Graph, found: Sequence[Merged]) -> Report:
    """Rows of merged sites count what is left there; their errors against the source's weights say nothing after training."""
    by_path = {merged.site: merged for merged in found}
    precision = job.spec.export.precision
    rows = tuple(_row(row, by_path[row.path], graph, precision) if row.path in by_path else row for row in job.report.sites)
    before, after = job.report.totals, totals(job.source, graph, rows, (), job.spec.export, all_methods())
    figures = Totals(
        (before.parameters[0], after.parameters[1]),
        (before.bytes[0], after.bytes[1]),
        (before.macs[0], after.macs[1]),
        after.trainable,
        before.cache,
    )
    worst = max(found, key=lambda merged: merged.error)
    note = f"adapters merged at {len(found)} sites; largest error of a merged weight {worst.error:.2e} ({worst.site})"
    return replace(job.report, sites=rows, totals=figures, parity=None, notes=(*job.report.notes, note, *lost_notes(found)))


def _row(row: SiteRow, merged: Merged, graph: Graph, precision: str) -> SiteRow:
    coded = row.parameters[0] if merged.quantizer is not None else 0
    consts = [const for const in graph.state if const.path in merged.consts]
    dense = merged.quantizer is None
    made = sum(const.numel * item_size(const.tensor.dtype, precision) for const in consts)
    gone = [name for name in row.weights if name not in {const.path for const in graph.state}] if dense else []
    size = row.bytes[0] if dense and not gone else made
    parameters = sum(const.numel for const in consts) if gone else row.parameters[0]
    note = f"merged: error {merged.error:.3g} of the weight, which the update changed by {merged.change:.3g}"
    instead = f"{', '.join(merged.consts)} takes the place of {', '.join(gone)}"
    return replace(
        row,
        method=f"{row.method}, merged",
        rank=None,
        requested_rank=None,
        weight_error=None,
        output_error=None,
        bound=None,
        parameters=(row.parameters[0], parameters),
        bytes=(row.bytes[0], size),
        macs=(row.macs[0], row.macs[0]),
        trainable=0,
        coded=coded,
        notes=(note, instead) if gone else (note,),
    )


# back out of a merged folder


def unmerged(graph: Graph, adapters: Sequence[Adapter], merged: Path, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Trained values of `graph` (a reopened training folder) that give the weights of the folder `merged`: factors, and every other
    parameter that differs. With them, per site, the share of the difference that the factors do not hold.

    InputError: nothing to unmerge, adapters whose merged form is no sum of base and factors, a folder of another model.
    """
    _refuse_unfit(adapters)
    sites = {site.path: site for site in find_sites(graph)}
    state = {const.path: const for const in graph.state}
    weights = initializers(merged, verify)
    values: dict[str, Tensor] = {}
    rest: dict[str, float] = {}
    taken: set[str] = set()
    for adapter in adapters:
        site = sites[adapter.site if adapter.base == "dense" else adapter.base_consts["base"]]
        name = site.const.path if adapter.base == "dense" and not site.parts else f"{adapter.site}.weight"
        taken.add(name)
        rank = int(state[adapter.consts["down"]].tensor.shape[-1])
        factors, rest[adapter.site] = factors_of(_read(site, weights, name, merged), site.weight().detach(), adapter, rank)
        values.update({adapter.consts[part]: factor.float().contiguous() for part, factor in factors.items()})
    values.update(_others(state, weights, taken))
    return values, rest


def _refuse_unfit(adapters: Sequence[Adapter]) -> None:
    if not adapters:
        raise InputError("nothing to unmerge: the model has no adapters")
    for adapter in adapters:
        if adapter.base not in ("dense", "own"):
            raise InputError(f"{adapter.site}: merging quantised its base anew, which cannot be undone; keep the file of trained values")
        if set(adapter.consts) != {"down", "up"} or [entry.site for entry in adapters].count(adapter.site) > 1:
            raise InputError(f"{adapter.site}: only one pair of factors can be found in a merged weight; keep the file of trained values")


def _read(site: Site, weights: Mapping[str, Tensor], name: str, merged: Path) -> Tensor:
    shape = tuple(int(dim) for dim in site.const.tensor.shape)
    found = weights.get(name)
    if found is None or tuple(found.shape) != shape:
        raise InputError(f"{merged}: has no weight {name} of {list(shape)}, so it was not merged from this model")
    return site.read(found)


def _others(state: Mapping[str, Const], weights: Mapping[str, Tensor], taken: set[str]) -> dict[str, Tensor]:
    """Parameters outside of all merged sites that training changed (heads, norms)."""
    both = {name: weights[name] for name, const in state.items() if const.kind == "parameter" and name in weights and name not in taken}
    changed = {name: tensor for name, tensor in both.items() if not torch.equal(tensor.float(), state[name].load().float())}
    return {name: tensor.float().contiguous() for name, tensor in changed.items()}
