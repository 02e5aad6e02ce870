"""Mutants of the distillation loss: each plants one plausible mistake, and the definition must notice. Those of a teacher: test_teacher."""

from __future__ import annotations

from typing import Any

import pytest
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


def by_definition(m: Any) -> None:
    source = graph()
    consts = parameters_of(source)
    for settings in (Distill(top=2), TAUGHT):
        labels = {"labels": classes(3, 4), **teacher_answers(3, 4, settings)[1]}
        feeds = {name: value for name, value in feeds_of(source, consts, [x_of(3, 4)], labels).items() if name != "loss_scale"}
        found = evaluated(m.loss_graph(source, consts, m.Loss("distill", distill=settings)), feeds)
        wanted = distilled(seeded(Two).double()(x_of(3, 4))["logits"], labels, settings).detach()
        assert abs(found["loss"] - wanted) <= ROUNDING


@pytest.mark.parametrize("mutant", LOSS, ids=[f"{mutant.where}: {mutant.put}" for mutant in LOSS])
def test_mutants_are_noticed(mutant: Mutant) -> None:
    assert killer(mutated(mutant), [by_definition])


def test_the_code_itself_passes() -> None:
    assert killer(unmutated(LOSS), [by_definition]) is None
