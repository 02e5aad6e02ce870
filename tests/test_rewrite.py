"""The rewrite: golden text, every form, composition, one splice, what leaves the state. Oracle: the graph before, at full rank."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from rewriting import LINEAR, METHODS, graph_of, low_rank, moment, only_site, rewritten, rule_of, run, weights_of
from torch import Tensor

from matmorph.errors import InputError, RewriteError, VerifyError
from matmorph.ir.core import Graph, Value
from matmorph.ir.site import Choice, Cost, Fragment, Reject, Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.text.printing import print_graph
from matmorph.passes import methods
from matmorph.passes.methods.protocol import Error, FragmentBuilder, Method, UpdateMethod, dense_cost
from matmorph.passes.rewriting.rewrite import appraise, build, refuse_impossible, rewrite, splice
from matmorph.specs.schema import MethodUse

FULL = rule_of(low_rank({"energy": 1.0}), force=True)


def test_golden_text_of_a_linear() -> None:
    result, (outcome,) = rewritten(graph_of(LINEAR), rule_of(low_rank(4)))
    assert print_graph(result) == (
        "graph device=cpu\n"
        "range batch 1..\n"
        'input %x: float32[batch, 12] "x"\n'
        'parameter %fc.low_rank.down: float32[12, 4] "fc.low_rank.down" trainable rule="all" site="fc" method="low_rank" part="down"\n'
        'parameter %fc.low_rank.up: float32[4, 10] "fc.low_rank.up" trainable rule="all" site="fc" method="low_rank" part="up"\n'
        'parameter %fc.bias: float32[10] "fc.bias" trainable\n'
        "%linear_down: float32[batch, 4] = aten.matmul.default(%x, %fc.low_rank.down) "
        '@":Net/fc:Linear" layer=0 rule="all" location="s.yaml:3"\n'
        "%linear_up: float32[batch, 10] = aten.matmul.default(%linear_down, %fc.low_rank.up) "
        '@":Net/fc:Linear" layer=0 rule="all" location="s.yaml:3"\n'
        '%linear: float32[batch, 10] = aten.add.Tensor(%linear_up, %fc.bias) @":Net/fc:Linear" layer=0 rule="all" location="s.yaml:3"\n'
        '%relu: float32[batch, 10] = aten.relu.default(%linear) @":Net"\n'
        'output %relu "output"\n'
    )
    assert [const.path for const in outcome.consts] == ["fc.low_rank.down", "fc.low_rank.up"]
    assert outcome.cost == Cost(88, 352, 88)


# every form: rewritten at full rank, the graph gives its own outputs back

FORMS: Mapping[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "x @ W.T": (
        """input %x: float32[b, s, 6] "x"
parameter %w: float32[5, 6] "fc.weight"
%t: float32[6, 5] = aten.transpose.int(%w, 0, 1)
%y: float32[b, s, 5] = aten.matmul.default(%x, %t)
output %y "output"
""",
        {"x": (2, 3, 6)},
    ),
    "addmm, Conv1D layout": (
        """input %x: float32[b, 6] "x"
parameter %w: float32[6, 5] "fc.weight"
parameter %c: float32[5] "fc.bias"
%y: float32[b, 5] = aten.addmm.default(%c, %x, %w)
output %y "output"
""",
        {"x": (4, 6)},
    ),
    "W @ x": (
        """input %x: float32[b, 6, s] "x"
parameter %w: float32[5, 6] "fc.weight"
%y: float32[b, 5, s] = aten.matmul.default(%w, %x)
output %y "output"
""",
        {"x": (2, 6, 3)},
    ),
    "one vector": (
        """input %x: float32[6] "x"
parameter %w: float32[6, 5] "fc.weight"
%y: float32[5] = aten.matmul.default(%x, %w)
output %y "output"
""",
        {"x": (6,)},
    ),
    "einsum with two out axes": (
        """input %x: float32[b, s, 6] "x"
parameter %w: float32[6, 2, 5] "fc.weight"
%y: float32[b, s, 2, 5] = aten.einsum.default("bsd,dhk->bshk", [%x, %w])
output %y "output"
""",
        {"x": (2, 3, 6)},
    ),
    "einsum over a stack": (
        """input %x: float32[3, b, 6] "x"
parameter %w: float32[3, 6, 5] "experts"
%y: float32[3, b, 5] = aten.einsum.default("ebd,edf->ebf", [%x, %w])
output %y "output"
""",
        {"x": (3, 2, 6)},
    ),
    "1x1 convolution, then a view": (
        """input %x: float32[b, 6, 4, 3] "x"
parameter %w: float32[5, 6, 1, 1] "conv.weight"
parameter %c: float32[5] "conv.bias"
%y: float32[b, 5, 4, 3] = aten.conv2d.default(%x, %w, %c)
%v: float32[b, 60] = aten.view.default(%y, [-1, 60])
output %v "output"
""",
        {"x": (2, 6, 4, 3)},
    ),
    "experts picked by a list, W @ x": (
        """input %x: float32[b, 6] "x"
input %i: int64[b] "i"
parameter %w: float32[3, 5, 6] "experts"
%p: float32[b, 5, 6] = aten.index.Tensor(%w, [%i])
%u: float32[b, 6, 1] = aten.unsqueeze.default(%x, -1)
%m: float32[b, 5, 1] = aten.bmm.default(%p, %u)
%y: float32[b, 5] = aten.squeeze.dim(%m, -1)
output %y "output"
""",
        {"x": (4, 6), "i": (4,)},
    ),
    "slices of one weight": (
        """input %x: float32[b, 6] "x"
parameter %w: float32[12, 6] "in_proj_weight"
%q: float32[5, 6] = aten.slice.Tensor(%w, 0, 0, 5)
%k: float32[7, 6] = aten.slice.Tensor(%w, 0, 5, 12)
%y: float32[b, 5] = aten.linear.default(%x, %q)
%z: float32[b, 7] = aten.linear.default(%x, %k)
output %y "output_0"
output %z "output_1"
""",
        {"x": (2, 6)},
    ),
    "one weight in two places": (
        """input %x: float32[b, 6] "x"
parameter %w: float32[6, 6] "fc.weight"
%y: float32[b, 6] = aten.linear.default(%x, %w)
%r: float32[b, 6] = aten.relu.default(%y)
%z: float32[b, 6] = aten.linear.default(%r, %w)
output %z "output"
""",
        {"x": (2, 6)},
    ),
}


def example(shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randint(0, 3, shape, generator=g) if name == "i" else torch.randn(shape, generator=g) for name, shape in shapes.items()]


def head(text: str) -> str:
    symbols = [name for name in ("b", "s") if f"[{name}" in text or f", {name}" in text]
    return "graph device=cpu\n" + "".join(f"range {name} 1..\n" for name in symbols) + text


@pytest.mark.parametrize("name", FORMS)
def test_full_rank_gives_every_form_its_outputs_back(name: str) -> None:
    text, shapes = FORMS[name]
    graph = graph_of(head(text))
    result, outcomes = rewritten(graph, FULL)
    assert outcomes
    assert [outcome.reject for outcome in outcomes] == [None] * len(outcomes)
    assert not {const.path for const in result.state} & {outcome.site.const.path for outcome in outcomes}
    inputs = example(shapes)
    for before, after in zip(run(graph, *inputs), run(result, *inputs), strict=True):
        assert before.stride() == after.stride()
        torch.testing.assert_close(after, before, rtol=0, atol=2e-5)  # float32: sums of 6 products of size 3, twice


@pytest.mark.parametrize("name", FORMS)
def test_a_small_rank_is_the_merged_matrix_in_every_form(name: str) -> None:
    """Each application multiplies by W' = merge(factors): judged by putting W' where W was in the original graph."""
    text, shapes = FORMS[name]
    weights = weights_of(head(text))
    graph = graph_of(head(text), weights)
    result, outcomes = rewritten(graph, rule_of(low_rank(2), force=True))
    replaced = {path: tensor.clone() for path, tensor in weights.items()}
    for outcome in outcomes:
        merged, _ = METHODS["low_rank"].merge({c.path.rpartition(".")[2]: c.load() for c in outcome.consts})
        outcome.site.read(replaced[outcome.site.const.path]).copy_(merged)  # a view of the stored tensor
    inputs = example(shapes)
    for expected, found in zip(run(graph_of(head(text), replaced), *inputs), run(result, *inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # float32, as above


# the splice


def test_dead_nodes_and_consts_go_and_names_stay_in_place() -> None:
    graph = graph_of(head(FORMS["x @ W.T"][0]))
    result, _ = rewritten(graph, FULL)
    assert [node.op for node in result.nodes] == ["aten.matmul.default"] * 2
    assert result.nodes[-1].output is graph.nodes[-1].output  # bound to the same Value: nothing behind it changes


def test_a_sliced_weight_stays_while_one_slice_does() -> None:
    graph = graph_of(head(FORMS["slices of one weight"][0]))
    first, second = find_sites(graph)
    result, _ = rewrite(graph, [(first, FULL)], METHODS)
    names = [const.path for const in result.state]
    assert names == ["in_proj_weight", "in_proj_weight[0:5].low_rank.down", "in_proj_weight[0:5].low_rank.up"]
    assert [node.op for node in result.nodes].count("aten.slice.Tensor") == 1
    both, _ = rewrite(graph, [(first, FULL), (second, FULL)], METHODS)
    assert both.state[0].path == "in_proj_weight[0:5].low_rank.down"
    assert len(both.state) == 4


def test_an_unused_weight_stays_in_the_state() -> None:
    text = LINEAR.replace("parameter %fc.bias", 'parameter %idle: float32[3] "idle"\nparameter %fc.bias')
    result, _ = rewritten(graph_of(text), FULL)
    assert [const.path for const in result.state] == ["fc.low_rank.down", "fc.low_rank.up", "idle", "fc.bias"]


def test_a_node_nobody_read_before_stays() -> None:
    text = LINEAR.replace("%relu:", "%idle: float32[batch, 12] = aten.relu.default(%x)\n%relu:")
    result, _ = rewritten(graph_of(text), FULL)
    assert "idle" in [node.name for node in result.nodes]


TIED = """graph device=cpu
range b 1..
input %i: int64[b] "i"
parameter %w: float32[9, 6] "embed.weight" "head.weight"
%e: float32[b, 6] = aten.embedding.default(%w, %i)
%y: float32[b, 9] = aten.linear.default(%e, %w)
output %y "output"
"""


def test_a_tied_table_is_rejected_and_untie_separates_the_head() -> None:
    graph = graph_of(TIED)
    _, (outcome,) = rewritten(graph, FULL)
    assert outcome.reject is not None
    assert "untie: true" in outcome.reject.reason
    result, (outcome,) = rewritten(graph, rule_of(low_rank({"energy": 1.0}), force=True, untie=True))
    assert outcome.reject is None
    assert result.state[0].path == "embed.weight"
    ids = torch.tensor([1, 8, 4])
    torch.testing.assert_close(run(result, ids)[0], run(graph, ids)[0], rtol=0, atol=2e-5)  # float32, sums of 6


def test_names_never_clash_with_the_models_own() -> None:
    text = LINEAR.replace("parameter %fc.bias", 'parameter %mine: float32[2] "fc.low_rank.down"\nparameter %fc.bias')
    result, (outcome,) = rewritten(graph_of(text), FULL)
    names = [name for const in result.state for name in const.names]
    assert len(set(names)) == len(names)
    assert outcome.consts[0].path == "fc.low_rank.down_1"


def test_rolling_back_is_leaving_an_outcome_out_of_the_splice() -> None:
    graph = graph_of(head(FORMS["slices of one weight"][0]))
    outcomes = build(graph, [(site, FULL) for site in find_sites(graph)], METHODS)
    assert print_graph(splice(graph, [])) == print_graph(graph)
    assert len(splice(graph, outcomes[1:]).state) == 3


def test_progress_counts_sites() -> None:
    graph = graph_of(head(FORMS["slices of one weight"][0]))
    seen: list[tuple[int, int | None]] = []
    build(graph, [(site, FULL) for site in find_sites(graph)], METHODS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_blocked_and_unreadable_sites_are_rejects() -> None:
    text = """graph device=cpu
range b 1..
input %x: float32[b, 6] "x"
parameter %w: float32[6, 5] "fc.weight"
%u: float32[1, 6, 5] = aten.unsqueeze.default(%w, 0)
%y: float32[1, b, 5] = aten.matmul.default(%x, %u)
output %y "output"
"""
    found = appraise(only_site(graph_of(text)), FULL, METHODS)
    assert isinstance(found, Reject)
    assert "broadcast" in found.reason
    graph = graph_of(head(FORMS["slices of one weight"][0]).replace("0, 5, 12", "0, 4, 11"))
    _, (outcome,) = rewritten(graph, FULL)
    assert "overlap" in (outcome.reject or Reject("")).reason


def test_impossible_ranks_are_judged_over_a_whole_rule() -> None:
    graph = graph_of(head(FORMS["slices of one weight"][0]))
    rule = rule_of(low_rank(6), force=True)
    claims = [(site, rule) for site in find_sites(graph)]  # min(in, out) 5 and 6
    refuse_impossible(claims, METHODS)
    _, (first, second) = rewritten(graph, rule)
    assert first.reject == Reject("rank 6 is above min(in, out) = 5")
    assert second.reject is None


# composition


@dataclass(frozen=True)
class NoSpec:
    pass


class Shift(UpdateMethod):
    """An update with known mathematics: adds `amount` in every entry, as a rank-one product. `residual` is kept for the test to see."""

    name: ClassVar[str] = "shift"
    kind: ClassVar[str] = "update"
    Spec: ClassVar[type] = NoSpec
    seen: ClassVar[list[tuple[Tensor, Tensor]]] = []
    amount = 0.5

    def needs(self, spec: Any) -> frozenset[Any]:
        return frozenset()

    def check(self, site: Site, spec: Any) -> Reject | None:
        return None

    def choices(self, site: Site, spec: Any) -> Iterable[Choice]:
        return [Choice(1)]

    def cost(self, site: Site, spec: Any, choice: Choice) -> Cost:
        size = site.in_features + site.out_features
        return Cost(size, 4 * size, size)

    def errors(self, site: Site, spec: Any, choices: Sequence[Choice], stats: Any) -> Sequence[Error]:
        return [Error() for _ in choices]

    def build(self, site: Site, spec: Any, choice: Choice, stats: Any, b: FragmentBuilder) -> Fragment:
        self.seen.append((b.weight(), b.residual()))
        ones = b.const("ones", torch.ones(site.in_features, 1))
        row = b.const("row", torch.full((1, site.out_features), self.amount))

        def body(rows: Value) -> Value:
            return b.matmul(b.matmul(rows, ones), row)

        return b.fragment(body, [ones, row], lambda: torch.full((site.out_features, site.in_features), self.amount))

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return (parts["ones"] @ parts["row"]).T, None


COMPOSED: dict[str, Any] = {**METHODS, "shift": Shift()}
SHIFT = MethodUse("shift", NoSpec())


@pytest.fixture
def seen() -> Iterable[list[tuple[Tensor, Tensor]]]:
    Shift.seen.clear()
    yield Shift.seen
    Shift.seen.clear()


def expected(graph: Graph, x: Tensor, w: Tensor) -> Tensor:
    return torch.relu(x @ w.T + next(c for c in graph.state if c.path == "fc.bias").load())


def test_base_and_updates_are_summed_with_the_bias_once(seen: list[tuple[Tensor, Tensor]]) -> None:
    graph = graph_of(LINEAR)
    result, (outcome,) = rewritten(graph, rule_of(low_rank(2), SHIFT, SHIFT, force=True), {"fc": moment(torch.eye(12))}, COMPOSED)
    base, _ = METHODS["low_rank"].merge({c.path.rpartition(".")[2]: c.load() for c in outcome.consts[:2]})
    w = only_site(graph).weight()
    for original, _ in seen:
        assert torch.equal(original, w)  # every method sees the original
    torch.testing.assert_close(seen[0][1], w - base)
    torch.testing.assert_close(seen[1][1], w - base - 0.5)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(result, x)[0], expected(graph, x, base + 1.0), rtol=0, atol=5e-5)  # float32, sums of 12
    error = float((w - base - 1.0).norm() / w.norm())
    assert outcome.weight_error == pytest.approx(error, rel=1e-5)  # float32 W'
    assert outcome.output_error == pytest.approx(error, rel=1e-5)  # identity moment: the same number
    assert outcome.bound is None  # Eckart-Young says nothing of base + updates
    assert [c.path for c in outcome.consts[2:]] == ["fc.shift.ones", "fc.shift.row", "fc.shift_1.ones", "fc.shift_1.row"]
    assert outcome.cost == Cost(44 + 2 * 22, 4 * (44 + 2 * 22), 44 + 2 * 22)


def test_updates_alone_stay_beside_the_dense_matmul(seen: list[tuple[Tensor, Tensor]]) -> None:
    graph = graph_of(LINEAR)
    result, (outcome,) = rewritten(graph, rule_of(SHIFT), methods=COMPOSED)
    assert not seen[0][1].any() or torch.equal(seen[0][1], seen[0][0])
    assert "fc.weight" in [const.path for const in result.state]
    assert [node.op for node in result.nodes].count("aten.linear.default") == 1
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(result, x)[0], expected(graph, x, only_site(graph).weight() + 0.5), rtol=0, atol=5e-5)
    assert outcome.cost is not None
    assert outcome.cost.parameters == dense_cost(only_site(graph)).parameters + 22


def test_a_replacing_method_after_an_update_is_refused() -> None:
    with pytest.raises(RewriteError, match="as part 2 of its rewrite"):
        rewritten(graph_of(LINEAR), rule_of(SHIFT, low_rank(2)), methods=COMPOSED)


def test_a_fragment_of_the_wrong_type_is_our_bug() -> None:
    class Wrong(Shift):
        def build(self, site: Site, spec: Any, choice: Choice, stats: Any, b: FragmentBuilder) -> Fragment:
            narrow = b.const("narrow", torch.ones(site.in_features, 3))
            return b.fragment(lambda rows: b.matmul(rows, narrow), [narrow], lambda: torch.zeros(10, 12))

    class Lazy(Shift):
        kind = "replace"

        def build(self, site: Site, spec: Any, choice: Choice, stats: Any, b: FragmentBuilder) -> Fragment:
            return b.fragment(lambda rows: rows, [], lambda: torch.zeros(10, 12))

    class Replacing(Wrong):
        kind = "replace"

    for method, message in ((Replacing(), r"gives float32\[batch, 3\]|refuses"), (Lazy(), "does not make its own output")):
        with pytest.raises(VerifyError, match=message):
            rewritten(graph_of(LINEAR), rule_of(SHIFT, force=True), methods={"shift": method})


def test_methods_satisfy_the_protocol() -> None:
    assert isinstance(METHODS["low_rank"], Method)
    assert isinstance(Shift(), Method)


# memory, and the table of methods


def test_one_weight_is_held_at_a_time() -> None:
    """Each load makes a tensor of its own; when the next is asked for, the last one is gone."""
    graph = graph_of(head(FORMS["slices of one weight"][0]))
    held: list[weakref.ref[Tensor]] = []
    most = 0

    def load() -> Tensor:
        nonlocal most
        gc.collect()
        made = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
        held.append(weakref.ref(made.untyped_storage()))
        most = max(most, sum(ref() is not None for ref in held))
        return made

    claims = [(replace(site, const=replace(site.const, load=load)), FULL) for site in find_sites(graph)]
    outcomes = build(graph, claims, METHODS)
    gc.collect()
    assert len(held) == len(claims)  # loaded once per site
    assert most == 1
    assert [ref() for ref in held] == [None] * len(held)
    assert all(outcome.reject is None for outcome in outcomes)


class Point:
    """An entry point of an installed package, as far as the table looks at it."""

    def __init__(self, name: str, loaded: Any, owner: str = "other-package") -> None:
        self.name, self.value, self.loaded = name, "other:Method", loaded
        self.dist = SimpleNamespace(name=owner)

    def load(self) -> Any:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([Point("low_rank", Shift)], "two packages announce a method named low_rank: matmorph and other-package"),
        ([Point("shift", Shift), Point("shift", Shift, "third")], "a method named shift: other-package and third"),
        ([Point("shift", ImportError("no module x"))], "the method shift of other-package cannot be imported: no module x"),
        ([Point("shift", NoSpec)], "the method shift of other-package lacks name, kind"),
        ([Point("moved", Shift)], "the method moved of other-package calls itself shift"),
    ],
)
def test_methods_of_other_packages_that_do_not_fit(points: list[Point], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "entry_points", lambda group: points)
    with pytest.raises(InputError, match=message):
        methods.method_table()


def test_the_method_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert methods.method_table()["low_rank"] is type(METHODS["low_rank"])
    monkeypatch.setattr(methods, "entry_points", lambda group: [Point("shift", Shift)] if group == "matmorph.methods" else [])
    assert methods.method_table()["shift"] is Shift
