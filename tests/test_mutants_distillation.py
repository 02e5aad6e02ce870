"""Mutants of the distillation loss and of what a teacher answers: each plants one plausible mistake, and the checks below must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from differentiating import evaluated, feeds_of, parameters_of
from exporting import seeded
from mutating import Mutant, killer, mutated, unmutated
from test_losses import ROUNDING, TAUGHT, Two, classes, distilled, graph, teacher_answers, x_of

from matmorph.runtime.format.distillation import Distill

LOSS = (
    Mutant("divergence", "b('aten.sub.Tensor', log_p, b('aten.cat.default', [named, log_rest], -1))", "log_p"),
    Mutant("divergence", "b('aten.exp.default', log_p)", "b('aten.exp.default', b('aten.cat.default', [named, log_rest], -1))"),
    Mutant("divergence", "b('aten.ones_like.default', log_q)", "b('aten.exp.default', log_q)"),
    Mutant("divergence", "b('aten.mul.Tensor', b('aten.exp.default', log_q), others)", "b('aten.exp.default', log_q)"),
    Mutant("divergence", "temperature ** 2", "temperature"),
    Mutant("divergence", "b('aten.div.Scalar', logits, temperature)", "logits"),
    Mutant("losses._distill", "1 - share", "1.0"),
    Mutant("losses._distill", "_next(b, labels[LABELS], loss)", "labels[LABELS]"),
)
TEACHER = (
    Mutant("likeliest", "logits[part].astype(np.float64) / settings.temperature", "logits[part].astype(np.float64)"),
    Mutant("likeliest", "-found", "found"),
    Mutant("likeliest", "-np.take_along_axis(found, chosen, -1)", "np.take_along_axis(found, chosen, -1)"),
    Mutant("likeliest", "1 - np.exp(named).sum(-1, keepdims=True)", "np.exp(named).sum(-1, keepdims=True)"),
)
ROWS = (
    Mutant("TextRows.of", "Cut.of(window, None, prefix).room", "window"),
    Mutant("TextRows.of", "parts[0][:most[0]]", "parts[0]"),
    Mutant("TextRows.first", "max(1, self.prefix)", "self.prefix"),
)


def by_definition(m: Any) -> None:
    source = graph()
    consts = parameters_of(source)
    for settings in (Distill(top=2), TAUGHT):
        labels = {"labels": classes(3, 4), **teacher_answers(3, 4, settings)[1]}
        feeds = {name: value for name, value in feeds_of(source, consts, [x_of(3, 4)], labels).items() if name != "loss_scale"}
        found = evaluated(m.loss_graph(source, consts, m.Loss("distill", distill=settings)), feeds)
        wanted = distilled(seeded(Two).double()(x_of(3, 4))["logits"], labels, settings).detach()
        assert abs(found["loss"] - wanted) <= ROUNDING


def answers(m: Any) -> None:
    logits = 3 * np.random.default_rng(2).standard_normal((70, 9))  # more rows than go through at once
    settings = Distill(top=3, temperature=2.0)
    ids, logs = m.likeliest(logits, settings)
    for row, found, log in zip(logits, ids, logs, strict=True):
        shares = torch.softmax(torch.from_numpy(row) / 2.0, -1).tolist()
        order = sorted(range(9), key=lambda word: -shares[word])
        assert list(found) == order[:3]
        named = [shares[word] for word in order[:3]]
        np.testing.assert_allclose(np.exp(log), [*named, 1 - sum(named)], rtol=1e-6)  # float32 of logarithms


def rows(m: Any) -> None:
    found = m.TextRows.of(np.arange(20), np.arange(20, 40), [99], 5, (3, 2))
    assert found.learnt.tolist() == [[99, 0, 1, 2, 3], [99, 4, 5, 6, 7], [99, 8, 9, 10, 11]]
    assert found.judged.tolist() == [[99, 20, 21, 22, 23], [99, 36, 37, 38, 39]]
    assert (found.prefix, found.first) == (1, 1)
    assert m.TextRows.of(np.arange(20), np.arange(20), [], 5, (3, 2)).first == 1


CASES: tuple[tuple[tuple[Mutant, ...], Callable[[Any], None]], ...] = ((LOSS, by_definition), (TEACHER, answers), (ROWS, rows))
EACH = [(mutant, check) for mutants, check in CASES for mutant in mutants]


@pytest.mark.parametrize(("mutant", "check"), EACH, ids=[f"{mutant.where}: {mutant.put}" for mutant, _ in EACH])
def test_mutants_are_noticed(mutant: Mutant, check: Callable[[Any], None]) -> None:
    assert killer(mutated(mutant), [check])


@pytest.mark.parametrize(("mutants", "check"), CASES, ids=["loss", "teacher", "rows"])
def test_the_code_itself_passes(mutants: tuple[Mutant, ...], check: Callable[[Any], None]) -> None:
    with unmutated(mutants) as found:
        check(found)
