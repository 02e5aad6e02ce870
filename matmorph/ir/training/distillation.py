"""Nodes of the distillation loss: the divergence of a student's next-token distribution from a teacher's likeliest words and the rest."""

from __future__ import annotations

from collections.abc import Mapping

from matmorph.errors import InputError
from matmorph.ir.build import Builder
from matmorph.ir.core import Value
from matmorph.ir.types import TensorType
from matmorph.runtime.format.distillation import TEACHER_IDS, TEACHER_LOGS, Distill

_LEAST = 1e-30
"""A student's share of the rest counts as no less, so that its logarithm is a number."""


def teacher_inputs(logits: TensorType, settings: Distill) -> dict[str, TensorType]:
    """The inputs that hold the teacher's answers, for logits [batch, seq, words]. InputError for as many words as there are, or more."""
    words = logits.shape[-1]
    if isinstance(words, int) and settings.top >= words:
        raise InputError(f"distill.top is {settings.top} and the model has {words} words: at least one must be left for the rest")
    places = logits.shape[:-1]
    return {
        TEACHER_IDS: TensorType("int64", (*places, settings.top)),
        TEACHER_LOGS: TensorType("float64" if logits.dtype == "float64" else "float32", (*places, settings.top + 1)),
    }


def divergence(b: Builder, logits: Value, teacher: Mapping[str, Value], settings: Distill) -> Value:
    """T^2 KL(teacher || student) of each place [batch, seq], in nats, over the teacher's words and the rest; T the temperature, by
    which the student's logits are divided here and the teacher's were before (Hinton, Vinyals and Dean 2015, section 2.1)."""
    temperature = settings.temperature
    scaled = logits if temperature == 1 else b("aten.div.Scalar", logits, temperature)
    log_q = b("aten.log_softmax.int", scaled, -1)
    ids, log_p = teacher[TEACHER_IDS], teacher[TEACHER_LOGS]
    named = b("aten.gather.default", log_q, -1, ids)
    # What is left is added up, not taken from 1: beside a share of nearly 1 the difference would be rounding.
    others = b("aten.scatter.value", b("aten.ones_like.default", log_q), -1, ids, 0.0)
    rest = b("aten.sum.dim_IntList", b("aten.mul.Tensor", b("aten.exp.default", log_q), others), [-1], True)
    log_rest = b("aten.log.default", b("aten.clamp.default", rest, _LEAST))
    gaps = b("aten.sub.Tensor", log_p, b("aten.cat.default", [named, log_rest], -1))
    found = b("aten.sum.dim_IntList", b("aten.mul.Tensor", b("aten.exp.default", log_p), gaps), [-1])
    return found if temperature == 1 else b("aten.mul.Scalar", found, temperature**2)
