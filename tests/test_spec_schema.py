"""The dataclasses of the language as typed readers, and the JSON Schema that is generated from them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from decimal import Decimal
from importlib import resources
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from spec_methods import METHODS, LoraSpec, LowRankSpec, Modes

from matmorph.errors import SpecError, VerifyError
from matmorph.optimizers import SGD, AdamAtan2, AdamW, Lion, optimizer_name
from matmorph.passes.methods import method_table
from matmorph.specs.json_schema import json_schema, schema_text
from matmorph.specs.kinds import Boolean, Integer, Limits, Number
from matmorph.specs.load import library_names, library_text, load_spec
from matmorph.specs.notations import Count, Size
from matmorph.specs.schema import Budget, Calibration, Export, Rank, Tolerance, Train
from matmorph.specs.tree import MapTree, Scalar, from_data, read
from matmorph.specs.typed import kind_of, read_dataclass, to_plain


def plain(text: str) -> Scalar:
    return Scalar(None, "", text, plain=True)


# --------------------------------------------------------------------------------------------------------------------------- reading


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_integers(value: int) -> None:
    assert Integer().read(plain(str(value))) == value
    assert Integer().read(plain(f"{value:_}")) == value


@pytest.mark.parametrize("text", ["", "1.0", "1e3", "0x1", "0o7", "1_", "_1", "1__0", "٣", " 1", "1:30", "true", "null", str(2**63)])
def test_no_integers(text: str) -> None:
    with pytest.raises(SpecError, match=r"^expected an integer, got "):
        Integer().read(plain(text))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers(value: float) -> None:
    assert Number().read(plain(repr(value))) == value
    assert Number().read(plain(f"{value:.17e}")) == value


@pytest.mark.parametrize("text", ["", ".", "e5", "nan", ".nan", "inf", "-.inf", "1e999", "1,5", "0x1p3", "1_.5", "infinity"])
def test_no_numbers(text: str) -> None:
    with pytest.raises(SpecError, match=r"^expected a number, got "):
        Number().read(plain(text))


@given(st.floats(-5, 5), st.sampled_from(["minimum", "exclusive_minimum", "maximum", "exclusive_maximum"]), st.integers(-2, 2))
def test_limits(value: float, name: str, end: int) -> None:
    holds = {"minimum": value >= end, "exclusive_minimum": value > end, "maximum": value <= end, "exclusive_maximum": value < end}
    assert Limits(**{name: end}).hold(value) is holds[name]


@given(st.text(max_size=6))
def test_only_two_words_are_booleans(text: str) -> None:
    outcome: Any = None
    try:
        outcome = Boolean().read(plain(text))
    except SpecError as error:
        outcome = error.message
    expected = {"true": True, "false": False}.get(text)
    assert outcome is expected if expected is not None else outcome.startswith("expected true or false, got ")


DIGITS = st.decimals(min_value=1, max_value=10**6, places=3, allow_nan=False)


@given(DIGITS, st.sampled_from([("k", 10**3), ("K", 10**3), ("M", 10**6), ("G", 10**9)]))
def test_counts(number: Decimal, unit: tuple[str, int]) -> None:
    assert Count.from_tree(plain(f"{number}{unit[0]}"), {}) == Count(int(number * unit[1]), percent=False)


@given(DIGITS, st.sampled_from([("kB", 10**3), ("MB", 10**6), ("GB", 10**9)]))
def test_sizes(number: Decimal, unit: tuple[str, int]) -> None:
    assert Size.from_tree(plain(f"{number} {unit[0]}"), {}) == Size(int(number * unit[1]), percent=False)


@given(st.integers(1, 10**9), st.sampled_from([("", 1), ("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)]))
def test_binary_sizes(number: int, unit: tuple[str, int]) -> None:
    assert Size.from_tree(plain(f"{number:_}{unit[0]}"), {}) == Size(number * unit[1], percent=False)


@given(st.integers(1, 10_000))
def test_percentages(hundredths: int) -> None:
    text = f"{hundredths / 100}%"
    for kind in (Count, Size):
        amount = kind.from_tree(plain(text), {})
        assert (amount.value, amount.percent) == (hundredths / 100, True)
        assert kind.from_tree(from_data({"a": amount.plain()}).items["a"], {}) == amount


@pytest.mark.parametrize("text", ["", "0%", "101%", "-1", "1 k k", "1MB", "3m", "40 percent", "1e3", "0.5", "0.0001k", "9" * 50])
def test_no_counts(text: str) -> None:
    with pytest.raises(SpecError, match=r"^expected a "):
        Count.from_tree(plain(text), {})


RANKS = st.one_of(
    st.builds(Rank, st.sampled_from(["energy", "ratio"]), st.floats(1e-9, 1.0), st.integers(1, 64), st.integers(1, 4), st.integers(4, 9)),
    st.builds(Rank, st.just("error"), st.floats(0.0, 0.999)),
    st.builds(Rank, st.just("fixed"), st.integers(1, 10**9)),
    st.just(Rank("auto")),
)


@given(RANKS, st.booleans(), st.floats(0, 1))
def test_a_method_spec_comes_back(rank: Rank, whiten: bool, damping: float) -> None:
    spec = LowRankSpec(rank, whiten, damping)
    assert read_dataclass(LowRankSpec, from_data(to_plain(spec))) == spec


@given(st.integers(1, 99), st.sampled_from([2, 4, 8]), st.one_of(st.just("auto"), st.integers(1, 9)), st.none() | st.text(min_size=1))
def test_every_type_of_setting_comes_back(rank: int, bits: Any, levels: Any, label: str | None) -> None:
    spec = LoraSpec(rank, bits, levels, "normal", label, Modes((2, 3), (4,)), (0.5, 1.5))
    assert read_dataclass(LoraSpec, from_data(to_plain(spec))) == spec


@pytest.mark.parametrize("value", [
    Tolerance(0.1, None, "roll_back"), Calibration(7, "fisher"), Export(tokens=(3,)),
    Budget(Count(40.0, True), Size(5, False), None, "matched"),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_sections_come_back(value: Any) -> None:
    assert read_dataclass(type(value), from_data(to_plain(value))) == value


def test_train_is_typed() -> None:
    text = "{loss: mse, optimizer: {adamw: {lr: 1e-4, betas: [0.8, 0.99]}}, trainable: [adapters, 'a.**'], frozen: all}"
    train = read_dataclass(Train, read(text, "f"))
    trainable, frozen = ([word.text for word in words] for words in (train.trainable, train.frozen))
    assert (train.loss, trainable, frozen, train.ignore_index) == ("mse", ["adapters", "a.**"], ["all"], -100)
    assert [(str(word.at), word.keypath) for word in train.trainable] == [("f:1:77", "trainable[0]"), ("f:1:87", "trainable[1]")]
    assert train.optimizer.chosen == AdamW(1e-4, (0.8, 0.99), 1e-8, 0.01)


@pytest.mark.parametrize(("text", "expected"), [
    ("adamw: {lr: 2e-3}", AdamW(2e-3)),
    ("sgd: {lr: 0.1, momentum: 0.9, nesterov: true}", SGD(0.1, 0.9, True)),
    ("adam_atan2: {lr: 1}", AdamAtan2(1.0, a=4 / math.pi)),
    ("lion: {lr: 1e-4, betas: [0.95, 0.98], weight_decay: 1}", Lion(1e-4, (0.95, 0.98), 1.0)),
])  # fmt: skip
def test_one_optimizer_by_its_name(text: str, expected: Any) -> None:
    train = read_dataclass(Train, read(f"{{loss: mse, optimizer: {{{text}}}}}", "f"))
    assert train.optimizer.chosen == expected
    assert optimizer_name(expected) == text.partition(":")[0]
    assert read_dataclass(Train, from_data(to_plain(train))) == train


@dataclass(frozen=True)
class Own:
    """Has a `min` of its own, so that of `rank` can only stand inside the rank mapping."""

    rank: Rank
    min: float = field(default=0.5, metadata={"minimum": 0})


def test_a_key_of_the_method_goes_before_one_of_rank() -> None:
    assert read_dataclass(Own, read("{rank: {ratio: 1, min: 3}, min: 0.25, max: 9}", "f")) == Own(Rank("ratio", 1.0, min=3, max=9), 0.25)


@dataclass(frozen=True)
class Optional:
    """A rank that may be left out."""

    rank: Rank = field(default=Rank("fixed", 4))


def test_limits_of_a_rank_need_the_rank() -> None:
    with pytest.raises(SpecError, match=r"^f:1:2: min: has no meaning without rank$"):
        read_dataclass(Optional, read("{min: 3}", "f"))


@pytest.mark.parametrize("hint", [dict[str, int], list[int], tuple[int, str], object, bytes])
def test_types_that_a_spec_cannot_hold(hint: Any) -> None:
    with pytest.raises(TypeError, match=r"^a spec cannot hold "):
        kind_of(hint)


def test_a_method_without_a_kind_is_its_own_fault() -> None:
    class Broken:
        Spec, example, automatic = LowRankSpec, None, ()

    data = {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"broken": {"rank": 1}}}]}
    with pytest.raises(VerifyError, match="method broken: kind is None, not one of replace, update, block"):
        load_spec(data, {"broken": Broken})


def test_the_methods_that_exist_can_be_read() -> None:
    for name in library_names():
        spec = load_spec(name, method_table())
        assert load_spec(spec.resolved, method_table()) == spec


# ----------------------------------------------------------------------------------------------------------------------- JSON Schema


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema(METHODS)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_shipped_schema_is_the_generated_one() -> None:
    shipped = resources.files("matmorph.specs") / "library" / "schema.json"
    assert shipped.read_text(encoding="utf-8") == schema_text(method_table())


def test_library_specs_name_the_schema_and_fit_it() -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json_schema(method_table()))
    for name in library_names():
        text = library_text(name)
        assert text.startswith("# yaml-language-server: $schema=schema.json\n")
        assert list(validator.iter_errors(yaml.safe_load(text))) == []
        assert list(validator.iter_errors(load_spec(name, method_table()).resolved)) == []


def rule(**keys: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": "keep", **keys}]}


def low_rank(**settings: Any) -> dict[str, Any]:
    return rule(rewrite={"low_rank": settings})


GOOD = [
    rule(),
    rule(expect=3, optional=True, force=True, pays={"time": True}, untie=True, name="a"),
    rule(rewrite=[{"low_rank": {"rank": 4}}, {"lora": {}}]),
    low_rank(rank={"energy": 0.9, "multiple_of": 8}),
    low_rank(rank={"ratio": 0.9}, max=64, whiten=True),
    rule(match={"role": ["mlp.*", "attention.q"], "layer": [0, "2..5"], "not": {"path": "a.**"}, "any": [{"op": "mm"}, {"use": "w"}]}),
    rule(match={"pattern": "g = matmul(x)", "claim": ["g"], "in_features": "% 64 == 0", "out_features": 64, "effective_rank": "< 9"}),
    {"version": 1, "stages": [{"name": "a", "rules": rule()["rules"], "calibration": {"samples": 8}}], "seed": 4, "strict": True},
    {"version": 1, "extends": ["low-rank-60"], "rules": [{"name": "blocks", "rewrite": {"low_rank": {"whiten": False}}}]},
    {"version": 1, "extends": "low-rank-60"},
    {"version": 1, "extends": "low-rank-60", "calibration": None},
    {"version": 1, "extends": "low-rank-60", "rules": [{"name": "blocks", "rewrite": {"low_rank": {"whiten": None}}}]},
    {
        **rule(),
        "train": {"loss": "causal_lm", "output": "logits", "optimizer": {"sgd": {"lr": 0.1}}, "trainable": "all", "frozen": ["a.**"]},
    },
    {**rule(), "select": {"w": {"params": ">= 100k"}}, "tolerance": {"weight_error": 0.1}, "export": {"target": "cpu", "tokens": [1]}},
]

# Wrong in both, and read (typed) but refused by the loader alone.
BAD = [
    {},
    {"version": 1},
    {"version": 2, "rules": rule()["rules"]},
    {**rule(), "sed": 1},
    {**rule(), "seed": -1},
    {**rule(), "strict": "yes"},
    {**rule(), "stages": [{"name": "a", "rules": rule()["rules"]}]},
    {"version": 1, "rules": []},
    {"version": 1, "rules": [{"match": {"op": "matmul"}}]},
    {"version": 1, "rules": [{"rewrite": "keep"}]},
    {"version": 1, "stages": [{"rules": rule()["rules"]}]},
    rule(expect="4"),
    rule(rewrite="kep"),
    rule(rewrite=[]),
    rule(rewrite={"lowrank": {"rank": 4}}),
    rule(rewrite={"lora": {}, "quantize": {}}),
    rule(rewrite=[{"low_rank": {}}]),
    rule(match={}),
    rule(match={"ops": "linear"}),
    rule(match={"op": "lin"}),
    rule(match={"claim": ["g"]}),
    low_rank(),
    low_rank(rank=0),
    low_rank(rank={"energy": 1.5}),
    low_rank(rank={"energy": 0.5, "ratio": 0.5}),
    low_rank(rank={"max": 3}),
    low_rank(rank=4, rnak=4),
    low_rank(rank=4, solver="exakt"),
    {**rule(), "tolerance": {"weight_error": 0}},
    {**rule(), "export": {"precision": "fp8"}},
    {**rule(), "export": {"target": []}},
    {**rule(), "calibration": {"samples": 0}},
    {**rule(), "budget": {"bytes": "40 percent"}},
    {**rule(), "train": {"loss": "mse", "optimizer": {"adam": {}}}},
    {**rule(), "train": {"loss": "mse", "trainable": []}},
    {**rule(), "train": {"loss": "hinge"}},
    {**rule(), "select": {"w": {"params": None}}},
    {**rule(), "seed": None},
    {**rule(), "calibration": {"samples": None}},
    rule(match={"op": "matmul", "layer": None}),
    low_rank(rank=4, damping=None),
    rule(rewrite=[{"low_rank": {"rank": 4, "solver": None}}]),
    {"version": None, "extends": "low-rank-60"},
]


@pytest.mark.parametrize("data", GOOD, ids=range(len(GOOD)))
def test_good_specs_fit_the_schema(data: dict[str, Any], validator: Any) -> None:
    assert [error.message for error in validator.iter_errors(data)] == []
    complete = {"select": {"w": {"op": "mm"}}, **data}
    assert load_spec(complete, METHODS).version == 1


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_bad_specs_do_not(data: dict[str, Any], validator: Any) -> None:
    assert not validator.is_valid(data)
    with pytest.raises(SpecError):
        load_spec(data, METHODS)


@pytest.mark.parametrize("more", [
    {},
    {"export": {"adapters": "inputs"}},
    {"calibration": {"sensitivity": "fisher"}, "train": {"loss": "mse"}},
])  # fmt: skip
def test_what_a_budget_decides_is_in_the_schema(more: dict[str, Any], validator: Any) -> None:
    data = {**rule(rewrite={"any_of": [{"low_rank": {"rank": "auto"}}, [{"lora": {}}], "keep"]}), **more}
    assert validator.is_valid(data)
    with pytest.raises(SpecError, match="needs a budget"):
        load_spec(data, METHODS)
    full = {**data, "budget": {"bytes": "40%", "macs": 1000, "of": "matched"}}
    assert validator.is_valid(full)
    assert load_spec(full, METHODS).rules[0].is_open


def test_descriptions_and_defaults_reach_the_editor() -> None:
    schema = json_schema(METHODS)
    rank, damping = (schema["$defs"]["method"]["properties"]["low_rank"]["properties"][key] for key in ("rank", "damping"))
    assert damping == {
        "type": ["number", "null"],
        "minimum": 0,
        "maximum": 1,
        "description": "share of the diagonal that is added",
        "default": 1e-4,
    }
    assert rank["description"] == "inner size of the two factors"
    assert schema["properties"]["export"]["properties"]["precision"]["default"] == "fp32"
    undocumented = [path for path in _paths(schema["properties"], ()) if not _at(schema["properties"], path).get("description")]
    assert undocumented == []


def _paths(properties: dict[str, Any], above: tuple[str, ...]) -> list[tuple[str, ...]]:
    found = []
    for key, schema in properties.items():
        found += [(*above, key), *_paths(schema.get("properties", {}), (*above, key))]
    return found


def _at(properties: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    schema: dict[str, Any] = {"properties": properties}
    for key in path:
        schema = schema["properties"][key]
    return schema


def test_the_schema_text_is_json_of_the_schema() -> None:
    assert json.loads(schema_text(METHODS)) == json_schema(METHODS)
    assert isinstance(read(schema_text(METHODS), "schema.json"), MapTree)  # JSON is YAML too
