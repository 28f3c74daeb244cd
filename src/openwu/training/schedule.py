"""Learning rates over a training: a stage's optimisation and a step enter, a part of the peak rates leaves."""

from __future__ import annotations

import math
from collections.abc import Callable

from openwu.training.recipe import StageConfig

FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 - 0.5 * math.cos(math.pi * left),
    "constant": lambda _: 1.0,
}
"""Name of a schedule -> what is left of the peak when this part (1 to 0) of the fall's steps is left."""


def part_of_peak(config: StageConfig, step: int) -> float:
    """The learning rates of a step as part of their peaks: linear warm-up, constant, then the fall of the schedule."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1.0, config.decay * config.steps)
    return min(rise, FALLS[config.schedule](min(1.0, left)))
