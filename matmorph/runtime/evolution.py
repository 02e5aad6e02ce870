"""Which configuration of a trained supernet is best: evolutionary search on validation data, with the supernet's own parameters.

GLoRA (arXiv 2306.07967, section 3.3), after SPOS (arXiv 1904.00420): a population at random; then, round by round, children of the best so
far, by mutation (each word drawn anew with a probability) and crossover (each word from one of two parents). Nothing is retrained. What a
round tries follows from the seed, its number and the results before it, so that a search goes on where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matmorph.runtime.checkpoint import only_writer
from matmorph.runtime.disk.files import write_whole
from matmorph.runtime.errors import CheckpointError, InputMismatch
from matmorph.runtime.format.artifact import of_format
from matmorph.runtime.format.plain import from_plain, typed
from matmorph.runtime.format.reading import StoredError, read_json
from matmorph.runtime.supernet import Configuration, Supernet

if TYPE_CHECKING:
    from matmorph.runtime.batches import Loader
    from matmorph.runtime.trainer import Metric, Trainer

SEARCH_FORMAT = 1
"""Version of a search's state, which only this module writes and reads."""

TRIES = 20
"""Draws for one new child; where all of them were seen before, the round has one less."""

SAVED_EVERY = 10
"""Configurations judged between two writes of the state."""

Judge = Callable[[Configuration], float]
"""The fitness of a configuration: larger is better."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """`population`: tried in each round; `top`: parents, the best of all rounds; `mutation`, `crossover`: children of each kind, what is
    missing of the population is drawn at random; `rate`: probability of each word to change; `limit`: parameters of a configuration."""

    population: int = 50
    top: int = 10
    mutation: int = 25
    crossover: int = 25
    rate: float = 0.2
    rounds: int = 20
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("population", "top", "rounds"):
            if getattr(self, name) < 1:
                raise InputMismatch(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("mutation", "crossover", "seed"):
            if getattr(self, name) < 0:
                raise InputMismatch(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.mutation + self.crossover > self.population:
            raise InputMismatch(
                f"{self.mutation} mutations and {self.crossover} crossovers are more than a population of {self.population}"
            )
        if not 0 < self.rate <= 1:
            raise InputMismatch(f"rate must be above 0 and at most 1, got {self.rate}")


@dataclass(frozen=True, slots=True)
class Scored:
    """A configuration that was judged, in round `number`."""

    configuration: Configuration
    fitness: float
    parameters: int
    number: int


@dataclass(frozen=True, slots=True)
class SearchResult:
    """`scored`: everything that was judged, in order. `named`: the best one by site and tensor."""

    scored: tuple[Scored, ...]
    named: Mapping[str, Mapping[str, str]]

    @property
    def best(self) -> Scored:
        """The largest fitness; among equals the fewest parameters."""
        return ranked(self.scored)[0]

    @property
    def pareto(self) -> tuple[Scored, ...]:
        """Those that no other one beats with as few parameters, by parameters."""
        found: list[Scored] = []
        for one in sorted(self.scored, key=lambda one: (one.parameters, -one.fitness)):
            if not found or one.fitness > found[-1].fitness:
                found.append(one)
        return tuple(found)


Watch = Callable[[int, int, int, Scored], None]
"""Called after each judged configuration with the round, how many of it are done, of how many, and the best so far."""


def search(
    trainer: Trainer,
    loader: Loader,
    metric: Metric | None = None,
    settings: SearchSettings | None = None,
    *,
    state: str | os.PathLike[str] | None = None,
    resume: bool = False,
    watch: Watch | None = None,
) -> SearchResult:
    """The best configuration of a trained supernet on validation data, which must not be the test data.

    `metric`: (outputs, batch) -> figures whose mean is the fitness, larger is better; None = minus the loss. `state`: a JSON file that
    keeps what was judged; with `resume` a search goes on from it.

    Raises InputMismatch: no supernet, no configuration under the limit, a fitness that is not finite; CheckpointError: a state that cannot
    be read, belongs to other parameters or settings, or that another process writes.
    """
    supernet = trainer.supernet
    if supernet is None:
        raise InputMismatch("there is nothing to search: these training graphs are of no supernet (glora: {search: true})")

    def judge(configuration: Configuration) -> float:
        found = trainer.evaluate(loader, None if metric is None else {"fitness": metric}, configuration=configuration)
        return -found["loss"] if metric is None else found["fitness"]

    digest = hashlib.sha256(b"".join(value.tobytes() for value in trainer.parameters().values())).hexdigest()
    about = {"trainable_fingerprint": trainer.manifest.trainable_fingerprint, "theta_sha256": digest}
    return evolve(supernet, judge, settings or SearchSettings(), None if state is None else Path(state), about, resume, watch)


def evolve(
    supernet: Supernet,
    judge: Judge,
    settings: SearchSettings,
    state: Path | None = None,
    about: Mapping[str, str] | None = None,
    resume: bool = False,
    watch: Watch | None = None,
) -> SearchResult:
    """The search itself, over any judge. `about`: what a state must belong to. Raises as `search`."""
    smallest = supernet.limits()[0]
    if settings.limit is not None and settings.limit < smallest:
        raise InputMismatch(f"no configuration has at most {settings.limit} parameters: the smallest has {smallest}")
    keeper = _Keeper(state, supernet, settings, about or {})
    known = keeper.read() if resume else {}
    with nullcontext() if state is None else only_writer(state):
        scored = _judge_all(supernet, judge, settings, keeper, known, watch)
    result = SearchResult(tuple(scored), {})
    return SearchResult(result.scored, supernet.named(result.best.configuration))


def _judge_all(
    supernet: Supernet,
    judge: Judge,
    settings: SearchSettings,
    keeper: _Keeper,
    known: Mapping[Configuration, float],
    watch: Watch | None,
) -> list[Scored]:
    """Round by round; what was judged is kept however it ends."""
    scored: list[Scored] = []
    try:
        for number in range(settings.rounds):
            tried = list(candidates(supernet, settings, number, scored))
            if not tried:
                break  # every configuration that can be reached was judged
            for done, configuration in enumerate(tried, 1):
                fitness = known[configuration] if configuration in known else _judged(judge, configuration)
                scored.append(Scored(configuration, fitness, supernet.count(configuration), number))
                if watch is not None:
                    watch(number, done, len(tried), ranked(scored)[0])
                if len(scored) % SAVED_EVERY == 0 and len(scored) > len(known):
                    keeper.write(scored)
    finally:
        if len(scored) > len(known):
            keeper.write(scored)
    return scored


def candidates(supernet: Supernet, settings: SearchSettings, number: int, scored: Sequence[Scored]) -> Iterator[Configuration]:
    """What round `number` tries, none of it judged before: children of the best, then configurations at random."""
    generator = np.random.default_rng([settings.seed, number])
    parents = [one.configuration for one in ranked(scored)[: settings.top]]
    seen = {one.configuration for one in scored}

    def chosen() -> Configuration:
        return parents[generator.integers(len(parents))]

    makers: list[tuple[int, Callable[[], Configuration]]] = []
    if parents:
        makers.append((settings.mutation, lambda: _mutated(supernet, chosen(), settings.rate, generator)))
        makers.append((settings.crossover, lambda: _crossed(chosen(), chosen(), generator)))
    made = 0
    for wanted, make in (*makers, (settings.population, lambda: supernet.sample(generator))):
        for _ in range(min(wanted, settings.population - made)):
            child = _new(lambda make=make: _within(supernet, make(), settings.limit, generator), seen)  # type: ignore[misc]
            if child is not None:
                seen.add(child)
                made += 1
                yield child


def ranked(scored: Sequence[Scored]) -> list[Scored]:
    """Best first: by fitness, then by parameters, then by when it was found."""
    return sorted(scored, key=lambda one: (-one.fitness, one.parameters))


def _judged(judge: Judge, configuration: Configuration) -> float:
    fitness = float(judge(configuration))
    if not math.isfinite(fitness):
        raise InputMismatch(f"the fitness of a configuration is {fitness}: the metric must give finite numbers")
    return fitness


def _new(make: Callable[[], Configuration], seen: set[Configuration]) -> Configuration | None:
    for _ in range(TRIES):
        child = make()
        if child not in seen:
            return child
    return None


def _mutated(supernet: Supernet, parent: Configuration, rate: float, generator: np.random.Generator) -> Configuration:
    other = supernet.sample(generator)
    return _mixed(parent, other, rate, generator)


def _crossed(first: Configuration, second: Configuration, generator: np.random.Generator) -> Configuration:
    return _mixed(first, second, 0.5, generator)


def _mixed(first: Configuration, second: Configuration, share: float, generator: np.random.Generator) -> Configuration:
    """Each word from `second` with probability `share`."""
    return tuple(
        tuple(b if generator.random() < share else a for a, b in zip(left, right, strict=True))
        for left, right in zip(first, second, strict=True)
    )


def _within(supernet: Supernet, configuration: Configuration, limit: int | None, generator: np.random.Generator) -> Configuration:
    """The configuration, tensors in random order at their smallest until it keeps the limit."""
    count = supernet.count(configuration)
    if limit is None or count <= limit:
        return configuration
    words = [list(site) for site in configuration]
    places = [(row, column) for row, site in enumerate(words) for column in range(len(site))]
    for place in generator.permutation(len(places)):
        row, column = places[place]
        tensor = supernet.sites[row].tensors[column]
        smallest = min(tensor.words, key=tensor.count)
        count += tensor.count(smallest) - tensor.count(words[row][column])
        words[row][column] = smallest
        if count <= limit:
            break
    return tuple(map(tuple, words))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A judged configuration as it stands in the file; `words`: a digit per tensor."""

    words: str
    fitness: float


def _state(data: Any) -> tuple[Mapping[str, Any], tuple[_Entry, ...]]:
    table = of_format(data, SEARCH_FORMAT, "search")
    return table, tuple(from_plain(_Entry, one, f"scored[{k}]") for k, one in enumerate(typed(table.get("scored"), list, "scored")))


@dataclass(frozen=True, slots=True)
class _Keeper:
    """The file of a search."""

    path: Path | None
    supernet: Supernet
    settings: SearchSettings
    about: Mapping[str, str]

    def _belongs(self) -> dict[str, Any]:
        """What must be equal for a search to go on; it may be given more rounds."""
        return {**self.about, "settings": {key: value for key, value in asdict(self.settings).items() if key != "rounds"}}

    def write(self, scored: Sequence[Scored]) -> None:
        """Whole or not at all. Raises CheckpointError."""
        if self.path is None:
            return
        words = [[tensor.words for tensor in site.tensors] for site in self.supernet.sites]
        entries = [
            {
                "words": "".join(
                    str(choices.index(word))
                    for site, own in zip(words, one.configuration, strict=True)
                    for choices, word in zip(site, own, strict=True)
                ),
                "fitness": one.fitness,
                "parameters": one.parameters,
                "round": one.number,
            }
            for one in scored
        ]
        best = ranked(scored)[0]
        data = {
            "format": SEARCH_FORMAT,
            **self._belongs(),
            "fitness": best.fitness,
            "parameters": best.parameters,
            "configuration": self.supernet.named(best.configuration),
            "scored": entries,
        }
        try:
            write_whole(self.path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def read(self) -> dict[Configuration, float]:
        """Fitness by configuration of what was judged. Raises CheckpointError."""
        if self.path is None:
            raise InputMismatch("resume needs the state of a search to go on from")
        try:
            data, entries = read_json(self.path, _state)
        except StoredError as error:
            raise CheckpointError(f"{error} (read as the state of a search)") from error
        for key, here in self._belongs().items():
            if data.get(key) != here:
                raise CheckpointError(f"{self.path}: belongs to another search: its {key} is {str(data.get(key))[:300]}, here {here}")
        return {self._configuration(one.words): one.fitness for one in entries}

    def _configuration(self, text: str) -> Configuration:
        tensors = [tensor for site in self.supernet.sites for tensor in site.tensors]
        if len(text) != len(tensors) or not (text.isascii() and text.isdigit()):
            raise CheckpointError(f"{self.path}: an entry does not fit the supernet: {text!r:.40}")
        try:
            flat = [tensor.words[int(letter)] for tensor, letter in zip(tensors, text, strict=True)]
        except IndexError as error:
            raise CheckpointError(f"{self.path}: an entry does not fit the supernet: {text!r:.40}") from error
        sizes = [len(site.tensors) for site in self.supernet.sites]
        starts = np.cumsum([0, *sizes])
        return tuple(tuple(flat[start : start + size]) for start, size in zip(starts, sizes, strict=False))
