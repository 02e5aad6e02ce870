"""The supernet of glora as a graph: gates as an input of its training graphs, a configuration put in, and the spec of a configuration.

The compiled graph has one constant `<site>.glora.gates` [17] per site, zeros until a configuration is named: the model is its source.
In training graphs one input `gates` [sites, 17] takes their place, a row per site in the order of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_structure

from matmorph.errors import InputError, VerifyError, did_you_mean
from matmorph.ir.adapter import Adapter
from matmorph.ir.build import Builder
from matmorph.ir.core import Const, Graph, Input, Value
from matmorph.ir.rewiring import exchanged, loaded, rewired
from matmorph.ir.types import TensorType
from matmorph.passes.methods.glora.settings import COLUMNS, GATE, GATE_COLUMNS, WORDS
from matmorph.passes.methods.protocol import Configuration, TrainingForm
from matmorph.runtime.format.training import SearchedSite, SearchSpace, SearchTensor
from matmorph.specs.schema import Rule, Spec


def gates_of(graph: Graph, method: str) -> tuple[Const, ...]:
    """The gates of each site of a supernet, in the order of their rows; () where there is none."""
    return tuple(const for const in graph.used_state() if const.method == method and const.part == GATE)


def training_form(graph: Graph, adapters: Sequence[Adapter], method: str) -> TrainingForm | None:
    """With the gates as an input, all open in its example: every form of every tensor counts there, which no configuration allows. A
    configuration says what trains of a supernet, so all of it must be among the parameters. None where there is no supernet."""
    gates = gates_of(graph, method)
    if not gates:
        return None
    sites = [_site_of(const) for const in gates]
    return TrainingForm(
        with_gate_input(graph, gates),
        {GATE: torch.ones(len(gates), GATE_COLUMNS, device=graph.device)},
        tuple(const for const in graph.used_state() if const.trainable and const.method == method and const.site in sites),
        "belongs to a supernet and does not train: train all its tensors (trainable: adapters)",
        _space(sites, adapters),
    )


def _site_of(gates: Const) -> str:
    if gates.site is None:
        raise VerifyError(f"{gates.path} is of no site")
    return gates.site


def _space(sites: Sequence[str], adapters: Sequence[Adapter]) -> SearchSpace:
    """What a Trainer needs to choose: the columns of a gate row, and by site and tensor its words and parameters."""
    of_site = {adapter.site: adapter for adapter in adapters if "words" in adapter.details}
    found = []
    for site in sites:
        consts, words = of_site[site].consts, of_site[site].details["words"]
        tensors = {
            tensor: SearchTensor(tuple(words[tensor]), consts.get(f"{tensor}_up", consts.get(tensor)), consts.get(f"{tensor}_down"))
            for tensor in WORDS
        }
        found.append(SearchedSite(site, tensors))
    return SearchSpace(tuple(COLUMNS), tuple(found))


def with_gate_input(graph: Graph, consts: Sequence[Const]) -> Graph:
    """The graph with an input `gates` float32 [sites, 17] in the place of these constants. InputError where the model has one."""
    if any(entry.name == GATE for entry in graph.signature.inputs):
        raise InputError(f"the model has an input {GATE} of its own, a name that the training graphs of a supernet need")
    gates = Value(GATE, TensorType("float32", (len(consts), GATE_COLUMNS)))
    b = Builder(graph, {GATE})
    rows: dict[Value, Value] = {}
    for row, const in enumerate(consts):
        value = b("aten.select.int", gates, 0, row)
        dtype = const.tensor.torch_dtype
        rows[const] = value if dtype == torch.float32 else b("aten._to_copy.default", value, dtype=dtype)
    inputs = (*graph.signature.inputs, Input(GATE, gates))
    in_spec = tree_structure(((), {entry.name: 0 for entry in inputs}))
    return replace(
        graph,
        signature=replace(graph.signature, inputs=inputs, in_spec=in_spec),
        nodes=(*b.nodes, *(rewired(node, rows) for node in graph.nodes)),
        state=tuple(const for const in graph.state if const not in rows),
    )


def configured(graph: Graph, adapters: Sequence[Adapter], configuration: Configuration) -> Graph | None:
    """The graph with one-hot gates; None without a supernet. InputError for sites, tensors or words that it does not have."""
    choices = choices_of(adapters)
    if not choices:
        return None
    full = completed(choices, configuration)
    gates = {adapter.site: adapter.consts[GATE] for adapter in adapters if adapter.site in choices}
    state = {const.path: const for const in graph.state}
    change: dict[Const, Const] = {}
    for site, words in full.items():
        row = torch.zeros(GATE_COLUMNS)
        for pair in words.items():
            row[COLUMNS[pair]] = 1
        const = state[gates[site]]
        change[const] = loaded(const, row.to(const.tensor.torch_dtype))
    return exchanged(graph, change)


def choices_of(adapters: Sequence[Adapter]) -> dict[str, Mapping[str, Sequence[str]]]:
    """By site of the supernet, what each tensor may be; empty where there is no supernet."""
    return {adapter.site: adapter.details["words"] for adapter in adapters if "words" in adapter.details}


def completed(choices: Mapping[str, Mapping[str, Sequence[str]]], configuration: Configuration) -> dict[str, dict[str, str]]:
    """The configuration with every site and tensor. InputError naming a site that the supernet does not have, a tensor that glora does not
    have, a word that is no choice there, or a tensor that must be named."""
    for site, tensors in configuration.items():
        if site not in choices:
            raise InputError(f"the configuration names {site}, and the supernet has no such layer{did_you_mean(site, choices)}")
        for tensor, word in tensors.items():
            if tensor not in WORDS:
                raise InputError(f"{site}: glora has no tensor {tensor}; there are {', '.join(WORDS)}")
            if word not in choices[site][tensor]:
                raise InputError(f"{site}: {tensor} cannot be {word}; it is one of {', '.join(choices[site][tensor])}")
    return {
        site: {tensor: configuration.get(site, {}).get(tensor) or _unnamed(site, tensor, words) for tensor, words in tensors.items()}
        for site, tensors in choices.items()
    }


def _unnamed(site: str, tensor: str, words: Sequence[str]) -> str:
    if len(words) > 1 and "none" not in words:
        raise InputError(f"{site}: {tensor} must be named: one of {', '.join(words)}")
    return words[0] if len(words) == 1 else "none"


def replacing_spec(spec: Spec, adapters: Sequence[Adapter], configuration: Configuration, method: str) -> dict[str, Any] | None:
    """The spec in which every rule that searches is replaced by what the configuration says: plain data that loads by itself; None without
    a supernet.

    Sites with the same configuration share a rule; a site that is none throughout keeps its weight. Raises as `completed`.
    """
    choices = choices_of(adapters)
    if not choices:
        return None
    full = completed(choices, configuration)
    sites: dict[str, list[str]] = {}
    for adapter in adapters:
        if adapter.site in choices:
            sites.setdefault(adapter.rule, []).append(adapter.site)
    rules = {rule.name: rule for rule in spec.rules}
    data: dict[str, Any] = dict(spec.resolved)
    if "stages" in data:
        data["stages"] = [{**stage, "rules": _replaced(stage["rules"], rules, sites, full, method)} for stage in data["stages"]]
    else:
        data["rules"] = _replaced(data["rules"], rules, sites, full, method)
    return {**data, "name": f"{spec.name}-found"}


def _replaced(
    data: Sequence[Mapping[str, Any]],
    rules: Mapping[str, Rule],
    sites: Mapping[str, Sequence[str]],
    configuration: Configuration,
    method: str,
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for rule in data:
        if rule["name"] not in sites:
            found.append(dict(rule))
            continue
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for site in sites[rule["name"]]:
            groups.setdefault(tuple(configuration[site].items()), []).append(site)
        for number, (words, paths) in enumerate(groups.items(), 1):
            rewrite = _rewrite(rules[rule["name"]], rule["rewrite"], dict(words), method)
            match = {"op": "matmul", "path": [f"re:{_escaped(path)}" for path in paths]}
            found.append({**rule, "name": f"{rule['name']}-{number}", "match": match, "expect": len(paths), "rewrite": rewrite})
    return found


def _escaped(path: str) -> str:
    """A path as a regular expression: names of modules hold letters, digits, _ and dots; slices brackets."""
    return "".join(f"\\{letter}" if letter in ".[]:+*?()|^$\\" else letter for letter in path)


def _rewrite(rule: Rule, data: Any, words: Mapping[str, str], method: str) -> Any:
    """The rule's rewrite with these words in the place of the search; without the method where they are all none."""
    listed = data if isinstance(data, list) else [data]
    settings = {tensor: word for tensor, word in words.items() if word != "none"}
    uses: list[Any] = []
    for use, plain in zip(rule.rewrite, listed, strict=True):
        if use.method != method:
            uses.append(plain)
        elif settings:
            uses.append({method: {**settings, "rank": use.spec.rank}})
    return uses if len(uses) > 1 else uses[0] if uses else "keep"
