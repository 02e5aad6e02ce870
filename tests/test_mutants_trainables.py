"""Mutants of the choice of what trains: each plants one plausible mistake, and the checks below must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mutating import Mutant, killer, mutated, unmutated

from matmorph.errors import SpecError
from matmorph.ir.text.printing import parse_graph
from matmorph.passes.methods import all_methods

METHODS = all_methods()
GRAPH = parse_graph("""graph device=cpu
range batch 1..
input %x: float32[batch, 4] "x"
parameter %a.weight: float32[4, 4] "a.weight" "tied.weight" trainable
parameter %a.lora.down: float32[4, 2] "a.lora.down" trainable rule="r" site="a" method="lora" part="down"
parameter %a.lora.up: float32[2, 4] "a.lora.up" trainable rule="r" site="a" method="lora" part="up"
parameter %a.lora.base: float32[4, 4] "a.lora.base" rule="r" site="a" method="lora" part="base"
buffer %a.steps: int64[4] "a.steps"
parameter %a.tt_lora_1.core_0: float32[4] "a.tt_lora_1.core_0" trainable rule="r" site="a" method="tt_lora" part="core_0"
parameter %b.low_rank.down: float32[4] "b.low_rank.down" trainable rule="r" site="b" method="low_rank" part="down"
parameter %b.table: int64[4] "b.table"
parameter %lora.bias: float32[4] "lora.bias" trainable
parameter %idle: float32[4] "idle" trainable
%1: float32[batch, 4] = aten.matmul.default(%x, %a.weight)
%2: float32[batch, 2] = aten.matmul.default(%1, %a.lora.down)
%3: float32[batch, 4] = aten.matmul.default(%2, %a.lora.up)
%4: float32[batch, 4] = aten.matmul.default(%3, %a.lora.base)
%5: float32[batch, 4] = aten.add.Tensor(%4, %a.steps)
%6: float32[batch, 4] = aten.add.Tensor(%5, %a.tt_lora_1.core_0)
%7: float32[batch, 4] = aten.add.Tensor(%6, %b.low_rank.down)
%8: float32[batch, 4] = aten.add.Tensor(%7, %b.table)
%9: float32[batch, 4] = aten.add.Tensor(%8, %lora.bias)
output %9 "y"
""")


def chosen(module: Any, *words: str, frozen: tuple[str, ...] = (), reached: Any = None) -> list[tuple[str, str]]:
    found = module["trainables.resolve"](GRAPH, METHODS, module.selectors(words, "t"), module.selectors(frozen, "f"), reached)
    return [(item.const.path, item.segment) for item in found]


def refused(module: Any, message: str, *words: str, **more: Any) -> None:
    with pytest.raises(SpecError) as caught:
        chosen(module, *words, **more)
    assert message in str(caught.value)


def groups(module: Any) -> None:
    adapters = ["a.lora.down", "a.lora.up", "a.tt_lora_1.core_0"]
    assert chosen(module, "adapters") == [(name, "adapters") for name in adapters]
    assert chosen(module, "factors") == [("b.low_rank.down", "factors")]


def everything(module: Any) -> None:
    names = ["a.weight", "a.lora.down", "a.lora.up", "a.tt_lora_1.core_0", "b.low_rank.down", "lora.bias"]
    assert chosen(module, "all") == [(name, "all") for name in names]  # not the frozen base, the integers, what nothing reads


def segments(module: Any) -> None:
    assert chosen(module, "factors", "a.lora.*", "a.**") == [
        ("b.low_rank.down", "factors"),
        ("a.lora.down", "a.lora.*"),
        ("a.lora.up", "a.lora.*"),
        ("a.lora.base", "a.lora.*"),
        ("a.weight", "a.**"),
        ("a.tt_lora_1.core_0", "a.**"),
    ]


def names(module: Any) -> None:
    assert chosen(module, "tied.weight") == [("a.weight", "tied.weight")]


def reach(module: Any) -> None:
    live = [const for const in GRAPH.used_state() if const.path != "a.lora.up"]
    assert [name for name, _ in chosen(module, "adapters", reached=live)] == ["a.lora.down", "a.tt_lora_1.core_0"]
    refused(module, "t[0]: the loss does not depend on what a.lora.up chooses", "a.lora.up", reached=live)


def refusals(module: Any) -> None:
    refused(module, "t[1]: a.lora.down is matched by both train.trainable (adapters) and train.frozen (*.lora.down)",
            "factors", "adapters", frozen=("*.lora.down",))  # fmt: skip
    refused(module, "f[0]: no parameter is called nothing", "all", frozen=("nothing",))
    refused(module, "t[0]: b.table holds int64, which does not train", "b.**")
    refused(module, "t[0]: a.steps is a buffer (int64), not a parameter", "a.steps")
    refused(module, "t[0]: no parameter is called idle", "idle")
    refused(module, "train.trainable is empty")
    refused(module, "a.weight is matched by both", "a.weight", frozen=("a.weight",))
    assert "a.weight" not in [name for name, _ in chosen(module, "all", frozen=("a.weight",))]
    refused(module, "t[0]: everything is frozen: nothing trains", "all", frozen=("all",))


CHECKS: tuple[Callable[[Any], None], ...] = (groups, everything, segments, names, reach, refusals)

MUTANTS = {
    "an adapter counts as a factor": Mutant("protocol.names_of", "method.trains == trains", "method.trains is not None"),
    "what a method inherits is forgotten": Mutant("protocol.names_of", "method.trains", "vars(type(method)).get('trains')"),
    "a repeated method is another one": Mutant("trainables._chosen", "const.method", "const.path.split('.')[-2]"),
    "the source's own names count": Mutant("trainables._chosen", "const.method", "(const.method or const.path.split('.')[0])"),
    "a frozen base trains with the adapters": Mutant(
        "trainables._chosen", "const.trainable and const.method in names", "const.method in names"
    ),
    "all takes what a method froze": Mutant(
        "_trains",
        "const.tensor.torch_dtype.is_floating_point and (const.rule is None or const.trainable)",
        "const.tensor.torch_dtype.is_floating_point",
    ),
    "all takes integers": Mutant("_trains", "const.tensor.torch_dtype.is_floating_point", "True"),
    "all takes buffers": Mutant("trainables._chosen", "[const for const in consts if const.kind == 'parameter']", "list(consts)"),
    "what nothing reads trains": Mutant(
        "trainables.resolve", "_chosen(used, methods, selector)", "_chosen(graph.state, methods, selector)"
    ),
    "what the loss does not reach trains": Mutant("trainables.resolve", "[const for const in chosen if const in live]", "chosen"),
    "the last to name a parameter has it": Mutant("trainables.resolve", "found.setdefault", "found.__setitem__"),
    "a tied parameter has one name": Mutant(
        "_matching",
        "[const for const in parameters if any(map(glob.matches, const.names))]",
        "[const for const in parameters if glob.matches(const.path)]",
    ),
    "both lists are fine": Mutant("_refuse_both", "const in kept", "False"),
    "a dead guard is fine": Mutant(
        "trainables.resolve", "{const: selector for selector in frozen for const in _chosen(graph.state, methods, selector)}", "{}"
    ),
    "integers are let through": Mutant("trainables._matching", "integers", "False", nth=1),
    "nothing is something": Mutant("trainables.resolve", "not found", "False"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name: str) -> None:
    # pytest's own failure is what a refusal that does not come raises
    with mutated(MUTANTS[name]) as m, pytest.raises((AssertionError, SpecError, pytest.fail.Exception)):
        passes_all(m)


def passes_all(module: Any) -> None:
    for check in CHECKS:
        check(module)


def test_the_code_itself_passes() -> None:
    assert killer(unmutated(MUTANTS.values()), [passes_all]) is None
