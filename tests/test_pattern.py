"""Patterns: what they find in a graph, and the exact place and words of their errors."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest
from handmade import GATED, asked, gated_mlp, graph_of, match_of, sites_of
from hypothesis import given
from hypothesis import strategies as st
from zoo import ZOO

from matmorph.errors import SpecError
from matmorph.ir.site import Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace
from matmorph.specs.conditions.role import ROLES
from matmorph.specs.pattern import parse_pattern
from matmorph.specs.pattern_match import find, operator_counts
from matmorph.specs.tree import Scalar, read


def pattern_of(text: str):
    return parse_pattern(Scalar(None, "pattern", text, plain=False))


def found(text: str, graph) -> list[dict[str, str]]:
    """Each occurrence as {captured name: path of the site, or name of the value}."""
    occurrences = find(pattern_of(text), graph, sites_of(graph))
    return [{name: getattr(item, "path", None) or item.name for name, item in one.captures.items()} for one in occurrences]


@pytest.mark.parametrize("product", ["%s, %up", "%up, %s"])
def test_a_gated_mlp_whatever_the_order_of_the_product(product: str) -> None:
    graph = graph_of(gated_mlp(2, product))
    expected = [{"g": f"layers.{k}.gate", "u": f"layers.{k}.up", "h": f"h{k}", "d": f"layers.{k}.down"} for k in (0, 1)]
    assert found(GATED, graph) == expected
    assert found(GATED.replace("mul(silu(g), u)", "mul(u, silu(g))"), graph) == expected


def test_lines_may_stand_in_any_order_and_calls_may_nest() -> None:
    graph = graph_of(gated_mlp(1))
    assert found("d = matmul(mul(silu(g), u))\nu = matmul(x)  # up\ng = matmul(x)", graph) == [
        {"d": "layers.0.down", "u": "layers.0.up", "g": "layers.0.gate"}
    ]
    assert found("d = matmul(\n  mul(silu(matmul(x)), matmul(x))\n)", graph) == [{"d": "layers.0.down"}]


def test_a_repeated_name_is_one_value() -> None:
    graph = graph_of(
        gated_mlp(1)
        .replace('"x"', '"x"\ninput %z: float32[batch, 4] "z"', 1)
        .replace("aten.linear.default(%x, %up0.w)", "aten.linear.default(%z, %up0.w)")
    )
    assert found(GATED, graph) == []
    assert len(found(GATED.replace("u = matmul(x)", "u = matmul(z)"), graph)) == 1


def test_two_free_names_may_be_one_value() -> None:
    assert len(found(GATED.replace("u = matmul(x)", "u = matmul(z)"), graph_of(gated_mlp(1)))) == 1


def test_intermediate_values_may_have_other_users() -> None:
    text = gated_mlp(1).replace('output %r0 "output"', 'output %r0 "output"\noutput %h0 "hidden"\noutput %s0 "gate"')
    extra = "%other: float32[batch, 6] = aten.relu.default(%s0)\noutput %r0"
    assert len(found(GATED, graph_of(text.replace("output %r0", extra, 1)))) == 1


def test_another_activation_or_a_missing_part_is_no_match() -> None:
    graph = graph_of(gated_mlp(1).replace("silu", "gelu"))
    assert found(GATED, graph) == []
    assert len(found(GATED.replace("silu", "gelu"), graph)) == 1
    assert found("a = matmul(x)\nb = matmul(relu(a))", graph) == []
    assert found("a = matmul(x)\nb = matmul(a)", graph) == [], "a product lies between them"


ATTENTION = """
range batch 1..
range seq 1..
input %x: float32[batch, seq, 8] "x"
input %mask: float32[batch, 1, seq, seq] "mask"
parameter %q.w: float32[8, 8] "block.0.attn.q.weight"
parameter %k.w: float32[8, 8] "block.0.attn.k.weight"
parameter %v.w: float32[8, 8] "block.0.attn.v.weight"
parameter %o.w: float32[8, 8] "block.0.attn.o.weight"
parameter %b: float32[8] "block.0.attn.q.bias"
%q: float32[batch, seq, 8] = aten.linear.default(%x, %q.w, %b) layer=0
%k: float32[batch, seq, 8] = aten.linear.default(%x, %k.w) layer=0
%v: float32[batch, seq, 8] = aten.linear.default(%x, %v.w) layer=0
%b1: int(batch) = aten.sym_size.int(%x, 0)
%b2: int(seq) = aten.sym_size.int(%x, 1)
%q1: float32[batch, seq, 2, 4] = aten.view.default(%q, [%b1, %b2, 2, 4]) layer=0
%q2: float32[batch, 2, seq, 4] = aten.transpose.int(%q1, 1, 2) layer=0
%k1: float32[batch, seq, 2, 4] = aten.view.default(%k, [%b1, %b2, 2, 4]) layer=0
%k2: float32[batch, 2, seq, 4] = aten.transpose.int(%k1, 1, 2) layer=0
%v1: float32[batch, seq, 2, 4] = aten.view.default(%v, [%b1, %b2, 2, 4]) layer=0
%v2: float32[batch, 2, seq, 4] = aten.transpose.int(%v1, 1, 2) layer=0
%a: float32[batch, 2, seq, 4] = aten.scaled_dot_product_attention.default(%q2, %k2, %v2, %mask) layer=0
%a1: float32[batch, seq, 2, 4] = aten.transpose.int(%a, 1, 2) layer=0
%a2: float32[batch, seq, 2, 4] = aten.clone.default(%a1) layer=0
%a3: float32[batch, seq, 8] = aten._unsafe_view.default(%a2, [%b1, %b2, 8]) layer=0
%o: float32[batch, seq, 8] = aten.linear.default(%a3, %o.w) layer=0
output %o "output"
"""

HEADS = "q = matmul(x)\nk = matmul(x)\nv = matmul(x)\no = matmul(scaled_dot_product_attention(q, k, v))\n"


def test_attention_through_layout_operators() -> None:
    assert found(HEADS, graph_of(ATTENTION)) == [{name: f"block.0.attn.{name}" for name in "qkvo"}]


def test_operands_of_other_operators_keep_their_order() -> None:
    swapped = graph_of(ATTENTION.replace("default(%q2, %k2, %v2, %mask)", "default(%k2, %q2, %v2, %mask)"))
    assert found(HEADS, swapped)[0] | {"v": "", "o": ""} == {"q": "block.0.attn.k", "k": "block.0.attn.q", "v": "", "o": ""}
    assert found("a = scaled_dot_product_attention(q, k, v)\nv = matmul(x)", swapped) == [{"a": "a", "v": "block.0.attn.v"}]
    assert found("a = scaled_dot_product_attention(v, k)\nv = matmul(x)", swapped) == [{"a": "a", "v": "block.0.attn.k"}]


def test_matmuls_side_by_side_come_in_every_order() -> None:
    occurrences = found("a = matmul(x)\nb = matmul(x)\n", graph_of(ATTENTION))
    expected = {(f"block.0.attn.{a}", f"block.0.attn.{b}") for a, b in itertools.permutations("qkv", 2)}
    assert {(one["a"], one["b"]) for one in occurrences} == expected
    assert len(occurrences) == len(expected)


def test_a_weight_is_not_an_argument_and_extra_operands_are_ignored() -> None:
    assert found("q = matmul(x)\nl = linear(x)\na = scaled_dot_product_attention(q)", graph_of(ATTENTION))[0]["q"] == "block.0.attn.q"


def test_captured_matmuls_lie_in_one_layer() -> None:
    graph = graph_of(gated_mlp(3))
    assert found("d = matmul(x)\ng = matmul(add(y, d))", graph) == []
    nested = found("g = matmul(add(y, matmul(x)))", graph)
    assert [one["g"] for one in nested] == ["layers.1.gate", "layers.1.up", "layers.2.gate", "layers.2.up"], (
        "an uncaptured one may lie outside"
    )


def test_matmuls_of_a_plain_sequence_are_not_layers_of_their_own() -> None:
    text = """
input %x: float32[2, 4] "x"
parameter %a: float32[6, 4] "0.weight"
parameter %b: float32[5, 6] "2.weight"
%y: float32[2, 6] = aten.linear.default(%x, %a) layer=0
%r: float32[2, 6] = aten.relu.default(%y) layer=1
%z: float32[2, 5] = aten.linear.default(%r, %b) layer=2
output %z "output"
"""
    assert found("a = matmul(x)\nb = matmul(relu(a))", graph_of(text)) == [{"a": "0", "b": "2"}]


OTHER_OPERATORS = """
input %x: float32[2, 4] "x"
input %i: int64[2, 3] "i"
parameter %t: float32[9, 4] "table.weight"
parameter %a: float32[8, 4] "a.weight"
parameter %b: float32[4, 4] "b.weight"
%e: float32[2, 3, 4] = aten.embedding.default(%t, %i)
%y: float32[2, 8] = aten.linear.default(%x, %a)
%s0: float32[2, 4], %s1: float32[2, 4] = aten.split.Tensor(%y, 4, -1)
%g: float32[2, 4] = aten.gelu.default(%s1)
%m: float32[2, 4] = aten.mul.Tensor(%s0, %g)
%z: float32[2, 4] = aten.linear.default(%m, %b)
%w: float32[2, 4] = aten.mul.Tensor(%z, %z)
%zt: float32[4, 2] = aten.transpose.int(%z, 0, 1)
%p: float32[2, 2] = aten.matmul.default(%w, %zt)
%f: float32[2, 2] = aten._softmax.default(%p, -1, False)
%k: float32[2, 2] = aten.mul.Scalar(%f, 2)
%n: float32[2, 2] = aten.add_.Tensor(%k, %f)
output %n "output"
output %e "embedded"
"""


@pytest.mark.parametrize(
    ("text", "captured"),
    [
        ("y = matmul(x)\na, b = split(y)\nz = matmul(mul(a, gelu(b)))", {"y": "a", "a": "s0", "b": "s1", "z": "b"}),
        ("y = matmul(x)\na, b = split(y)\nz = matmul(mul(b, gelu(a)))", None),
        ("z = matmul(x)\nw = mul(z, z)", {"z": "b", "w": "w"}),
        ("z = matmul(x)\nw = mul(z, y)\np = matmul(w, z)", {"z": "b", "w": "w", "p": "p"}),
        ("z = matmul(x)\np = softmax(matmul(mul(z, z), z))", {"z": "b", "p": "f"}),
        ("z = matmul(x)\np = _softmax(matmul(mul(z, z), z))\nn = add(p, mul(p))", {"z": "b", "p": "f", "n": "n"}),
        ("e = embedding(t, i)\nz = matmul(e)", None),
    ],
)
def test_outputs_overloads_and_products_of_activations(text: str, captured: dict[str, str] | None) -> None:
    assert found(text, graph_of(OTHER_OPERATORS)) == ([captured] if captured else [])


# ------------------------------------------------------------------------------------------------------------------ against brute force


@st.composite
def programs(draw) -> str:
    """A few random operators on values of one shape."""
    lines, values = [], ["%x", "%z"]
    weights = draw(st.integers(1, 3))
    for k in range(draw(st.integers(2, 6))):
        op = draw(st.sampled_from(["linear", "add", "mul", "sub", "silu"]))
        first, second = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        args = {"linear": f"{first}, %w{draw(st.integers(0, weights - 1))}", "silu": first}.get(op, f"{first}, {second}")
        full = {"linear": "linear.default", "silu": "silu.default"}.get(op, f"{op}.Tensor")
        lines.append(f"%v{k}: float32[4, 4] = aten.{full}({args})")
        values.append(f"%v{k}")
    consts = [f'parameter %w{k}: float32[4, 4] "w{k}.weight"' for k in range(weights)]
    return "\n".join(['input %x: float32[4, 4] "x"', 'input %z: float32[4, 4] "z"', *consts, *lines, f'output {values[-1]} "output"'])


PATTERNS = {
    "a = matmul(x)\nb = mul(a, y)": [("a", "linear", ("x",)), ("b", "mul", ("a", "y"))],
    "a = matmul(x)\nb = matmul(x)\nc = add(a, b)": [("a", "linear", ("x",)), ("b", "linear", ("x",)), ("c", "add", ("a", "b"))],
    "a = matmul(x)\nb = sub(a, x)": [("a", "linear", ("x",)), ("b", "sub", ("a", "x"))],
    "a = silu(x)\nb = matmul(a)\nc = add(b, x)": [("a", "silu", ("x",)), ("b", "linear", ("a",)), ("c", "add", ("b", "x"))],
    "b = mul(x, x)\na = matmul(b)": [("b", "mul", ("x", "x")), ("a", "linear", ("b",))],
}


def brute_force(calls: list[tuple[str, str, tuple[str, ...]]], graph) -> set[tuple[str, ...]]:
    """Every assignment of distinct nodes to calls, in every order of commuting operands, kept where the names agree."""
    results = set()
    for nodes in itertools.permutations(graph.nodes, len(calls)):
        if [node.op.split(".")[1] for node in nodes] != [op for _, op, _ in calls]:
            continue
        orders = [itertools.permutations(n.args) if ".add." in n.op or ".mul." in n.op else [n.args] for n in nodes]
        for placed in itertools.product(*orders):
            bound = {name: node.output for node, (name, _, _) in zip(nodes, calls, strict=True)}
            pairs = [pair for (_, _, args), values in zip(calls, placed, strict=True) for pair in zip(args, values, strict=False)]
            if all(bound.setdefault(arg, value) is value for arg, value in pairs):
                results.add(tuple(node.output.name for node in nodes))
    return results


@pytest.mark.parametrize("text", PATTERNS)
@given(program=programs())
def test_occurrences_agree_with_brute_force(text: str, program: str) -> None:
    graph = graph_of(program)
    sites = sites_of(graph)
    occurrences = find(pattern_of(text), graph, sites)
    expected = brute_force(PATTERNS[text], graph)
    assert len(occurrences) == len(expected)
    # Captured sites stand for their weight, so occurrences are compared by the values that are no matmul and by the weights.
    weights = {node.output.name: node.args[1].path.removesuffix(".weight") for node in graph.nodes if node.op.startswith("aten.linear")}
    names = [name for name, _, _ in PATTERNS[text]]
    seen = sorted(tuple(getattr(one.captures[name], "path", None) or one.captures[name].name for name in names) for one in occurrences)
    assert seen == sorted(tuple(weights.get(value, value) for value in values) for values in expected)


# ------------------------------------------------------------------------------------------------------------------ as a condition


def test_a_rule_claims_what_the_pattern_claims() -> None:
    graph = graph_of(gated_mlp(2))
    sites = sites_of(graph)

    def matched(**more: object) -> list[str]:
        match = match_of({"pattern": GATED, **more})
        return [one.path for one in sites if match.test(*asked(one, 2, graph, sites))]

    assert matched() == [f"layers.{k}.{name}" for k in (0, 1) for name in ("gate", "up", "down")]
    assert matched(claim=["g", "u"]) == [f"layers.{k}.{name}" for k in (0, 1) for name in ("gate", "up")]
    assert matched(claim="d", layer=1) == ["layers.1.down"]
    assert matched(claim="d", **{"not": {"layer": 1}}) == ["layers.0.down"]


def test_operator_counts_show_what_is_missing() -> None:
    graph = graph_of(gated_mlp(2))
    assert operator_counts(pattern_of("a = matmul(x)\nb = gelu(a)"), graph, sites_of(graph)) == {"matmul": 6, "gelu": 0}


# ------------------------------------------------------------------------------------------------------------------ traced models


TRACED = {
    "llama": {
        GATED: ("model.layers.{k}.mlp.", {"g": "gate_proj", "u": "up_proj", "d": "down_proj"}),
        # grouped keys and values are repeated through slices of everything, unsqueeze and expand
        "v = matmul(x)\no = matmul(scaled_dot_product_attention(q, k, v))": (
            "model.layers.{k}.self_attn.",
            {"v": "v_proj", "o": "o_proj"},
        ),
    },
    "bert": {
        HEADS: ("encoder.layer.{k}.attention.", {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}),
        "a = matmul(x)\nb = matmul(gelu(a))": ("encoder.layer.{k}.", {"a": "intermediate.dense", "b": "output.dense"}),
    },
}


@pytest.mark.parametrize("model", TRACED)
def test_traced_models(model: str) -> None:
    module, inputs, dynamic_shapes = ZOO[model].build()
    graph = trace(module, inputs, dynamic_shapes)
    sites = find_sites(graph)
    assert {site.role for site in sites} <= set(ROLES)
    for text, (prefix, names) in TRACED[model].items():
        occurrences = find(pattern_of(text), graph, sites)
        seen = [{name: item.path for name, item in one.captures.items() if isinstance(item, Site)} for one in occurrences]
        assert seen == [{name: prefix.format(k=k) + path for name, path in names.items()} for k in (0, 1)]


def test_every_role_of_the_zoo_is_a_role() -> None:
    assert {role for entry in ZOO.values() for role in entry.roles.values()} <= set(ROLES)


# ------------------------------------------------------------------------------------------------------------------ work


def calls_of(run: Callable[[], object]) -> int:
    """Python and C functions called: unlike seconds, the same on every machine however busy it is."""
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("text", [GATED, "g = matmul(x)\nu = matmul(x)\nd = matmul(h)\nr = add(d, x)", "a = matmul(x)\nb = matmul(y)\n"])
def test_the_work_grows_with_the_graph_and_no_faster(text: str) -> None:
    """A search without the layer scopes and shares of values would be quadratic (4 x for twice the layers) or worse."""
    pattern, work = pattern_of(text), {}
    for layers in (30, 60, 120):
        graph = graph_of(gated_mlp(layers))
        sites = sites_of(graph)
        assert len(find(pattern, graph, sites)) >= layers
        work[layers] = calls_of(lambda graph=graph, sites=sites: find(pattern, graph, sites))
    assert work[60] <= 2.2 * work[30]  # 2 plus a tenth for what sorting and hashing add
    assert work[120] <= 2.2 * work[60]


# ------------------------------------------------------------------------------------------------------------------ errors

ERRORS = [
    ("g = mathmul(x)", "4:9: match.pattern: unknown operator mathmul; did you mean matmul?"),
    ("g = matmul(x)\nh = sillu(g)", "5:9: match.pattern: unknown operator sillu; did you mean silu?"),
    ("g = matmul(x)\nh = qqqqqq(g)", "5:9: match.pattern: unknown operator qqqqqq; operators are matmul and the base names of ATen"),
    ("g = matmul(x", "4:17: match.pattern: expected `,` or `)`, got the end of the pattern"),
    ("g = matmul(x))", "4:18: match.pattern: expected the end of the line, got ')'"),
    ("g = matmul()", "4:16: match.pattern: expected a name or an operator, got ')'"),
    ("g = matmul(x) h = silu(g)", "4:19: match.pattern: expected the end of the line, got 'h'"),
    ("matmul(x)", "4:11: match.pattern: expected `=` and an operator, got '('"),
    ("g = x", "4:9: match.pattern: expected an operator with arguments, as in `matmul(x)`, got the name 'x'"),
    ("g =", "4:8: match.pattern: expected an operator, as in `matmul(x)`, got the end of the line"),
    ("g = matmul(x)\ng = matmul(y)", "5:5: match.pattern: g is already defined on an earlier line"),
    ("g = matmul(x)\nh = mul(g, 2.5)", "5:16: match.pattern: numbers are not compared in a pattern; leave them out"),
    ("g = matmul(x)\nh = view(g)", "5:9: match.pattern: view only changes the layout and is looked through; leave it out"),
    (
        "g = matmul(x, w, b)",
        "4:9: match.pattern: matmul takes one argument, or two where no weight is involved; the weight and the bias are not written",
    ),
    ("a, b = matmul(x)", "4:8: match.pattern: matmul has one output"),
    ("g = matmul(h)\nh = silu(g)", "4:9: match.pattern: g is computed from itself"),
    ("h = silu(x)", "4:5: match.pattern: the pattern captures no matmul; a line like `g = matmul(x)` does"),
    ("h = silu(matmul(x))", "4:5: match.pattern: the pattern captures no matmul; a line like `g = matmul(x)` does"),
    ("# nothing", "4:5: match.pattern: the pattern captures no matmul; a line like `g = matmul(x)` does"),
    ("g = matmul(x)\nh = softmax(y)", "5:9: match.pattern: softmax is connected to no captured matmul of the pattern"),
    ("g = matmul(x); h", "4:18: match.pattern: ';' does not belong in a pattern; its lines look like `g = matmul(x)`"),
    ("g = matmul(x)\n\n  h = (g)", "6:11: match.pattern: expected an operator, as in `matmul(x)`, got '('"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[text for text, _ in ERRORS])
def test_errors_stand_at_their_place_in_the_file(text: str, message: str) -> None:
    block = "\n".join(f"    {line}" for line in text.splitlines())
    spec = read("version: 1\nrule: a\nmatch: {a: 1}\n".replace("match: {a: 1}", f"pattern: |\n{block}"), "s.yaml")
    scalar = spec.items["pattern"]
    assert isinstance(scalar, Scalar)
    with pytest.raises(SpecError) as error:
        parse_pattern(Scalar(scalar.at, "match.pattern", scalar.text, scalar.plain, scalar.start))
    assert str(error.value) == f"s.yaml:{message}"


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("h", "s.yaml:5:10: match.claim: 'h' is no captured matmul of the pattern; captured matmuls: gate"),
        ("[gat]", "s.yaml:5:11: match.claim[0]: 'gat' is no captured matmul of the pattern; did you mean gate?"),
        ("[]", "s.yaml:5:10: match.claim: the pattern claims nothing; name at least one captured matmul, or leave claim out to claim all"),
    ],
)
def test_errors_of_claims(claim: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        match_of(f"match:\n  pattern: |\n    gate = matmul(x)\n    h = silu(gate)\n  claim: {claim}\n")
    assert str(error.value) == message


def test_a_quoted_pattern_and_a_dict_have_places_too() -> None:
    with pytest.raises(SpecError, match=r"^s.yaml:1:23: match.pattern: unknown operator matmull; did you mean matmul\?$"):
        match_of('match: {pattern: "g = matmull(x)"}')
    with pytest.raises(SpecError, match=r"^match.pattern: unknown operator matmull"):
        match_of({"pattern": "g = matmull(x)"})
