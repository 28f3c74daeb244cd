"""The loss of picture regression: what the base predicts against what should have come out.

Shapes: b requests, h and w the sides of a picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-4
"""Mean squared error (40 dB) below which a picture asks for little more."""
FLOOR_FALLS = 0.6
"""Part of a training over which the floor falls from where it starts to FLOOR."""


def squared_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every sample in float32: `[b, ...]` twice -> `[b]`."""
    if predicted.shape != target.shape:
        raise ValueError(f"prediction: expected the target's shape {list(target.shape)}, got {list(predicted.shape)}")
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)


def picture_loss(predicted: Tensor, target: Tensor, floor: float = FLOOR) -> Tensor:
    """Mean over the pictures of `picture_losses`."""
    return picture_losses(predicted, target, floor).mean()


def picture_losses(predicted: Tensor, target: Tensor, floor: float = FLOOR) -> Tensor:
    """log(mse + floor) of every picture `[b]`: minus its PSNR up to a factor, soft below the floor.

    Sub-tasks differ a hundredfold in the error that can be reached (a tone curve against a restoration). The logarithm
    weighs a relative improvement of each of them alike. A high floor makes it nearly linear: then what is worst counts
    most.
    """
    return (squared_errors(predicted, target) + floor).log()


def falling_floor(first: float, progress: float) -> float:
    """The floor after this part (0 to 1) of a training: from `first` to FLOOR along a geometric line, then constant.

    With a low floor from the beginning, sub-tasks that the base does already hold an adapter near nothing: their
    gradients are the largest, and the sub-tasks that are furthest off hardly move.
    """
    remaining = max(0.0, 1 - progress / FLOOR_FALLS)
    return float(FLOOR * (first / FLOOR) ** remaining)


def psnr(predicted: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in 0..1, each clamped to that range first: -> `[b]`."""
    return -10 * torch.log10(squared_errors(predicted.clamp(0, 1), target).clamp(min=1e-10))
