"""The optimizers that a training graph can be written for: one file and one line of `OPTIMIZERS` each.

A file holds the settings, the names of the states and the update rule, written against `rule.Ops`. This room lies below the spec language,
which reads the settings, and below the exporters, which give the rule its operators; it needs neither torch nor onnx.
"""

from __future__ import annotations

from matmorph.optimizers.adam_atan2 import AdamAtan2
from matmorph.optimizers.adamw import AdamW
from matmorph.optimizers.lion import Lion
from matmorph.optimizers.rule import AnyOptimizer
from matmorph.optimizers.sgd import SGD

__all__ = ["OPTIMIZERS", "SGD", "AdamAtan2", "AdamW", "AnyOptimizer", "Lion", "optimizer_name"]

OPTIMIZERS: dict[str, type[AnyOptimizer]] = {
    "adamw": AdamW,
    "sgd": SGD,
    "adam_atan2": AdamAtan2,
    "lion": Lion,
}
"""By its name in a spec and in train.json."""


def optimizer_name(optimizer: AnyOptimizer) -> str:
    """The name of an optimizer in a spec and in train.json ("adamw")."""
    return next(name for name, kind in OPTIMIZERS.items() if isinstance(optimizer, kind))
