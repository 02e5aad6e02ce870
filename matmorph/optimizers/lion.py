"""Lion: settings, state and update rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from matmorph.optimizers.rule import DECAY, LR, UpdateOps, UpdateRule, mixed


@dataclass(frozen=True, slots=True)
class Lion:
    """Sign of an interpolated momentum (Chen et al. 2023, algorithm 2), one moment only.

    theta loses lr * weight_decay * theta, then lr * sign(beta1 * m + (1 - beta1) * g); afterwards m = beta2 * m + (1 - beta2) * g.
    """

    DOC: ClassVar[str] = "sign of the momentum"
    STATES: ClassVar[tuple[str, ...]] = ("m",)

    lr: float = field(metadata=LR)
    betas: tuple[float, float] = field(
        default=(0.9, 0.99),
        metadata={"doc": "weight of the moment in the step, and its decay", "minimum": 0, "exclusive_maximum": 1},
    )
    weight_decay: float = field(default=0.0, metadata=DECAY)

    def rule(self, b: UpdateOps) -> UpdateRule:
        """The sign of one mixture is the step, the other is the new moment."""

        def step(b: UpdateOps, gradient: str) -> dict[str, str]:
            sign = b("Sign", mixed(b, "m", gradient, self.betas[0]))
            return {"m": mixed(b, "m", gradient, self.betas[1]), "step": sign}

        return UpdateRule(step)
