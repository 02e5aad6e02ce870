"""The public surface as a torch user expects it: calls, both kinds of arguments, axes as torch.export has them, specs of objects."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim

import matmorph as mm
from matmorph.errors import InputError, SpecError, TraceError
from matmorph.ir.core import Graph, Range
from matmorph.models.resolve import read_calibration, resolve
from matmorph.passes.methods import method_table
from matmorph.runtime import Session, Trainer
from matmorph.runtime.check import check
from matmorph.specs.dump import dump_resolved
from matmorph.specs.load import library_names

SPEC = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": {"low_rank": {"rank": 4}}}]}
LORA = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": {"lora": {"rank": 2}}}], "train": {"loss": "mse"}}
AXES = {"x": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}}


class Masked(torch.nn.Module):
    """Takes `x` by position and `mask` by name only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, scale: float | None = None, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden: torch.Tensor = self.down(torch.relu(self.up(x)))
        hidden = hidden if scale is None else hidden * scale
        return hidden if mask is None else hidden * mask.unsqueeze(-1)


class Several(torch.nn.Module):
    """Takes as many positional inputs as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(16, 8)

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.up(x) for x in xs]).sum(0)


def batch(rows: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, 16, generator=generator), torch.randint(0, 2, (rows, 6), generator=generator).float()


def traced(dynamic_shapes: Any, model: torch.nn.Module | None = None, *, masked: bool = True) -> Graph:
    x, mask = batch()
    return mm.trace(model or Masked(), (x,), dynamic_shapes, kwargs={"mask": mask} if masked else None)


def shapes(graph: Graph) -> list[list[str]]:
    return [[str(dim) for dim in value.tensor.shape] for value in graph.inputs]


# calls


def test_a_compiled_model_is_called_like_its_source() -> None:
    x, mask = batch()
    compiled = mm.compile(Masked(), {**SPEC, "rules": [{"match": {"op": "linear"}, "rewrite": "keep"}]}, (x,), AXES, kwargs={"mask": mask})
    assert torch.equal(compiled(x[:3], mask=mask[:3]), Masked()(x[:3], mask=mask[:3]))
    assert compiled(x, mask=mask) is not None
    with pytest.raises(InputError, match="1 positional arguments and keyword arguments mask"):
        compiled(x, mask)


# positional and keyword arguments together


@pytest.mark.parametrize("given", [AXES, (AXES["x"], AXES["mask"]), [AXES["x"], AXES["mask"]]], ids=["by name", "tuple", "list"])
def test_both_kinds_of_arguments_with_axes_in_every_form(given: Any) -> None:
    assert shapes(traced(given)) == [["batch", "seq", "16"], ["batch", "seq"]]


def test_positional_arguments_may_be_named_in_dynamic_shapes() -> None:
    assert shapes(traced({"x": {0: "rows"}}, masked=False)) == [["rows", "6", "16"]]
    x, _ = batch()
    starred = mm.trace(Several(), (x, x), {"xs": ({0: "rows"}, {0: "rows"})})
    assert shapes(starred) == [["rows", "6", "16"]] * 2


def test_todays_calls_mean_what_they_meant() -> None:
    x, mask = batch()
    by_name = mm.trace(Masked(), {"x": x, "mask": mask}, AXES)
    by_position = mm.trace(Masked(), (x,), ({0: "batch", 1: "seq"},))
    assert [entry.name for entry in by_name.signature.inputs] == ["x", "mask"]
    assert shapes(by_position) == [["batch", "seq", "16"]]
    assert mm.plan(Masked(), SPEC, {"x": x, "mask": mask}, AXES).totals == mm.plan(Masked(), SPEC, (x,), AXES, kwargs={"mask": mask}).totals
    assert len(mm.inspect_model(Masked(), (x,), AXES, kwargs={"mask": mask}).sites) == 2
    assert mm.explain(Masked(), SPEC, (x,), AXES, "up", kwargs={"mask": mask}).rules[0].matched


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x, mask: mm.trace(Masked(), {"x": x}, kwargs={"mask": mask}), "put all of them into one"),
        (lambda x, mask: mm.trace(Masked(), (x,), kwargs=[mask]), "kwargs must be a dict keyed by argument name, got list"),
        (lambda x, mask: mm.trace(Masked(), (x,), {"mask": mask}), r"kwargs=\{\.\.\.\}"),
        (lambda x, mask: mm.trace(Masked(), (x,), {"msk": {0: "n"}}, kwargs={"mask": mask}), "did you mean mask"),
        (lambda x, mask: mm.trace(Masked(), (x,), ({0: "n"},), kwargs={"mask": mask}), r"a dict by input \(x, mask\), or a tuple of 2"),
        (lambda x, mask: mm.trace(Masked(), (x,), kwargs={"mask": mask, "more": x}), "do not fit the model"),
    ],
    ids=["dict and kwargs", "no dict", "kwargs in the place of axes", "unknown name", "too short", "unknown argument"],
)
def test_wrong_arguments_are_named(call: Callable[..., Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        call(*batch())


def test_both_kinds_are_calibrated_saved_and_run(tmp_path: Path) -> None:
    x, mask = batch()
    spec = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": {"low_rank": {"rank": 4, "whiten": True}}}]}
    named = [{"x": x, "mask": mask}, {"x": x.flip(0), "mask": mask.flip(0)}]
    pairs = [((b["x"],), {"mask": b["mask"]}) for b in named]
    by_name = mm.compile(Masked(), spec, (x,), AXES, named, kwargs={"mask": mask})
    by_pair = mm.compile(Masked(), spec, (x,), AXES, pairs, kwargs={"mask": mask})
    for one, other in zip(by_name.report.sites, by_pair.report.sites, strict=True):
        assert one.output_error is not None
        assert one.output_error == other.output_error
    folder = by_name.save(tmp_path / "out")
    assert check(folder).ok
    answer = Session(folder).run({"x": x[:2].numpy(), "mask": mask[:2].numpy()})
    # float32 on both sides, 16 to 32 terms per sum
    np.testing.assert_allclose(next(iter(answer.values())), by_name(x[:2], mask=mask[:2]).detach().numpy(), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="calibration batch 1: input mask is missing"):
        mm.compile(Masked(), spec, (x,), AXES, [(x,)], kwargs={"mask": mask})


def test_both_kinds_are_trained(tmp_path: Path) -> None:
    x, mask = batch()
    compiled = mm.compile(Masked(), LORA, (x,), AXES, kwargs={"mask": mask})
    trainer = Trainer(compiled.export_training(tmp_path / "train"))
    feeds = {"x": x.numpy(), "mask": mask.numpy(), "labels": np.zeros((4, 6, 16), np.float32)}
    first = trainer.step(feeds)
    assert trainer.step(feeds) < first
    assert first == pytest.approx(float(compiled(x, mask=mask).detach().square().mean()), rel=1e-4)  # float32 sums of 384 terms


def test_a_program_with_both_kinds_comes_as_a_file_and_is_calibrated_from_one(tmp_path: Path) -> None:
    x, mask = batch()
    rows = Dim("rows")
    program = torch.export.export(Masked(), (x,), {"mask": mask}, dynamic_shapes={"x": {0: rows}, "mask": {0: rows}})
    torch.export.save(program, tmp_path / "program.pt2")
    np.savez(tmp_path / "data.npz", x=x.numpy(), mask=mask.numpy())
    model = resolve(str(tmp_path / "program.pt2"))
    assert model.kwargs is not None
    batches = read_calibration(tmp_path / "data.npz", model, batch=2)
    compiled = mm.compile(model.module, SPEC, model.example_inputs, {"x": {0: "n"}}, batches, kwargs=model.kwargs)
    assert shapes(compiled.source) == [["n", "6", "16"], ["n", "6"]]
    assert compiled.report.sites[0].output_error is not None


# dynamic axes as torch.export has them


def test_a_dim_is_its_name_and_its_limits() -> None:
    rows, seq = Dim("rows", max=64), Dim("seq", min=2, max=512)
    graph = traced({"x": {0: rows, 1: seq}, "mask": (rows, seq)})
    named = traced({"x": {0: {"name": "rows", "max": 64}, 1: {"name": "seq", "min": 2, "max": 512}}, "mask": {0: "rows", 1: "seq"}})
    assert graph.ranges == named.ranges == {"rows": Range(1, 64), "seq": Range(2, 512)}
    assert shapes(graph) == shapes(named)


def test_a_list_has_one_entry_for_every_axis() -> None:
    assert shapes(traced(((Dim("n"), Dim.STATIC, None), ["n", 6]))) == [["n", "6", "16"], ["n", "6"]]


def test_axes_left_to_torch_are_fixed_or_share_a_name() -> None:
    graph = traced({"x": (Dim.AUTO, Dim.AUTO(max=99), Dim.AUTO), "mask": {0: Dim.DYNAMIC, 1: Dim.AUTO}})
    assert shapes(graph) == [["x_0", "x_1", "16"], ["x_0", "x_1"]]
    assert graph.ranges == {"x_0": Range(1, None), "x_1": Range(1, 99)}
    mixed = traced({"x": {0: "rows", 1: Dim.DYNAMIC}, "mask": {0: Dim.AUTO, 1: Dim.AUTO}})
    assert shapes(mixed) == [["rows", "x_1", "16"], ["rows", "x_1"]]


def test_axes_left_to_torch_of_what_is_traced_already() -> None:
    x, mask = batch()
    module = mm.compile(Masked(), SPEC, (x,), AXES, kwargs={"mask": mask}).module
    again = mm.trace(module, (x,), {"x": {0: "batch", 1: Dim.DYNAMIC, 2: Dim.AUTO}}, kwargs={"mask": mask})
    assert shapes(again) == [["batch", "seq", "16"], ["batch", "seq"]]
    with pytest.raises(InputError, match="axis 2 of 0 was 16"):
        mm.trace(module, (x,), {"x": {2: Dim.DYNAMIC}}, kwargs={"mask": mask})


class Pairs(torch.nn.Module):
    """Needs an even number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x.reshape(x.shape[0] // 2, 2, 6, 16)).sum(1)


@pytest.mark.parametrize(
    ("axes", "error", "said"),
    [
        ({0: 2 * Dim("half")}, InputError, r"axis 2\*half: no axis is named half"),
        ({0: 5}, InputError, "axis 0 of x is given as 5, but its example has 4"),
        (("n", "m"), InputError, "lists 2 axes, but its example has 3"),
        ({0: Dim("n", max=2), 1: Dim("n", min=5)}, InputError, "no size of n is within all of its limits: at least 5 and at most 2"),
        ({0: torch.float32}, InputError, "axis 0 of x needs a name"),
        ({3: Dim.AUTO}, InputError, "names axis 3"),
        ({0: Dim("x_1"), 1: Dim.AUTO}, InputError, "would be called x_1"),
        ({2: Dim.DYNAMIC}, TraceError, "works only with x_2 = 16"),
    ],
    ids=["derived", "wrong size", "too short", "no size", "no name", "no such axis", "name taken", "fixed by the model"],
)
def test_wrong_axes_are_named(axes: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        traced({"x": axes}, masked=False)


def test_an_axis_left_to_torch_is_held_to_what_the_model_demands() -> None:
    for axis in (Dim.AUTO, "n"):
        with pytest.raises(TraceError, match=r"to be a multiple of 2"):
            traced({"x": {0: axis}}, Pairs(), masked=False)


# specs of objects


def given_again(uses: Sequence[Any]) -> Any:
    """A rewrite made anew: each method called with the values that its settings hold."""
    if len(uses) == 1 and uses[0].method == "any_of":
        return {"any_of": [given_again(alternative) for alternative in uses[0].spec.alternatives]}
    return [_called(use) for use in uses] or "keep"


def _called(use: Any) -> Any:
    held = {field.metadata.get("key", field.name): getattr(use.spec, field.name) for field in fields(use.spec)}
    return mm.method(use.method)(**{key: value for key, value in held.items() if value is not None})


def rules_again(rules: Sequence[Any], written: Sequence[Mapping[str, Any]]) -> list[mm.Rule]:
    found = []
    for rule, data in zip(rules, written, strict=True):
        flags = {key: getattr(rule, key) for key in ("name", "expect", "optional", "force", "pays", "untie")}
        # what `use` names is a part of the spec: such a match is given as it was read
        match = rule.match if "'use'" in repr(data["match"]) else data["match"]
        found.append(mm.Rule(match=match, rewrite=given_again(rule.rewrite), **flags))
    return found


def spec_again(spec: Any) -> Any:
    """The spec made of objects: rules, sections, stages."""
    sections = {key: getattr(spec, key) for key in ("name", "tolerance", "calibration", "export", "train", "seed", "strict")}
    sections |= {key: spec.resolved[key] for key in ("select",) if key in spec.resolved}
    if "stages" not in spec.resolved:
        sections |= {"rules": rules_again(spec.rules, spec.resolved["rules"]), "budget": spec.stages[0].budget}
    else:
        written = zip(spec.stages, spec.resolved["stages"], strict=True)
        sections["stages"] = [replace(stage, rules=tuple(rules_again(stage.rules, data["rules"]))) for stage, data in written]
    return mm.Spec(**{key: value for key, value in sections.items() if value is not None})


@pytest.mark.parametrize("name", library_names())
def test_a_library_spec_made_of_objects_is_the_same(name: str, tmp_path: Path) -> None:
    spec = mm.load_spec(name)
    again = spec_again(spec)
    assert again == spec
    assert dump_resolved(again) == dump_resolved(spec)
    assert [rule.rewrite for rule in again.rules] == [rule.rewrite for rule in spec.rules]
    (tmp_path / "again.yaml").write_text(dump_resolved(again), encoding="utf-8")
    assert mm.load_spec(tmp_path / "again.yaml") == spec


def test_objects_are_the_yaml(tmp_path: Path) -> None:
    path = tmp_path / "halves.yaml"
    path.write_text(
        """version: 1
rules:
  - {name: mlp, match: {role: mlp.*, in_features: ">= 16"}, rewrite: {low_rank: {rank: {ratio: 0.5, multiple_of: 8}, whiten: true}}}
  - match: {any: [{role: head}, {layer: [0, 2]}]}
    rewrite: [{low_rank: {rank: {energy: 0.9}}}, {lora: {rank: 4}}]
    optional: true
  - {match: {op: linear}, rewrite: {any_of: [{low_rank: {rank: {error: 0.1}}}, keep]}, pays: {time: true}}
  - {match: {block: mlp}, rewrite: {transact: {width: 50%}}, untie: true}
budget: {parameters: 60%, of: matched}
train: {loss: mse, optimizer: {adamw: {lr: 0.001}}}
seed: 3
""",
        encoding="utf-8",
    )
    built = mm.Spec(
        name="halves",
        rules=[
            mm.Rule(
                match={"role": "mlp.*", "in_features": ">= 16"},
                rewrite=mm.LowRank(rank=mm.Ratio(0.5, multiple_of=8), whiten=True),
                name="mlp",
            ),
            mm.Rule(
                match={"any": [{"role": "head"}, {"layer": [0, 2]}]},
                rewrite=[mm.LowRank(rank=mm.Energy(0.9)), mm.Lora(rank=4)],
                optional=True,
            ),
            mm.Rule({"op": "linear"}, {"any_of": [mm.LowRank(rank=mm.MaxError(0.1)), "keep"]}, pays={"time": True}),
            mm.Rule({"block": "mlp"}, mm.Transact(width=mm.Percent(50)), untie=True),
        ],
        budget={"parameters": mm.Percent(60), "of": "matched"},
        train={"loss": "mse", "optimizer": mm.AdamW(lr=0.001)},
        seed=3,
    )
    assert isinstance(built, mm.Spec)
    assert isinstance(mm.load_spec("low-rank-60"), mm.Spec)
    assert not isinstance("low-rank-60", mm.Spec)
    assert built == mm.load_spec(path)
    assert built.resolved == mm.load_spec(path).resolved
    assert mm.load_spec(list(built.rules[:2])).rules == built.rules[:2]
    assert mm.load_spec({"version": 1, "rules": [built.rules[0]]}).rules[0].rewrite == (
        mm.LowRank(rank={"ratio": 0.5}, whiten=True, multiple_of=8),
    )


def test_auto_is_what_the_yaml_says() -> None:
    built = mm.Spec(rules=[mm.Rule({"op": "linear"}, mm.LowRank(rank=mm.Auto()))], budget={"parameters": "60%"})
    assert built.rules[0].rewrite == (mm.LowRank(rank="auto"),)
    assert built.rules[0].is_open


def test_a_spec_of_objects_compiles_as_its_dict() -> None:
    x, _ = batch()
    rule = mm.Rule({"op": "linear"}, mm.LowRank(rank=4))
    built = mm.compile(Masked(), mm.Spec(rules=[rule]), (x,))
    assert torch.equal(built(x), mm.compile(Masked(), SPEC, (x,))(x))
    assert torch.equal(built(x), mm.compile(Masked(), [rule], (x,))(x))


def test_rules_of_a_spec_are_changed_and_used_again() -> None:
    spec = mm.load_spec("low-rank-60")
    changed = mm.Spec(rules=[replace(rule, rewrite=mm.LowRank(rank=8)) for rule in spec.rules])
    assert [rule.name for rule in changed.rules] == [rule.name for rule in spec.rules]
    assert {rule.rewrite for rule in changed.rules} == {(mm.LowRank(rank=8),)}
    assert [rule.match.root.text for rule in changed.rules] == [rule.match.root.text for rule in spec.rules]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: mm.LowRank(rnk=3), r"low_rank\.rnk: unknown key; did you mean rank"),
        (lambda: mm.LowRank(rank=mm.Ratio(2.0)), r"low_rank\.rank\.ratio: expected a number > 0 and <= 1"),
        (lambda: mm.LowRank(rank=object()), r"low_rank\.rank: expected str"),
        (lambda: mm.LowRank(), "low_rank: rank is missing"),
        (lambda: mm.Rule({"roel": "head"}, "keep"), r"match\.roel: unknown key; did you mean role"),
        (lambda: mm.Rule("head", "keep"), "match: expected a dict of conditions, got 'head'"),
        (lambda: mm.Rule({"role": "head"}, "kep"), "rewrite: .* got 'kep'; did you mean keep"),
        (lambda: mm.Rule({"role": "head"}, mm.LowRank), "rewrite: .* got <method low_rank without settings>"),
        (lambda: mm.Rule({"role": "head"}, mm.SGD(lr=0.1)), "rewrite: .* got SGD"),
        (lambda: mm.Rule({"role": "head"}, {"any_of": ["keep", 3]}), r"rewrite\.any_of\[1\]: .* got 3"),
        (lambda: mm.Rule({"role": "head"}, "keep", pays={"tim": True}), r"pays\.tim: unknown key; did you mean time"),
        (lambda: mm.Spec(rule=[]), "rule: unknown key; did you mean rules"),
        (lambda: mm.Spec(rules=[mm.Rule({"role": "head"}, "keep", expect="two")]), r"rules\[0\]\.expect: expected an integer"),
        (lambda: mm.Spec(rules=[mm.Rule({"role": "head"}, [mm.Lora(rank=2), mm.LowRank(rank=2)])]), r"rules\[0\]\.rewrite\[1\]"),
        (lambda: mm.Spec(rules=[mm.Model]), r"rules\[0\]: expected str, int"),
        (lambda: mm.Spec(rules=[mm.Rule({"role": "head"}, mm.LowRank(rank=mm.Auto()))]), r"rules\[0\].*auto needs a budget"),
        (lambda: mm.method("low_rnk"), "no method is called 'low_rnk'; did you mean low_rank"),
    ],
)
def test_wrong_objects_are_named_with_their_place(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        make()


def test_every_method_is_an_attribute_under_the_name_of_its_class() -> None:
    for name, kind in method_table().items():
        assert getattr(mm, kind.__name__) == mm.method(name)
        assert kind.__name__ in dir(mm)
    assert mm.methods() == tuple(method_table())
    assert list(inspect.signature(mm.LowRank).parameters)[:2] == ["rank", "whiten"]
    with pytest.raises(AttributeError, match="did you mean LowRank"):
        mm.LowRnk  # noqa: B018


def test_a_method_of_another_package_is_reached_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halving(method_table()["low_rank"]):  # type: ignore[misc]
        name = "halving"

    found = dict(method_table()) | {"halving": Halving}
    monkeypatch.setattr("matmorph.spec.method_table", lambda: found)
    monkeypatch.setattr("matmorph.spec.languages", lambda: found)
    built = mm.Spec(rules=[mm.Rule({"op": "linear"}, mm.method("halving")(rank=mm.Ratio(0.5)))])
    assert built.rules[0].rewrite[0].method == "halving"
    assert mm.Halving == mm.method("halving")
    assert mm.methods()[-1] == "halving"


def test_public_names_need_no_torch_until_they_are_used() -> None:
    code = (
        "import sys, matmorph as mm; mm.AdamW(lr=0.1); assert 'torch' not in sys.modules; mm.LowRank(rank=4); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_all_public_names_are_there() -> None:
    assert {"Rule", "Spec", "Report", "Ratio", "Energy", "MaxError", "Auto", "Percent", "explain", "method", "methods"} <= set(mm.__all__)
    assert [name for name in mm.__all__ if not hasattr(mm, name)] == []
    assert mm.prune_schedule.__module__ == "matmorph.passes.pruning.widths"
