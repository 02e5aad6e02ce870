"""What a method is: one way to treat a matmul, or a block of them. All that the compiler asks of one stands here, with its default.

A method is stateless: a class without fields, made once. It owns all it knows, in its own file or folder: settings, mathematics, nodes,
choices, costs, the way back to a dense matrix, and what those who train, export, merge and draw want of it. `SiteMethod` treats one matmul,
`BlockMethod` a whole attention or MLP block; `Method` is what both have in common.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from torch import Tensor

from matmorph.errors import InputError, VerifyError
from matmorph.ir.adapter import Adapter
from matmorph.ir.build import Builder
from matmorph.ir.core import Const, ConstKind, Graph, Value
from matmorph.ir.site import Choice, Cost, Fragment, Reject, Site, Statistic
from matmorph.passes.linalg.hosvd import GradientStats
from matmorph.passes.linalg.massive import Massive
from matmorph.passes.linalg.target import CrossMoments
from matmorph.passes.linalg.whiten import relative_output_error
from matmorph.passes.methods.language import MethodKind, MethodLanguage
from matmorph.passes.pruning.axes import Counts
from matmorph.passes.pruning.find_blocks import Block
from matmorph.passes.pruning.patch import Patch
from matmorph.runtime.format.training import SearchSpace
from matmorph.specs import schema

Trains = Literal["adapters", "factors"]
"""The word of `train.trainable` for the weights of a method that train: adapters are put in to be trained (and exchanged, and merged),
factors stand for the weight and may be trained too."""

Configuration: TypeAlias = Mapping[str, Mapping[str, str]]
"""Of a supernet, by site and tensor what it is: {"layer.0.fc": {"A": "lora", "E": "vector"}}."""


@dataclass(frozen=True, slots=True)
class Error:
    """What one choice would cost in accuracy; None where that error was not asked for (see `SiteRow` for the first two). `felt_error`:
    |C^T (W - W') L| / |C^T W L|, as the model behind the site feels it (`passes.statistics.sensitivity`)."""

    weight_error: float | None = None
    output_error: float | None = None
    felt_error: float | None = None

    def times(self, rest: Error) -> Error:
        """Of what an approximation leaves over, of which `rest` is left over in turn."""

        def product(one: float | None, other: float | None) -> float | None:
            return None if one is None or other is None else one * other

        return Error(
            product(self.weight_error, rest.weight_error),
            product(self.output_error, rest.output_error),
            product(self.felt_error, rest.felt_error),
        )


@dataclass(frozen=True, slots=True, eq=False)
class SiteStats:
    """Calibration statistics of a site's input: `second_moment` = sum of x x^T over `rows` rows, [in, in]; for an expert stack [E, in, in]
    and the number of rows of each expert, [E]. `held_out`, `held_rows`: the same of rows that no method is fitted to, where that was asked
    for. `gradients`: by its weight, of `passes.statistics.weight_gradients`. `input_taylor` [in] and `output_taylor` [out], float64:
    `passes.statistics.taylor`, where asked for. `output_moment` [out, out], float64: of the gradients at its output, summed over the rows
    of a sample, where they were gathered (`passes.statistics.sensitivity`). `massive`: of its rows, None where none is. `weighted`: whether
    rows count by the inverse of their squared norm. `shared`: what has been computed of a site, while its options are priced (`once`).

    Of a site whose model is rewritten in front of it, the moments are those of the inputs that it has now. `target` [out, in] is then the
    weight that a method which replaces it works on, whose outputs on these inputs are nearest to what the original gave on its own;
    `across` and `held_across` hold both inputs together, of the rows fitted to and of those held out. `notes`: for the report."""

    second_moment: Tensor
    rows: int | Tensor
    gradients: GradientStats | None = None
    input_taylor: Tensor | None = None
    output_taylor: Tensor | None = None
    output_moment: Tensor | None = None
    held_out: Tensor | None = None
    held_rows: int | Tensor = 0
    massive: Massive | None = None
    weighted: bool = False
    target: Tensor | None = None
    across: CrossMoments | None = None
    held_across: CrossMoments | None = None
    notes: tuple[str, ...] = ()
    shared: dict[Hashable, Any] | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a site's row says of its data."""
        dominated = self.massive is not None and self.massive.dominates
        return (*self.notes, *((self.massive.note(),) if dominated and self.massive is not None else ()))

    def once(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """What `find` gives; while a site is priced it is asked once for each key, whatever method asks."""
        if self.shared is None:
            return find()
        if key not in self.shared:
            self.shared[key] = find()
        return self.shared[key]

    @property
    def judged(self) -> Tensor:
        """The moment that errors are measured in: of the rows that were held out, of all where none were."""
        return self.second_moment if self.held_out is None else self.held_out

    def output_error(self, w: Tensor, approximation: Tensor) -> float:
        """Relative, against the outputs of the original weight `w` on the original's inputs, on the rows of `judged`."""
        across = self.across if self.held_out is None else self.held_across
        return relative_output_error(w, approximation, self.judged) if across is None else across.relative_error(w, approximation)

    def fitted_error(self, w: Tensor, approximation: Tensor) -> float:
        """The same on the rows that are fitted to."""
        return (
            relative_output_error(w, approximation, self.second_moment)
            if self.across is None
            else self.across.relative_error(w, approximation)
        )


@dataclass(frozen=True, slots=True)
class Preliminary:
    """What a method wants of gradients of the loss by a weight, before it trains (see `passes.statistics.weight_gradients`).

    `steps`: calibration batches, one gradient each. `group`: weights of one rule and group share their bases. `bases`, `scores`: whether
    they are wanted. `count`: how many entries of the weight are to learn.
    """

    steps: int
    group: str
    bases: bool
    scores: bool
    count: int


@dataclass(frozen=True)
class Peft:
    """How PEFT's folder format knows the adapters of a method that has a two-factor form: as its two factors of type LORA.

    `takes_in`: whether those are this method's own, so that such a folder can be read. `refused`: why none can be written.
    """

    type: ClassVar[str] = "LORA"
    takes_in: bool = False
    refused: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TrainingForm:
    """What the training graphs of a method need beside its weights.

    `graph`: with further inputs, `inputs` their examples by name, in order. `whole`: weights that must all train, `why` what is said of one
    that does not. `space`: what is searched, of a supernet.
    """

    graph: Graph
    inputs: Mapping[str, Tensor]
    whole: tuple[Const, ...]
    why: str
    space: SearchSpace | None = None


class FragmentBuilder(Protocol):
    """What `build` writes its fragment with; `passes.rewriting.site_builder.SiteBuilder` is the one that exists."""

    seed: int
    solution: Any
    """What the method's `solve` found ahead of `build`; None where it has none."""

    def weight(self) -> Tensor:
        """The original W [out, in] or [batch, out, in], stored dtype, loaded once per site."""
        ...

    def residual(self) -> Tensor:
        """W minus what the methods before this one stand for (W itself for the first); for updates."""
        ...

    def const(self, name: str, tensor: Tensor, *, trainable: bool = True, kind: ConstKind = "parameter") -> Const:
        """A new weight `<site path>.<method>.<name>`."""
        ...

    def shared(self, name: str, key: Hashable, tensor: Callable[[], Tensor]) -> Const:
        """A buffer that all sites which ask for the same key share, under the name that the first of them gives it."""
        ...

    def __call__(self, op: str, *args: Any, name: str | None = None, **attrs: Any) -> Value:
        """Any operator with one result, inside a body."""
        ...

    def bias(self) -> Value | None:
        """Inside a body: the bias [out] that the fragment may add itself (`adds_bias=True`), None where it has none to add."""
        ...

    def matmul(self, x: Value, const: Const, *, name: str | None = None) -> Value:
        """x [.., in] times const [in, out]; for an expert stack const is [batch, in, out] and the application's experts are picked."""
        ...

    def fragment(
        self,
        body: Callable[[Value], Value],
        consts: Sequence[Const],
        weight: Callable[[], Tensor],
        *,
        lookup: Callable[[Value], Value] | None = None,
        **more: Any,
    ) -> Fragment:
        """`body(rows)` is emitted once per application, `lookup(indices)` once per gather of a table; `weight()` is the dense matrix that
        they stand for; `more`: other fields of Fragment. The `adapter` of a method that trains adapters is all its trainable weights at
        scale 1 where `more` does not say otherwise."""
        ...


class Method(MethodLanguage, ABC):
    """What methods of all kinds have in common, beside what the spec language knows of them.

    `trains`: what its trainable weights are, None = nothing of it
    trains. `colour`: its number in the report's palette and `code` its short name there, None = one that is free, and its first letters.
    """

    trains: ClassVar[Trains | None] = None
    colour: ClassVar[int | None] = None
    code: ClassVar[str | None] = None

    def needs(self, spec: Any) -> frozenset[Statistic]:
        """Statistics of the calibration data that it reads."""
        return frozenset()

    def fitted(self, spec: Any) -> bool:
        """Whether what it makes is fitted to the second moment, so that errors on the same rows say too little."""
        return Statistic.INPUT_SECOND_MOMENT in self.needs(spec)

    def for_inference(self, graph: Graph) -> Graph:
        """The graph that is exported to run: without what only training needs of this method's weights."""
        return graph

    def for_training(self, graph: Graph, adapters: Sequence[Adapter]) -> TrainingForm | None:
        """The graph that is differentiated, where it differs. `adapters`: those of this method."""
        return None

    def configured(self, graph: Graph, adapters: Sequence[Adapter], configuration: Configuration) -> Graph | None:
        """A supernet in one configuration; None where these adapters are none. InputError for what it cannot be."""
        return None

    def spec_of(self, spec: schema.Spec, adapters: Sequence[Adapter], configuration: Configuration) -> dict[str, Any] | None:
        """The spec that gives the model of a configuration, as plain data; None where these adapters are no supernet."""
        return None


class SiteMethod(Method):
    """One way to treat a single matmul, or an embedding table.

    `beside`: the form of it for a site whose weight a method before it has replaced; a method that has one works on the dense weight
    otherwise. `peft`: how PEFT knows its adapters.
    """

    peft: ClassVar[Peft | None] = None

    @abstractmethod
    def check(self, site: Site, spec: Any) -> Reject | None:
        """Why this site cannot be treated, from shapes and types only (no weight is read). Size is judged elsewhere, from `cost`."""

    @abstractmethod
    def choices(self, site: Site, spec: Any) -> Iterable[Choice]:
        """What `auto` may pick; exactly one choice otherwise. Only for sites that `check` let pass."""

    @abstractmethod
    def cost(self, site: Site, spec: Any, choice: Choice) -> Cost:
        """What the site takes under that choice, from shapes only."""

    @abstractmethod
    def errors(self, site: Site, spec: Any, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        """The error of each choice, all from one decomposition."""

    @abstractmethod
    def build(self, site: Site, spec: Any, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        """The fragment; its own `choice` says what was taken in the end."""

    @abstractmethod
    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Back to one dense (W, bias or None) from the tensors of the fragment's consts by their short names."""

    @property
    def beside(self) -> SiteMethod | None:
        """See above."""
        return None

    def impossible(self, sites: Sequence[Site], spec: Any) -> str | None:
        """Why the settings fit none of the sites of a rule (an error of the spec), None where they fit one."""
        return None

    def solve(self, site: Site, spec: Any, choice: Choice, stats: SiteStats | None, weight: Tensor, seed: int) -> Any:
        """The pure part of `build`, which finds it as `b.solution`. It runs for several sites at a time, on one thread each, so it must
        touch nothing but its arguments."""
        return None

    def preliminary(self, site: Site, spec: Any) -> Preliminary | None:
        """What it wants of gradients by the site's weight before training; None = nothing."""
        return None

    def equalises(self, spec: Any) -> bool:
        """Whether scales of the site's input channels are to be moved between its weight and what makes its input, before it is built
        (`passes.rewriting.equalise`)."""
        return False

    def trial_error(self, site: Site, spec: Any, stats: SiteStats) -> float:
        """The relative error of the outputs that such scales are judged by, of a site whose weight has them."""
        raise VerifyError(f"{self.name} has no error to judge scales by")

    def splits_weight(self, spec: Any) -> str | None:
        """How it makes the dense weight its own ("works on"), which must then still be there; None where it leaves it alone."""
        return None

    def times(self, site: Site, spec: Any, choice: Choice, export: schema.Export) -> tuple[tuple[int, float], ...]:
        """(rows of x, predicted time over that of the dense matmul) on the targets of the export, where that is no part of `cost`."""
        return ()

    def two_factor(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """(down [.., in, r], up [.., r, out]) with x @ down @ up = what is added to x W^T, from the tensors as for `merge`; None where the
        method has no such form. ExportError where these tensors have none."""
        return None

    def base_settings(self, spec: Any) -> Mapping[str, Any] | None:
        """What the base in the place of the weight is made anew by, where it takes an update in; None where it keeps its form."""
        return None

    def base_again(self, settings: Mapping[str, Any]) -> tuple[SiteMethod, Any]:
        """(the method, its settings) that make such a base out of another weight."""
        raise VerifyError(f"the base of {self.name} cannot be made anew")

    def refuse_merge(self, adapter: Adapter, read: Callable[[str], Tensor]) -> InputError | None:
        """Why this adapter cannot be merged yet. `read`: the tensor of a short name; all adapters are asked before any is merged, so a
        method reads no more than it must."""
        return None


class ReplaceMethod(SiteMethod):
    """Takes the place of the dense matmul; its trainable weights are factors of the weight."""

    kind: ClassVar[MethodKind] = "replace"
    trains: ClassVar[Trains | None] = "factors"


class UpdateMethod(SiteMethod):
    """Is added to what stays, or to what took its place; its trainable weights are adapters."""

    kind: ClassVar[MethodKind] = "update"
    trains: ClassVar[Trains | None] = "adapters"


class BlockMethod(Method):
    """One way to prune a whole block. `choices[k].rank` is the width of the block that the choice leaves."""

    kind: ClassVar[MethodKind] = "block"

    @abstractmethod
    def reads(self, block: Block, spec: Any) -> tuple[Site, ...]:
        """The sites whose statistics it reads."""

    @abstractmethod
    def check(self, block: Block, spec: Any) -> Reject | None:
        """Why this block cannot be pruned, from shapes only."""

    @abstractmethod
    def choices(self, block: Block, spec: Any) -> Iterable[Choice]:
        """What `auto` may pick; exactly one choice otherwise. Only for blocks that `check` let pass."""

    @abstractmethod
    def counts(self, block: Block, spec: Any, choice: Choice) -> Counts:
        """How many of each unit of the block the choice leaves."""

    @abstractmethod
    def costs(self, block: Block, spec: Any, choice: Choice) -> Mapping[Site, Cost]:
        """What each site of the block takes under that choice."""

    @abstractmethod
    def errors(self, block: Block, spec: Any, choices: Sequence[Choice], stats: Mapping[Site, SiteStats]) -> Sequence[Error]:
        """The error of each choice at the last matmul of the block."""

    @abstractmethod
    def build(self, block: Block, spec: Any, choice: Choice, stats: Mapping[Site, SiteStats], b: Builder) -> Patch:
        """The narrower block, written with `b` over the graph that it was found in."""

    def impossible(self, blocks: Sequence[Block], spec: Any) -> str | None:
        """Why the settings fit no block of a rule (an error of the spec), None where they fit one."""
        return None

    def shots(self, spec: Any) -> int:
        """In how many steps it prunes, each scored on what the one before left."""
        return 1

    def schedule(self, block: Block, spec: Any) -> tuple[Choice, ...]:
        """The choice of each shot."""
        return tuple(self.choices(block, spec))


Methods: TypeAlias = Mapping[str, Method]
"""By name."""


def site_method(methods: Methods, name: str) -> SiteMethod:
    """The method of that name, which treats single matmuls. InputError where it is not installed, VerifyError for a block method: claims
    are divided before."""
    found = named_method(methods, name)
    if not isinstance(found, SiteMethod):
        raise VerifyError(f"{name} is of kind {found.kind}, where a method of single matmuls is asked for")
    return found


def block_method(methods: Methods, name: str) -> BlockMethod:
    """The method of that name, which prunes blocks. InputError where it is not installed, VerifyError for another."""
    found = named_method(methods, name)
    if not isinstance(found, BlockMethod):
        raise VerifyError(f"{name} is of kind {found.kind}, where a method of blocks is asked for")
    return found


def named_method(methods: Methods, name: str) -> Method:
    """The method of that name. InputError where it is not installed: a folder may come from another machine."""
    if name not in methods:
        raise InputError(f"the method {name} is not installed here")
    return methods[name]


def names_of(methods: Methods, trains: Trains) -> tuple[str, ...]:
    """The methods whose weights train under that word."""
    return tuple(name for name, method in methods.items() if method.trains == trains)


def dense_cost(site: Site) -> Cost:
    """What the site takes as it is, its bias excluded; `macs` per row of x, summed over applications."""
    parameters, size = site.held
    return Cost(parameters, size, site.in_features * site.out_features * len(site.applications))


def refuse_larger(site: Site, cost: Cost) -> Reject | None:
    """The law of every replacing method: it may not take more bytes than the dense weight (`force: true` overrides)."""
    dense = dense_cost(site).bytes
    if cost.bytes <= dense:
        return None
    return Reject(f"does not pay: {cost.bytes:,} bytes, the dense weight has {dense:,} (force: true rewrites it all the same)")
