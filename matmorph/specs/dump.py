"""The resolved spec: as plain data, and as the YAML text that an artefact keeps."""

from __future__ import annotations

from typing import Any

import yaml

from matmorph.specs.schema import Rule, Spec, Stage, plain_uses
from matmorph.specs.tree import MapTree, Scalar, SeqTree, Tree, to_data
from matmorph.specs.typed import to_plain

SCHEMA_LINE = "# yaml-language-server: $schema=schema.json"
_TEXT = "tag:yaml.org,2002:str"
_WIDTH = 110  # characters; a mapping or list that fits is written on one line


def entries(tree: Tree, key: str) -> tuple[Tree, ...]:
    """The items of the list under `key`; () where there is none."""
    found = tree.items.get(key) if isinstance(tree, MapTree) else None
    return found.items if isinstance(found, SeqTree) else ()


def resolved_data(spec: Spec, tree: MapTree) -> dict[str, Any]:
    """Plain data of a spec that was read from `tree` (extends applied): the defaults of methods, calibration, export and train
    are written out. Matches are kept as they were written, with the named selections they use.
    """
    data: dict[str, Any] = {"version": spec.version, "name": spec.name}
    if "select" in tree.items:
        data["select"] = to_data(tree.items["select"])
    if "stages" in tree.items:
        data["stages"] = [_stage(spec, stage) for stage in spec.stages]
    else:
        data["rules"] = [plain_rule(rule) for rule in spec.stages[0].rules]
        if spec.stages[0].budget is not None:
            data["budget"] = to_plain(spec.stages[0].budget)
    if spec.tolerance is not None:
        data["tolerance"] = to_plain(spec.tolerance)
    data |= {"calibration": to_plain(spec.calibration), "export": to_plain(spec.export)}
    if spec.train is not None:
        data["train"] = to_plain(spec.train)
    return {**data, "seed": spec.seed, "strict": spec.strict}


def _stage(spec: Spec, stage: Stage) -> dict[str, Any]:
    data: dict[str, Any] = {"name": stage.name, "rules": [plain_rule(rule) for rule in stage.rules]}
    if spec.tolerance is not None or stage.tolerance is not None:  # null: the spec has one that this stage takes away
        data["tolerance"] = to_plain(stage.tolerance)
    if stage.budget is not None:
        data["budget"] = to_plain(stage.budget)
    return {**data, "calibration": to_plain(stage.calibration)}


def plain_rule(rule: Rule) -> dict[str, Any]:
    """A rule with its name, where it has one, without the keys that have their default."""
    name = {"name": rule.name} if rule.name else {}
    flags = {key: True for key in ("force", "untie") if getattr(rule, key)}
    pays = {"pays": to_plain(rule.pays)} if rule.pays.time is not None else {}
    expect = {} if rule.expect is None else {"expect": rule.expect}
    optional = {"optional": True} if rule.optional else {}
    written = {"match": to_data(rule.match.written), **expect, **optional, "rewrite": plain_uses(rule.rewrite)}
    return {**name, **written, **flags, **pays}


def dump_resolved(spec: Spec) -> str:
    """YAML of `spec.resolved`, the same text for equal specs; it loads to an equal spec."""
    header = [SCHEMA_LINE, "# The resolved spec; `matmorph specs schema > schema.json` writes the schema for editors.", ""]
    # yaml.dump with a SafeDumper writes plain data only
    body = yaml.dump(spec.resolved, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return "\n".join(header) + body


class _Dumper(yaml.SafeDumper):
    """Short mappings and lists on one line, rules in blocks, texts of several lines as `|`."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    if not text.replace("\n", "").isprintable():  # control characters survive only as escapes
        style = '"'
    elif to_data(Scalar(None, "", text, plain=True)) != text:  # a text that looks like a number
        style = "'"
    return dumper.represent_scalar(_TEXT, text, style=style)


def _represent_float(dumper: yaml.SafeDumper, number: float) -> yaml.Node:
    """Its shortest form, which our reader takes back exactly: 1e-05, where PyYAML prints 1.0e-05."""
    text = repr(number)
    return dumper.represent_scalar("tag:yaml.org,2002:float" if "." in text else _TEXT, text)


def _represent_mapping(dumper: yaml.SafeDumper, data: dict[str, Any]) -> yaml.Node:
    return dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=_is_short(data))


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=_is_short(data))


def _is_short(data: Any) -> bool:
    text = repr(data)
    return len(text) <= _WIDTH - 20 and "\\n" not in text and "'rewrite'" not in text and "'version'" not in text


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(dict, _represent_mapping)
_Dumper.add_representer(list, _represent_list)
