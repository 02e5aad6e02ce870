"""Search of a supernet: what a round tries, the planted best, limits, interruption; and `matmorph search` on real command lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from mutating import Mutant, mutated, unmutated
from supernets import WORDS, supernet
from tiny_training import batch, write_training

import matmorph as mm
from matmorph.cli.main import main
from matmorph.runtime import CheckpointError, InputMismatch, SearchSettings, Session, Trainer, search
from matmorph.runtime.evolution import SearchResult, candidates, evolve
from matmorph.runtime.supernet import Configuration

NET, _ = supernet()
PLANTED: Configuration = (
    ("vector", "none", "lora", "scalar", "vector"),
    ("none", "lora", "none", "none", "scalar"),
    ("scalar", "none", "vector", "vector", "none"),
)


def agreement(configuration: Configuration) -> float:
    """How many words are the planted ones: the best of 432^3 = 8e7 configurations is one."""
    pairs = [(a, b) for left, right in zip(configuration, PLANTED, strict=True) for a, b in zip(left, right, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.fixture(scope="module")
def found() -> SearchResult:
    return evolve(NET, agreement, SearchSettings())


def test_the_planted_configuration_is_found(found: SearchResult) -> None:
    """1000 of 8e7 configurations are judged: chance finds 15 right words of 15 with a probability of 1e-5."""
    assert found.best.fitness == 1.0
    assert found.best.configuration == PLANTED
    assert found.best.parameters == NET.count(PLANTED)
    assert found.named["layer.1"] == dict(zip(WORDS, PLANTED[1], strict=True))
    assert len(found.scored) == 20 * 50


def test_no_configuration_is_judged_twice(found: SearchResult) -> None:
    assert len({one.configuration for one in found.scored}) == len(found.scored)
    assert [sum(one.number == number for one in found.scored) for number in range(20)] == [50] * 20


def test_children_come_from_the_best(found: SearchResult) -> None:
    """Mutants change about a fifth of the words, less where a word is drawn again; crossovers hold words of their parents only."""
    before = [one for one in found.scored if one.number < 5]
    best = sorted(before, key=lambda one: (-one.fitness, one.parameters))[:10]
    tried = list(candidates(NET, SearchSettings(), 5, before))
    assert len(tried) == 50
    changed = [min(sum(a != b for x, y in zip(one, p.configuration, strict=True) for a, b in zip(x, y, strict=True)) for p in best)
               for one in tried[:25]]  # fmt: skip
    assert 1 <= np.mean(changed) <= 4  # 15 words, a fifth of them drawn anew, a third of those as before
    for one in tried[25:]:
        for site, words in enumerate(one):
            for column, word in enumerate(words):
                assert word in {p.configuration[site][column] for p in best}


def test_seeded_searches_are_the_same() -> None:
    first, second, other = (evolve(NET, agreement, SearchSettings(rounds=4, seed=seed)) for seed in (1, 1, 2))
    assert first == second
    assert first.scored != other.scored


@pytest.mark.parametrize("limit", [0, 10, 40])
def test_the_limit_holds(limit: int) -> None:
    result = evolve(NET, lambda one: float(NET.count(one)), SearchSettings(rounds=5, limit=limit))
    assert max(one.parameters for one in result.scored) <= limit
    assert result.best.parameters >= limit - 2  # scalars fill what is left
    assert all(one.parameters == NET.count(one.configuration) for one in result.scored)


def test_a_limit_below_every_configuration() -> None:
    net, _ = supernet(2, {**WORDS, "B": ("lora", "vector"), "E": ("vector",)})
    with pytest.raises(InputMismatch, match="no configuration has at most 19 parameters: the smallest has 20"):
        evolve(net, agreement, SearchSettings(limit=19))
    assert evolve(net, lambda one: 0.0, SearchSettings(rounds=1, limit=20)).best.parameters == 20


def test_a_small_space_is_searched_whole() -> None:
    net, _ = supernet(1, {name: ("vector", "none") if name == "E" else ("none",) for name in WORDS})
    result = evolve(net, lambda one: float(net.count(one)), SearchSettings())
    assert {one.configuration[0][4] for one in result.scored} == {"vector", "none"}
    assert len(result.scored) == 2


def test_the_pareto_front(found: SearchResult) -> None:
    front = found.pareto
    for one in found.scored:
        assert any(other.fitness >= one.fitness and other.parameters <= one.parameters for other in front)
    assert all(a.parameters < b.parameters and a.fitness < b.fitness for a, b in pairwise(front))
    assert front[-1].fitness == 1.0


def test_equal_fitness_prefers_fewer_parameters() -> None:
    result = evolve(NET, lambda one: 1.0, SearchSettings(rounds=3))
    assert result.best.parameters == min(one.parameters for one in result.scored)
    assert len(result.pareto) == 1


@pytest.mark.parametrize("settings", [
    {"population": 0}, {"top": 0}, {"rounds": 0}, {"mutation": -1}, {"seed": -1}, {"rate": 0.0}, {"rate": 1.5},
    {"population": 10}, {"mutation": 26},
])  # fmt: skip
def test_settings_that_do_not_work(settings: dict[str, Any]) -> None:
    with pytest.raises(InputMismatch):
        SearchSettings(**settings)


def test_a_fitness_that_is_no_number() -> None:
    with pytest.raises(InputMismatch, match="the fitness of a configuration is nan"):
        evolve(NET, lambda one: float("nan"), SearchSettings())


# interruption


class Counted:
    """A judge that counts, and stops the search at a call."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls, self.stop = 0, stop

    def __call__(self, configuration: Configuration) -> float:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return agreement(configuration)


ABOUT = {"theta_sha256": "abc"}


def interrupted(state: Path, stop: int = 78) -> None:
    with pytest.raises(KeyboardInterrupt):
        evolve(NET, Counted(stop), SearchSettings(rounds=4), state, ABOUT)


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    whole = evolve(NET, agreement, SearchSettings(rounds=4))
    interrupted(tmp_path / "search.json")
    assert len(json.loads((tmp_path / "search.json").read_text())["scored"]) == 77
    judge = Counted()
    assert evolve(NET, judge, SearchSettings(rounds=4), tmp_path / "search.json", ABOUT, True) == whole
    assert judge.calls == 4 * 50 - 77
    more = evolve(NET, judge, SearchSettings(rounds=5), tmp_path / "search.json", ABOUT, True)
    assert more.scored[:200] == whole.scored
    assert judge.calls == 5 * 50 - 77
    kept = json.loads((tmp_path / "search.json").read_text())
    assert kept["configuration"] == more.named
    assert sorted(path.name for path in tmp_path.iterdir()) == ["search.json"]


@pytest.mark.parametrize(("settings", "about", "message"), [
    (SearchSettings(seed=1), ABOUT, "belongs to another search: its settings"),
    (SearchSettings(limit=5), ABOUT, "belongs to another search: its settings"),
    (SearchSettings(), {"theta_sha256": "def"}, "belongs to another search: its theta_sha256 is abc, here def"),
])  # fmt: skip
def test_the_state_of_another_search(settings: SearchSettings, about: dict[str, str], message: str, tmp_path: Path) -> None:
    interrupted(tmp_path / "search.json")
    with pytest.raises(CheckpointError, match=message):
        evolve(NET, agreement, settings, tmp_path / "search.json", about, True)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', "CUT", "WORD"])
def test_a_state_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    interrupted(path)
    whole = path.read_text()
    data = json.loads(whole)
    data["scored"][0]["words"] = "9" * 15
    path.write_text({"CUT": whole[:-50], "WORD": json.dumps(data)}.get(text, text))
    with pytest.raises(CheckpointError):
        evolve(NET, agreement, SearchSettings(rounds=4), path, ABOUT, True)


def test_resuming_needs_a_state() -> None:
    with pytest.raises(InputMismatch, match="resume needs the state"):
        evolve(NET, agreement, SearchSettings(), None, {}, True)


# the command line

FACTORY = """
import torch, matmorph

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = torch.nn.Linear(12, 16), torch.nn.Linear(16, 3)

    def forward(self, x):
        return {"logits": self.head(torch.tanh(self.first(x)))}

def net():
    torch.manual_seed(0)
    return matmorph.Model(Net(), {"x": torch.randn(4, 12)}, {"x": {0: "batch"}})

def sharpness():
    return lambda outputs, batch: -abs(outputs["logits"]).max(-1)
"""
SPEC = """
version: 1
name: small
rules:
  - {name: all, match: {op: matmul}, rewrite: {glora: {search: true, rank: 2}}}
train: {loss: cross_entropy, output: logits, optimizer: {adamw: {lr: 3e-2}}}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a supernet's training graphs and what training gave."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "toy_search.py").write_text(FACTORY)
    (folder / "spec.yaml").write_text(SPEC)
    rng = np.random.default_rng(0)
    for name, rows in (("train", 96), ("valid", 48)):
        x = rng.standard_normal((rows, 12), dtype=np.float32)
        np.savez(folder / f"{name}.npz", x=x, labels=np.argmax(x[:, :3] + 2, axis=1))
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))

    def command(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        text = capsys.readouterr()
        return int(left.value.code or 0), text.out, text.err

    return command


SMALL = ("--population", "12", "--mutation", "6", "--crossover", "6", "--rounds", "3", "--threads", "1")


def test_train_search_compile_and_merge(run: Run, place: Path) -> None:
    assert run("compile", "toy_search:net", "--spec", "spec.yaml", "--out", "net")[0] == 0
    code, _, error = run("train", "net", "--data", "train.npz", "--out", "net.safetensors", "--epochs", "12", "--threads", "1")
    assert code == 0, error
    assert run("train", "net", "--data", "train.npz", "--out", "x.safetensors", "--validation", "valid.npz")[0] == 2

    words = ("search", "net", "--data", "valid.npz", "--trained", "net.safetensors", "--limit", "120", *SMALL)
    code, text, error = run(*words, "--out", "best")
    assert code == 0, error
    assert "36 configurations judged; best: accuracy" in text
    assert sorted(path.name for path in (place / "best").iterdir()) == ["search.json", "spec.yaml", "values.safetensors"]
    kept = json.loads((place / "best" / "search.json").read_text())
    assert max(one["parameters"] for one in kept["scored"]) <= 120

    assert run(*words, "--out", "best")[0] == 2  # it is there
    code, text, _ = run(*words, "--out", "best", "--resume", "--json")
    assert code == 0
    assert json.loads(text)["configuration"] == kept["configuration"]

    # the spec compiles anywhere, starts from the values, and is the supernet merged in that configuration
    values = safetensors.numpy.load_file(place / "best" / "values.safetensors")
    assert sum(value.size for value in values.values()) == kept["parameters"]
    import toy_search

    model = toy_search.net()
    found = mm.compile(model.module, str(place / "best" / "spec.yaml"), model.example_inputs, model.dynamic_shapes)
    assert found.report.totals.trainable == kept["parameters"]
    valid = np.load(place / "valid.npz")
    import torch

    logits = found.load_trained(values).module(x=torch.from_numpy(valid["x"]))["logits"].detach().numpy()
    assert (logits.argmax(-1) == valid["labels"]).mean() == pytest.approx(kept["fitness"])
    merged = ("merge", "net", "--trained", "net.safetensors")
    assert "no configuration says" in run(*merged, "--out", "merged")[2]
    assert not (place / "merged").exists()
    assert run(*merged, "--out", "merged", "--configuration", "best/search.json")[0] == 0
    answer = Session(place / "merged", "cpu", log=lambda line: None).run({"x": valid["x"]})["logits"]
    assert np.abs(answer - logits).max() < 1e-5  # two float32 layers

    code, _, error = run(*words, "--out", "other", "--metric", "toy_search:sharpness")
    assert code == 0, error
    assert json.loads((place / "other" / "search.json").read_text())["fitness"] < 0
    assert run(*words[: -len(SMALL)], *SMALL, "--out", "third", "--limit", "-1")[2].count("no configuration has at most -1 parameters")
    assert run(*words, "--out", "third", "--metric", "toy_search:net")[0] == 2
    assert not (place / "third").exists()


def test_search_of_what_is_no_supernet(run: Run, tmp_path: Path) -> None:
    folder = write_training(tmp_path / "plain")
    trainer = Trainer(folder, "cpu", threads=1, log=lambda line: None)
    with pytest.raises(InputMismatch, match="there is nothing to search"):
        search(trainer, [])
    trainer.save_parameters(tmp_path / "plain.safetensors")
    words = ("--data", "valid.npz", "--trained", str(tmp_path / "plain.safetensors"), "--out", str(tmp_path / "none"))
    code, _, error = run("search", str(folder), *words)
    assert code == 2
    assert "there is nothing to search" in error
    assert not (tmp_path / "none").exists()


def test_values_put_into_a_trainer(tmp_path: Path) -> None:
    """By name and from both kinds of file; what does not fit is refused."""
    folder = write_training(tmp_path / "plain")
    first, second = (Trainer(folder, "cpu", threads=1, log=lambda line: None) for _ in range(2))
    first.step(batch(4))
    first.save_parameters(tmp_path / "values.safetensors")
    first.save(tmp_path / "checkpoint.safetensors")
    for source in (tmp_path / "values.safetensors", tmp_path / "checkpoint.safetensors", first.parameters()):
        second.load_parameters({name: np.zeros_like(value) for name, value in first.parameters().items()})
        second.load_parameters(source)
        assert all(np.array_equal(value, first.parameters()[name]) for name, value in second.parameters().items())
    for values, message in (
        ({"fc.wait": np.zeros(3)}, "no trainable parameter is called 'fc.wait'"),
        ({"fc.bias": np.zeros(4)}, "fc.bias has shape"),
        ({"fc.bias": np.array([0.0, np.nan, 0.0])}, "fc.bias has NaN or infinity"),
    ):
        with pytest.raises(InputMismatch, match=message):
            second.load_parameters(values)
    other = write_training(tmp_path / "other", fingerprint="c" * 64)
    with pytest.raises(InputMismatch, match="trained on another base"):
        Trainer(other, "cpu", threads=1, log=lambda line: None).load_parameters(tmp_path / "values.safetensors")


# mutants of the search itself


def test_the_toy_is_hard_without_selection() -> None:
    """The same number of configurations at random: a mutant of the search that never selects would be noticed."""
    drawn = [NET.sample(np.random.default_rng([9, k])) for k in range(1000)]
    assert max(map(agreement, drawn)) < 0.85


def test_without_children_the_planted_best_is_missed(found: SearchResult) -> None:
    assert evolve(NET, agreement, SearchSettings(mutation=0, crossover=0)).best.fitness < found.best.fitness


MUTANTS = {
    "the worst are parents": Mutant("ranked", "(-one.fitness, one.parameters)", "(one.fitness, one.parameters)"),
    "the limit is forgotten": Mutant("evolution._within", "limit is None or count <= limit", "True"),
    "judged again and again": Mutant("_new", "child not in seen", "True"),
    "children of one kind only": Mutant("evolution.candidates", "settings.mutation", "0 * settings.mutation"),
    "mutants change everything": Mutant("_mutated", "_mixed(parent, other, rate, generator)", "other"),
    "a front with beaten points": Mutant("SearchResult.pareto", "not found or one.fitness > found[-1].fitness", "True"),
    "every round draws the same": Mutant("evolution.candidates", "[settings.seed, number]", "[settings.seed]"),
}


def wrong(module: Any) -> bool:
    """A digest of the tests above."""
    settings = module.SearchSettings(rounds=7, limit=70)
    result = module.evolve(NET, agreement, settings)
    fitness = [one.fitness for one in result.pareto]
    return (
        result.best.fitness < max(one.fitness for one in result.scored)
        or result.best.fitness < 0.95
        or max(one.parameters for one in result.scored) > 70
        or len({one.configuration for one in result.scored}) < 7 * 50
        or fitness != sorted(set(fitness))
    )


def test_the_module_as_it_is_passes() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert not wrong(m)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name: str) -> None:
    with mutated(MUTANTS[name]) as m:
        assert wrong(m)
