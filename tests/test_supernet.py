"""The supernet of glora: gates in the training graphs, what a step trains and leaves, configurations put in. Oracle: torch in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapting import X, far
from mutating import Mutant, mutated, unmutated
from supernets import COLUMNS, IN, OUT, RANK, WORDS, everywhere, supernet
from torch import nn
from torch.nn.functional import mse_loss

import matmorph as mm
from matmorph.errors import InputError
from matmorph.folders.after_training import found_spec
from matmorph.passes.methods.glora import method as glora
from matmorph.runtime import ArtifactError, InputMismatch, Trainer
from matmorph.runtime.supernet import Chooser

LR, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.999), 1e-8
TOLERANCE = 2e-5
"""Parameters of size 1 after 12 float32 updates of 1e-2, beside float64: Adam passes relative roundings of a gradient (1e-6) on in full."""
ROUNDING = 2e-6
SEARCH = {
    "version": 1,
    "name": "toy",
    "rules": [{"name": "all", "match": {"op": "matmul"}, "rewrite": {"glora": {"search": True, "rank": 2}}}],
}
BATCH = {
    "input": np.random.default_rng(0).standard_normal((16, 24), dtype=np.float32),
    "labels": np.random.default_rng(1).standard_normal((16, 8), dtype=np.float32),
}
"""Labels of mse: cross entropy does not see what is added to all logits, and Adam divides the rounding noise of that by its size."""


def network() -> nn.Sequential:
    """The second layer has no bias."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8, bias=False)).eval()


def search(rewrite: Any = None, model: nn.Module | None = None) -> mm.Compiled:
    spec = SEARCH if rewrite is None else {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": rewrite}]}
    return mm.compile(model or network(), spec, (X,), ({0: "batch"},))


@pytest.fixture(scope="module")
def compiled() -> mm.Compiled:
    return search()


@pytest.fixture(scope="module")
def folder(compiled: mm.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("supernet") / "train"
    return compiled.export_training(place, loss="mse", optimizer=mm.AdamW(lr=LR, weight_decay=DECAY))


def trainer(folder: Path, **more: Any) -> Trainer:
    return Trainer(folder, "cpu", threads=1, log=lambda line: None, **more)


def bits(values: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in values.items()}


# the choices


def test_432_configurations_per_layer(folder: Path) -> None:
    net = trainer(folder).supernet
    assert net is not None
    assert net.columns == COLUMNS == tuple(glora.COLUMNS)
    assert [site.path for site in net.sites] == ["0", "2"]
    assert net.size == 432 * 144  # without a bias D is none
    assert supernet(1)[0].size == 432
    assert net.gates(net.sample(np.random.default_rng(0))).shape == (2, 17)


def test_gates_are_one_hot_in_each_tensor() -> None:
    net, _ = supernet()
    for seed in range(20):
        configuration = net.sample(np.random.default_rng(seed))
        rows = net.gates(configuration)
        for row, words in zip(rows, configuration, strict=True):
            assert [COLUMNS[k] for k in np.flatnonzero(row)] == list(zip(WORDS, words, strict=True))
            assert row.sum() == 5


def test_samples_are_uniform() -> None:
    """Of 3 x 2000 draws each word of 4 comes 1500 times, of 3 words 2000 times; four standard errors are 140 and 150."""
    net, _ = supernet()
    rng = np.random.default_rng(0)
    drawn = [words for _ in range(2000) for words in net.sample(rng)]
    for column, words in enumerate(WORDS.values()):
        for word in words:
            assert abs(sum(one[column] == word for one in drawn) - 6000 / len(words)) < 150


@pytest.mark.parametrize(("words", "wanted"), [
    (("none", "none", "none", "none", "none"), 0),
    (("lora", "none", "none", "none", "none"), RANK * (OUT + IN)),
    (("none", "lora", "lora", "none", "none"), RANK * (OUT + IN) + RANK * (IN + 1)),
    (("vector", "vector", "vector", "vector", "vector"), 4 * OUT + IN),
    (("scalar", "scalar", "none", "scalar", "scalar"), 4),
])  # fmt: skip
def test_parameters_and_mask(words: tuple[str, ...], wanted: int) -> None:
    net, length = supernet(2)
    configuration = (words, ("none",) * 5)
    mask = net.mask(configuration, length)
    assert net.count(configuration) == wanted
    assert mask.sum() == wanted + 3  # the head behind the supernet trains always
    assert set(np.unique(mask)) <= {0, 1}
    assert mask[-3:].all()


def test_the_mask_is_the_leading_column_and_the_first_entry() -> None:
    net, length = supernet(1)
    a, b = net.sites[0].tensors[:2]
    assert a.up is not None
    assert b.up is not None
    assert b.down is not None
    mask = net.mask((("vector", "scalar", "none", "none", "none"),), length)
    assert a.up.of(mask).tolist() == [[1, 0]] * OUT
    assert b.up.of(mask).tolist() == [[1, 0], *[[0, 0]] * (OUT - 1)]
    assert not b.down.of(mask).any()


# steps


def oracle_forward(theta: Mapping[str, torch.Tensor], gates: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """Eq. 10 with the views of the shared tensors, from the weights of the network, float64."""
    model = network().double()
    for row, (site, layer) in enumerate((("0", model[0]), ("2", model[2]))):
        gate = {pair: float(gates[row, column]) for column, pair in enumerate(COLUMNS)}
        w, b = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()

        def whole(name: str, site: str = site, gate: Mapping[tuple[str, str], float] = gate) -> torch.Tensor:
            up, down = theta[f"{site}.glora.{name}_up"], theta[f"{site}.glora.{name}_down"]
            return gate[name, "lora"] * (up @ down) + gate[name, "vector"] * up[:, :1] + gate.get((name, "scalar"), 0) * up[0, 0]

        def line(name: str, site: str = site, gate: Mapping[tuple[str, str], float] = gate) -> torch.Tensor:
            return gate[name, "vector"] * theta[f"{site}.glora.{name}"] + gate[name, "scalar"] * theta[f"{site}.glora.{name}"][0]

        x = x @ (w + w * whole("A") + whole("B")).T + (w @ whole("C")).T + line("E")
        x = x if b is None else x + b + line("D") * b
        x = x.relu() if site == "0" else x
    return x


def test_steps_are_those_of_masked_adamw_in_torch(folder: Path) -> None:
    """12 steps in configurations of their own: loss, parameters and moments; outside of each mask nothing moves by a bit."""
    run = trainer(folder, seed=5)
    net = run.supernet
    assert net is not None
    start = run.parameters()
    theta = {name: torch.tensor(value).double() for name, value in start.items()}
    m, v = ({name: torch.zeros_like(value) for name, value in theta.items()} for _ in range(2))
    x, labels = torch.tensor(BATCH["input"]).double(), torch.tensor(BATCH["labels"]).double()
    touched = set()
    for step in range(1, 13):
        configuration = net.sample(np.random.default_rng([5, step]))
        mask = run._chooser.mask(configuration)
        assert mask is not None
        masks = {one.name: mask[one.offset : one.offset + one.size].reshape(one.shape) > 0 for one in run.manifest.parameters}
        touched |= {name for name, kept in masks.items() if kept.any()}
        before, moments = run.parameters(), run.moments()
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        loss = mse_loss(oracle_forward(leaves, net.gates(configuration), x), labels)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        assert run.step(BATCH) == pytest.approx(float(loss.detach()), rel=1e-5)
        after, later = run.parameters(), run.moments()
        for name, kept in masks.items():
            for old, new in ((before[name], after[name]), *zip(moments[name], later[name], strict=True)):
                np.testing.assert_array_equal(new[~kept].view(np.uint32), old[~kept].view(np.uint32))
            moves = torch.tensor(kept)
            m[name] = torch.where(moves, BETAS[0] * m[name] + (1 - BETAS[0]) * grads[name], m[name])
            v[name] = torch.where(moves, BETAS[1] * v[name] + (1 - BETAS[1]) * grads[name] ** 2, v[name])
            step_size = m[name] / (1 - BETAS[0] ** step) / ((v[name] / (1 - BETAS[1] ** step)).sqrt() + EPS)
            theta[name] = torch.where(moves, theta[name] - LR * (DECAY * theta[name] + step_size), theta[name])
    assert touched == set(theta)  # every tensor was trained at least once
    found, second = run.parameters(), run.moments()
    for name, wanted in theta.items():
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=TOLERANCE, err_msg=name)
        np.testing.assert_allclose(second[name][0], m[name], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(second[name][1], v[name], rtol=0, atol=TOLERANCE)
    assert any(not np.array_equal(found[name], start[name]) for name in found)


def test_seeded_runs_are_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    first, second, other = (trainer(folder, seed=seed) for seed in (1, 1, 2))
    losses = [[run.step(BATCH) for _ in range(6)] for run in (first, second, other)]
    assert losses[0] == losses[1] != losses[2]
    assert bits(first.parameters()) == bits(second.parameters())
    half = trainer(folder, seed=1)
    for _ in range(3):
        half.step(BATCH)
    half.save(tmp_path / "half.safetensors")
    rest = Trainer.resume(folder, tmp_path / "half.safetensors", "cpu", threads=1, log=lambda line: None)
    assert [rest.step(BATCH) for _ in range(3)] == losses[0][3:]
    assert bits(rest.parameters()) == bits(first.parameters())


def test_one_configuration_throughout(folder: Path) -> None:
    run = trainer(folder, configuration={"0": {"A": "vector", "E": "scalar"}})
    start = run.parameters()
    for _ in range(3):
        run.step(BATCH)
    moved = {name: int((value != start[name]).sum()) for name, value in run.parameters().items()}
    assert {name: count for name, count in moved.items() if count} == {"0.glora.A_up": 16, "0.glora.E": 1}
    assert run.evaluate([BATCH])["loss"] < trainer(folder).evaluate([BATCH], configuration={})["loss"]


def test_a_mask_of_ones_own_holds_too(folder: Path) -> None:
    words = {"A": "vector", "E": "vector"}
    run = trainer(folder, configuration={"0": words}, mask={"0.glora.E": np.array(0.0)})
    start = run.parameters()
    run.step(BATCH)
    assert {name for name, value in run.parameters().items() if not np.array_equal(value, start[name])} == {"0.glora.A_up"}


# configurations


def trained(run: Trainer) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: (0.2 * rng.standard_normal(value.shape)).astype(np.float32) for name, value in run.parameters().items()}


def answers(run: Trainer, configuration: Mapping[str, Mapping[str, str]]) -> torch.Tensor:
    found: list[np.ndarray] = []
    run.evaluate([BATCH], {"kept": lambda outputs, batch: found.append(outputs["output"]) or 0.0}, configuration=configuration)
    return torch.from_numpy(found[0])


def test_evaluated_configured_merged_and_compiled_from_its_spec_are_one_model(compiled: mm.Compiled, folder: Path) -> None:
    run = trainer(folder)
    net = run.supernet
    assert net is not None
    run.load_parameters(trained(run))
    x = torch.from_numpy(BATCH["input"])
    for seed in range(4):
        chosen = net.sample(np.random.default_rng(seed))
        configuration = net.named(chosen)
        wanted = answers(run, configuration)
        values = run.parameters()
        assert far(compiled.load_trained(values).configured(configuration).module(x), wanted) < ROUNDING
        merged = compiled.merge(values, configuration=configuration)
        assert far(merged.module(x), wanted) < ROUNDING
        found = mm.compile(network(), found_spec(compiled.spec, compiled.adapters, configuration), (X,), ({0: "batch"},))
        start = net.values(values, chosen)
        assert {name for name, _ in found.module.named_parameters() if ".glora." in name} == set(start)
        assert far(found.load_trained(start).module(x), wanted) < ROUNDING
        assert found.report.totals.trainable == net.count(chosen)


def test_a_supernet_starts_as_its_source(compiled: mm.Compiled) -> None:
    assert torch.equal(compiled.module(X), network()(X))


def test_spec_of_a_configuration(compiled: mm.Compiled) -> None:
    data = found_spec(compiled.spec, compiled.adapters, {"0": {"A": "vector", "B": "lora"}})
    assert data["rules"] == [
        {"name": "all-1", "match": {"op": "matmul", "path": ["re:0"]}, "expect": 1,
         "rewrite": {"glora": {"A": "vector", "B": "lora", "rank": 2}}},
        {"name": "all-2", "match": {"op": "matmul", "path": ["re:2"]}, "expect": 1, "rewrite": "keep"},
    ]  # fmt: skip


# wrong input


def test_merging_without_a_configuration_is_refused(compiled: mm.Compiled, folder: Path) -> None:
    run = trainer(folder)
    run.step(BATCH)
    with pytest.raises(InputError, match="0: a supernet of glora, and no configuration says which of its tensors to merge"):
        compiled.merge(run.parameters())


@pytest.mark.parametrize(("configuration", "message"), [
    ({"1": {"A": "lora"}}, "no such layer|no layer '1'"),
    ({"0": {"F": "lora"}}, "no tensor '?F"),
    ({"0": {"C": "scalar"}}, "C (of 0 )?cannot be '?scalar"),
    ({"2": {"D": "vector"}}, "D (of 2 )?cannot be '?vector"),
])  # fmt: skip
def test_configurations_that_there_are_not(compiled: mm.Compiled, folder: Path, configuration: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compiled.configured(configuration)
    with pytest.raises(InputMismatch, match=message):
        trainer(folder, configuration=configuration)


def test_what_must_be_named() -> None:
    net, _ = supernet(1, {**WORDS, "B": ("lora", "vector"), "C": ("vector",)})
    with pytest.raises(InputMismatch, match=r"B of layer\.0 must be named: one of lora, vector"):
        net.read({})
    assert net.read({"layer.0": {"B": "lora"}}) == (("none", "lora", "vector", "none", "none"),)


def test_evaluating_without_a_configuration_is_refused(folder: Path) -> None:
    with pytest.raises(InputMismatch, match="a supernet is evaluated in one configuration"):
        trainer(folder).evaluate([BATCH])


def test_a_negative_seed(folder: Path) -> None:
    with pytest.raises(InputMismatch, match="seed must be 0 or more"):
        trainer(folder, seed=-1)


def test_a_supernet_trains_as_a_whole(compiled: mm.Compiled, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.glora\.B_up belongs to a supernet and does not train"):
        compiled.export_training(tmp_path / "out", loss="cross_entropy", trainable=["**.glora.A_*"])
    assert not (tmp_path / "out").exists()


class Gated(nn.Module):
    """Has an input of the name that training graphs need."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 8)

    def forward(self, gates: torch.Tensor) -> torch.Tensor:
        return self.layer(gates)


def test_an_input_called_gates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model has an input gates of its own"):
        search(model=Gated()).export_training(tmp_path / "out", loss="cross_entropy")


def test_a_chooser_without_a_supernet() -> None:
    with pytest.raises(InputMismatch, match="these training graphs are of no supernet"):
        Chooser(None, 3, 0, {"0": {}}, None)
    plain = Chooser(None, 3, 0, None, None)
    assert plain.at(1) is None
    assert plain.feeds(None) == {}
    assert plain.mask(None) is None


def test_a_damaged_manifest(folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    data = json.loads((copy / "train.json").read_text())
    data["supernet"]["sites"][0]["tensors"]["A"]["up"] = "gone"
    (copy / "train.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="no parameter is called 'gone'"):
        trainer(copy)


# mutants


MUTANTS = {
    "everything trains": Mutant("Supernet.mask", "mask[piece.offset:piece.offset + piece.size] = 0", "pass"),
    "the head is frozen": Mutant("Supernet.mask", "np.ones(length, np.float32)", "np.zeros(length, np.float32)"),
    "a vector opens all columns": Mutant(
        "Tensor.open", "up[:, :1][:None if word == 'vector' else 1] = 1", "up[:, :][:None if word == 'vector' else 1] = 1"
    ),
    "a scalar opens the column": Mutant("Tensor.open", "None if word == 'vector' else 1", "None"),
    "the smaller factor stays": Mutant("Tensor.open", "self.down.of(mask)[...] = 1", "pass"),
    "a scalar counts as a vector": Mutant("supernet.Tensor.count", "1", "self.up.shape[0]"),
    "the down factor is not counted": Mutant("Tensor.count", "self.up.size + (self.down.size if self.down else 0)", "self.up.size"),
    "one gate too few": Mutant(
        "Supernet.gates",
        "row[self.columns.index((tensor.name, word))] = 1",
        "row[self.columns.index((tensor.name, word))] = word != 'none'",
    ),
}


def copied(module: Any, tensor: Any) -> Any:
    pieces = [None if piece is None else module.Piece(piece.name, piece.offset, piece.shape) for piece in (tensor.up, tensor.down)]
    return module.Tensor(tensor.name, tensor.words, *pieces)


def wrong(module: Any) -> bool:
    """A digest of the tests above on a module's classes."""
    real, length = supernet(2)
    sites = tuple(module.SearchSite(site.path, tuple(copied(module, one) for one in site.tensors)) for site in real.sites)
    net = module.Supernet(COLUMNS, sites)
    for words, wanted in (
        (("lora", "vector", "lora", "scalar", "none"), 24 + 5 + 16 + 1),
        (("scalar",) * 2 + ("none", "vector", "none"), 7),
    ):
        configuration = everywhere(real, *words)
        mask = net.mask(configuration, length)
        if net.count(configuration) != 2 * wanted or mask.sum() != 2 * wanted + 3 or (net.gates(configuration).sum(1) != 5).any():
            return True
    return False


def test_the_module_as_it_is_passes() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert not wrong(m)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name: str) -> None:
    with mutated(MUTANTS[name]) as m:
        assert wrong(m)
