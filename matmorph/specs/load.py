"""Loading a spec: from the library, a file or a dict, with everything it extends, into a checked `Spec`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

from matmorph.errors import Position, SpecError, did_you_mean
from matmorph.specs.document import LANGUAGE_VERSION, Document, document_record, named_selections
from matmorph.specs.dump import entries, resolved_data
from matmorph.specs.kinds import Integer, ListOf, Text
from matmorph.specs.match import leaves
from matmorph.specs.merge import extend, inherit
from matmorph.specs.schema import Spec, Stage
from matmorph.specs.tree import DICT_FILE, MapTree, Scalar, SeqTree, Tree, from_data, read_bytes

EXTENDS = ListOf(Text())
VERSION = Integer(choices=(LANGUAGE_VERSION,))
MAX_CHAIN = 64


def library_names() -> tuple[str, ...]:
    """The names of the specs that come with matmorph, sorted."""
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in _library().iterdir() if entry.name.endswith(".yaml")))


def library_text(name: str) -> str:
    """The YAML of a library spec; SpecError where there is none of this name."""
    return _library_bytes(name, None, "").decode("utf-8")


def load_spec(source: str | Path | Mapping[str, Any], methods: Mapping[str, type[Any]]) -> Spec:
    """Reads and checks a whole spec.

    `source`: the name of a library spec, a path (a Path, or a str that ends in .yaml or .yml or contains a path separator) or a dict.
    `methods`: method classes by name, each with `kind` and `Spec`. SpecError with position and keypath for everything that is wrong
    with the spec.
    """
    loader = _Loader()
    tree, file, identity, name = loader.source(source)
    return _spec(loader.merged(tree, file, ((identity, file),)), file, name, methods)


# ------------------------------------------------------------------------------------------------------------------ files and extends


def _library() -> Any:
    return resources.files("matmorph.specs") / "library"


def _library_bytes(name: str, at: Position | None, keypath: str) -> bytes:
    names = library_names()
    if name not in names:
        details = [f"library specs: {', '.join(names)}", "a file ends in .yaml, or is given with its folder (./NAME)"]
        raise SpecError(f"no library spec is called {name!r}{did_you_mean(name, names)}", at=at, keypath=keypath, details=details)
    data: bytes = (_library() / f"{name}.yaml").read_bytes()
    return data


def is_path(source: str) -> bool:
    """Whether a str names a file rather than a library spec."""
    separators = [separator for separator in (os.sep, os.altsep) if separator]
    return source.endswith((".yaml", ".yml")) or any(separator in source for separator in separators)


def _file_bytes(path: str, at: Position | None, keypath: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        reason = "no such file"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    except ValueError as error:  # a NUL character
        reason = f"is no path: {error}"
    raise SpecError(f"{path if path.isprintable() else repr(path)}: {reason}", at=at, keypath=keypath)


@dataclass
class _Loader:
    """One load: remembers what it read, so a base that is reached twice is the same tree, and sees a circle.

    A chain is the (identity, file) of the specs that led to one; the identity is the same however a path is spelled.
    """

    done: dict[str, MapTree] = field(default_factory=dict)

    def source(self, source: str | Path | Mapping[str, Any]) -> tuple[MapTree, str, str, str]:
        """The tree, the file shown in positions, its identity, and the name the spec has unless it names itself."""
        if isinstance(source, Mapping):
            return from_data(source), DICT_FILE, DICT_FILE, "spec"
        if not isinstance(source, str | Path):
            raise SpecError(f"a spec is a library name, a path or a dict, got {type(source).__name__}")
        file = str(source)
        if isinstance(source, Path) or is_path(file):
            return read_bytes(_file_bytes(file, None, ""), file), file, os.path.realpath(file), Path(file).stem
        return read_bytes(_library_bytes(file, None, ""), file), file, f"library:{file}", file

    def merged(self, tree: MapTree, file: str, chain: tuple[tuple[str, str], ...]) -> MapTree:
        """`tree` over everything it extends, first to last."""
        _check_version(tree)
        own = replace(tree, items={key: item for key, item in tree.items.items() if key != "extends"})
        if "extends" not in tree.items:
            return own
        given = tree.items["extends"]
        names = EXTENDS.read(given)
        entries = given.items if isinstance(given, SeqTree) else (given,)
        bases: list[MapTree] = []
        for index, (name, entry) in enumerate(zip(names, entries, strict=True)):
            if name in names[:index]:
                raise entry.error(f"{name} is listed twice")
            bases.append(self.base(name, entry, file, chain))
        return reduce(extend, [*bases, own])

    def base(self, name: str, entry: Tree, file: str, chain: tuple[tuple[str, str], ...]) -> MapTree:
        shown, identity = name, f"library:{name}"
        if is_path(name):
            shown = name if file == DICT_FILE else os.path.normpath(os.path.join(os.path.dirname(file), name))
            identity = os.path.realpath(shown.replace("\0", "?"))
        seen = [known for known, _ in chain]
        if identity in seen:
            circle = [*(known for _, known in chain[seen.index(identity) :]), shown]
            raise entry.error(f"circular extends: {' -> '.join(circle)}")
        if len(chain) > MAX_CHAIN:
            raise entry.error(f"extends is nested more than {MAX_CHAIN} files deep")
        if identity not in self.done:
            read = _file_bytes if is_path(name) else _library_bytes
            tree = read_bytes(read(shown, entry.at, entry.keypath), shown)
            self.done[identity] = self.merged(tree, shown, (*chain, (identity, shown)))
        return self.done[identity]


def _check_version(tree: MapTree) -> None:
    if "version" not in tree.items:
        raise tree.error(f"version is missing; this is version: {LANGUAGE_VERSION} of the spec language")
    VERSION.read(tree.items["version"])


# ---------------------------------------------------------------------------------------------------------------------- reading it all


def _spec(tree: MapTree, file: str, name: str, methods: Mapping[str, type[Any]]) -> Spec:
    tree = _with_inheritance(tree)
    opened: list[SpecError] = []
    named = named_selections(tree.items.get("select"))
    document: Document = document_record(methods, named, opened).read(tree)
    _check_budgets(document, tree, opened)
    _check_sensitivity(document, tree)
    spec = Spec(
        version=document.version,
        name=document.name or name,
        stages=_stages(document, tree),
        tolerance=document.tolerance,
        calibration=document.calibration,
        export=document.export,
        train=document.train,
        seed=document.seed,
        strict=document.strict,
        file=file,
        resolved={},
    )
    return replace(spec, resolved=resolved_data(spec, tree))


def _with_inheritance(tree: MapTree) -> MapTree:
    """Each stage over the tolerance, calibration and budget of the whole spec."""
    stages = tree.items.get("stages")
    if not isinstance(stages, SeqTree):
        return tree
    full = [inherit(stage, tree, ("tolerance", "calibration", "budget")) if isinstance(stage, MapTree) else stage for stage in stages.items]
    return replace(tree, items={**tree.items, "stages": replace(stages, items=tuple(full))})


def _check_budgets(document: Document, tree: MapTree, opened: Sequence[SpecError]) -> None:
    """What is open needs a budget in its stage, and a budget needs something open: in its stage or, where it is the spec's, in any."""
    for number, stage in enumerate(document.stages):
        prefix = f"stages[{number}]."
        if stage.budget is None:
            _raise_first(error for error in opened if error.keypath.startswith(prefix))
    if not document.stages and document.budget is None:
        _raise_first(opened)
    if not opened and "budget" in tree.items:
        raise tree.key_error("budget", "nothing to decide: no rule says auto or any_of")
    for number, entry in enumerate(entries(tree, "stages")):
        own = document.budget is None and isinstance(entry, MapTree) and "budget" in entry.items
        if own and isinstance(entry, MapTree) and not any(error.keypath.startswith(f"stages[{number}].") for error in opened):
            raise entry.key_error("budget", "nothing to decide: no rule of this stage says auto or any_of")


def _raise_first(errors: Iterable[SpecError]) -> None:
    for error in errors:
        raise error


def _check_sensitivity(document: Document, tree: MapTree) -> None:
    """Gradients are those of a loss."""
    if document.train is not None:
        return
    for owner in (tree, *entries(tree, "stages")):
        section = owner.items.get("calibration") if isinstance(owner, MapTree) else None
        value = section.items.get("sensitivity") if isinstance(section, MapTree) else None
        if isinstance(value, Scalar) and value.text == "fisher":
            raise value.error(
                "fisher is made of gradients of a loss, and the spec has none", ["for instance: train: {loss: cross_entropy}"]
            )


def _stages(document: Document, tree: MapTree) -> tuple[Stage, ...]:
    """The stages with a name for every rule; SpecError where there are no rules, rules and stages, or a name twice."""
    if document.rules and document.stages:
        raise tree.key_error("stages", "a spec has rules or stages, not both")
    if not document.rules and not document.stages:
        raise tree.error("rules is missing; a spec has rules, or stages with rules")
    stages = document.stages or (Stage(None, document.rules, document.tolerance, document.calibration, document.budget),)
    _refuse_twice("stage", [(stage.name, entry) for stage, entry in zip(document.stages, entries(tree, "stages"), strict=True)])
    trees = [rule for stage in entries(tree, "stages") or [tree] for rule in entries(stage, "rules")]
    rules = [rule for stage in stages for rule in stage.rules]
    names = [rule.name or f"rule-{number}" for number, rule in enumerate(rules, 1)]
    _refuse_twice("rule", list(zip(names, trees, strict=True)))
    named = iter(names)
    stages = tuple(replace(stage, rules=tuple(replace(rule, name=next(named)) for rule in stage.rules)) for stage in stages)
    _check_inserted_by(stages)
    return stages


def _check_inserted_by(stages: tuple[Stage, ...]) -> None:
    """Conditions name rules of earlier stages: only their matmuls are there to be matched."""
    earlier: list[str] = []
    for stage in stages:
        conditions = [leaf for rule in stage.rules for leaf, _ in leaves(rule.match.root)]
        for at, keypath, name in [(leaf.at, leaf.keypath, name) for leaf in conditions for name in leaf.earlier_rules]:
            if name not in earlier:
                known = did_you_mean(name, earlier) or (f"; they are {', '.join(earlier)}" if earlier else "; there is no earlier stage")
                raise SpecError(f"no rule of an earlier stage is called {name!r}{known}", at=at, keypath=keypath)
        earlier += [rule.name for rule in stage.rules]


def _refuse_twice(what: str, named: Sequence[tuple[str | None, Tree]]) -> None:
    first: dict[str | None, Tree] = {}
    for name, tree in named:
        place = tree.items.get("name", tree) if isinstance(tree, MapTree) else tree
        if name in first:
            raise place.error(f"another {what} is called {name} already{f' (at {first[name].at})' if first[name].at else ''}")
        first[name] = place
