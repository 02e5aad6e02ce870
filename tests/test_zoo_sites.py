"""Sites and roles of every model of the zoo, held against its module tree, and unchanged when everything is renamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from module_tree import tree_kernels
from zoo import ZOO, Entry

from matmorph.ir.core import Const, Graph, Input, Node, Value, map_values
from matmorph.ir.site import Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace

pytestmark = pytest.mark.no_cover
"""What runs here is covered by the tests of its parts; the tracer of the coverage would take two fifths of the time."""

LAYERED = {"mlp": {0, 2, 4}, "cnn": set(), "mha": set(), "mha-weights": set(), "mha-cross": set(), "mha-cross-apart": set(), "albert": {0}}
"""Layer numbers of the models that do not have the zoo's two layers: nn.Sequential is numbered, ALBERT has one group."""


OPERANDS = dict.fromkeys(("deberta", "deberta-apart"), ("encoder.rel_embeddings",))
"""Parameters that no module multiplies with, which are multiplied by a weight: positions that keys and queries are made of."""


FORMS_OF_OTHERS = ("-eager", "-gated", "-apart")
"""How names of entries end whose model is in the zoo in another form too."""


@pytest.mark.parametrize(
    "entry", [pytest.param(entry, id=name, marks=pytest.mark.full if name.endswith(FORMS_OF_OTHERS) else ()) for name, entry in ZOO.items()]
)
def test_zoo(entry: Entry) -> None:
    """One test per model, because the trace takes longer than all that is checked of it."""
    module, inputs, dynamic_shapes = entry.build()
    graph = trace(module, inputs, dynamic_shapes)
    every = find_sites(graph)
    sites = tuple(site for site in every if not site.listed)
    listed = {site.path: site.form for site in every if site.listed}
    assert listed == {**tree_kernels(module), **dict.fromkeys(OPERANDS.get(entry.name, ()), "product")}
    assert all(site.blocked for site in every if site.listed)
    assert [site.blocked for site in sites if site.blocked] == []
    check_matmuls(sites, entry.matrices(module))
    assert {site.path: (site.out_features, site.in_features) for site in sites if site.gathers} == entry.tables(module, inputs)
    assert {site.path: site.role for site in sites} == {site.path: entry.role_of(site.path) for site in sites}
    check_layers(entry, sites)
    check_renamed(graph, every)


def check_matmuls(sites: tuple[Site, ...], matrices: Mapping[str, torch.Tensor]) -> None:
    found = {site.path: site for site in sites if site.applications}
    assert found.keys() == matrices.keys()
    for path, matrix in matrices.items():
        site = found[path]
        assert torch.equal(site.weight(), matrix), path
        assert (site.out_features, site.in_features) == tuple(matrix.shape[-2:]), path
        assert site.parameters == matrix.numel(), path


def check_layers(entry: Entry, sites: tuple[Site, ...]) -> None:
    layers = {site.layer for site in sites} - {None}
    assert layers == LAYERED.get(entry.name, {0, 1})
    for site in sites:
        numbers = [int(part) for part in site.path.partition("[")[0].split(".") if part.isdigit()]
        assert numbers[:1] == ([] if site.layer is None else [site.layer]), site.path


def check_renamed(graph: Graph, sites: tuple[Site, ...]) -> None:
    """The same sites in the same order with the same roles, under new paths."""
    rename = Renaming()
    again = find_sites(renamed(graph, rename))
    assert [(site.path, site.role, site.layer, site.form) for site in again] == [
        (rename(site.path), site.role, site.layer, site.form) for site in sites
    ]


class Renaming:
    """A meaningless name for each part of a dotted path; numbers, ".weight" and slices stay, as their meaning is the IR's own."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def __call__(self, path: str) -> str:
        names, bracket, rows = path.partition("[")
        return ".".join(self.part(name) for name in names.split(".")) + bracket + rows

    def part(self, name: str) -> str:
        fixed = name.isdigit() or name in ("weight", "")
        return name if fixed else self.known.setdefault(name, f"m{len(self.known)}x")


def renamed(graph: Graph, rename: Callable[[str], str]) -> Graph:
    """The graph with every constant, value, input and module scope renamed; class names and source lines are gone too."""
    values: dict[Value, Value] = {}
    for const in graph.state:
        names = tuple(rename(name) for name in const.names)
        values[const] = Const(names[0], const.type, const.load, names, const.kind, const.trainable, const.persistent, rename(const.storage))
    for number, value in enumerate([*graph.inputs, *(value for node in graph.nodes for value in node.outputs)]):
        values[value] = Value(f"{7919 * (number + 1) % 10007}v{number}", value.type)  # the order of names says nothing either
    inputs = tuple(Input(f"i{k}", entry.value and values[entry.value], entry.literal) for k, entry in enumerate(graph.signature.inputs))
    return replace(
        graph,
        signature=replace(graph.signature, inputs=inputs),
        nodes=tuple(_renamed_node(node, values, rename) for node in graph.nodes),
        outputs=map_values(graph.outputs, values.__getitem__),
        state=tuple(values[const] for const in graph.state),
    )


def _renamed_node(node: Node, values: Mapping[Value, Value], rename: Callable[[str], str]) -> Node:
    scopes = tuple((rename(path), "Module") for path, _ in node.origin.scopes)
    return Node(
        node.op,
        map_values(node.args, values.__getitem__),
        tuple(values[value] for value in node.outputs),
        {name: map_values(arg, values.__getitem__) for name, arg in node.attrs.items()},
        replace(node.origin, scopes=scopes, source=None),
    )


def test_expectations_are_specific() -> None:
    """The role table names every role that models of these families have, so that no glob swallows the zoo."""
    roles = {role for entry in ZOO.values() for role in entry.roles.values()}
    families = {
        "attention": "q k v qkv o",
        "cross_attention": "q k v kv o",
        "mlp": "gate up gate_up fc1 fc2 down",
        "moe": "router gate_up down",
    }
    wanted = {f"{family}.{part}" for family, parts in families.items() for part in parts.split()}
    assert roles == wanted | {"head", "embedding", "other"}
