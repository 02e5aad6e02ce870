"""What a method is, and which there are. ONE FILE = ONE METHOD: its spec, its mathematics, its fragment, its choices, its merge."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from matmorph.errors import InputError
from matmorph.ir.core import Const, ConstKind, Value
from matmorph.ir.site import Choice, Cost, Fragment, Reject, Site, Statistic
from matmorph.passes.linalg.hosvd import GradientStats

Kind = Literal["replace", "update", "block"]
"""replace: takes the place of the dense matmul; update: is added to what stays; block: prunes a whole block (its steps are those of
`passes.block_pass.BlockMethod`; the kind for training plans comes later)."""

ENTRY_POINT_GROUP = "matmorph.methods"

_BUILT_IN: Mapping[str, str] = {
    "low_rank": "matmorph.passes.methods.low_rank:LowRank",
    "quantize": "matmorph.passes.methods.quantize:Quantize",
    "loftq": "matmorph.passes.methods.loftq:LoftQ",
    "qlora": "matmorph.passes.methods.qlora:QLora",
    "tt": "matmorph.passes.methods.tt:TT",
    "tt_lora": "matmorph.passes.methods.tt_lora:TTLora",
    "lora": "matmorph.passes.methods.lora:Lora",
    "glora": "matmorph.passes.methods.glora:Glora",
    "sparse_grad": "matmorph.passes.methods.sparse_grad:SparseGrad",
    "transact": "matmorph.passes.methods.transact:Transact",
}


@dataclass(frozen=True, slots=True)
class Error:
    """What one choice would cost in accuracy; None where that error was not asked for (see `SiteRow` for the first two). `felt_error`:
    |C^T (W - W') L| / |C^T W L|, as the model behind the site feels it (`passes.sensitivity`)."""

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
    and the number of rows of each expert, [E]. `gradients`: by its weight, of `passes.preliminary`. `input_taylor` [in] and `output_taylor`
    [out], float64: `passes.taylor`, where asked for. `output_moment` [out, out], float64: of the gradients at its output, summed over the
    rows of a sample, where they were gathered (`passes.sensitivity`)."""

    second_moment: Tensor
    rows: int | Tensor
    gradients: GradientStats | None = None
    input_taylor: Tensor | None = None
    output_taylor: Tensor | None = None
    output_moment: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Preliminary:
    """What a method wants of gradients of the loss by a weight, before it trains (see `passes.preliminary`).

    `steps`: calibration batches, one gradient each. `group`: weights of one rule and group share their bases. `bases`, `scores`: whether
    they are wanted. `count`: how many entries of the weight are to learn.
    """

    steps: int
    group: str
    bases: bool
    scores: bool
    count: int


class FragmentBuilder(Protocol):
    """What `build` writes its fragment with; `passes.fragment.SiteBuilder` is the one that exists."""

    seed: int
    solution: Any
    """What the method's `solve` found ahead of `build`, where it has one; None otherwise."""

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
        they stand for; `more`: other fields of Fragment."""
        ...


@runtime_checkable
class Method(Protocol):
    """One way to treat a matmul. Stateless: a method is a class without fields, made once.

    A method may also have `solve(site, spec, choice, stats, weight, seed)`: the pure part of `build`, which then finds its result as
    `b.solution`. It runs for several sites at a time, on one thread each, so it must touch nothing but its arguments. And it
    may have `impossible(sites, spec)`: why its settings fit none of the sites of a rule (an error of the spec), None where they fit one.

    A Spec with fields `tokens` and `target` gets those of `export` where they are None. A method may have `preliminary(site, spec)`: what
    it wants of gradients by the site's weight, None = nothing.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    Spec: ClassVar[type]

    def needs(self, spec: Any) -> frozenset[Statistic]:
        """Statistics of the calibration data that `build` reads."""
        ...

    def check(self, site: Site, spec: Any) -> Reject | None:
        """Why this site cannot be treated, from shapes and types only (no weight is read). Size is judged elsewhere, from `cost`."""
        ...

    def choices(self, site: Site, spec: Any) -> Iterable[Choice]:
        """What `auto` may pick; exactly one choice otherwise. Only for sites that `check` let pass."""
        ...

    def cost(self, site: Site, spec: Any, choice: Choice) -> Cost:
        """What the site takes under that choice, from shapes only."""
        ...

    def errors(self, site: Site, spec: Any, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        """The error of each choice, all from one decomposition."""
        ...

    def build(self, site: Site, spec: Any, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        """The fragment; its own `choice` says what was taken in the end."""
        ...

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Back to one dense (W, bias or None) from the tensors of the fragment's consts by their short names."""
        ...


Methods: TypeAlias = Mapping[str, Method]
"""All methods of a run, by their names in a spec."""


def dense_cost(site: Site) -> Cost:
    """What the site takes as it is, its bias excluded; `macs` per row of x, summed over applications."""
    size = site.const.tensor.torch_dtype.itemsize
    return Cost(site.parameters, site.parameters * size, site.in_features * site.out_features * len(site.applications))


def refuse_larger(site: Site, cost: Cost) -> Reject | None:
    """The law of every replacing method: it may not take more bytes than the dense weight (`force: true` overrides)."""
    dense = dense_cost(site).bytes
    if cost.bytes <= dense:
        return None
    return Reject(f"does not pay: {cost.bytes:,} bytes, the dense weight has {dense:,} (force: true rewrites it all the same)")


def method_table() -> Mapping[str, type[Method]]:
    """All methods by name: ours, and those that installed packages announce in the entry-point group `matmorph.methods`.

    Raises InputError where two announce the same name, where a class is no method, or where a package cannot be imported.
    """
    found: dict[str, tuple[str, type[Method]]] = {name: ("matmorph", _import(place)) for name, place in _BUILT_IN.items()}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: (point.name, point.value)):
        owner = point.dist.name if point.dist is not None else point.value
        if point.name in found:
            raise InputError(f"two packages announce a method named {point.name}: {found[point.name][0]} and {owner}")
        found[point.name] = (owner, _load(point, owner))
    return {name: method for name, (_, method) in found.items()}


def _import(place: str) -> type[Method]:
    module, _, name = place.partition(":")
    method: type[Method] = getattr(import_module(module), name)
    return method


def _load(point: EntryPoint, owner: str) -> type[Method]:
    try:
        method = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"the method {point.name} of {owner} cannot be imported: {error}") from error
    missing = [part for part in _PARTS if not hasattr(method, part)]
    if missing or not isinstance(method, type):
        raise InputError(f"the method {point.name} of {owner} lacks {', '.join(missing) or 'a class'}")
    found: type[Method] = method
    if found.name != point.name:
        raise InputError(f"the method {point.name} of {owner} calls itself {found.name}")
    return found


_PARTS: tuple[str, ...] = ("name", "kind", "Spec", "needs", "check", "choices", "cost", "errors", "build", "merge")
