"""sparse_grad: identities in float64, the paper's three-matrix form step by step, masks, moments to the bit, files, bad input; mutants.

The oracle is written out here from the paper, in float64 on torch's autograd: no code is shared with the method or its optimizer graph.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from mutating import Mutant, killer, mutated, unmutated
from rewriting import LINEAR, graph_of, rewritten, rule_of, run, weights_of
from torch import Tensor, nn
from torch.nn import functional

import matmorph as mm
from matmorph.errors import InputError, SpecError
from matmorph.ir.evaluate import evaluate
from matmorph.ir.training.gradient import gradient_graph
from matmorph.ir.training.losses import Loss
from matmorph.passes.linalg import hosvd
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.methods.sparse_grad import method as real
from matmorph.runtime import Session, Trainer
from matmorph.specs.notations import Count
from matmorph.specs.schema import MethodUse

EXACT = 1e-12
"""Float64 products of orthogonal matrices of size 32, sums of 32 terms of size 1: some hundred roundings of 1e-16."""
ROUNDING = 2e-6
"""The same in float32, whose roundings are 6e-8."""
LR = 1e-2


class Net(nn.Module):
    """An MLP whose first two layers have one shape, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.gelu(self.second(functional.gelu(self.first(x)))))


def network(dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().to(dtype).eval()


def batches(count: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, 16, generator=g, dtype=dtype)  # few directions of the inputs carry all there is
    rows = [torch.randn(12, 4, generator=g, dtype=dtype) @ mixing for _ in range(count)]
    return [{"x": x, "labels": torch.randint(0, 5, (12,), generator=g)} for x in rows]


def compiled(
    settings: Mapping[str, Any], path: Any = ("first", "second"), data: Any = None, dtype: torch.dtype = torch.float32, **more: Any
) -> mm.Compiled:
    rule = {"name": "mlp", "match": {"path": list(path)}, "rewrite": {"sparse_grad": {"steps": 4, **settings}}}
    spec = {"version": 1, "rules": [rule], "train": {"loss": "cross_entropy"}, **more}
    if data is None:
        return _compiled(json.dumps(spec), dtype)
    return mm.compile(network(dtype), spec, {"x": data[0]["x"]}, {"x": {0: "batch"}}, calibration=data)


@cache
def _compiled(spec: str, dtype: torch.dtype) -> mm.Compiled:
    found = batches(dtype=dtype)
    return mm.compile(network(dtype), json.loads(spec), {"x": found[0]["x"]}, {"x": {0: "batch"}}, calibration=found)


def weights(found: mm.Compiled) -> dict[str, Tensor]:
    return {const.path: const.load().detach() for const in found.graph.state}


def gradients(net: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """By weight, float64, from torch."""
    wide = network(torch.float64)
    wide.load_state_dict({name: tensor.double() for name, tensor in net.state_dict().items()})
    loss = functional.cross_entropy(wide(batch["x"].double()), batch["labels"])
    found = torch.autograd.grad(loss, [wide.get_parameter(name) for name in names])
    return dict(zip(names, found, strict=True))


def plain(batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in batch.items()}


def trainer_of(found: mm.Compiled, folder: Path, optimizer: Any = None, **more: Any) -> Trainer:
    found.export_training(folder, optimizer=optimizer or mm.AdamW(lr=LR, weight_decay=0.0), **more)
    return Trainer(folder, log=lambda line: None)


# the mathematics


def test_forward_gradient_and_input_gradient_are_those_of_the_papers_three_matrices() -> None:
    """y = ((x V) W~^T) U^T with W~ = U^T W V + delta; dL/dW~ = U^T G V; dL/dx the same; in float64."""
    found = compiled({"keep": "10%"}, dtype=torch.float64, data=batches(dtype=torch.float64))
    source, module = network(torch.float64), found.module
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, 16, generator=g, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())
    for name in ("first", "second"):
        delta = parameters[f"{name}.sparse_grad.delta"]
        with torch.no_grad():
            delta.copy_(0.3 * torch.randn(delta.shape, generator=g, dtype=torch.float64))
    u, vt = weights(found)["first.sparse_grad.u"], weights(found)["first.sparse_grad.vt"]
    assert (u.T @ u - torch.eye(16)).abs().max() < EXACT
    rotated = {
        name: (u.T @ source.get_parameter(f"{name}.weight") @ vt.T + parameters[f"{name}.sparse_grad.delta"]).detach().requires_grad_()
        for name in ("first", "second")
    }

    def three(name: str, rows: Tensor) -> Tensor:
        return ((rows @ vt.T) @ rotated[name].T) @ u.T

    y = source.head(functional.gelu(three("second", functional.gelu(three("first", x) + source.first.bias))))
    mine = module(x=x)
    assert (mine - y).abs().max() < EXACT
    weight = torch.randn(y.shape, generator=g, dtype=torch.float64)
    wanted = torch.autograd.grad((y * weight).sum(), [x, rotated["first"], rotated["second"]])
    deltas = [parameters[f"{name}.sparse_grad.delta"] for name in ("first", "second")]
    actual = torch.autograd.grad((mine * weight).sum(), [x, *[delta.requires_grad_() for delta in deltas]])
    for one, other in zip(actual, wanted, strict=True):
        assert (one - other).abs().max() < EXACT


@pytest.mark.parametrize("settings", [{"keep": "10%"}, {"keep": 20, "mask": "fixed"}, {"keep": 20, "mask": "fixed", "basis": "none"}])
def test_the_gradient_graph_gives_the_rotated_gradient(settings: dict[str, Any]) -> None:
    found = compiled(settings, path=["first"], dtype=torch.float64)
    state = weights(found)
    delta = next(const for const in found.graph.state if const.path.endswith(".delta"))
    theta = 0.1 * torch.randn(delta.numel, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    graph = gradient_graph(found.graph, [delta], Loss("cross_entropy"))
    batch = batches(dtype=torch.float64, seed=5)[0]
    given = {"theta": theta, "loss_scale": torch.ones((), dtype=torch.float64), **batch}
    _, _, actual = evaluate(graph, [given[entry.name] for entry in graph.signature.inputs])
    eye = torch.eye(16, dtype=torch.float64)
    u, v = state.get("first.sparse_grad.u", eye), state.get("first.sparse_grad.vt", eye).T
    places = state.get("first.sparse_grad.indices", torch.arange(256))
    full = torch.zeros(256, dtype=torch.float64).scatter(0, places, theta).reshape(16, 16)
    changed = network(torch.float64)
    with torch.no_grad():
        changed.first.weight += u @ full @ v.T
    wanted = u.T @ gradients(changed, batch, ["first.weight"])["first.weight"] @ v
    assert (actual - wanted.reshape(-1)[places]).abs().max() < EXACT


class Paper:
    """SparseGrad in float64: three matrices, the k largest entries of |dL/dW~|, Adam on them (SparseAdam: the others are not touched)."""

    def __init__(self, names: Sequence[str], u: Tensor, v: Tensor, keep: int) -> None:
        self.net, self.names, self.u, self.v, self.keep = network(torch.float64), names, u.double(), v.double(), keep
        self.rotated = {name: (self.u.T @ self.net.get_parameter(name) @ self.v).detach() for name in names}
        self.m = {name: torch.zeros_like(w) for name, w in self.rotated.items()}
        self.v2 = {name: torch.zeros_like(w) for name, w in self.rotated.items()}
        self.t = 0

    def step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mask of each weight."""
        with torch.no_grad():
            for name in self.names:
                self.net.get_parameter(name).copy_(self.u @ self.rotated[name] @ self.v.T)
        self.t += 1
        masks = {}
        for name, gradient in gradients(self.net, batch, self.names).items():
            g = self.u.T @ gradient @ self.v
            on = torch.zeros(g.numel(), dtype=torch.bool).scatter(0, g.abs().reshape(-1).topk(self.keep).indices, True).reshape(g.shape)
            self.m[name][on] = 0.9 * self.m[name][on] + 0.1 * g[on]
            self.v2[name][on] = 0.999 * self.v2[name][on] + 0.001 * g[on] ** 2
            root = (self.v2[name][on] / (1 - 0.999**self.t)).sqrt() + 1e-8
            self.rotated[name][on] -= LR * (self.m[name][on] / (1 - 0.9**self.t)) / root
            masks[name] = on
        return masks


def test_the_trajectory_is_that_of_the_three_matrices(tmp_path: Path) -> None:
    found = compiled({"keep": 20})
    trainer, state = trainer_of(found, tmp_path / "t"), weights(found)
    names = ["first.weight", "second.weight"]
    assert [name for name in state if name.endswith(".u")] == ["first.sparse_grad.u"]  # one basis for both
    paper = Paper(names, state["first.sparse_grad.u"], state["first.sparse_grad.vt"].T, 20)
    before = trainer.parameters()
    for batch in batches(8, seed=3):
        moments = trainer.moments()
        trainer.step(plain(batch))
        masks, after = paper.step(batch), trainer.parameters()
        for name, on in masks.items():
            mine = name.replace("weight", "sparse_grad.delta")
            outside = ~on.numpy()
            assert int(on.sum()) == 20
            assert (after[mine] != before[mine]).sum() == 20
            assert np.array_equal(after[mine][outside].view(np.int32), before[mine][outside].view(np.int32))
            for old, new in zip(moments[mine], trainer.moments()[mine], strict=True):
                assert np.array_equal(old[outside].view(np.int32), new[outside].view(np.int32))
        before = after
    merged = {const.path: const.load() for const in found.merge(trainer.parameters()).graph.state}
    for name in names:
        wanted = paper.u @ paper.rotated[name] @ paper.v.T
        # 8 steps of 1e-2 in float32; a root of a second moment of 1e-6 of a rounding error in it moves a step by 1e-5 of itself
        assert (merged[name].double() - wanted).abs().max() < 1e-5
        outside = (paper.rotated[name] - paper.u.T @ network().double().get_parameter(name) @ paper.v).detach() == 0
        moved = paper.u.T @ (merged[name].double() - network().get_parameter(name).detach().double()) @ paper.v
        assert outside.any()
        assert moved[outside].abs().max() < 1e-6  # the rotated weight there: a rounding of weights of 0.25 in float32, times 4 of 16 terms


def test_with_every_entry_kept_one_step_of_sgd_is_plain_sgd(tmp_path: Path) -> None:
    found = compiled({"keep": "100%"})
    trainer = trainer_of(found, tmp_path / "t", mm.SGD(lr=0.5))
    batch = batches(seed=4)[0]
    trainer.step(plain(batch))
    state = {const.path: const.load() for const in found.merge(trainer.parameters()).graph.state}
    for name, gradient in gradients(network(), batch, ["first.weight", "second.weight"]).items():
        wanted = network().get_parameter(name).detach().double() - 0.5 * gradient
        assert (state[name].double() - wanted).abs().max() < ROUNDING * wanted.abs().max()


# the preliminary phase


@pytest.mark.parametrize("share", ["shape", "layer"])
def test_bases_are_those_of_the_gradients_of_the_first_batches(share: str) -> None:
    state, names = weights(compiled({"share": share, "steps": 3})), ["first.weight", "second.weight"]
    stacks = {name: torch.stack([gradients(network(), batch, names)[name] for batch in batches()[:3]]) for name in names}
    groups = [names] if share == "shape" else [[name] for name in names]
    for group in groups:
        stack = torch.cat([stacks[name] for name in group])
        place = group[0].replace("weight", "sparse_grad")
        for basis, sums in (
            (state[f"{place}.u"], torch.einsum("nab,ncb->ac", stack, stack)),
            (state[f"{place}.vt"].T, torch.einsum("nba,nbc->ac", stack, stack)),
        ):
            turned = basis.double().T @ sums @ basis.double()
            values = turned.diagonal()
            assert (turned - values.diag()).abs().max() < 1e-5 * values[0]  # gradients and bases in float32
            assert bool((values.diff() <= 1e-5 * values[0]).all())
    assert sum(name.endswith(".u") for name in state) == len(groups)


def test_a_fixed_mask_is_that_of_the_mean_magnitude(tmp_path: Path) -> None:
    found = compiled({"keep": 20, "mask": "fixed"})
    state, names = weights(found), ["first.weight", "second.weight"]
    u, v = state["first.sparse_grad.u"].double(), state["first.sparse_grad.vt"].double().T
    for name in names:
        mean = torch.stack([(u.T @ gradients(network(), batch, names)[name] @ v).abs() for batch in batches()[:4]]).mean(0)
        places = state[name.replace("weight", "sparse_grad.indices")]
        assert sorted(mean.reshape(-1).topk(20).indices.tolist()) == places.tolist()
    trainer = trainer_of(found, tmp_path / "t")
    assert trainer.manifest.length == 40  # the parameters, and as many of each moment
    assert [one.shape for one in trainer.manifest.parameters] == [(20,), (20,)]
    trainer.step(plain(batches()[0]))
    assert all((array != 0).all() for array in trainer.parameters().values())
    note = "20 of 256 entries learn: parameters and Adam's moments take 240 bytes, of all entries 3,072"
    rows = [row for row in found.report.sites if row.status == "rewritten"]
    assert [row.notes[0] for row in rows] == [note, note]
    assert [row.trainable for row in rows] == [20, 20]


def test_without_a_basis_it_is_meprop_and_gmt(tmp_path: Path) -> None:
    """The largest entries of the gradient itself; of the mean magnitude where the mask is fixed."""
    trainer = trainer_of(compiled({"keep": 20, "basis": "none"}, path=["first"]), tmp_path / "t", mm.SGD(lr=0.5))
    batch = batches(seed=4)[0]
    trainer.step(plain(batch))
    g = gradients(network(), batch, ["first.weight"])["first.weight"]
    wanted = torch.zeros(256, dtype=torch.float64).scatter(0, (at := g.abs().reshape(-1).topk(20).indices), -0.5 * g.reshape(-1)[at])
    assert np.abs(trainer.parameters()["first.sparse_grad.delta"].reshape(-1) - wanted.numpy()).max() < ROUNDING * float(g.abs().max())
    state = weights(compiled({"keep": 20, "basis": "none", "mask": "fixed"}, path=["first"]))
    mean = torch.stack([gradients(network(), one, ["first.weight"])["first.weight"].abs() for one in batches()[:4]]).mean(0)
    assert sorted(mean.reshape(-1).topk(20).indices.tolist()) == state["first.sparse_grad.indices"].tolist()
    assert set(state) >= {"first.sparse_grad.delta"}
    assert not any(name.endswith((".u", ".vt")) for name in state)


def test_one_gradient_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the sums get a gradient of a batch, nobody holds that of the batch before."""
    seen: list[Any] = []
    add = hosvd.GradientGrams.add

    def watched(self: Any, gradient: Tensor) -> None:
        whole = gradient._base if gradient._base is not None else gradient
        alive = [ref for ref in seen if ref() is not None and ref() is not whole]
        assert not alive
        seen.append(weakref.ref(whole))
        add(self, gradient)

    monkeypatch.setattr(hosvd.GradientGrams, "add", watched)
    compiled({"steps": 6}, data=batches())
    assert len(seen) == 12


def test_a_note_says_whether_the_rotation_pays() -> None:
    [row] = [row for row in compiled({"keep": "5%"}, path=["first"]).report.sites if row.status == "rewritten"]
    state = weights(compiled({"keep": "5%"}, path=["first"]))
    g = gradients(network(), batches()[0], ["first.weight"])["first.weight"]
    u, v = state["first.sparse_grad.u"].double(), state["first.sparse_grad.vt"].double().T
    shares = [float(one.square().reshape(-1).topk(13).values.sum() / g.square().sum()) for one in (u.T @ g @ v, g)]
    assert row.notes[1] == f"in its basis 13 entries hold {shares[0]:.1%} of a gradient's energy, {shares[1]:.1%} without"
    assert shares[0] > shares[1]


# files and life cycle


def test_the_file_is_the_dense_model_to_the_byte(tmp_path: Path) -> None:
    """No update, no basis: before training even the data file is that of a model without a rule."""
    found = compiled({"keep": "10%"})
    found.save(tmp_path / "a", train=False)
    keep = {"version": 1, "rules": [{"match": {"path": "**"}, "rewrite": "keep"}]}
    x = batches()[0]["x"]
    mm.compile(network(), keep, {"x": x}, {"x": {0: "batch"}}).save(tmp_path / "b")
    assert (tmp_path / "a/model.onnx.data").read_bytes() == (tmp_path / "b/model.onnx.data").read_bytes()
    graphs = [onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph for name in "ab"]
    assert [node.op_type for node in graphs[0].node] == [node.op_type for node in graphs[1].node]
    totals = found.report.totals
    assert totals.parameters[0] == totals.parameters[1]
    assert totals.bytes[0] == totals.bytes[1]
    assert totals.macs[0] == totals.macs[1]
    assert totals.trainable == 512


@pytest.mark.parametrize("settings", [{"keep": "10%"}, {"keep": 20, "mask": "fixed"}, {"keep": 20, "basis": "none", "mask": "fixed"}])
def test_trained_values_go_back_into_module_and_file(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = compiled(settings)
    trainer = trainer_of(found, tmp_path / "train")
    for batch in batches(seed=3):
        trainer.step(plain(batch))
    values, x = trainer.parameters(), batches(seed=9)[0]["x"]
    loaded, merged = found.load_trained(values), found.merge(values)
    wanted = loaded.module(x=x).detach()
    assert (wanted - network()(x)).abs().max() > 1e-3  # something was learnt
    assert (merged.module(x=x).detach() - wanted).abs().max() < ROUNDING * wanted.abs().max()
    assert [one.methods for one in merged.merged] == [("sparse_grad",)] * 2
    assert max(one.error for one in merged.merged) < 1e-7  # one rounding to float32
    for number, one in enumerate((loaded, merged)):
        folder = tmp_path / f"file{number}"
        one.save(folder, train=False)
        names = [tensor.name for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer]
        assert {"first.weight", "first.bias", "second.weight"} <= set(names)
        assert not [name for name in names if "sparse_grad" in name]
        (y,) = Session(folder, log=lambda line: None).run({"x": x.numpy()}).values()
        assert np.abs(y - wanted.numpy()).max() < ROUNDING * float(wanted.abs().max())
    assert merged.unmerge().adapters


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    found, data = compiled({"keep": 20}), [plain(batch) for batch in batches(seed=3)]
    whole = trainer_of(found, tmp_path / "t")
    for batch in data:
        whole.step(batch)
    first = Trainer(tmp_path / "t", log=lambda line: None)
    for batch in data[:3]:
        first.step(batch)
    first.save(tmp_path / "c.safetensors")
    second = Trainer.resume(tmp_path / "t", tmp_path / "c.safetensors", log=lambda line: None)
    for batch in data[3:]:
        second.step(batch)
    for name, array in whole.parameters().items():
        assert np.array_equal(array, second.parameters()[name])
        for one, other in zip(whole.moments()[name], second.moments()[name], strict=True):
            assert np.array_equal(one, other)
    keeps = {one["name"]: one.get("keep") for one in json.loads((tmp_path / "t/train.json").read_text())["parameters"]}
    assert keeps == {"first.sparse_grad.delta": 20, "second.sparse_grad.delta": 20}


def test_a_folder_is_merged_without_the_model(tmp_path: Path) -> None:
    from matmorph.folders.after_training import merged_job
    from matmorph.folders.open import reopen

    found = compiled({"keep": 20})
    trainer = trainer_of(found, tmp_path / "t")
    trainer.step(plain(batches()[0]))
    job, adapters = reopen(tmp_path / "t")
    result, _ = merged_job(job, adapters, trainer.parameters())
    wanted = weights(found.merge(trainer.parameters()))
    again = {const.path: const.load().detach() for const in result.graph.state}
    assert set(again) == set(wanted) == set(network().state_dict())
    for name, tensor in wanted.items():
        assert torch.equal(again[name], tensor)


def test_decay_and_other_parameters_train_beside_it(tmp_path: Path) -> None:
    """Biases and the head train whole; decay pulls chosen entries towards the start, others not at all."""
    found = compiled({"keep": 20})
    trainer = trainer_of(found, tmp_path / "t", mm.AdamW(lr=LR, weight_decay=0.5), trainable=["adapters", "head.**", "first.bias"])
    trainer.step(plain(batches()[0]))
    first, second = trainer.parameters(), None
    trainer.step(plain(batches()[1]))
    second = trainer.parameters()
    for name, array in first.items():
        moved = int((second[name] != array).sum())
        assert moved == (20 if name.endswith(".delta") else array.size)


def test_it_is_planned_without_data() -> None:
    spec = {"version": 1, "rules": [{"match": {"path": ["first", "second"]}, "rewrite": {"sparse_grad": {"keep": "10%"}}}]}
    plan = mm.plan(network(), spec, {"x": batches()[0]["x"]}, {"x": {0: "batch"}})
    rows = [row for row in plan.sites if row.status == "rewritten"]
    assert [row.trainable for row in rows] == [256, 256]
    assert [row.bytes for row in rows] == [(1024, 1024)] * 2
    assert "26 of 256 entries learn at each step" in rows[0].notes[0]


class Odd(nn.Module):
    """Weights in every layout: [in, out], slices of one matrix, a 1x1 convolution, one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        self.joined = nn.Parameter(torch.randn(16, 8, generator=torch.Generator().manual_seed(1)) / 4)
        self.twice = nn.Linear(8, 8)
        self.pixel = nn.Conv1d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.addmm(torch.zeros(8), x, self.turned)
        b, c = functional.linear(x, self.joined[:8]), functional.linear(x, self.joined[8:])
        d = self.twice(torch.tanh(self.twice(a) + b * c))
        return self.pixel(d.unsqueeze(-1)).squeeze(-1)


def test_every_layout_of_a_weight(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Odd().eval()
    data = [{"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(k)), "labels": torch.tensor([0, 1, 2, 3, 4])} for k in range(3)]
    spec = {
        "version": 1,
        "rules": [{"match": {"op": "matmul"}, "rewrite": {"sparse_grad": {"keep": "20%", "steps": 3}}}],
        "train": {"loss": "cross_entropy"},
    }
    found = mm.compile(net, spec, {"x": data[0]["x"]}, {"x": {0: "batch"}}, calibration=data)
    assert [row.status for row in found.report.sites] == ["rewritten"] * 5
    products = [node for node in found.graph.nodes if node.op == "aten.mm.default"]
    assert len(products) == 2 * 5  # the weight that is used twice is rotated once
    x = data[1]["x"]
    assert (found.module(x=x) - net(x)).abs().max() < ROUNDING
    trainer = trainer_of(found, tmp_path / "t", mm.SGD(lr=0.1))
    trainer.step(plain(data[0]))
    merged = found.merge(trainer.parameters())
    wanted = found.load_trained(trainer.parameters()).module(x=x)
    assert (wanted - net(x)).abs().max() > 1e-4
    assert (merged.module(x=x) - wanted).abs().max() < ROUNDING * wanted.abs().max()


# bad input


def refusal(settings: Mapping[str, Any], kind: type[Exception] = SpecError, **more: Any) -> str:
    """What compiling with these settings says."""
    with pytest.raises(kind) as caught:
        compiled(settings, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("0%", 'expected a percentage > 0% and <= 100%, got the text "0%"'),
        ("101%", 'expected a percentage > 0% and <= 100%, got the text "101%"'),
        (0, "expected a whole number >= 1, got 0"),
        (257, "keep 257 is above the entries of every matched weight; the largest has 256 (first)"),
    ],
)
def test_keep_must_be_a_share(keep: Any, message: str) -> None:
    assert message in refusal({"keep": keep})


def test_more_steps_than_data() -> None:
    assert "rule mlp: sparse_grad takes the gradients of 7 batches, and the calibration data has 6" in refusal({"steps": 7})


def test_calibration_without_labels() -> None:
    bare = [{"x": batch["x"]} for batch in batches()]
    said = refusal({}, data=bare)
    assert "rule mlp: sparse_grad takes gradients of a loss, and calibration batch 1 has no labels" in said


def test_a_gradient_that_is_not_finite() -> None:
    data = batches()
    data[2]["x"] = data[2]["x"].clone()
    data[2]["x"][0] = 3.4e38  # finite, but no product of it
    data[2]["x"][0, ::2] = -3.4e38
    assert "NaN or infin" in refusal({}, InputError, data=data)


def test_no_loss_and_no_data() -> None:
    spec: dict[str, Any] = {"version": 1, "rules": [{"name": "mlp", "match": {"path": "first"}, "rewrite": {"sparse_grad": {}}}]}
    example = {"x": batches()[0]["x"]}
    for train, data, message in (
        (None, batches(), "rule mlp: sparse_grad takes gradients of a loss, and the spec has none"),
        ({"loss": "cross_entropy"}, None, "rule mlp: sparse_grad needs calibration data (gradient_grams) and none was given"),
    ):
        with pytest.raises(SpecError) as caught:
            mm.compile(network(), {**spec, **({"train": train} if train else {})}, example, {"x": {0: "batch"}}, calibration=data)
        assert message in str(caught.value)


def test_what_cannot_be_treated_is_a_reject() -> None:
    rules = [{"match": {"path": "**"}, "rewrite": {"sparse_grad": {"keep": 100, "basis": "none"}}}]
    plan = mm.plan(network(), {"version": 1, "rules": rules}, {"x": batches()[0]["x"]}, {"x": {0: "batch"}})
    assert [row.reason for row in plan.sites] == [None, None, "keep 100 is above the 80 entries of the weight"]
    both: Any = [{"quantize": {"quantizer": "uniform", "bits": 8, "block_size": 16}}, {"sparse_grad": {"basis": "none"}}]
    rules = [{"match": {"path": "first"}, "rewrite": both, "force": True}]
    plan = mm.plan(network(), {"version": 1, "rules": rules}, {"x": batches()[0]["x"]}, {"x": {0: "batch"}})
    assert plan.sites[0].reason == "sparse_grad works on the dense weight, and quantize comes before it"


# mutants

X = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
WEIGHTS = weights_of(LINEAR)


def stats_of(scores: bool = False) -> dict[str, SiteStats]:
    g = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64)).Q for size in (10, 12))
    found = hosvd.GradientStats(hosvd.Bases(u, v), torch.rand(10, 12, generator=g) if scores else None, (0.25, 0.5))
    return {"fc": SiteStats(torch.eye(12, dtype=torch.float64), 1, gradients=found)}


def built(module: Any, spec: Any, stats: Any = None) -> tuple[Any, dict[str, Tensor], Any]:
    use = MethodUse("sparse_grad", spec)
    graph, (outcome,) = rewritten(graph_of(LINEAR), rule_of(use), stats, {"sparse_grad": module.SparseGrad()})
    return graph, {const.path.removeprefix("fc.sparse_grad."): const.load() for const in graph.state}, outcome


def with_delta(graph: Any, seed: int = 4) -> tuple[Any, Tensor]:
    from matmorph.passes.adapters.values import with_values

    delta = next(const for const in graph.state if const.path.endswith(".delta"))
    value = torch.randn([int(d) for d in delta.tensor.shape], generator=torch.Generator().manual_seed(seed))
    return with_values(graph, {delta.path: value}), value


def formula(module: Any) -> None:
    """W + U delta V^T, whole and of chosen entries; merge gives the same."""
    for fixed in (False, True):
        stats = stats_of(fixed)
        spec = module.SparseGradSpec(keep=Count(20, percent=False), mask="fixed" if fixed else "step")
        graph, state, _ = built(module, spec, stats)
        assert torch.equal(run(graph, X)[0], run(graph_of(LINEAR), X)[0])  # the start, to the bit
        graph, delta = with_delta(graph)
        found = stats["fc"].gradients
        assert found is not None
        assert found.bases is not None
        full = delta
        if found.scores is not None:
            places = found.scores.reshape(-1).topk(20).indices.sort().values
            full = torch.zeros(120).scatter(0, places, delta).reshape(10, 12)
            assert torch.equal(state["indices"], places)
        w = WEIGHTS["fc.weight"].double() + found.bases.u @ full.double() @ found.bases.v.T
        wanted = torch.relu(X.double() @ w.T + WEIGHTS["fc.bias"].double())
        assert (run(graph, X)[0].double() - wanted).abs().max() < ROUNDING * wanted.abs().max()
        parts = {name: state[name] for name in ("u", "vt", "indices") if name in state}
        merged, bias = module.SparseGrad().merge({"base": WEIGHTS["fc.weight"], "delta": delta, **parts})
        assert bias is None
        assert (merged.double() - w).abs().max() < ROUNDING * w.abs().max()


def counts(module: Any) -> None:
    method, spec = module.SparseGrad(), module.SparseGradSpec
    assert spec().count(2_359_296) == 23_593
    assert spec(keep=Count(0.3, percent=True)).count(1000) == 3
    assert spec().count(10) == 1
    assert spec(keep=Count(28_000, percent=False)).count(2_359_296) == 28_000
    needs = {
        (basis, mask): {s.value for s in method.needs(spec(basis=basis, mask=mask))}
        for basis in ("hosvd", "none")
        for mask in ("step", "fixed")
    }
    assert needs == {
        ("hosvd", "step"): {"gradient_grams"},
        ("hosvd", "fixed"): {"gradient_grams", "gradient_scores"},
        ("none", "step"): set(),
        ("none", "fixed"): {"gradient_scores"},
    }
    _, state, outcome = built(module, spec(keep=Count(20, percent=False)), stats_of())
    assert outcome.cost.trains == 120
    assert state["delta"].shape == (10, 12)
    assert outcome.notes == (
        "20 of 120 entries learn at each step; any may, so parameters and Adam's moments take 1,440 bytes",
        "in its basis 20 entries hold 50.0% of a gradient's energy, 25.0% without",
    )
    trains = [name for name in state if name in ("delta", "u", "vt")]
    graph = built(module, spec(), stats_of())[0]
    assert trains == ["delta", "u", "vt"]
    assert [const.path for const in graph.state if const.trainable and const.rule is not None] == ["fc.sparse_grad.delta"]


def groups(module: Any) -> None:
    from rewriting import only_site

    site, method, spec = only_site(graph_of(LINEAR)), module.SparseGrad(), module.SparseGradSpec
    assert method.preliminary(site, spec(basis="none")) is None
    wanted = method.preliminary(site, spec(steps=7, mask="fixed"))
    assert (wanted.steps, wanted.group, wanted.bases, wanted.scores, wanted.count) == (7, "10 x 12", True, True, 1)
    assert method.preliminary(site, spec(share="layer")).group == "fc"
    assert method.splits_weight(spec())


CHECKS: tuple[Callable[[Any], None], ...] = (formula, counts, groups)


@pytest.mark.parametrize("check", CHECKS)
def test_the_method_itself(check: Callable[[Any], None]) -> None:
    check(real)


MUTANTS = {
    "the input mode turned the wrong way round": Mutant("_Weights.of", "stored(site, bases.v.T)", "stored(site, bases.v)"),
    "the output mode turned the wrong way round": Mutant("_Weights.of", "stored(site, bases.u)", "stored(site, bases.u.T)"),
    "an update that replaces the weight": Mutant("_Weights.changed", "b('aten.add.Tensor', w, moved)", "moved"),
    "not from zero": Mutant("_Weights.of", "torch.zeros(shape)", "torch.ones(shape)"),
    "other entries than the chosen": Mutant(
        "_Weights.of", "top_entries(found.scores, spec.count(site.parameters))", "top_entries(-found.scores, spec.count(site.parameters))"
    ),
    "merging forgets the weight": Mutant("SparseGrad.merge", "(base + update, None)", "(update, None)"),
    "merging in the wrong order": Mutant(
        "SparseGrad.merge", "widened(parts[INTO]).to(base.dtype)", "widened(parts[INTO]).to(base.dtype).T"
    ),
    "rounded up to the whole": Mutant("SparseGradSpec.count", "entries * self.keep.value / 100", "entries * self.keep.value"),
    "nothing may be kept": Mutant(
        "SparseGradSpec.count", "max(round(entries * self.keep.value / 100), 1)", "round(entries * self.keep.value / 100)"
    ),
    "scores never asked for": Mutant("SparseGrad.needs", "spec.mask == 'fixed'", "False"),
    "one basis for everything": Mutant("SparseGrad.preliminary", "spec.share == 'shape'", "True"),
    "energies exchanged": Mutant("sparse_grad._said", "raw, rotated = found.shares", "rotated, raw = found.shares"),
    "it stands beside anything": Mutant("SparseGrad.splits_weight", "return 'works on'", "return None"),
}


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(unmutated(MUTANTS.values()), [passes_all]) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name: str) -> None:
    with mutated(MUTANTS[name]) as m, pytest.raises(AssertionError):
        passes_all(m)


def passes_all(module: Any) -> None:
    for check in CHECKS:
        check(module)
