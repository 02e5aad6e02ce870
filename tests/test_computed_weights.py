"""Weights behind something (weight norm, spectral norm, orthogonal, a mask, `w * 0.1` ...) from inspect to ONNX Runtime and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from torch.nn.utils import parametrizations, parametrize, prune

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.folders.after_training import unmerged
from matmorph.ir.sites.matmuls import find_sites
from matmorph.runtime import Session

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
AXES = ({0: "batch"},)


def hooked(module: nn.Module) -> nn.Module:
    """By the utility that torch has put aside since, which many checkpoints were made with."""
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(module)


def masked(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", 0.5)


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).transpose(0, 1)


def symmetric(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Symmetric())


BEHIND: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm by hooks": hooked,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": lambda module: parametrizations.orthogonal(module, orthogonal_map="cayley"),
    "parametrised": symmetric,
    "mask": masked,
}


class Net(nn.Module):
    """fc1 is the weight behind something."""

    def __init__(self, behind: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = behind(nn.Linear(8, 8))
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def rule(rewrite: object, path: str = "fc1") -> dict:
    return {"version": 1, "rules": [{"name": "a", "match": {"path": path}, "expect": 1, "rewrite": rewrite}]}


def parameters_behind(module: nn.Module) -> set[str]:
    return {f"fc1.{name}" for name, parameter in module.fc1.named_parameters() if not name.endswith("bias")}


@pytest.mark.parametrize("name", BEHIND)
def test_it_is_a_site_to_the_bit(name: str) -> None:
    net = Net(BEHIND[name]).eval()
    graph = mm.trace(net, (X,), AXES)
    row = mm.inspect_model(net, (X,), AXES).sites[0]
    assert (row.path, row.form, row.role, row.shape) == ("fc1", "linear", "mlp.fc1", (8, 8))
    assert parameters_behind(net) <= set(row.weights)
    assert row.notes == (f"its weight is computed from {', '.join(row.weights)}",)
    (site, _) = find_sites(graph)
    with torch.no_grad():
        assert torch.equal(site.weight(), net.fc1.weight)


@pytest.mark.parametrize("name", BEHIND)
def test_it_is_replaced(name: str, tmp_path: Path) -> None:
    """All of its rank gives the model back; its parts are gone; the file agrees."""
    net = Net(BEHIND[name]).eval()
    spec = rule({"low_rank": {"rank": 8}})
    spec["rules"][0]["force"] = True
    done, planned = mm.compile(net, spec, (X,), AXES), mm.plan(net, spec, (X,), AXES)
    torch.testing.assert_close(done(X), net(X), rtol=0, atol=1e-5)  # float32 factors of an 8 x 8 matrix
    left = {const.path for const in done.graph.state}
    assert {"fc1.low_rank.down", "fc1.low_rank.up", "fc2.weight"} <= left
    assert not parameters_behind(net) & left
    assert done.report.totals.parameters == planned.totals.parameters
    assert done.report.totals.bytes == planned.totals.bytes
    folder = done.save(tmp_path / "out")
    found = Session(folder).run({"x": X.numpy()})["output"]
    torch.testing.assert_close(torch.from_numpy(found), net(X), rtol=0, atol=1e-5)


def test_a_quantised_weight_is_that_of_the_folded_model() -> None:
    """The same codes as of a model whose mask was made permanent."""
    net = Net(masked).eval()
    plain = Net(lambda module: prune.remove(masked(module), "weight")).eval()
    spec = rule({"quantize": {"quantizer": "uniform", "bits": 8}})
    spec["rules"][0]["force"] = True
    assert torch.equal(mm.compile(net, spec, (X,), AXES)(X), mm.compile(plain, spec, (X,), AXES)(X))


@pytest.mark.parametrize("name", BEHIND)
def test_an_adapter_beside_it_and_merged(name: str) -> None:
    """The parts stay while it trains; merged, one weight takes their place."""
    net = Net(BEHIND[name]).eval()
    done, planned = (make(net, rule({"lora": {"rank": 2}}), (X,), AXES) for make in (mm.compile, mm.plan))
    parts = parameters_behind(net)
    assert parts <= set(done.module.state_dict())
    assert done.report.totals.bytes == planned.totals.bytes
    assert done.report.sites[0].parameters == planned.sites[0].parameters
    generator = torch.Generator().manual_seed(1)
    values = {f"fc1.lora.{k}": torch.randn(s, generator=generator) for k, s in (("down", (8, 2)), ("up", (2, 8)))}
    merged = done.merge(values)
    assert not parts & set(merged.module.state_dict())
    (row, _) = merged.report.sites
    assert row.notes[1].startswith("fc1.weight takes the place of ")
    assert all(part in row.notes[1] for part in parts)
    assert row.parameters[1] == 64
    with torch.no_grad():
        update = float(done.adapters[0].scale) * (values["fc1.lora.down"] @ values["fc1.lora.up"]).T
        wanted = net.fc2(torch.relu(F.linear(X, net.fc1.weight + update, net.fc1.bias)))
        torch.testing.assert_close(merged.module.state_dict()["fc1.weight"], net.fc1.weight + update, rtol=1e-6, atol=1e-6)  # rounded once
    torch.testing.assert_close(merged(X), wanted, rtol=0, atol=1e-5)  # float32, another order of sums


def test_it_is_found_again_in_a_merged_folder(tmp_path: Path) -> None:
    net = Net(parametrizations.weight_norm).eval()
    done = mm.compile(net, rule({"lora": {"rank": 2}}), (X,), AXES)
    generator = torch.Generator().manual_seed(1)
    values = {f"fc1.lora.{k}": torch.randn(s, generator=generator) for k, s in (("down", (8, 2)), ("up", (2, 8)))}
    folder = done.merge(values).save(tmp_path / "merged")
    found, rest = unmerged(done.graph, done.adapters, folder)
    product = found["fc1.lora.down"].double() @ found["fc1.lora.up"].double()
    torch.testing.assert_close(product, values["fc1.lora.down"].double() @ values["fc1.lora.up"].double(), rtol=1e-5, atol=1e-5)  # float32
    assert rest["fc1"] < 1e-5  # of the difference, after rounding to float32


def test_what_trains_with_all_is_the_parts() -> None:
    net = Net(parametrizations.weight_norm).eval()
    done = mm.compile(net, rule({"lora": {"rank": 2}}), (X,), AXES)
    names = {name for name, parameter in done.module.named_parameters() if parameter.requires_grad}
    assert parameters_behind(net) <= names
    assert "fc1.weight" not in names


@pytest.mark.parametrize(("method", "settings"), [("sparse_grad", {}), ("glora", {"A": "vector"})])
def test_methods_that_work_on_the_stored_weight_say_why_not(method: str, settings: dict) -> None:
    row = mm.plan(Net(masked).eval(), rule({method: settings}), (X,), AXES).sites[0]
    assert (row.status, row.reason) == (
        "rejected",
        f"its weight is computed from fc1.weight_orig, fc1.weight_mask, and {method} works on a stored weight",
    )


def test_its_block_is_not_pruned() -> None:
    spec = {"version": 1, "rules": [{"match": {"block": "mlp"}, "rewrite": {"transact": {"width": "50%"}}}]}
    rows = mm.plan(Net(masked).eval(), spec, (X,), AXES).sites
    assert {row.reason for row in rows} == {"fc1: its weight is computed from fc1.weight_orig, which cannot be cut with it"}


def test_a_name_that_two_weights_wish_for() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(F.linear(x, self.w * 0.1), self.w * 0.2)

    rows = mm.inspect_model(Twice(), (X,), AXES).sites
    assert [(row.path, row.weights) for row in rows] == [("w", ("w",)), ("w_1", ("w",))]
    with pytest.raises(SpecError, match="strict"):
        mm.plan(Twice(), {**rule({"low_rank": {"rank": 2}}, "w"), "strict": True}, (X,), AXES)


def test_strided_and_padded_1x1_convolutions_and_other_forms_are_rewritten(tmp_path: Path) -> None:
    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.down = nn.Conv2d(4, 6, 1, stride=(2, 3), padding=(1, 0))
            self.inner, self.dots, self.batched = (nn.Parameter(torch.randn(s)) for s in ((4, 6), (4, 2, 4), (3, 4, 7)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.inner(self.down(x).permute(0, 2, 3, 1), self.inner)
            h = torch.tensordot(h, self.dots, dims=([-1], [0])).sum(-2)
            return torch.baddbmm(torch.ones(1), h.flatten(1, 2).transpose(0, 1)[:3], self.batched)

    x = torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(1))
    spec = {"version": 1, "rules": [{"match": {"op": "matmul"}, "expect": 4, "force": True, "rewrite": {"low_rank": {"rank": 4}}}]}
    done = mm.compile(Forms().eval(), spec, (x,), ({0: "batch"},))
    assert [(row.path, row.status) for row in done.report.sites] == [(k, "rewritten") for k in ("down", "inner", "dots", "batched")]
    torch.testing.assert_close(done(x), Forms()(x), rtol=1e-4, atol=1e-4)  # all of the rank of matrices with a side of 4, in float32
    found = Session(done.save(tmp_path / "out")).run({"x": x.numpy()})["output"]
    torch.testing.assert_close(torch.from_numpy(found), done(x), rtol=1e-4, atol=1e-4)  # float32 on another executor
