"""The selector language against a brute-force oracle, and the exact words of its errors."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from handmade import asked, gather, match_of, site
from hypothesis import given
from hypothesis import strategies as st

from matmorph.errors import RewriteError, SpecError
from matmorph.specs.conditions.role import ROLES
from matmorph.specs.globs import Glob, GlobError, expand_braces
from matmorph.specs.numbers import parse_comparison, parse_layers

# ------------------------------------------------------------------------------------------------------------------ globs


def oracle_component(glob: str, name: str) -> bool:
    """`*` = any characters of one component, by recursion over characters."""
    if not glob:
        return not name
    if glob[0] == "*":
        return oracle_component(glob[1:], name) or (bool(name) and oracle_component(glob, name[1:]))
    return bool(name) and name[0] == glob[0] and oracle_component(glob[1:], name[1:])


def oracle_glob(glob: list[str], name: list[str]) -> bool:
    """`**` = zero or more components, by recursion over components."""
    if not glob:
        return not name
    if glob[0] == "**":
        return oracle_glob(glob[1:], name) or (bool(name) and oracle_glob(glob, name[1:]))
    return bool(name) and oracle_component(glob[0], name[0]) and oracle_glob(glob[1:], name[1:])


WORD = st.sampled_from(["a", "b", "ab", "ba", "0"])
COMPONENT = st.one_of(WORD, st.sampled_from(["*", "**", "a*", "*b", "*a*"]))


@given(st.lists(COMPONENT, min_size=1, max_size=5), st.lists(WORD, min_size=1, max_size=5))
def test_globs_agree_with_recursion(glob: list[str], name: list[str]) -> None:
    assert Glob(".".join(glob)).matches(".".join(name)) == oracle_glob(glob, name)


@pytest.mark.parametrize(
    ("glob", "matching", "other"),
    [
        ("encoder.*.dense", ["encoder.a.dense"], ["encoder.dense", "encoder.a.b.dense"]),
        ("encoder.**.dense", ["encoder.dense", "encoder.a.dense", "encoder.a.b.dense"], ["encoders.dense", "x.encoder.dense"]),
        ("**", ["a", "a.b.c", ""], []),
        ("*", ["a"], ["a.b", ""]),
        ("**.5.**", ["5", "a.5", "5.b", "a.5.b.c"], ["15", "a.55.b"]),
        ("enc**", ["encoder.a.b", "enc"], ["x.enc"]),
        ("in_proj[0:64]", ["in_proj[0:64]"], ["in_proj0", "in_proj[0:65]"]),
        ("a.{b,c{d,e}}.f", ["a.b.f", "a.cd.f", "a.ce.f"], ["a.c.f", "a.d.f"]),
        ("{a.b,c}", ["a.b", "c"], ["a", "b"]),
        ("x{,_1}", ["x", "x_1"], ["x_"]),
        ("a,b", ["a,b"], ["a", "b"]),
    ],
)
def test_globs(glob: str, matching: list[str], other: list[str]) -> None:
    assert [name for name in [*matching, *other] if Glob(glob).matches(name)] == matching


def test_braces_expand_in_order() -> None:
    assert expand_braces("{a,b}{1,2}") == ("a1", "a2", "b1", "b2")


@pytest.mark.parametrize(("glob", "offset"), [("a.{b,c", 2), ("a}b", 1), ("{a,{b}", 0), ("", 0), ("a..b", 0), ("{1,2}" * 10, 0)])
def test_globs_that_cannot_be_read(glob: str, offset: int) -> None:
    with pytest.raises(GlobError) as error:
        Glob(glob)
    assert (error.value.offset == offset) or glob.startswith("{1")


# ------------------------------------------------------------------------------------------------------------------ numbers and layers


@pytest.mark.parametrize(
    ("text", "holding", "other"),
    [
        ("768", [768], [767, 769]),
        ("== 768", [768], [0]),
        ("!= 768", [767], [768]),
        (">= 100k", [100_000, 100_001], [99_999]),
        ("> 100K", [100_001], [100_000]),
        ("<3M", [2_999_999], [3_000_000]),
        ("<= 1.5k", [1500], [1501]),
        ("7B", [7 * 10**9], [7]),
        ("2G", [2 * 10**9], [2]),
        ("1_000", [1000], [1]),
        ("1e3", [1000], [1]),
        ("100..200", [100, 150, 200], [99, 201]),
        ("1k .. 2k", [1000, 2000], [999, 2001]),
        ("% 64 == 0", [0, 64, 640], [1, 65]),
        ("%64!=0", [1, 65], [64]),
        ("% 3 == 2", [2, 5], [3]),
        (">= 0.5", [0.5, 1], [0.49]),
    ],
)
def test_comparisons(text: str, holding: list[float], other: list[float]) -> None:
    comparison = parse_comparison(text)
    assert [number for number in [*holding, *other] if comparison.holds(number)] == holding


@pytest.mark.parametrize("text", ["", "many", "> ", "=> 3", "5 5", "% 0 == 0", "9..3", "-1", "1_", "% 64", "3 > 2", "1e", "1kk"])
def test_comparisons_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|empty|division"):
        parse_comparison(text)


@given(st.integers(0, 10**7), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), st.integers(0, 9999), st.sampled_from(["", "k", "M"]))
def test_comparisons_agree_with_python(number: int, op: str, value: int, unit: str) -> None:
    bound = value * {"": 1, "k": 1000, "M": 1_000_000}[unit]
    assert parse_comparison(f"{op} {value}{unit}").holds(number) == eval(f"{number} {op} {bound}")


@pytest.mark.parametrize(
    ("text", "layers", "chosen"),
    [
        ("0..5", 8, [0, 1, 2, 3, 4, 5]),
        ("2 .. 3", 8, [2, 3]),
        ("3", 8, [3]),
        ("last 2", 6, [4, 5]),
        ("last 9", 3, [0, 1, 2]),
        ("every 2", 6, [0, 2, 4]),
        ("every  3", 7, [0, 3, 6]),
        ("7..9", 8, [7]),
    ],
)
def test_layers(text: str, layers: int, chosen: list[int]) -> None:
    assert [layer for layer in range(layers) if parse_layers(text).holds(layer, layers)] == chosen


@pytest.mark.parametrize("text", ["5..2", "last", "last 0", "every 0", "first 2", "-1", "1,2", "0...5", "a..b"])
def test_layers_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|empty|1 or more"):
        parse_layers(text)


# ------------------------------------------------------------------------------------------------------------------ algebra

SITES = [
    site("enc.0.q", role="attention.q", layer=0, in_features=64, out_features=64),
    site("enc.0.fc1", role="mlp.fc1", layer=0, in_features=64, out_features=256, uses=2),
    site("enc.3.fc2", role="mlp.down", layer=3, in_features=256, out_features=64),
    site("enc.5.o", role="cross_attention.o", layer=5, in_features=64, out_features=48, form="conv1x1"),
    site("table", role="embedding", in_features=64, out_features=999, form="embedding", uses=0, gathers=(gather(),)),
    site("head", role="head", in_features=64, out_features=999, gathers=(gather(),), names=("head.weight", "wte.weight")),
    site("enc.0.q.low_rank.up", layer=0, in_features=4, out_features=64, form="mm", rule="first"),
]

# (data of one condition, what it should say of a site, by plain Python)
LEAVES = [
    ({"role": "mlp.*"}, lambda s: s.role.startswith("mlp.")),
    ({"role": ["head", "attention.{q,k}"]}, lambda s: s.role in ("head", "attention.q")),
    ({"path": "enc.*.fc*"}, lambda s: ".fc" in s.path),
    ({"path": "wte"}, lambda s: s.path == "head"),
    ({"path": "re:enc\\.[03]\\..*"}, lambda s: s.path.startswith(("enc.0.", "enc.3."))),
    ({"layer": "0..3"}, lambda s: s.layer in (0, 3)),
    ({"layer": "last 1"}, lambda s: s.layer == 5),
    ({"layer": [5, "every 4"]}, lambda s: s.layer in (0, 5)),
    ({"op": "matmul"}, lambda s: s.form != "embedding"),
    ({"op": "embedding"}, lambda s: s.path in ("table", "head")),
    ({"op": ["conv1x1", "mm"]}, lambda s: s.form in ("conv1x1", "mm")),
    ({"in_features": 64}, lambda s: s.in_features == 64),
    ({"out_features": ["% 64 == 0", "> 64"]}, lambda s: s.out_features == 256),
    ({"params": ">= 16k"}, lambda s: s.in_features * s.out_features >= 16_000),
    ({"shared": True}, lambda s: s.path in ("enc.0.fc1", "head")),
    ({"shared": False}, lambda s: s.path not in ("enc.0.fc1", "head")),
    ({"inserted_by": "first"}, lambda s: s.path.endswith(".up")),
    ({"use": "wide"}, lambda s: s.out_features > 100 and s.role != "head"),
]
NAMED = {"wide": {"out_features": "> 100", "not": {"role": "head"}}}


def leaf(index: int):
    return LEAVES[index]


def merge(parts):
    """Several conditions in one mapping, where no key stands twice."""
    data: dict = {}
    tests = []
    for one, test in parts:
        if not data.keys() & one.keys():
            data |= one
            tests.append(test)
    return data, lambda s: all(test(s) for test in tests)


def combined(children):
    many = st.lists(children, min_size=1, max_size=3)
    return st.one_of(
        children.map(lambda c: ({"not": c[0]}, lambda s: not c[1](s))),
        many.map(lambda cs: ({"any": [c[0] for c in cs]}, lambda s: any(c[1](s) for c in cs))),
        many.map(lambda cs: ({"all": [c[0] for c in cs]}, lambda s: all(c[1](s) for c in cs))),
        many.map(merge),
    )


TREES = st.recursive(st.sampled_from(LEAVES), combined, max_leaves=8)


def names(data: object, key: str, positive: bool = True) -> bool:
    """Whether the key stands somewhere outside a `not` (or inside two)."""
    if isinstance(data, list):
        return any(names(item, key, positive) for item in data)
    if not isinstance(data, dict):
        return False
    return any(
        (positive and name == key) or names(value, key, positive != (name == "not"))
        for name, value in data.items()
    )  # fmt: skip


@given(TREES)
def test_algebra_agrees_with_a_truth_table(tree) -> None:
    data, expected = tree
    match = match_of(data, NAMED)
    for one in SITES:
        wanted = expected(one)
        wanted &= names(data, "op") or one.form != "embedding"
        wanted &= names(data, "inserted_by") or one.const.rule is None
        verdict = match.test(*asked(one))
        assert (verdict.matched, bool(verdict.failed)) == (wanted, not wanted)


def test_every_combination_of_three_conditions() -> None:
    conditions = {"role": ("mlp.*", "mlp.fc1"), "layer": (0, 0), "in_features": (64, 64)}
    match = match_of({key: data for key, (data, _) in conditions.items()})
    for role, layer, width in itertools.product(["mlp.fc1", "head"], [0, 1], [64, 65]):
        verdict = match.test(*asked(site("a", role=role, layer=layer, in_features=width)))
        wrong = [key for key, value in zip(conditions, (role, layer, width), strict=True) if value != conditions[key][1]]
        assert [condition.key for condition in verdict.failed] == wrong, "every failing condition is reported, in the order of the spec"
        assert verdict.matched == (not wrong)


def test_parts_of_use_and_all_fail_on_their_own() -> None:
    match = match_of({"use": "wide", "all": [{"layer": 3}, {"path": "enc.**"}]}, NAMED)
    verdict = match.test(*asked(SITES[5]))
    assert [condition.text for condition in verdict.failed] == ["not: {role: head}", "layer: 3", "path: enc.**"]


def test_implied_conditions_are_named_as_such() -> None:
    match = match_of({"params": "> 1"})
    assert [c.text for c in match.test(*asked(SITES[4])).failed] == ["op: matmul (implied: no op is named)"]
    assert [c.text for c in match.test(*asked(SITES[6])).failed] == ["of the source model (implied: no inserted_by is named)"]
    assert match_of({"not": {"op": "linear"}}).test(*asked(SITES[4])).matched is False, "a negated op does not open the tables"


def test_a_slice_is_matched_under_each_name() -> None:
    one = site("attn.in_proj[0:4]", names=("attn.in_proj.weight", "tied.in_proj.weight"))
    assert match_of({"path": "tied.in_proj[0:4]"}).test(*asked(one)).matched
    assert not match_of({"path": "tied.in_proj"}).test(*asked(one)).matched


# ------------------------------------------------------------------------------------------------------------------ statistics


def test_effective_rank_and_outlier_ratio() -> None:
    # Two equal singular values: entropy log 2, effective rank 2 (Roy & Vetterli 2007). 32 entries, two of size 3: rms = 3/4, ratio 4.
    weight = torch.zeros(4, 8)
    weight[0, 0] = weight[1, 1] = 3.0
    one = site("a", weight=weight)
    assert match_of({"effective_rank": "1.999..2.001"}).test(*asked(one)).matched
    assert match_of({"outlier_ratio": "3.999..4.001"}).test(*asked(one)).matched
    assert not match_of({"outlier_ratio": "> 5", "effective_rank": "< 3"}).test(*asked(one)).matched


def test_effective_rank_agrees_with_a_full_svd(rng) -> None:
    weight = torch.from_numpy(rng.standard_normal((9, 5)))
    share = torch.linalg.svdvals(weight)
    share = share / share.sum()
    expected = float(torch.exp(-(share * share.log()).sum()))
    # float64: the Gram matrix loses half of the 16 digits of the smallest singular value
    match = match_of({"effective_rank": f"{expected - 1e-6:.9f}..{expected + 1e-6:.9f}"})
    assert match.test(*asked(site("a", weight=weight))).matched


def test_a_stack_counts_its_largest_matrix() -> None:
    stack = torch.stack([torch.diag(torch.tensor([1.0, 0, 0])), torch.eye(3)])
    assert match_of({"effective_rank": "2.99..3.01"}).test(*asked(site("a", weight=stack, batch=2))).matched


def test_a_zero_matrix_has_statistics() -> None:
    one = site("a", weight=torch.zeros(3, 3))
    assert match_of({"effective_rank": 0, "outlier_ratio": 0}).test(*asked(one)).matched


class Unreadable:
    """A weight that must not be read."""

    shape = (4, 8)

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"the weight was read ({name})")


@pytest.mark.parametrize(
    "data",
    [
        {"effective_rank": "> 1", "role": "mlp.*"},
        {"all": [{"effective_rank": "> 1"}, {"layer": 9}]},
        {"any": [{"effective_rank": "> 1", "role": "mlp.*"}, {"role": "moe.*"}]},
        {"not": {"any": [{"effective_rank": "> 1"}, {"role": "head"}]}},
        {"not": {"not": {"outlier_ratio": "> 1"}}, "path": "nowhere"},
    ],
)
def test_weights_are_left_alone_where_something_cheaper_fails(data: dict) -> None:
    verdict = match_of(data).test(*asked(site("a", role="head", weight=Unreadable())))
    assert not verdict.matched
    assert all(condition.key not in ("effective_rank", "outlier_ratio") for condition in verdict.failed)


def test_weights_are_left_alone_where_something_cheaper_holds() -> None:
    assert (
        match_of({"any": [{"effective_rank": "> 1"}, {"role": "head"}]}).test(*asked(site("a", role="head", weight=Unreadable()))).matched
    )


def test_a_table_is_not_read_by_a_rule_that_cannot_match_it() -> None:
    assert not match_of({"effective_rank": "> 1"}).test(*asked(site("a", form="embedding", weight=Unreadable()))).matched


def test_statistics_of_weights_without_numbers() -> None:
    match = match_of('match:\n  outlier_ratio: "> 1"\n')
    with pytest.raises(SpecError) as error:
        match.test(*asked(site("fc", weight=torch.ones(4, 8, device="meta"))))
    assert (
        str(error.value) == "s.yaml:2:18: match.outlier_ratio: outlier_ratio reads the weight of fc, and this model is on the meta device"
    )
    with pytest.raises(RewriteError, match="fc: the weight has NaN or Inf"):
        match.test(*asked(site("fc", weight=torch.full((2, 2), torch.nan))))


# ------------------------------------------------------------------------------------------------------------------ errors

ERRORS = [
    ("match: {rolle: head}", "s.yaml:1:9: match.rolle: unknown key; did you mean role?"),
    ("match: {}", "s.yaml:1:8: match: no condition is given; {op: matmul} matches every weight matmul"),
    ("match: {role: atention.q}", "s.yaml:1:15: match.role: 'atention.q' matches no role; did you mean attention.q?"),
    ("match: {role: attention}", "s.yaml:1:15: match.role: 'attention' matches no role; did you mean attention.*?"),
    ("match: {role: query}", f"s.yaml:1:15: match.role: 'query' matches no role; roles: {', '.join(ROLES)}"),
    ("match: {role: gate_up}", "s.yaml:1:15: match.role: 'gate_up' matches no role; did you mean mlp.gate_up?"),
    ('match: {role: "attention.{q,w}"}', "s.yaml:1:15: match.role: 'attention.w' matches no role; did you mean attention.v?"),
    ("match: {role: [head, mpl.up]}", "s.yaml:1:22: match.role[1]: 'mpl.up' matches no role; did you mean mlp.up?"),
    ("match: {role: []}", "s.yaml:1:15: match.role: expected a role, got an empty list"),
    ("match: {role: {a: b}}", "s.yaml:1:15: match.role: expected a role, got a mapping with a"),
    ("match: {role: null}", "s.yaml:1:15: match.role: expected a role, got null"),
    ('match: {path: "a.{b,c"}', "s.yaml:1:18: match.path: not a glob: this { is not closed"),
    ('match: {path: "a..b"}', "s.yaml:1:16: match.path: not a glob: a component of 'a..b' is empty"),
    ('match: {path: "re:a(b"}', "s.yaml:1:20: match.path: not a regular expression: missing ), unterminated subpattern"),
    ("match: {layer: first}", "s.yaml:1:16: match.layer: expected 0..5, [0, 2, 5], 3, last 2 or every 2, got 'first'"),
    ("match: {layer: 5..2}", "s.yaml:1:16: match.layer: the range 5..2 is empty"),
    ("match: {layer: [0, -1]}", "s.yaml:1:20: match.layer[1]: expected 0..5, [0, 2, 5], 3, last 2 or every 2, got '-1'"),
    ("match: {op: lineer}", "s.yaml:1:13: match.op: unknown op 'lineer'; did you mean linear?"),
    (
        "match: {op: xyz}",
        "s.yaml:1:13: match.op: unknown op 'xyz'; known: matmul, linear, addmm, mm, einsum, conv1x1, expert, embedding, conv, "
        "recurrent, product",
    ),
    ("match: {block: {mlp: 1}}", "s.yaml:1:16: match.block: expected a block (attention, mlp), got a mapping with mlp"),
    ("match: {block: atention}", "s.yaml:1:16: match.block: unknown block 'atention'; did you mean attention?"),
    (
        'match: {params: "=> 3"}',
        's.yaml:1:17: match.params: expected 768, ">= 100k", "< 3M", "100..200" or "% 64 == 0", got \'=> 3\'',
    ),
    ("match: {shared: yes}", "s.yaml:1:17: match.shared: expected true or false, got yes"),
    ('match: {shared: "true"}', 's.yaml:1:17: match.shared: expected true or false, got the text "true"'),
    ("match: {claim: g}", "s.yaml:1:9: match.claim: claim goes with pattern, and there is none"),
    ("match: {use: wide}", "s.yaml:1:14: match.use: unknown selection 'wide'; the spec has no select"),
    (
        "select: {wide: {params: 1}}\nmatch: {use: wyde}",
        "s.yaml:2:14: match.use: unknown selection 'wyde'; did you mean wide?",
    ),
    (
        "select:\n  a: {use: b}\n  b: {not: {use: a}}\nmatch: {use: a}",
        "s.yaml:3:18: select.b.not.use: the selection uses itself: a -> b -> a",
    ),
    ("select: {a: 5}\nmatch: {use: a}", "s.yaml:1:13: select.a: a selection is a mapping of conditions, got 5"),
    (
        "match: {not: [{role: head}]}",
        "s.yaml:1:14: match.not: not takes one mapping of conditions (not: {any: [...]} for several), got a list of 1",
    ),
    ("match: {any: {role: head}}", "s.yaml:1:14: match.any: any takes a list of mappings, got a mapping with role"),
    ("match: {all: [head]}", "s.yaml:1:15: match.all[0]: all takes a list of mappings, got head"),
    ("match: {any: []}", "s.yaml:1:14: match.any: any takes a list of mappings, got an empty list"),
    (
        "match: {any: [{op: mm}, {not: {}}]}",
        "s.yaml:1:31: match.any[1].not: no condition is given; {op: matmul} matches every weight matmul",
    ),
    (
        "match: {effective_rank: low}",
        's.yaml:1:25: match.effective_rank: expected 768, ">= 100k", "< 3M", "100..200" or "% 64 == 0", got \'low\'',
    ),
    ("match: {pattern: [a]}", "s.yaml:1:18: match.pattern: a pattern is a text of lines like `g = matmul(x)`, got a list of 1"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[text.replace("\n", " ") for text, _ in ERRORS])
def test_errors_say_where_and_what(text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        match_of(text)
    assert error.value.headline() == message


def test_errors_of_a_dict_name_the_keypath() -> None:
    with pytest.raises(SpecError, match=re.escape("match.any[0].role: 'hed' matches no role; did you mean head?")):
        match_of({"any": [{"role": "hed"}]})


def test_unknown_keys_list_the_known_ones() -> None:
    with pytest.raises(SpecError) as error:
        match_of({"colour": "red"})
    assert "effective_rank" in error.value.details[0]
