"""The spec language as frozen dataclasses: every key with its type, default, limits and documentation.

The loader reads through them and the JSON Schema is generated from them, so this file is the reference of the language.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, Self

from matmorph.errors import Position, SpecError, did_you_mean
from matmorph.optimizers import OPTIMIZERS, AdamW, AnyOptimizer, optimizer_name
from matmorph.runtime.format.distillation import DISTILL, Distill
from matmorph.runtime.targets import TARGETS, chosen_targets
from matmorph.specs.kinds import JsonSchema, Name
from matmorph.specs.match import Match
from matmorph.specs.notations import Count, Rank, Size, Width
from matmorph.specs.selectors import parse_match
from matmorph.specs.tree import Data, MapTree, Tree, from_data
from matmorph.specs.typed import ByName, Notation, read_dataclass, to_plain

__all__ = [
    "ANY_OF",
    "AnyOf",
    "Budget",
    "Calibration",
    "Count",
    "Export",
    "Match",
    "MethodUse",
    "Optimizer",
    "ParameterSelector",
    "Pays",
    "Rank",
    "Rule",
    "Size",
    "Spec",
    "Stage",
    "Tolerance",
    "Train",
    "checked_optimizer",
    "is_open",
    "read_dataclass",
]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest errors a rewritten site may have; `on_exceed` says what happens above them."""

    weight_error: float | None = field(
        default=None, metadata={"doc": "largest |W - W'| / |W| (Frobenius) of a site", "exclusive_minimum": 0}
    )
    output_error: float | None = field(
        default=None, metadata={"doc": "largest relative output error of a site on the calibration data", "exclusive_minimum": 0}
    )
    on_exceed: Literal["fail", "roll_back"] = field(
        default="fail", metadata={"doc": "fail: name the worst site and stop; roll_back: undo the worst sites"}
    )
    at: Position | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.weight_error is None and self.output_error is None:
            raise ValueError("give weight_error, output_error or both")


@dataclass(frozen=True, slots=True)
class Calibration:
    """How many calibration samples are read, and what says how much an error at a site matters."""

    samples: int = field(default=256, metadata={"doc": "number of samples that are read (fewer where the data ends)", "minimum": 1})
    sensitivity: Literal["none", "output", "kl", "fisher"] = field(
        default="none",
        metadata={
            "doc": "output: errors count as an output of the model feels them; kl: as the distribution over its classes does, which output "
            "means too for a language model's logits; fisher: as train.loss does; none: relative to each site"
        },
    )
    output: str | None = field(
        default=None, metadata={"doc": "the output of the model that sensitivity: output or kl is about; the first by default"}
    )
    order: Literal["parallel", "sequential"] = field(
        default="parallel",
        metadata={
            "doc": "parallel: matmuls are fitted to the inputs of the model as it was; sequential: each to those behind what was rewritten "
            "before it, so that its outputs come near to the original's"
        },
    )
    token_weights: Literal["none", "norm"] = field(
        default="none",
        metadata={"doc": "norm: each row of an input counts by the inverse of its squared norm; none: by its size"},
    )

    def __post_init__(self) -> None:
        if self.output is not None and self.sensitivity not in ("output", "kl"):
            raise ValueError(f"output goes with sensitivity: output or kl, and it is {self.sensitivity}")


DEFAULT_OPSET = 21
ATTENTION_OPSET = 23
"""The first opset with an operator for attention."""


@dataclass(frozen=True, slots=True)
class Export:
    """What the ONNX file is written for."""

    opset: int | None = field(
        default=None,
        metadata={"doc": "ONNX opset; 21 by default, 23 where attention becomes an operator of it", "minimum": 18, "maximum": 23},
    )
    precision: Literal["fp32", "fp16", "bf16", "keep"] = field(
        default="fp32", metadata={"doc": "type of the exported weights and activations; keep: as in the model"}
    )
    target: tuple[str, ...] = field(
        default=tuple(target.name for target in TARGETS.values() if target.default),
        metadata={"doc": "devices on which ONNX Runtime must run the file", "choices": TARGETS.keys(), "min_items": 1},
    )
    tokens: tuple[int, ...] = field(
        default=(1, 16, 256), metadata={"doc": "numbers of rows for which contractions are planned", "minimum": 1, "min_items": 1}
    )
    activations: Literal["fp32", "int8"] = field(default="fp32", metadata={"doc": "type in which quantised matmuls multiply"})
    codebook: Literal["rebuild", "packed"] = field(
        default="rebuild", metadata={"doc": "rebuild: dense again when the session loads; packed: codes stay packed"}
    )
    adapters: Literal["inline", "inputs"] = field(default="inline", metadata={"doc": "inputs: adapters are inputs of the graph"})
    logits: Literal["all", "last"] = field(
        default="all", metadata={"doc": "of a language model: of all places, or of the last one of each row alone, [batch, 1, words]"}
    )
    fuse: Literal["auto", "none"] = field(
        default="auto",
        metadata={"doc": "auto: norms, and quantised q, k and v for gqa, become one operator where targets have it; none: as traced"},
    )
    attention: Literal["auto", "plain", "standard", "gqa"] = field(
        default="auto",
        metadata={
            "doc": "over a key/value cache: plain: as it was traced; standard: ONNX's Attention; gqa: GroupQueryAttention, one buffer for "
            "past and present, padding on the right only; auto: standard, or plain under an opset without it"
        },
    )
    cache: Literal["float", "int8"] = field(
        default="float",
        metadata={"doc": "of keys and values: float: in the type they are computed in; int8: in codes, a scale for each token of a head"},
    )

    @property
    def written_opset(self) -> int:
        """The opset of the file."""
        return DEFAULT_OPSET if self.opset is None else self.opset

    @property
    def integer_products(self) -> bool:
        """Whether codes with a scale per output channel are multiplied in integers: asked for, and on every target at hand."""
        return self.activations == "int8" and all(target.multiplies_integers for target in chosen_targets(self.target))

    def __post_init__(self) -> None:
        if self.attention == "standard" and self.opset is not None and self.opset < ATTENTION_OPSET:
            raise ValueError(f"attention: standard is an operator of opset {ATTENTION_OPSET}, and opset is {self.opset}")
        if len(set(self.target)) < len(self.target):
            raise ValueError(f"target names a device twice: {', '.join(self.target)}")


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that `rank: auto` and `any_of` are allocated under; all given limits hold."""

    parameters: Count | None = field(default=None, metadata={"doc": "parameters, as a percentage or a count"})
    bytes: Size | None = field(default=None, metadata={"doc": "bytes of the data file, as a percentage or a size"})
    macs: Count | None = field(default=None, metadata={"doc": "multiply-accumulates, as a percentage or a count"})
    of: Literal["matched", "model"] = field(
        default="model", metadata={"doc": "what is limited, and what a percentage is of: the matched sites or the whole model"}
    )
    at: Position | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.parameters is None and self.bytes is None and self.macs is None:
            raise ValueError("give parameters, bytes, macs or several of them")


@dataclass(frozen=True, init=False)
class Optimizer(ByName):
    """One optimizer by name."""

    chosen: AnyOptimizer

    def __init__(self, **settings: AnyOptimizer | None) -> None:
        """ValueError where not exactly one is given."""
        given = [name for name in OPTIMIZERS if settings.get(name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one optimizer ({', '.join(OPTIMIZERS)}), got {' and '.join(given) or 'none'}")
        object.__setattr__(self, "chosen", settings[given[0]])

    @classmethod
    def table(cls) -> Mapping[str, type[AnyOptimizer]]:
        return OPTIMIZERS

    @property
    def name(self) -> str:
        return optimizer_name(self.chosen)


def checked_optimizer(optimizer: AnyOptimizer) -> AnyOptimizer:
    """An optimizer made in Python, held to the limits that a spec's is held to. SpecError naming the setting, or for another object."""
    if not isinstance(optimizer, tuple(OPTIMIZERS.values())):
        names = ", ".join(kind.__name__ for kind in OPTIMIZERS.values())
        raise SpecError(f"expected an optimizer ({names}), got {type(optimizer).__name__}", keypath="optimizer")
    return read_dataclass(Optimizer, from_data({optimizer_name(optimizer): to_plain(optimizer)})).chosen


@dataclass(frozen=True, slots=True)
class ParameterSelector(Notation):
    """Which parameters: one of the words of `GROUPS`, or a glob over `compiled.module.named_parameters()` (`*` one component, `**` any)."""

    text: str
    at: Position | None = field(default=None, compare=False, repr=False)
    keypath: str = field(default="", compare=False, repr=False)

    GROUPS: ClassVar[tuple[str, ...]] = ("adapters", "factors", "all")
    EXPECTED: ClassVar[str] = "adapters, factors, all, or a glob over parameter names"

    @classmethod
    def from_tree(cls, tree: Tree, beside: Mapping[str, Tree]) -> Self:
        return cls(Name(cls.EXPECTED).read(tree), tree.at, tree.keypath)

    @classmethod
    def schema(cls) -> JsonSchema:
        return {"type": "string", "minLength": 1}

    def plain(self) -> Data:
        return self.text


@dataclass(frozen=True, slots=True)
class Train:
    """What the training graphs are built for."""

    loss: Literal["cross_entropy", "causal_lm", "mse", "cosine", "distill"] = field(metadata={"doc": "loss of the training graph"})
    output: str | None = field(default=None, metadata={"doc": "output of the model that the loss reads; the first by default"})
    ignore_index: int = field(default=-100, metadata={"doc": "label that counts nothing"})
    optimizer: Optimizer = field(default=Optimizer(adamw=AdamW(lr=1e-4)), metadata={"doc": "optimizer and its settings"})
    trainable: tuple[ParameterSelector, ...] = field(
        default=(ParameterSelector("adapters"),),
        metadata={"doc": "adapters, factors, all, or globs over parameter names", "min_items": 1},
    )
    frozen: tuple[ParameterSelector, ...] = field(default=(), metadata={"doc": "as trainable, but kept fixed"})
    distill: Distill | None = field(default=None, metadata={"doc": "settings of the loss of that name"})
    at: Position | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.distill is not None and self.loss != DISTILL:
            raise ValueError(f"distill holds settings of loss: {DISTILL}, and the loss is {self.loss}")


@dataclass(frozen=True, slots=True)
class Pays:
    """What a rewrite must gain beyond bytes, or be rejected."""

    time: bool | None = field(
        default=None,
        metadata={
            "doc": "true: reject a rewrite that is predicted to be slower; left out: a budget does not choose what is predicted to take "
            "more than twice the time; false: time does not count"
        },
    )


@dataclass(frozen=True, slots=True)
class MethodUse:
    """One method of a rewrite with its settings: `spec` is an instance of the method's Spec. `at`: the method's key."""

    method: str
    spec: Any
    at: Position | None = field(default=None, compare=False, repr=False)


_PAYS = Pays()
ANY_OF = "any_of"


@dataclass(frozen=True, slots=True)
class AnyOf:
    """The alternatives of `any_of:`, the settings of a MethodUse that is called so; () among them is `keep`."""

    alternatives: tuple[tuple[MethodUse, ...], ...]


def plain_uses(uses: tuple[MethodUse, ...]) -> Any:
    """A rewrite as plain data: a method, a list of methods, any_of or keep."""
    methods = [{use.method: _plain_settings(use.spec)} for use in uses]
    return methods[0] if len(methods) == 1 else methods or "keep"


def _plain_settings(spec: Any) -> Any:
    return [plain_uses(uses) for uses in spec.alternatives] if isinstance(spec, AnyOf) else to_plain(spec)


def is_open(use: MethodUse) -> bool:
    """Whether the budget decides a part of it: `any_of`, `rank: auto`, `bits: auto`, `width: auto`."""
    values = [getattr(use.spec, entry.name) for entry in fields(use.spec)] if is_dataclass(use.spec) else []
    automatic = any(isinstance(value, Rank | Width) and value.kind == "auto" for value in values)
    return use.method == ANY_OF or automatic or getattr(use.spec, "bits", None) == "auto"


def as_match(given: Any) -> Match:
    """A match as it is, or read from a dict with the keys of a spec file. SpecError where it cannot be."""
    if isinstance(given, Match):
        return given
    tree = from_data({"match": given}).items["match"]
    if not isinstance(tree, MapTree):
        raise tree.error(f"expected a dict of conditions, got {given!r:.60}")
    return parse_match(tree, {})


def as_rewrite(given: Any, keypath: str = "rewrite") -> tuple[MethodUse, ...]:
    """A rewrite from objects: a method with its settings, a list of them, {"any_of": [...]} or "keep". SpecError for anything else."""
    if isinstance(given, MethodUse):
        return (given,)
    if isinstance(given, str) and given == "keep":
        return ()
    if isinstance(given, Mapping) and list(given) == [ANY_OF] and isinstance(given[ANY_OF], list | tuple):
        each = (as_rewrite(uses, f"{keypath}.{ANY_OF}[{number}]") for number, uses in enumerate(given[ANY_OF]))
        return (MethodUse(ANY_OF, AnyOf(tuple(each))),)
    if isinstance(given, list | tuple) and all(isinstance(use, MethodUse) for use in given):
        return tuple(given)
    near = did_you_mean(given, ["keep"]) if isinstance(given, str) else ""
    hint = ["a method by its name: matmorph.method(NAME)(...); or the whole rule as a dict"] if isinstance(given, str | Mapping) else []
    expected = 'a method with its settings, a list of them, {"any_of": [...]} or "keep"'
    raise SpecError(f"expected {expected}, got {given!r:.60}{near}", keypath=keypath, details=hint)


@dataclass(frozen=True, slots=True, init=False)
class Rule:
    """Which matmuls, and what becomes of them; the first rule that matches one owns it.

    `rewrite` () is `keep`; after loading, `name` is never empty. In Python `match` is a dict with the keys of a spec file, `rewrite` a
    method with its settings, a list of them, {"any_of": [...]} or "keep"; SpecError where one of them cannot be.
    """

    match: Match = field(compare=False, metadata={"doc": "conditions that all hold for a site of this rule"})
    rewrite: tuple[MethodUse, ...] = field(metadata={"doc": "a method, a list of methods (a replacing one first), any_of, or keep"})
    name: str = field(default="", metadata={"doc": "name in reports and for extends; rule-N by default"})
    expect: int | None = field(default=None, metadata={"doc": "how many sites the rule owns; another count is an error", "minimum": 1})
    optional: bool = field(default=False, metadata={"doc": "no error when the rule matches nothing"})
    force: bool = field(default=False, metadata={"doc": "rewrite even where it takes more bytes than the dense matmul"})
    pays: Pays = field(default=_PAYS, metadata={"doc": "what else a rewrite must gain"})
    untie: bool = field(default=False, metadata={"doc": "separate a head from the embedding table it shares"})
    at: Position | None = field(default=None, compare=False, repr=False)

    def __init__(
        self,
        match: Match | Mapping[str, Any],
        rewrite: MethodUse | Sequence[MethodUse] | Mapping[str, Any] | str,
        name: str = "",
        expect: int | None = None,
        optional: bool = False,
        force: bool = False,
        pays: Pays | Mapping[str, Any] = _PAYS,
        untie: bool = False,
        at: Position | None = None,
    ) -> None:
        given = {"name": name, "expect": expect, "optional": optional, "force": force, "untie": untie, "at": at}
        read = pays if isinstance(pays, Pays) else read_dataclass(Pays, from_data({"pays": pays}).items["pays"])
        for key, value in {"match": as_match(match), "rewrite": as_rewrite(rewrite), "pays": read, **given}.items():
            object.__setattr__(self, key, value)

    @property
    def is_open(self) -> bool:
        """Whether the budget decides what becomes of its sites."""
        return any(is_open(use) for use in self.rewrite)

    @property
    def alternatives(self) -> tuple[tuple[MethodUse, ...], ...]:
        """What the budget chooses from: those of `any_of`, else the rewrite as it is or, where it says auto, `keep`."""
        [*uses] = self.rewrite
        if len(uses) == 1 and isinstance(uses[0].spec, AnyOf):
            return uses[0].spec.alternatives
        return (self.rewrite, ()) if self.is_open else (self.rewrite,)


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of selecting and rewriting; it sees what the stages before it made.

    `rules:` without `stages:` is one stage with the name None. `tolerance`, `calibration` and `budget` are already those of the spec where
    the stage says nothing.
    """

    name: str | None = field(metadata={"doc": "name of the stage"})
    rules: tuple[Rule, ...] = field(metadata={"doc": "rules in order: the first that matches a site owns it", "min_items": 1})
    tolerance: Tolerance | None = field(default=None, metadata={"doc": "over the tolerance of the spec, key by key"})
    calibration: Calibration = field(default=Calibration(), metadata={"doc": "over the calibration of the spec, key by key"})
    budget: Budget | None = field(default=None, metadata={"doc": "over the budget of the spec, key by key"})


@dataclass(frozen=True, slots=True)
class Spec:
    """A whole spec, read and checked.

    `resolved` is plain data (extends applied, defaults of methods, calibration and export written out) that loads to an equal Spec; matches
    are compared through it. `file` is the source as the user gave it ("<dict>" for a dict).
    """

    version: int
    name: str
    stages: tuple[Stage, ...]
    tolerance: Tolerance | None
    calibration: Calibration
    export: Export
    train: Train | None
    seed: int
    strict: bool
    file: str = field(compare=False)
    resolved: dict[str, Any] = field(hash=False, repr=False)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of all stages, in order."""
        return tuple(rule for stage in self.stages for rule in stage.rules)
