"""Methods of other packages, as docs/how-to/add-a-method.md writes them: installed beside matmorph through their entry points, and through
all that a built-in one goes through."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pages import DOCS, read_blocks

import matmorph as mm
from matmorph.errors import InputError, SpecError
from matmorph.ir.site import Choice, Cost, Reject
from matmorph.passes import methods
from matmorph.passes.methods.protocol import BlockMethod, Error, ReplaceMethod, UpdateMethod
from matmorph.runtime import Session, Trainer

PAGE = "how-to/add-a-method.md"
FILES = {block.file: block.text for block in read_blocks((DOCS / PAGE).read_text(encoding="utf-8"), PAGE) if block.file}
ENTRIES = {"interpolative": "interpolative:Interpolative", "lora_xs": "lora_xs:LoraXS", "column_norms": "column_norms:ColumnNorms"}
LR, DECAY, BETAS, EPS, STEPS = 1e-2, 0.01, (0.9, 0.999), 1e-8, 20
TRAINED = 1e-5
"""Both sides are float32: 20 steps of 1e-2, each of which passes on a gradient's relative rounding of 1e-6."""
ROUNDING = 2e-6
"""Of float32 sums over 64 and 256 terms of size 1, relative to the largest."""
RULE = {"name": "all", "match": {"op": "linear"}, "rewrite": {"lora_xs": {"rank": 8}}}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path with the three packages of the page, as pip leaves them."""
    folder = tmp_path_factory.mktemp("site-packages")
    for place in ENTRIES.values():
        name = f"{place.partition(':')[0]}.py"
        (folder / name).write_text(FILES[name], encoding="utf-8")
    info = folder / "our_methods-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-methods\nVersion: 0.1\n")
    lines = "\n".join(f"{name} = {place}" for name, place in ENTRIES.items())
    (info / "entry_points.txt").write_text(f"[{methods.ENTRY_POINT_GROUP}]\n{lines}\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for place in ENTRIES.values():
        sys.modules.pop(place.partition(":")[0], None)


def network() -> torch.nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).eval()


def batch(step: int, rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, 64, generator=generator), torch.randn(rows, 64, generator=generator)


def compiled(**more: Any) -> mm.Compiled:
    return mm.compile(network(), {"version": 1, "rules": [RULE], **more}, (batch(0)[0],), ({0: "batch"},))


@dataclass(frozen=True)
class Trained:
    """The update of the page after 20 steps, by ONNX Runtime and by torch."""

    model: mm.Compiled
    losses: list[tuple[float, float]]
    ours: dict[str, np.ndarray]
    theirs: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def trained(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    model = compiled()
    folder = tmp_path_factory.mktemp("train") / "out"
    model.export_training(folder, loss="mse", optimizer=mm.AdamW(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY))
    trainer = Trainer(folder, providers=["cpu"])
    module = compiled().module
    every = dict(module.named_parameters())
    names = ["0.lora_xs.middle", "2.lora_xs.middle"]
    for name, parameter in every.items():
        parameter.requires_grad_(name in names)
    optimizer = torch.optim.AdamW([every[name] for name in names], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False)
    losses = []
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append((trainer.step({"input": x.numpy(), "labels": y.numpy()}), float(loss.detach())))
    return Trained(model, losses, dict(trainer.parameters()), {name: every[name].detach().numpy() for name in names})


def test_the_update_is_an_adapter(trained: Trained) -> None:
    adapters = trained.model.adapters
    assert [(one.site, one.method, one.base, one.scale) for one in adapters] == [
        ("0", "lora_xs", "dense", 1.0),
        ("2", "lora_xs", "dense", 1.0),
    ]
    assert dict(adapters[0].consts) == {part: f"0.lora_xs.{part}" for part in ("down", "middle", "up")}
    planned = mm.plan(network(), {"version": 1, "rules": [RULE]}, (batch(0)[0],), ({0: "batch"},))
    assert trained.model.report.totals.trainable == planned.totals.trainable == 2 * 8 * 8


def test_twenty_steps_are_those_of_torch(trained: Trained) -> None:
    assert set(trained.ours) == set(trained.theirs)
    for name, value in trained.theirs.items():
        assert np.abs(value).max() > 0.05  # it has moved
        assert np.abs(trained.ours[name] - value).max() < TRAINED
    assert max(abs(ours - theirs) / theirs for ours, theirs in trained.losses) < TRAINED


def test_it_is_merged(trained: Trained, tmp_path: Path) -> None:
    x = batch(99)[0]
    merged = trained.model.merge(trained.ours)
    wanted = trained.model.load_trained(trained.ours).module(x).detach()
    assert not merged.adapters
    assert [line.methods for line in merged.merged] == [("lora_xs",), ("lora_xs",)]
    assert float((merged.module(x).detach() - wanted).abs().max() / wanted.abs().max()) < ROUNDING
    assert float((wanted - network()(x).detach()).abs().max()) > 0.01  # training changed something
    merged.save(tmp_path / "out")
    assert {name for name in merged.module.state_dict()} == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_its_adapter_is_saved_and_loaded(trained: Trained, tmp_path: Path) -> None:
    x = batch(99)[0]
    served = compiled(export={"adapters": "inputs"})
    served.save(tmp_path / "out")
    served.save_adapter(tmp_path / "xs.onnx_adapter", trained.ours)
    session = Session(tmp_path / "out", ["cpu"])
    adapter = session.load_adapter(tmp_path / "xs.onnx_adapter")
    wanted = trained.model.load_trained(trained.ours).module(x).detach().numpy()
    (got,) = session.run({"input": x.numpy()}, adapter=adapter).values()
    (base,) = session.run({"input": x.numpy()}).values()
    assert np.abs(got - wanted).max() / np.abs(wanted).max() < ROUNDING
    assert np.abs(base - network()(x).detach().numpy()).max() < ROUNDING * np.abs(base).max()


def test_the_block_is_narrower_and_zero_where_it_was_cut(installed: Path) -> None:
    rule = {"match": {"block": "mlp"}, "rewrite": {"column_norms": {"width": 96}}}
    found = mm.compile(network(), {"version": 1, "rules": [rule]}, (batch(0)[0],), ({0: "batch"},))
    reference = network()
    weight = reference[2].weight.detach()
    kept = set(np.argsort(-np.linalg.norm(weight.double().numpy(), axis=0), kind="stable")[:96].tolist())
    with torch.no_grad():
        reference[2].weight[:, [k for k in range(256) if k not in kept]] = 0
    x = batch(99)[0]
    wanted = reference(x).detach()
    assert float((found.module(x).detach() - wanted).abs().max()) < ROUNDING * float(wanted.abs().max())
    assert found.module.state_dict()["0.weight"].shape == (96, 64)


def test_what_it_cannot_treat_is_said(installed: Path) -> None:
    spec = {"version": 1, "rules": [{"match": {"block": "mlp"}, "rewrite": {"column_norms": {"width": 256}}}]}
    assert {row.reason for row in mm.plan(network(), spec, (batch(0)[0],)).sites} == {"the mlp block of 2 has 256 features"}
    with pytest.raises(SpecError, match="unknown key; did you mean width"):
        mm.load_spec({"version": 1, "rules": [{"match": {"block": "mlp"}, "rewrite": {"column_norms": {"widht": 8}}}]})


# ---- classes that inherit nothing, or not enough


class Plain:
    """An update that inherits nothing: what it does not declare are the defaults of its kind."""

    name = "plain"
    kind = "update"
    Spec = type("PlainSpec", (), {})

    def check(self, site: Any, spec: Any) -> Reject | None: ...
    def choices(self, site: Any, spec: Any) -> list[Choice]: ...
    def cost(self, site: Any, spec: Any, choice: Any) -> Cost: ...
    def errors(self, site: Any, spec: Any, choices: Any, stats: Any) -> list[Error]: ...
    def build(self, site: Any, spec: Any, choice: Any, stats: Any, b: Any) -> Any: ...
    def merge(self, parts: Any) -> Any: ...


class Half(BlockMethod):
    name: ClassVar[str] = "half"
    Spec: ClassVar[type] = type("HalfSpec", (), {})

    def reads(self, block: Any, spec: Any) -> tuple[Any, ...]:
        return ()


class Strange:
    name = "strange"
    kind = "procedure"
    Spec = type("StrangeSpec", (), {})


class _Point:
    def __init__(self, name: str, loaded: type) -> None:
        self.name, self.value, self.dist, self.loaded = name, "x:Y", None, loaded

    def load(self) -> type:
        return self.loaded


def announced(monkeypatch: pytest.MonkeyPatch, name: str, loaded: type) -> Any:
    monkeypatch.setattr(methods, "entry_points", lambda group: [_Point(name, loaded)])
    return methods.method_table()[name]


def test_a_class_that_inherits_nothing_gets_the_defaults_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    found = announced(monkeypatch, "plain", Plain)
    assert issubclass(found, UpdateMethod)
    assert issubclass(found, Plain)
    assert found.trains == "adapters"
    assert found().needs(None) == frozenset()
    assert ReplaceMethod.trains == "factors"


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (Half, "the method half of x:Y lacks check, choices, errors, build, counts, costs"),
        (Strange, "the method strange of x:Y is of kind 'procedure', not one of replace, update, block"),
    ],
)
def test_a_class_that_is_no_method_is_refused_by_what_it_lacks(loaded: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as caught:
        announced(monkeypatch, loaded.name, loaded)
    assert str(caught.value) == message
