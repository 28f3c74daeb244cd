"""The loss of picture regression: the logarithm of the mean squared error above a floor that is annealed.

Shapes: b requests, h and w the sides of a picture.
"""

from __future__ import annotations

from torch import Tensor

from openwu.training.config import FIRST_FLOOR
from openwu.training.objectives import squared_errors

FLOOR = FIRST_FLOOR
"""Mean squared error (40 dB) below which a picture's loss hardly falls any more."""
ANNEALED_SHARE = 0.6
"""Share of a training over which the floor is annealed from where it starts to FLOOR."""


def picture_losses(prediction: Tensor, target: Tensor, floor: float = FLOOR) -> Tensor:
    """Return log(mse + floor) of every picture `[b]`: minus its PSNR up to a factor, soft below the floor.

    Sub-tasks differ a hundredfold in the error that can be reached (a tone curve against a restoration). The logarithm
    weighs a relative improvement of each of them alike. A high floor makes it nearly linear: then what is worst counts
    most.
    """
    return (squared_errors(prediction, target) + floor).log()


def annealed_floor(first: float, progress: float) -> float:
    """Return the floor at this progress (0 to 1) of a training: from `first` to FLOOR geometrically, then constant.

    With a low floor from the beginning, sub-tasks that the base does already hold an adapter near nothing: their
    gradients are the largest, and the sub-tasks that are furthest off hardly move.
    """
    remaining = max(0.0, 1 - progress / ANNEALED_SHARE)
    return float(FLOOR * (first / FLOOR) ** remaining)
