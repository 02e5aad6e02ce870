"""glora: f(x) = (W + W o A + B) x + W C + D o b + E + b; the five tensors train, W and b do not (GLoRA, arXiv 2306.07967, eq. 10).

o is elementwise. A, B [out, in] are a product of two factors (`lora`), one number per output (`vector`), or one (`scalar`); C [in, 1] a
product or one number per input; D, E [out] one number per output, or one. All start at zero. A layer without a bias gains one where C or E
ask for it; D has nothing to scale there. The paper's eq. 10 writes W A; its code, and this file, multiply elementwise.

W + W o A + B and the bias are nodes over constants, which ONNX Runtime folds when it loads: inference is one dense matmul. Beside a base
that took the place of W (`GloraBeside`) only B, D and E are possible, as an update.

`search`: one over-complete set of factors (section 3.3 of the paper). `lora` is all of them, `vector` the first column of the larger, and
`scalar` its first entry; a constant `gates` [17] of ones and zeros says which. In training graphs the gates are an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from matmorph.errors import InputError
from matmorph.ir.adapter import Adapter
from matmorph.ir.core import Graph, Value
from matmorph.ir.site import Choice, Cost, Fragment, FragmentAdapter, Reject, Site
from matmorph.passes.methods.glora.nodes import Tensors
from matmorph.passes.methods.glora.settings import (
    COLUMNS,
    GATE,
    GATE_COLUMNS,
    WORDS,
    GloraLanguage,
    GloraSpec,
    Words,
    bias_of,
    shapes_of,
    words_of,
)
from matmorph.passes.methods.glora.supernet import configured, replacing_spec, training_form
from matmorph.passes.methods.protocol import Configuration, Error, FragmentBuilder, SiteStats, TrainingForm, UpdateMethod
from matmorph.passes.methods.weights import FLOATS, dense_matrix, own_stream, rank_beyond, refuse_computed, stored, widened
from matmorph.specs import schema
from matmorph.specs.schema import Rank


class Glora(GloraLanguage, UpdateMethod):
    """The dense weight scaled and shifted by tensors to be trained."""

    code: ClassVar[str | None] = "GL"
    colour: ClassVar[int | None] = 8

    @property
    def beside(self) -> GloraBeside:
        """What stands beside a base that took the weight's place."""
        return GloraBeside()

    def impossible(self, sites: Sequence[Site], spec: GloraSpec) -> str | None:
        return rank_beyond(sites, Rank("fixed", spec.rank)) if _has(spec.words, "lora") else None

    def check(self, site: Site, spec: GloraSpec) -> Reject | None:
        words, full = spec.words, min(site.in_features, site.out_features)
        biases = {application.bias for application in site.applications}
        odd = bias_of(site) is None and biases != {None}
        guards = (
            (site.blocked is not None, site.blocked or ""),
            (bool(site.parts), refuse_computed(site, self.name)),
            (site.form == "embedding", "glora serves matmuls, this is an embedding table"),
            (bool(site.gathers), "the weight is also read as an embedding table; glora serves only the matmul: use untie: true"),
            (site.const.tensor.dtype not in FLOATS, f"glora needs a floating-point weight, this one is {site.const.tensor.dtype}"),
            (site.batch is not None, "glora treats one matrix and one bias, this is a stack of experts"),
            (_has(words, "lora") and spec.rank > full, f"rank {spec.rank} is above min(in, out) = {full}"),
            (words["D"] != ("none",) and odd, "D scales a bias of one number per output, the same wherever the weight is used"),
            (_nothing(words_of(site, spec)), "D scales the bias, and this layer has none"),
        )
        return next((Reject(reason) for fails, reason in guards if fails), None)

    def choices(self, site: Site, spec: GloraSpec) -> Iterable[Choice]:
        words = words_of(site, spec)
        made = bias_of(site) is None and any(words[tensor] != ("none",) for tensor in "CE")
        notes = (
            (made, "the layer has no bias, and gains one"),
            (words["D"] != spec.words["D"], "D is left out: the layer has no bias to scale"),
            (spec.search, f"{prod(map(len, words.values()))} configurations"),
        )
        return [Choice(spec.rank if _has(words, "lora") else None, notes=tuple(note for holds, note in notes if holds))]

    def cost(self, site: Site, spec: GloraSpec, choice: Choice) -> Cost:
        """Of the five tensors alone. No multiplication is added: they are folded into weight and bias."""
        return _cost(site, spec, 0)

    def errors(self, site: Site, spec: GloraSpec, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        """None: the start changes nothing."""
        return [Error(0.0, None if stats is None else 0.0) for _ in choices]

    def build(self, site: Site, spec: GloraSpec, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        made = _tensors(site, spec, b)

        def body(rows: Value) -> Value:
            w = dense_matrix(site, b)
            return b("aten.linear.default", rows, made.weight(w), made.bias(w, bias_of(site), b.bias()))

        def dense() -> Tensor:
            return self.merge({**made.start, "base": site.weight().detach()})[0]

        adapter = _adapter(made, inside=True)
        return b.fragment(body, made.consts, dense, choice=choice, adds_bias=True, holds_dense=True, adapter=adapter)

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(W + W o A + B [out, in], b + W C + D o b + E [out]) in float32 or better, from `base` = W, `bias` = b where there is one, and
        the tensors by short name; W C is that of the old W. The bias is None where there is none and nothing makes one. With `gates` of
        a supernet the tensors are what the gates say."""
        w, b = widened(parts["base"]), parts.get("bias")
        a, shift, c, d, e = (_value(parts, tensor, w) for tensor in WORDS)
        bias = None if b is None else widened(b)
        if bias is not None and d is not None:
            bias = bias + d.reshape(-1) * widened(parts["bias"])
        for term in (None if c is None else (w @ c).reshape(-1), None if e is None else e.reshape(-1).expand(w.shape[0])):
            bias = bias if term is None else term if bias is None else bias + term
        scaled = w if a is None else w + w * a
        return scaled if shift is None else scaled + shift, bias

    def refuse_merge(self, adapter: Adapter, read: Callable[[str], Tensor]) -> InputError | None:
        """A supernet without a configuration."""
        if GATE not in adapter.consts or bool(read(GATE).any()):
            return None
        return InputError(
            f"{adapter.site}: a supernet of {self.name}, and no configuration says which of its tensors to merge",
            ["name one: merge(values, configuration=...), matmorph merge --configuration FILE; matmorph search finds one"],
        )

    def for_training(self, graph: Graph, adapters: Sequence[Adapter]) -> TrainingForm | None:
        return training_form(graph, adapters, self.name)

    def configured(self, graph: Graph, adapters: Sequence[Adapter], configuration: Configuration) -> Graph | None:
        return configured(graph, adapters, configuration)

    def spec_of(self, spec: schema.Spec, adapters: Sequence[Adapter], configuration: Configuration) -> dict[str, Any] | None:
        return replacing_spec(spec, adapters, configuration, self.name)


class GloraBeside(Glora):
    """B, D and E beside a base that took the weight's place: x B^T + D o b + E is added to it."""

    def check(self, site: Site, spec: GloraSpec) -> Reject | None:
        for tensor in "AC":
            if spec.words[tensor] != ("none",):
                return Reject(f"{tensor} of glora needs the dense weight, whose place another method takes; B, D and E can stand beside")
        return super().check(site, spec)

    def cost(self, site: Site, spec: GloraSpec, choice: Choice) -> Cost:
        """Of the tensors alone; a vector or number B acts on the sum of the features."""
        words = words_of(site, spec)["B"]
        product = spec.rank * (site.in_features + site.out_features) if "lora" in words else 0
        column = site.out_features if {"vector", "scalar"} & set(words) else 0
        return _cost(site, spec, (product + column) * len(site.applications))

    def build(self, site: Site, spec: GloraSpec, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        made = _tensors(site, spec, b)
        base = torch.zeros(site.out_features, site.in_features)
        return b.fragment(
            lambda rows: made.update(rows, bias_of(site)),
            made.consts,
            lambda: self.merge({**made.start, "base": base})[0].expand(base.shape),
            choice=choice,
            adapter=_adapter(made, inside=False),
        )


def _has(words: Words, word: str) -> bool:
    return any(word in found for found in words.values())


def _nothing(words: Words) -> bool:
    return all(found == ("none",) for found in words.values())


def _cost(site: Site, spec: GloraSpec, macs: int) -> Cost:
    parameters = sum(map(prod, shapes_of(site, spec).values()))
    elements = parameters + (GATE_COLUMNS if spec.search else 0)
    dtype = site.const.tensor
    return Cost(parameters, elements * dtype.torch_dtype.itemsize, macs, stored=((dtype.dtype, elements),) if spec.search else ())


def _drawn(site: Site, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Zeros, but for the smaller factors: uniform within +- 1 / sqrt(fan in), as torch draws a linear layer. Every tensor of every site has
    a stream of its own, whatever else is rewritten."""
    if not name.endswith("_down"):
        return torch.zeros(shape)
    generator = own_stream(seed, site.path, name)
    bound = 1 / sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _tensors(site: Site, spec: GloraSpec, b: FragmentBuilder) -> Tensors:
    """Drawn, stored and given names."""
    start = {name: stored(site, _drawn(site, name, shape, b.seed)) for name, shape in shapes_of(site, spec).items()}
    named = {name: b.const(name, tensor) for name, tensor in start.items()}
    if spec.search:
        start[GATE] = stored(site, torch.zeros(GATE_COLUMNS))
        named[GATE] = b.const(GATE, start[GATE], trainable=False, kind="buffer")
    return Tensors(site, words_of(site, spec), spec.search, start, named, b)


def _adapter(made: Tensors, inside: bool) -> FragmentAdapter:
    """Under `search` with the words that the site's tensors may be."""
    details = {"words": {tensor: list(words) for tensor, words in made.words.items()}} if made.searched else {}
    return FragmentAdapter(made.named, inside=inside, details=details)


# what a tensor is, as numbers


def _value(parts: Mapping[str, Tensor], tensor: str, like: Tensor) -> Tensor | None:
    """The tensor as a matrix that broadcasts to its own size; None where it is not there."""
    larger = parts.get(f"{tensor}_up", parts.get(tensor))
    if larger is None:
        return None
    up = widened(larger).to(like.dtype).reshape(larger.shape[0], -1)
    down = parts.get(f"{tensor}_down")
    product = None if down is None else up @ widened(down).to(like.dtype)
    gates = parts.get(GATE)
    if gates is None:
        return up if product is None else product
    forms = {"lora": product, "vector": up[:, :1], "scalar": up[:1, :1], "none": None}
    chosen = [(float(gates[COLUMNS[tensor, word]]), forms[word]) for word in WORDS[tensor]]
    total = torch.zeros(up.shape[0], 1, dtype=like.dtype, device=like.device)
    for gate, form in chosen:
        total = total if form is None or gate == 0 else total + gate * form
    return total
