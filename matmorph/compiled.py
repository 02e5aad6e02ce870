"""A compiled model: looked at, called, given trained values, merged, saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from matmorph.errors import InputError
from matmorph.exporters.training.prepare_training import LabelAxes, TrainRequest, of_spec
from matmorph.folders.after_training import Values, configured_job, loaded_job, merged_job, read_values, save_adapters
from matmorph.folders.job import Job
from matmorph.folders.save import save
from matmorph.ir.adapter import Adapter
from matmorph.ir.core import Graph
from matmorph.ir.to_torch import CompiledModule, to_torch
from matmorph.ir.training.losses import LossFunction
from matmorph.optimizers import AnyOptimizer
from matmorph.passes.adapters.merging import Merged
from matmorph.passes.adapters.trainables import selectors
from matmorph.passes.budget.pareto import Front, refuse_unswept, sweep
from matmorph.passes.methods.protocol import Configuration
from matmorph.progress import Progress, silent
from matmorph.report.front import front_files
from matmorph.report.model import Report
from matmorph.specs.schema import Spec, checked_optimizer


class Compiled:
    """A rewritten model.

    `graph` and `source`: the IR after and before. `module`: a torch module with weights of its own. `report`: what was done to each site;
    `save` adds the parity of the export to it. `merged`: after `merge`, what it did to each site.
    """

    merged: tuple[Merged, ...] = ()
    _unmerged: Compiled | None = None

    def __init__(self, job: Job, progress: Progress = silent) -> None:
        self._job = job
        self._progress = progress

    @property
    def spec(self) -> Spec:
        """The spec, resolved."""
        return self._job.spec

    @property
    def source(self) -> Graph:
        """The traced model, before any rewrite."""
        return self._job.source

    @property
    def graph(self) -> Graph:
        """The rewritten graph."""
        return self._job.graph

    @property
    def report(self) -> Report:
        """A row per site and totals; after `save` also the parity of the export."""
        return self._job.report

    @cached_property
    def module(self) -> CompiledModule:
        """The rewritten model as a torch module in eval mode, called like the source; made on first use (a copy of all weights)."""
        return to_torch(self.graph)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `module` answers: called like the source. InputError for a call unlike the traced example."""
        return self.module(*args, **kwargs)

    def pareto(self, points: int) -> Front:
        """The smallest error at each of `points` sizes, at equal distances between the smallest that can be reached and the best choice
        without a limit, from the candidates of this compile: nothing is decomposed again. `save(pareto=...)` writes it.

        Raises InputError or SpecError for a spec without one budget of one limit.
        """
        refuse_unswept(self.spec, points)
        if not self._job.decisions:
            raise InputError("the candidates of a front are those of compile, and this model was read from its files")
        return sweep(self._job.decisions[0], points)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The factors that rules put in to be trained, one entry per method and site; () once they are merged."""
        return self._job.remaining

    def load_trained(self, values: Values) -> Compiled:
        """The same model with trained values, in `graph` and `module`: `Trainer.parameters()`, a .safetensors file, or a folder with one.

        Raises InputError for values of another model or rank.
        """
        return Compiled(loaded_job(self._job, values), self._progress)

    def configured(self, configuration: Configuration) -> Compiled:
        """A supernet (`search: true`) in one configuration: {site: {"A": "lora", "E": "vector"}}, what is not named is none.

        Raises InputError for a model without a supernet, and for a site, tensor or word that it does not have.
        """
        return Compiled(configured_job(self._job, configuration), self._progress)

    def merge(self, values: Values | None = None, configuration: Configuration | None = None) -> Compiled:
        """The model with its adapters, trained (`values` as in `load_trained`) or as they are, merged into the weights beside them.

        A dense weight takes them in exactly, rounded once to its type; a quantised one is quantised anew with its own settings. `merged` of
        the result and its report say what that cost. `configuration`: of a supernet, as in `configured`. Raises InputError: nothing to
        merge, a base that takes nothing in, other values, a supernet without a configuration.
        """
        start = self if values is None else self.load_trained(values)
        start = start if configuration is None else start.configured(configuration)
        job, found = merged_job(start._job, start.adapters, None)
        result = Compiled(job, self._progress)
        result.merged, result._unmerged = found, start
        return result

    def save_adapter(self, path: str | os.PathLike[str], values: Values | None = None) -> Path:
        """Writes the adapters, trained (`values` as in `load_trained`) or as they are, as one `.onnx_adapter` file.

        Sessions of this model exported with `export.adapters: inputs` load it, whatever its rank. Raises InputError: no adapters, values of
        another model, something beside the factors was trained; AdapterError for a place that cannot be written.
        """
        if not self.adapters:
            raise InputError("there is no adapter to save: no rule added one, or they are merged")
        found, where = ({}, str(path)) if values is None else read_values(values)
        if found:
            self.load_trained(found)  # refuses what the model does not take
        save_adapters(self._job, self.adapters, found, where, Path(path))
        return Path(path)

    def unmerge(self) -> Compiled:
        """The model before `merge`: the stored base and the adapters beside it, to the bit. InputError where nothing was merged."""
        if self._unmerged is None:
            raise InputError("nothing to unmerge: this model was not made by merge")
        return self._unmerged

    def save(
        self, folder: str | os.PathLike[str], force: bool = False, train: bool | None = None, *, pareto: int | Front | None = None
    ) -> Path:
        """Writes the artefact folder, whole or not at all, after ONNX Runtime has agreed with torch on its check vectors.

        force: replace an existing artefact folder. train: write training graphs too, as the spec's `train:` says; None = where it has one
        and nothing was merged. pareto: write the front of so many budgets, or this one, too (`pareto.json`, `pareto.svg`).
        Raises InputError (the folder exists, cannot be written, disk full; no `train:`), ExportError and CheckError (parity), with training
        graphs also SpecError (what trains).
        """
        asked = self.spec.train
        if train and asked is None:
            raise InputError("the spec says nothing of training", ["add to it, for instance: train: {loss: cross_entropy}"])
        wanted = not self.merged if train is None else train
        front = self.pareto(pareto) if isinstance(pareto, int) else pareto
        return self._save(Path(folder), force, of_spec(asked) if asked is not None and wanted else None, front)

    def export_training(
        self,
        folder: str | os.PathLike[str],
        *,
        loss: str | LossFunction | None = None,
        output: str | None = None,
        ignore_index: int | None = None,
        optimizer: AnyOptimizer | None = None,
        trainable: Sequence[str] | None = None,
        frozen: Sequence[str] | None = None,
        labels: Mapping[str, torch.Tensor] | None = None,
        label_shapes: LabelAxes | None = None,
        keep_outputs: Sequence[str] = (),
        force: bool = False,
    ) -> Path:
        """Writes an artefact folder with training graphs, complete by itself: `Trainer(folder)` needs nothing else.

        loss: cross_entropy, causal_lm, mse, cosine, distill, or a function `f(outputs, labels) -> loss` of tensors by name, then with
        example `labels` and the names of their dynamic axes ({"labels": {0: "batch"}}). output: the model output that the loss reads.
        optimizer: its lr and weight_decay can be changed at each step, the rest is fixed. trainable, frozen: adapters, factors, all, or
        globs over `module.named_parameters()`. labels: with a named loss an example for the check, else drawn. keep_outputs: model outputs
        that a training step gives too. What is not given is as the spec's `train:` says, else AdamW at 1e-4 on the adapters.

        Raises SpecError (what trains), InputError (folder, labels), ExportError (an operator without gradient) and CheckError (ONNX Runtime
        and torch disagree); nothing is written then.
        """
        given: dict[str, Any] = {
            "loss": loss,
            "output": output,
            "ignore_index": ignore_index,
            "optimizer": None if optimizer is None else checked_optimizer(optimizer),
            "trainable": None if trainable is None else selectors(_words(trainable, "trainable"), "trainable"),
            "frozen": None if frozen is None else selectors(_words(frozen, "frozen"), "frozen"),
        }
        if loss is None and self.spec.train is None:
            raise InputError("export_training needs a loss", ["export_training(folder, loss='cross_entropy'), or train: in the spec"])
        asked = of_spec(self.spec.train) if self.spec.train is not None else TrainRequest(loss or "")
        asked = replace(asked, **{name: value for name, value in given.items() if value is not None})
        return self._save(Path(folder), force, replace(asked, labels=labels, label_shapes=label_shapes, keep=tuple(keep_outputs)))

    def _save(self, folder: Path, force: bool, training: TrainRequest | None, front: Front | None = None) -> Path:
        more = {} if front is None else front_files(front)
        report = save(folder, replace(self._job, training=training, more=more), force, self._progress)
        self._job = replace(self._job, report=report)
        return folder


def _words(given: Sequence[str], name: str) -> Sequence[str]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable) or not all(isinstance(word, str) for word in given):
        raise InputError(f"{name} is a list of words or globs, got {given!r:.80}")
    return tuple(given)
