"""A fifth optimizer, one class and one line of the table: a spec names it, its graph is written, it trains as torch's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from exporting import randn
from torch import nn

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.optimizers import OPTIMIZERS
from matmorph.optimizers.rule import DECAY, LR, UpdateOps, UpdateRule, mixed
from matmorph.passes.methods import method_table
from matmorph.runtime import Trainer
from matmorph.specs.json_schema import json_schema
from matmorph.specs.reference import reference_page

STEPS = 10


@dataclass(frozen=True, slots=True)
class RMSprop:
    """The gradient over the root of its running mean square (Tieleman and Hinton 2012)."""

    DOC: ClassVar[str] = "gradient over its running root mean square"
    STATES: ClassVar[tuple[str, ...]] = ("square",)

    lr: float = field(metadata=LR)
    alpha: float = field(default=0.99, metadata={"doc": "decay of the mean square", "minimum": 0, "exclusive_maximum": 1})
    eps: float = field(default=1e-8, metadata={"doc": "added to the root", "exclusive_minimum": 0})
    weight_decay: float = field(default=0.0, metadata=DECAY)

    def rule(self, b: UpdateOps) -> UpdateRule:
        eps = b.number(self.eps)

        def step(b: UpdateOps, gradient: str) -> dict[str, str]:
            square = mixed(b, "square", b("Mul", gradient, gradient), self.alpha)
            return {"square": square, "step": b("Div", gradient, b("Add", b("Sqrt", square), eps))}

        return UpdateRule(step)


@pytest.fixture
def rmsprop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "rmsprop", RMSprop)


def spec(optimizer: Any) -> dict[str, Any]:
    rule = {"match": {"path": "**"}, "rewrite": "keep"}
    return {"version": 1, "rules": [rule], "train": {"loss": "mse", "optimizer": optimizer, "trainable": "all"}}


@pytest.mark.usefixtures("rmsprop")
def test_the_spec_language_knows_it() -> None:
    found = mm.load_spec(spec({"rmsprop": {"lr": 0.01}}))
    assert found.train is not None
    assert found.train.optimizer.chosen == RMSprop(0.01)
    with pytest.raises(SpecError, match=r"train\.optimizer\.rmsprop\.alpha: expected a number >= 0 and < 1, got 2"):
        mm.load_spec(spec({"rmsprop": {"lr": 0.01, "alpha": 2}}))
    with pytest.raises(SpecError, match=r"optimizer\.rmsporp: unknown key; did you mean rmsprop\?"):
        mm.load_spec(spec({"rmsporp": {"lr": 0.01}}))
    described = json_schema(method_table())["properties"]["train"]["properties"]["optimizer"]["properties"]
    assert list(described) == ["adamw", "sgd", "adam_atan2", "lion", "rmsprop"]
    assert described["rmsprop"]["description"] == RMSprop.DOC
    assert "| `alpha` | a number &#62;= 0 and &#60; 1 | `0.99` | decay of the mean square |" in reference_page(method_table())


def test_without_its_line_nobody_does() -> None:
    with pytest.raises(SpecError, match=r"optimizer\.rmsprop: unknown key"):
        mm.load_spec(spec({"rmsprop": {"lr": 0.01}}))


@pytest.mark.usefixtures("rmsprop")
@pytest.mark.parametrize("given", ["in the spec", "in Python"])
def test_it_trains_as_torch_does(tmp_path: Path, given: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    named = {"rmsprop": {"lr": 0.01, "eps": 1e-3}} if given == "in the spec" else {"sgd": {"lr": 1.0}}
    compiled = mm.compile(module, spec(named), {"input": randn(4, 6)}, {"input": {0: "batch"}})
    compiled.export_training(tmp_path / "train", **({} if given == "in the spec" else {"optimizer": RMSprop(0.01, eps=1e-3)}))
    trainer = Trainer(tmp_path / "train", "cpu", log=lambda line: None)
    assert trainer.manifest.optimizer == {"name": "rmsprop", "lr": 0.01, "alpha": 0.99, "eps": 1e-3, "weight_decay": 0.0}
    assert trainer.manifest.states == ("square",)
    peer = torch.optim.RMSprop(module.parameters(), lr=0.01, alpha=0.99, eps=1e-3)
    for _ in range(STEPS):
        x, y = torch.randn(4, 6), torch.randn(4, 3)
        peer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        peer.step()
        trainer.step({"input": x.numpy(), "labels": y.numpy()})
    trained, moments = trainer.parameters(), trainer.moments()
    for name, parameter in module.named_parameters():
        # 10 float32 updates of numbers below 1, each of gradients that went through two products.
        np.testing.assert_allclose(trained[name], parameter.detach().numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(moments[name][0], peer.state[parameter]["square_avg"].numpy(), rtol=0, atol=1e-6)
