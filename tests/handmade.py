"""Graphs written as text, and their sites found by the plainest rule: a `linear` or an `embedding` whose weight is a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.site import Application, Site
from matmorph.ir.text.printing import parse_graph
from matmorph.ir.types import TensorType
from matmorph.passes.selection.context import GraphContext, context_of
from matmorph.passes.selection.survey import Survey
from matmorph.specs.load import load_spec
from matmorph.specs.schema import Stage
from matmorph.specs.selectors import parse_match
from matmorph.specs.tree import MapTree, from_data, read


def site(path: str, **given: object) -> Site:
    """A site on its own: 8 inputs, 4 outputs and one application, where nothing else is given. `names`, `rule`, `weight`: of its Const."""
    weight = given.pop("weight", torch.ones(4, 8))
    names = given.pop("names", (f"{path}.weight",))
    rule = given.pop("rule", None)
    const = Const(f"{path}.weight", TensorType("float32", tuple(weight.shape)), load=lambda: weight, names=names, rule=rule)
    applications = tuple(_application(const) for _ in range(given.pop("uses", 1)))
    settled = {"form": "linear", "layout": "oi", "in_features": 8, "out_features": 4, "applications": applications} | given
    return Site(path=path, const=const, **settled)


def _application(const: Const) -> Application:
    x, y = (Value(name, TensorType("float32", (2, width))) for name, width in (("x", 8), ("y", 4)))
    return Application(Node("aten.linear.default", (x, const), (y,)), x, y)


def gather() -> Node:
    """A node that reads a table, as far as selection looks at it."""
    return Node("aten.embedding.default", (), (Value("e", TensorType("float32", (2, 8))),))


def graph_of(text: str) -> Graph:
    return parse_graph("graph device=cpu\n" + text)


def sites_of(graph: Graph, roles: Mapping[str, str] | None = None) -> tuple[Site, ...]:
    """One site per weight, in order of first use; `roles` by path."""
    forms = {"aten.linear.default": ("linear", 0, 1), "aten.embedding.default": ("embedding", 1, 0)}
    found: dict[Const, Site] = {}
    for node in graph.nodes:
        form, x, weight = forms.get(node.op, ("", 0, 0))
        const = node.args[weight] if form else None
        if not isinstance(const, Const):
            continue
        application = Application(node, node.args[x], node.output)
        if const in found:
            found[const] = replace(found[const], applications=(*found[const].applications, application))
            continue
        path = const.path.removesuffix(".weight")
        out_features, in_features = map(int, const.tensor.shape)
        role = (roles or {}).get(path, "other")
        layer = node.origin.layer
        found[const] = Site(path, const, form, "oi", in_features, out_features, (application,), role=role, layer=layer)
    return tuple(found.values())


def match_of(data: dict | str, named: dict | None = None):
    """A match from data, or from the YAML text of a whole file `s.yaml` with `match:` (and `select:`) at its top."""
    if isinstance(data, str):
        spec = read(data, "s.yaml")
        tree, selections = spec.items["match"], spec.items.get("select")
    else:
        spec = from_data({"match": data, "select": named or {}})
        tree, selections = spec.items["match"], spec.items["select"]
    assert isinstance(tree, MapTree)
    return parse_match(tree, selections.items if isinstance(selections, MapTree) else {})


def asked(one: Site, layers: int = 6, graph: Graph | None = None, sites: Sequence[Site] = ()) -> tuple[Site, GraphContext]:
    """What `Match.test` takes for one site; patterns are searched in `graph` where one is given."""
    return one, context_of(Survey(graph or EMPTY, tuple(sites) or (one,), {one.container: layers}))


GATED = """
g = matmul(x)
u = matmul(x)
h = mul(silu(g), u)
d = matmul(h)
"""


def gated_mlp(layers: int = 1, product: str = "%s, %up") -> str:
    """Gated MLPs with a residual, each in a layer of its own; `product` are the operands of the product."""
    consts, body, x = [], [], "%x"
    for k in range(layers):
        for name, shape in {"gate": "[6, 4]", "up": "[6, 4]", "down": "[4, 6]"}.items():
            consts.append(f'parameter %{name}{k}.w: float32{shape} "layers.{k}.{name}.weight"')
        operands = product.replace("%s", f"%s{k}").replace("%up", f"%up{k}")
        body += [
            f"%g{k}: float32[batch, 6] = aten.linear.default({x}, %gate{k}.w) layer={k}",
            f"%up{k}: float32[batch, 6] = aten.linear.default({x}, %up{k}.w) layer={k}",
            f"%s{k}: float32[batch, 6] = aten.silu.default(%g{k}) layer={k}",
            f"%h{k}: float32[batch, 6] = aten.mul.Tensor({operands}) layer={k}",
            f"%d{k}: float32[batch, 4] = aten.linear.default(%h{k}, %down{k}.w) layer={k}",
            f"%r{k}: float32[batch, 4] = aten.add.Tensor({x}, %d{k}) layer={k}",
        ]
        x = f"%r{k}"
    lines = ["range batch 1..", 'input %x: float32[batch, 4] "x"', *consts, *body, f'output {x} "output"']
    return "\n".join(lines)


EMPTY = graph_of('input %x: float32[2] "x"\noutput %x "output"')
SITES = (
    *(
        site(f"encoder.layer.{layer}.{path}", role=role, layer=layer, in_features=width)
        for layer in range(3)
        for path, role, width in [("attention.query", "attention.q", 8), ("mlp.intermediate", "mlp.fc1", 8), ("mlp.output", "mlp.down", 16)]
    ),
    site("head", role="head"),
    site("embeddings.word", role="embedding", form="embedding", uses=0, gathers=(gather(),)),
)


def stage_of(rules: str, tmp_path, select: str = "") -> Stage:
    """The only stage of a spec whose rules are given as YAML."""
    path = tmp_path / "s.yaml"
    path.write_text(f"version: 1\n{select}rules:\n{rules}")
    return load_spec(path, {}).stages[0]


def later_stage(rules: str, tmp_path) -> Stage:
    """The second stage of a spec, behind one whose rules are called first and second."""
    path = tmp_path / "s.yaml"
    earlier = "".join(f"      - {{name: {name}, match: {{op: matmul}}, rewrite: keep}}\n" for name in ("first", "second"))
    later = rules.replace("  - ", "      - ")
    path.write_text(f"version: 1\nstages:\n  - name: one\n    rules:\n{earlier}  - name: two\n    rules:\n{later}")
    return load_spec(path, {}).stages[1]


def rules(*entries: str) -> str:
    return "".join(f"  - {{{entry}, rewrite: keep}}\n" for entry in entries)
