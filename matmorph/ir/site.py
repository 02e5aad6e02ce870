"""What selection yields and what methods return: sites, fragments, rejects, choices and costs.

A matmul is a view, not a conversion: the node keeps its own operator, and a `Site` says how to read it as rows times a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch

from matmorph.ir.core import Const, Node, Value

Form = Literal["linear", "addmm", "mm", "einsum", "conv1x1", "expert", "embedding", "conv", "recurrent", "product"]
"""`mm` covers mm, bmm, matmul and their kin with a constant. `embedding` is a table that no matmul reads. The last three are listed so that
every weight is accounted for, and no method takes them: other convolutions, recurrent operators, products in other forms."""

LISTED: frozenset[Form] = frozenset(("conv", "recurrent", "product"))

Layout = Literal["oi", "io"]
"""How the stored matrix is laid out: [out, in] or [in, out] (after the batch axis of an expert stack)."""


class Statistic(Enum):
    """What a method may ask of the calibration data, per site input."""

    INPUT_SECOND_MOMENT = "input_second_moment"  # sum over rows of x x^T, [in, in], float32 or better, and the number of rows
    HELD_OUT_MOMENT = "held_out_moment"  # the same of rows that are kept from the former: what errors of a fit are measured on
    GRADIENT_GRAMS = "gradient_grams"  # sums of G G^T and G^T G over gradients G of the weight; needs a loss and labels
    GRADIENT_SCORES = "gradient_scores"  # mean |G| of them, in the basis of the former where that is asked for too
    TAYLOR = "taylor"  # sum over rows of |x dL/dx| of inputs [in] and outputs [out], for methods of blocks; needs a loss and labels


@dataclass(frozen=True, slots=True, eq=False)
class Application:
    """One use of a site's weight: `output = rows(x) @ W^T (+ bias)`, computed by `node`.

    `x` is the activation operand as it enters `node`. `select` is the value that picks the expert matrices (index of the stack's first
    axis) where the form is "expert" and the trace gathers them; None = all E matrices at once (batched over E). `bias` is the bias Value
    that the node itself adds, or None.
    """

    node: Node
    x: Value
    output: Value
    bias: Value | None = None
    select: Value | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A unique weight with all its applications; rewritten in all places or in none.

    `path`: dotted path of the parameter without a trailing ".weight" ("encoder.layer.0.attention.self.query"), with "[a:b]" for a slice
    along the out axis. `weight()` gives [out, in], or [batch, out, in] for an expert stack, in the stored dtype. `rows`: (a, b) of that
    slice in the constant, None for the whole. `gathers`: nodes that read the constant as an embedding table (a head tied to a table).
    `layer`: its number in `container`, the stack of layers that all applications lie in; `stack`: whether that is an encoder or a
    decoder, None where it is neither. `blocked`: why no method may take this site (overlapping slices ...), None normally.

    A weight that the model computes from its parameters (weight norm, a mask) has `parts`, what it is computed from, and `roots`, the
    values that it is in the graph; `const` is then no part of the graph's state, and its numbers are computed when they are loaded. A
    rewrite that replaces it takes the parts away; where it stays, the parts are what is stored and what trains.
    """

    path: str
    const: Const
    form: Form
    layout: Layout
    in_features: int
    out_features: int
    applications: tuple[Application, ...]
    batch: int | None = None
    role: str = "other"
    layer: int | None = None
    container: str | None = None
    stack: str | None = None
    rows: tuple[int, int] | None = None
    gathers: tuple[Node, ...] = ()
    blocked: str | None = None
    parts: tuple[Const, ...] = ()
    roots: tuple[Value, ...] = ()
    read: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda t: t, repr=False)

    def weight(self) -> torch.Tensor:
        """[out, in] (or [batch, out, in]) as a view of the stored tensor where a view exists."""
        return self.read(self.const.load())

    @property
    def parameters(self) -> int:
        """Elements of this site's matrix (a slice counts its own part)."""
        return self.in_features * self.out_features * (self.batch or 1)

    @property
    def listed(self) -> bool:
        """Whether it stands here only to be accounted for."""
        return self.form in LISTED

    @property
    def held(self) -> tuple[int, int]:
        """(parameters, bytes) that are stored for it: those of its matrix, or of the parts that it is computed from. A slice counts its own
        share."""
        if not self.parts or self.rows is not None:
            return self.parameters, self.parameters * self.const.tensor.torch_dtype.itemsize
        return sum(part.numel for part in self.parts if part.kind == "parameter"), sum(part.nbytes for part in self.parts)

    @property
    def operands(self) -> tuple[Value, ...]:
        """What the weight is in the graph."""
        return self.roots or (self.const,)

    @property
    def anchor(self) -> Const:
        """Where it stands in the state."""
        return self.parts[0] if self.parts else self.const

    @property
    def bias(self) -> Const | None:
        """The bias all applications share, where it is a constant."""
        found = {application.bias for application in self.applications}
        only = next(iter(found)) if len(found) == 1 else None
        return only if isinstance(only, Const) else None


@dataclass(frozen=True, slots=True)
class Reject:
    """A rewrite that is not possible or does not pay for this site: expected, and shown in the report."""

    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One way for a method to treat one site. `rank`: factors' inner size; `at_most`: the data decides and `rank` is the upper limit.

    `ranks`: of each pair of neighbouring cores, where there are several; `rank` is the largest. `bits`: of a code, where that is a choice.
    `clamped`: which part of the request the shapes do not allow and what was taken instead (an error under `strict`). `notes`: what else
    shapes alone have to say of it.
    """

    rank: int | None = None
    at_most: bool = False
    ranks: tuple[int, ...] = ()
    clamped: str | None = None
    notes: tuple[str, ...] = ()
    bits: Literal[2, 3, 4, 8] | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a site takes after a rewrite, its bias excluded. `macs`: multiply-accumulates per row of x, summed over applications.

    `coded`: those of `parameters` that are kept as codes of a quantizer; `frozen`: those that are numbers and do not train. `stored`:
    (dtype, elements) of the new weights where they are not simply `parameters` elements of the old weight's type; it decides `bytes` under
    each export precision. `times`: (rows of x, predicted time over that of the dense matmul) where the method predicts one. `trains`:
    scalars that train and are none of `parameters`, because what they learn goes into the weight that stays.
    """

    parameters: int
    bytes: int
    macs: int
    coded: int = 0
    stored: tuple[tuple[str, int], ...] = ()
    times: tuple[tuple[int, float], ...] = ()
    trains: int = 0
    frozen: int = 0


@dataclass(frozen=True, slots=True)
class Bound:
    """A proven lower bound: `on` says which error of this form can not be smaller than `value` ("eckart_young" on "weight_error");
    "fitted_error" is the output error on the rows that the rewrite was fitted to."""

    name: str
    on: Literal["weight_error", "output_error", "fitted_error"]
    value: float


@dataclass(frozen=True, slots=True)
class Sample:
    """The calibration rows behind a site's numbers. `fitted`: how many the rewrite was fitted to, of the least seen matrix of a stack (0:
    it reads none); `judged`: how many its output error was measured on, none of them fitted to (0: none could be held out).
    `effective_rank`: how many directions the fitted rows span (those judged where none were fitted to), see `linalg.shrinkage`.
    `fitted_error`: the output error on the rows of the fit."""

    fitted: int
    judged: int
    effective_rank: float
    fitted_error: float | None = None


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of the matrix that was cut: `values[k]` is the one of number `at[k]` (1 = the largest) of `size`.

    `of`: "W", or "W L" with L L^T the damped second moment of the input, or "C^T W L" with C C^T that of the gradients at the output. A
    stack of experts has the roots of the sums of squares. `at` is a selection, and may end before `size`: what the decomposition did not
    compute is not there.
    """

    of: Literal["W", "W L", "C^T W L"]
    size: int
    at: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class FragmentAdapter:
    """What of a fragment is an adapter: factors that train, for whoever exchanges, serves and merges them.

    `consts`: the factors by short name, and what their meaning depends on. `scale`: of their product. `inside`: they compute the site's
    weight and bias; otherwise they are added to its result. `own_base`: short name of the frozen weight of the fragment that W became, as
    it lacks what the factors start with; None where they stand beside what there is. `starts_at_zero`: whether the base alone is the model
    before training. `kept`: by short name, how many entries of a factor take part in an update; what is not named takes part whole.
    `details`: plain data that the method alone understands.
    """

    consts: Mapping[str, Const]
    scale: float = 1.0
    inside: bool = False
    own_base: str | None = None
    starts_at_zero: bool = True
    kept: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Fragment:
    """What replaces a site. `parts[k]` are the new nodes of application k and `outputs[k]` its result as rows [..., out], bias not added
    unless `adds_bias` (then each that the builder's `bias()` gave out); each output is produced by its own part's nodes. `consts` are the
    new weights. `weight()` is the dense matrix [out, in] that it stands for, computed when asked. `choice` is what was taken in the end.
    `bound`: see `Bound`. `lookups[k]`: new nodes and result of `site.gathers[k]`; () leaves the table where it is. `holds_dense`: an update
    that brings the dense part with it, its own base among `consts`, so that the node does not stay beside it. `spectrum`: see `Spectrum`,
    where a decomposition gave one. `adapter`: see `FragmentAdapter`, of methods whose factors are adapters."""

    parts: tuple[tuple[Node, ...], ...]
    outputs: tuple[Value, ...]
    consts: tuple[Const, ...]
    weight: Callable[[], torch.Tensor]
    choice: Choice = Choice()
    bound: Bound | None = None
    adds_bias: bool = False
    notes: tuple[str, ...] = ()
    lookups: tuple[tuple[tuple[Node, ...], Value], ...] = ()
    holds_dense: bool = False
    spectrum: Spectrum | None = None
    adapter: FragmentAdapter | None = None
