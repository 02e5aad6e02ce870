"""Distillation from a teacher: its settings, and what a batch holds of the teacher's answers.

A teacher's logits of a whole vocabulary are too many to keep, so that of each token its `top` likeliest words are kept with their
log-probabilities, and all that it gives to other words as one number. The divergence of two such answers is that of the distributions over
`top` words and "any other"; it is never more than that of the whole ones, and it is 0 where the student gives the words, and the rest
together, what the teacher gives them. Dividing by what the words have together instead would say nothing of the rest: a student would be
free in what it gives to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DISTILL = "distill"
"""The loss."""

TEACHER_IDS, TEACHER_LOGS = "teacher_ids", "teacher_logs"
"""Inputs of the training graphs beside the labels: int64 [batch, seq, top], distinct words of each place; float32 [batch, seq, top + 1],
the logarithms of what the teacher gives to each of them and, last, to all others."""


@dataclass(frozen=True, slots=True)
class Distill:
    """How a student learns from a teacher."""

    top: int = field(default=64, metadata={"doc": "words of each token that are learnt one by one, all others as one", "minimum": 1})
    temperature: float = field(
        default=1.0, metadata={"doc": "logits of both are divided by it; the loss is multiplied by its square", "exclusive_minimum": 0}
    )
    next_token: float = field(
        default=0.0, metadata={"doc": "share of the cross entropy of the next token in the loss", "minimum": 0, "maximum": 1}
    )
