"""The optimizers a training graph can be written for, each with its settings; torch is not needed to name one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

_LR = {"doc": "learning rate", "exclusive_minimum": 0}
_BETAS = {"doc": "decay of the first and second moment", "minimum": 0, "exclusive_maximum": 1}
_DECAY = {"doc": "decoupled weight decay, in units of the learning rate", "minimum": 0}


@dataclass(frozen=True, slots=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).

    m and v are bias-corrected; theta loses lr * weight_decay * theta, then lr * m / (sqrt(v) + eps).
    """

    lr: float = field(metadata=_LR)
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=_BETAS)
    eps: float = field(default=1e-8, metadata={"doc": "added to the root of the second moment", "exclusive_minimum": 0})
    weight_decay: float = field(default=0.01, metadata=_DECAY)


@dataclass(frozen=True, slots=True)
class SGD:
    """Gradient descent with momentum, as torch.optim.SGD without dampening, but with decoupled weight decay.

    m = momentum * m + g; theta loses lr * weight_decay * theta, then lr * m (nesterov: lr * (g + momentum * m)).
    """

    lr: float = field(metadata=_LR)
    momentum: float = field(default=0.0, metadata={"doc": "decay of the sum of gradients", "minimum": 0, "exclusive_maximum": 1})
    nesterov: bool = field(default=False, metadata={"doc": "step along the momentum of the next step"})
    weight_decay: float = field(default=0.0, metadata=_DECAY)

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum > 0")


@dataclass(frozen=True, slots=True)
class AdamAtan2:
    """AdamW without eps (Everett et al. 2024): the step is lr * a * atan2(m, b * sqrt(v)), m and v bias-corrected.

    With a = 4 / pi and b = 1 a steady gradient moves a parameter by lr, as in Adam.
    """

    lr: float = field(metadata=_LR)
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=_BETAS)
    a: float = field(default=4 / math.pi, metadata={"doc": "factor of the arc tangent", "exclusive_minimum": 0})
    b: float = field(default=1.0, metadata={"doc": "factor of the root of the second moment", "exclusive_minimum": 0})
    weight_decay: float = field(default=0.01, metadata=_DECAY)


@dataclass(frozen=True, slots=True)
class Lion:
    """Sign of an interpolated momentum (Chen et al. 2023, algorithm 2), one moment only.

    theta loses lr * weight_decay * theta, then lr * sign(beta1 * m + (1 - beta1) * g); afterwards m = beta2 * m + (1 - beta2) * g.
    """

    lr: float = field(metadata=_LR)
    betas: tuple[float, float] = field(
        default=(0.9, 0.99),
        metadata={"doc": "weight of the moment in the step, and its decay", "minimum": 0, "exclusive_maximum": 1},
    )
    weight_decay: float = field(default=0.0, metadata=_DECAY)


AnyOptimizer: TypeAlias = AdamW | SGD | AdamAtan2 | Lion


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One optimizer by name."""

    adamw: AdamW | None = field(default=None, metadata={"doc": "Adam with decoupled weight decay"})
    sgd: SGD | None = field(default=None, metadata={"doc": "gradient descent with momentum"})
    adam_atan2: AdamAtan2 | None = field(default=None, metadata={"doc": "AdamW with an arc tangent in the place of eps"})
    lion: Lion | None = field(default=None, metadata={"doc": "sign of the momentum"})

    def __post_init__(self) -> None:
        given = [name for name in OPTIMIZERS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one optimizer ({', '.join(OPTIMIZERS)}), got {' and '.join(given) or 'none'}")

    @property
    def chosen(self) -> AnyOptimizer:
        """The one that is given."""
        found: AnyOptimizer = next(value for name in OPTIMIZERS if (value := getattr(self, name)) is not None)
        return found


OPTIMIZERS: dict[str, type[AnyOptimizer]] = {"adamw": AdamW, "sgd": SGD, "adam_atan2": AdamAtan2, "lion": Lion}
"""Class by its name in a spec and in train.json."""


def optimizer_name(optimizer: AnyOptimizer) -> str:
    """The name of an optimizer in a spec and in train.json ("adamw")."""
    return next(name for name, kind in OPTIMIZERS.items() if isinstance(optimizer, kind))
