"""The layout of a spec file, and how its parts that need more than a type hint are read: matches, rewrites, named selections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from matmorph.errors import SpecError, VerifyError, did_you_mean
from matmorph.specs.conditions.nesting import MappingClause
from matmorph.specs.kinds import Integer, JsonSchema, Kind, ListOf, Name, plain_text, wrong
from matmorph.specs.notations import Rank, Width
from matmorph.specs.schema import ANY_OF, AnyOf, Budget, Calibration, Export, Match, MethodUse, Rule, Stage, Tolerance, Train
from matmorph.specs.selectors import parse_match
from matmorph.specs.tree import MapTree, Scalar, SeqTree, Tree
from matmorph.specs.typed import Record

LANGUAGE_VERSION = 1
METHOD_KINDS = ("replace", "update", "block")
_A_BUDGET = "for instance, at the top of the spec: budget: {parameters: 60%, of: matched}"


@dataclass(frozen=True, slots=True)
class Document:
    """A spec of matmorph: which matmuls of a model to replace, and by what."""

    version: int = field(metadata={"doc": "version of the spec language", "choices": (LANGUAGE_VERSION,)})
    name: str | None = field(default=None, metadata={"doc": "name of the spec; that of its file by default"})
    extends: tuple[str, ...] = field(
        default=(), metadata={"doc": "specs this one is built on: library names, or paths of .yaml files relative to this file"}
    )
    select: Mapping[str, MapTree] = field(default_factory=dict, metadata={"doc": "named selections, for `use` in a match"})
    rules: tuple[Rule, ...] = field(default=(), metadata={"doc": "rules in order: the first that matches a site owns it", "min_items": 1})
    stages: tuple[Stage, ...] = field(default=(), metadata={"doc": "several runs of select ... rewrite, instead of rules", "min_items": 1})
    budget: Budget | None = field(default=None, metadata={"doc": "limits for what is allocated"})
    tolerance: Tolerance | None = field(default=None, metadata={"doc": "largest errors, and what happens above them"})
    calibration: Calibration = field(default=Calibration(), metadata={"doc": "what is read of the calibration data"})
    export: Export = field(default=Export(), metadata={"doc": "what the ONNX file is written for"})
    train: Train | None = field(default=None, metadata={"doc": "what training graphs are built for"})
    seed: int = field(default=0, metadata={"doc": "seed of every method that draws at random", "minimum": 0})
    strict: bool = field(default=False, metadata={"doc": "a rejected or clamped rewrite of a matched site is an error"})


@dataclass(frozen=True)
class MatchKind:
    """`match:`, or a named selection."""

    named: Mapping[str, MapTree]
    expected: str = "a mapping of conditions"

    def read(self, tree: Tree) -> Match:
        if not isinstance(tree, MapTree):
            raise wrong(tree, self.expected)
        return parse_match(tree, self.named)

    def schema(self) -> JsonSchema:
        return MappingClause.schema()


@dataclass(frozen=True)
class SelectKind:
    """`select:`: a mapping of names to matches; each is read, also where no rule uses it."""

    expected: str = "a mapping of names to conditions"

    def read(self, tree: Tree) -> dict[str, MapTree]:
        named = named_selections(tree)
        for name in named:
            MatchKind(named).read(named[name])
        return named

    def schema(self) -> JsonSchema:
        return {"type": "object", "additionalProperties": MappingClause.schema()}


def named_selections(tree: Tree | None) -> dict[str, MapTree]:
    """The mappings under `select:`; SpecError where it is anything else."""
    if tree is None:
        return {}
    if not isinstance(tree, MapTree):
        raise wrong(tree, SelectKind().expected)
    named: dict[str, MapTree] = {}
    for name, item in tree.items.items():
        if not isinstance(item, MapTree):
            raise wrong(item, "a mapping of conditions")
        named[name] = item
    return named


def example_of(methods: Mapping[str, type[Any]]) -> str:
    """How a method looks in a spec."""
    return next((method.example for method in methods.values() if method.example is not None), "{METHOD: {KEY: VALUE}}")


@dataclass(frozen=True)
class RewriteKind:
    """`rewrite:`: one method, a list of methods, `any_of`, or `keep`.

    For each place that a budget has to decide, `opened` gets the error that it is where there is no budget."""

    methods: Mapping[str, type[Any]]
    opened: list[SpecError] = field(default_factory=list)

    @property
    def expected(self) -> str:
        return f"{self.one}, a list of methods, any_of or keep"

    @property
    def one(self) -> str:
        """A method, for people."""
        return f"a method such as {example_of(self.methods)}"

    def read(self, tree: Tree) -> tuple[MethodUse, ...]:
        if isinstance(tree, MapTree) and "any_of" in tree.items:
            return self.any_of(tree)
        return self.item(tree)

    def item(self, tree: Tree) -> tuple[MethodUse, ...]:
        if isinstance(tree, Scalar):
            if tree.text != "keep":
                raise wrong(tree, self.expected, did_you_mean(plain_text(tree), ["keep", *self.methods]))
            return ()
        if isinstance(tree, SeqTree):
            if not tree.items:
                raise tree.error("the list of methods is empty; write keep to leave the matmuls as they are")
            return self.compose([(self.method(item), item) for item in tree.items])
        return self.compose([(self.method(tree), tree)])

    def method(self, tree: Tree) -> MethodUse:
        if not isinstance(tree, MapTree):
            raise wrong(tree, self.one)
        for name in tree.items:
            if name not in self.methods:
                raise tree.key_error(name, f"unknown method{did_you_mean(name, self.methods)}", [f"methods: {', '.join(self.methods)}"])
        if len(tree.items) != 1:
            raise tree.error(f"one method per mapping, got {', '.join(tree.items) or 'none'}; several go into a list")
        [(name, settings)] = tree.items.items()
        record = Record(self.methods[name].Spec)
        spec = record.read(settings)
        if isinstance(settings, MapTree):
            self.open(name, record, spec, settings)
        return MethodUse(name, spec, tree.key_at.get(name, tree.at))

    def open(self, method: str, record: Record, spec: Any, settings: MapTree) -> None:
        """Notes what says auto. SpecError for a method that has no choices to offer there: those it has are its `automatic`."""
        for entry in record.fields():
            value = getattr(spec, entry.name)
            if not (isinstance(value, Rank | Width) and value.kind == "auto") and not (entry.key == "bits" and value == "auto"):
                continue
            place = settings.items.get(entry.key)
            if place is None:
                continue
            if entry.key not in self.methods[method].automatic:
                raise place.error(f"{method} has no auto here")
            if getattr(spec, "shots", 1) > 1:
                raise place.error("auto is decided once: it goes with shots: 1")
            self.opened.append(place.error("auto needs a budget to be decided by", [_A_BUDGET]))

    def any_of(self, tree: MapTree) -> tuple[MethodUse, ...]:
        for key in tree.items:
            if key != "any_of":
                raise tree.key_error(key, "nothing stands beside any_of; alternatives go into its list")
        alternatives = tree.items["any_of"]
        if not isinstance(alternatives, SeqTree) or not alternatives.items:
            raise wrong(alternatives, "a list of alternatives, each a method, a list of methods or keep")
        self.opened.append(tree.key_error(ANY_OF, "any_of needs a budget to be decided by", [_A_BUDGET]))
        found = tuple(self.item(alternative) for alternative in alternatives.items)
        for uses, alternative in zip(found, alternatives.items, strict=True):
            if any(self.kind(use.method) == "block" for use in uses):
                raise alternative.error(f"{uses[0].method} is no alternative for one matmul; where it takes auto it stands alone")
        return (MethodUse(ANY_OF, AnyOf(found), tree.key_at.get(ANY_OF, tree.at)),)

    def compose(self, uses: list[tuple[MethodUse, Tree]]) -> tuple[MethodUse, ...]:
        """Holds the order of a rewrite: at most one replacing method, first; updates; a block alone."""
        kinds = [self.kind(use.method) for use, _ in uses]
        for index, ((use, tree), kind) in enumerate(zip(uses, kinds, strict=True)):
            problem = _misplaced(kinds, index)
            if problem and isinstance(tree, MapTree):
                raise tree.key_error(use.method, f"{problem} ({use.method} is of kind {kind})")
        return tuple(use for use, _ in uses)

    def kind(self, method: str) -> str:
        kind = getattr(self.methods[method], "kind", None)
        if kind not in METHOD_KINDS:
            raise VerifyError(f"method {method}: kind is {kind!r}, not one of {', '.join(METHOD_KINDS)}")
        return str(kind)

    def schema(self) -> JsonSchema:
        method, alternative = {"$ref": "#/$defs/method"}, {"$ref": "#/$defs/alternative"}
        any_of = {"type": "array", "items": alternative, "minItems": 1, "description": "alternatives that the budget chooses from"}
        choice: JsonSchema = {"type": "object", "properties": {"any_of": any_of}, "minProperties": 1, "additionalProperties": False}
        return {"oneOf": [{"const": "keep"}, method, {"type": "array", "items": method, "minItems": 1}, choice]}


def _misplaced(kinds: list[str], index: int) -> str:
    """Why the method at `index` may not stand there, or ""."""
    before = kinds[:index]
    if kinds[index] == "replace" and "replace" in before:
        return "a rewrite has at most one replacing method"
    if kinds[index] == "replace" and before:
        return "the replacing method comes first"
    if "block" in kinds and len(kinds) > 1:
        return "a method that works on a block stands alone"
    return ""


def document_record(methods: Mapping[str, type[Any]], named: Mapping[str, MapTree], opened: list[SpecError]) -> Record:
    """What reads a whole spec file into a `Document`; `opened`: see `RewriteKind`, in the order of the file."""
    rule = Record(Rule, {"name": Name(), "match": MatchKind(named), "rewrite": RewriteKind(methods, opened)})
    rules = ListOf(rule, min_items=1, single=False)
    stage = Record(Stage, {"name": Name(), "rules": rules})
    kinds: dict[str, Kind] = {"name": Name(), "select": SelectKind(), "rules": rules, "stages": ListOf(stage, min_items=1, single=False)}
    return Record(Document, {**kinds, "version": Integer(choices=(LANGUAGE_VERSION,))})
