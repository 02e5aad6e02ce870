"""tt_lora: a tensor train beside the matmul, y = x @ W^T + bias + alpha x @ dW^T; its cores train, W does not.

TT-LoRA (arXiv 2408.01008; by contraction 2504.21190): dW is a TT-vector G_k [r_{k-1}, k, r_k] over `shape`, input modes first, then output
modes reversed, dW = T.permute(output axes, reversed(input axes)). The scale is alpha alone. `modes` takes a TT-matrix instead.

Starts: `zero`, a last core of zeros, so the model starts unchanged; and the authors' two, which do change it: `tt_svd`, the TT-SVD of a
matrix drawn as Kaiming does (uniform, a = sqrt(8)), and `direct`, every core drawn so and divided by its Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from matmorph.errors import ExportError, RewriteError
from matmorph.ir.core import Value
from matmorph.ir.site import Choice, Cost, Fragment, FragmentAdapter, Reject, Site
from matmorph.passes.linalg.contraction import TrainShape, matrix_train, vector_train
from matmorph.passes.linalg.modes import Modes, balanced_shape, boundary, modes_problem, shape_problem
from matmorph.passes.linalg.tensor_train import (
    TensorTrain,
    matrix_to_tensor,
    reconstruct,
    split_modes,
    tt_svd,
    two_factors,
    vector_tensor_to_weight,
    weight_to_vector_tensor,
)
from matmorph.passes.methods.protocol import Error, FragmentBuilder, Peft, SiteStats, UpdateMethod
from matmorph.passes.methods.tt.method import train_of
from matmorph.passes.methods.tt_base import (
    chosen_ranks,
    core_consts,
    matmul_train,
    plan_note,
    planned,
    times_text,
    train_cost,
)
from matmorph.passes.methods.tt_lora.settings import CORES, TTLoraLanguage, TTLoraSpec
from matmorph.passes.methods.weights import own_stream, refuse_matrix, stored


class TTLora(TTLoraLanguage, UpdateMethod):
    """A tensor train to be trained, beside a matmul that stays."""

    code: ClassVar[str | None] = "TL"
    colour: ClassVar[int | None] = 6
    peft: ClassVar[Peft | None] = Peft()

    def impossible(self, sites: Sequence[Site], spec: TTLoraSpec) -> str | None:
        """A shape or modes by hand that fit none of the sites."""
        problems = [_shape_problem(site, spec) for site in sites]
        by_hand = spec.shape is not None or spec.modes is not None
        return f"{sites[0].path}: {problems[0]}" if by_hand and all(problems) else None

    def check(self, site: Site, spec: TTLoraSpec) -> Reject | None:
        problem = refuse_matrix(site, self.name)
        why = None if problem else _shape_problem(site, spec)
        return Reject(why) if why else problem

    def choices(self, site: Site, spec: TTLoraSpec) -> Iterable[Choice]:
        form = _form(site, spec)
        sizes = form.sizes if isinstance(form, Modes) else form
        choice = chosen_ranks(spec.rank, sizes, site.parameters)
        said = f"modes out {times_text(form.out)}, in {times_text(form.in_)}" if isinstance(form, Modes) else f"shape {list(form)}"
        plan = plan_note(planned(_train(site, spec, choice), spec), spec)
        return [replace(choice, notes=(f"{said}; ranks {list(choice.ranks)}", plan))]

    def cost(self, site: Site, spec: TTLoraSpec, choice: Choice) -> Cost:
        """Of the update alone."""
        return train_cost(site, _train(site, spec, choice), spec)

    def errors(self, site: Site, spec: TTLoraSpec, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        """What the start changes: nothing, or of a random start the size of the update over that of the weight."""
        found = []
        for choice in choices:
            cores = self.solve(site, spec, choice, stats, site.weight(), 0)
            update = spec.alpha * torch.linalg.vector_norm(_dense(TensorTrain(tuple(cores)), site.in_features))
            norm = torch.linalg.vector_norm(site.weight().double())
            found.append(Error(0.0 if spec.init == "zero" else float(update / norm)))
        return found

    def solve(self, site: Site, spec: TTLoraSpec, choice: Choice, stats: SiteStats | None, weight: Tensor, seed: int) -> tuple[Tensor, ...]:
        """The starting cores in canonical layout; every site has a stream of its own, whatever else is rewritten."""
        return _STARTS[spec.init](site, spec, choice, own_stream(seed, site.path))

    def build(self, site: Site, spec: TTLoraSpec, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        """Raises RewriteError for cores that leave the range of the stored type."""
        cores = [stored(site, core) for core in b.solution or self.solve(site, spec, choice, stats, b.weight(), b.seed)]
        train = _train(site, spec, choice)
        consts = core_consts(b, cores)

        def body(rows: Value) -> Value:
            return matmul_train(b, train, spec, rows, consts, site.out_features, spec.alpha)

        numbers = {"scale": torch.tensor(spec.alpha, dtype=torch.float64), "in_features": torch.tensor(site.in_features)}
        parts = {**{f"core_{k}": core for k, core in enumerate(cores)}, **numbers}
        adapter = FragmentAdapter({f"core_{k}": core for k, core in enumerate(consts)}, spec.alpha)
        return b.fragment(body, consts, lambda: self.merge(parts)[0], choice=choice, adapter=adapter)

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """`scale` dW [out, in] of `core_0`, `core_1` ... in float32 or better, plus `base` [out, in] where there is one.

        A TT-vector needs `base` or `in_features` to know which of its modes are inputs; RewriteError without them."""
        train = train_of(parts)
        base = parts.get("base")
        in_features = base.shape[1] if base is not None else int(parts.get("in_features", torch.tensor(0)))
        if not in_features and train.matrix_modes is None:
            raise RewriteError("a tensor train of the papers' shape is merged into a base, or with its number of in_features")
        update = float(parts.get("scale", 1.0)) * _dense(train, in_features)
        return update if base is None else base.to(update.dtype) + update, None

    def two_factor(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Exactly, at the border between input and output modes; needs `in_features`."""
        cores = [parts[f"core_{k}"] for k in range(sum(name.startswith("core_") for name in parts))]
        try:
            return two_factor_form(cores, int(parts["in_features"]), float(parts.get("scale", 1.0)))
        except ValueError as error:
            raise ExportError(f"its tensor train has no two-factor form: {error}") from error


def two_factor_form(cores: Sequence[Tensor], in_features: int, alpha: float) -> tuple[Tensor, Tensor]:
    """The same update as two factors, exactly: (down [in, r], up [r, out]) with x @ down @ up = alpha x @ dW^T; r is the rank at the border
    between input and output modes. In the type of the cores. ValueError for a TT-matrix (`modes`), which has no such border."""
    down, up = two_factors(TensorTrain(tuple(cores)), in_features)
    return down, alpha * up


def _dense(train: TensorTrain, in_features: int) -> Tensor:
    """dW [out, in]."""
    whole = reconstruct(train)
    return whole if train.matrix_modes is not None else vector_tensor_to_weight(whole, in_features)


# shapes


def _shape_problem(site: Site, spec: TTLoraSpec) -> str | None:
    """Why the shape or the modes do not fit the site."""
    if spec.shape is not None:
        return shape_problem(spec.shape, site.out_features, site.in_features)
    if spec.modes is not None:
        return modes_problem(spec.modes.out, spec.modes.in_, site.out_features, site.in_features)
    try:
        _form(site, spec)
    except ValueError as error:
        return str(error)
    return None


def _form(site: Site, spec: TTLoraSpec) -> Modes | tuple[int, ...]:
    """The pairs of a TT-matrix, or the shape of a TT-vector. ValueError where the site's sizes have no balanced factors."""
    if spec.modes is not None:
        return Modes(spec.modes.out, spec.modes.in_)
    count = spec.cores or CORES
    return spec.shape or balanced_shape(site.out_features, site.in_features, count // 2, count - count // 2)


def _train(site: Site, spec: TTLoraSpec, choice: Choice) -> TrainShape:
    form, ranks = _form(site, spec), (1, *choice.ranks, 1)
    if isinstance(form, Modes):
        return matrix_train(form.out, form.in_, ranks)
    return vector_train(form, boundary(form, site.in_features), ranks)


# starts


def _direct(site: Site, spec: TTLoraSpec, choice: Choice, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Cores drawn uniformly and divided by their norm; Kaiming's bound cancels but for the 1e-6 that the authors add to the norm."""
    cores = [_uniform(shape, prod(shape[1:]), generator) for shape in _train(site, spec, choice).core_shapes]
    return tuple(core / (torch.linalg.vector_norm(core) + 1e-6) for core in cores)


def _zero(site: Site, spec: TTLoraSpec, choice: Choice, generator: torch.Generator) -> tuple[Tensor, ...]:
    *cores, last = _direct(site, spec, choice, generator)
    return (*cores, torch.zeros_like(last))


def _svd(site: Site, spec: TTLoraSpec, choice: Choice, generator: torch.Generator) -> tuple[Tensor, ...]:
    drawn = _uniform((site.out_features, site.in_features), site.in_features, generator)
    form = _form(site, spec)
    if isinstance(form, Modes):
        return split_modes(tt_svd(matrix_to_tensor(drawn, form), choice.ranks)[0], form).cores
    return tt_svd(weight_to_vector_tensor(drawn, form, site.in_features), choice.ranks)[0].cores


def _uniform(shape: Sequence[int], fan_in: int, generator: torch.Generator) -> Tensor:
    """Kaiming's uniform distribution with a = sqrt(8)."""
    bound = sqrt(2 / (1 + 8)) * sqrt(3 / fan_in)
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


_STARTS: Mapping[str, Callable[[Site, TTLoraSpec, Choice, torch.Generator], tuple[Tensor, ...]]] = {
    "zero": _zero,
    "tt_svd": _svd,
    "direct": _direct,
}
