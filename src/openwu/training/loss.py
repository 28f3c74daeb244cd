"""The loss of picture regression: what the base predicts against what should have come out.

Shapes: b requests, h and w the sides of a picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-4
"""Mean squared error (40 dB) below which a picture asks for little more."""


def squared_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every picture: `[b, 3, h, w]` twice -> `[b]`."""
    return (predicted.float() - target).square().mean(dim=(1, 2, 3))


def picture_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over the pictures of log(mse + FLOOR): minus the mean PSNR up to a factor, soft above 40 dB.

    Sub-tasks differ a hundredfold in the error that can be reached (a tone curve against a restoration). The logarithm
    weighs a relative improvement of each of them alike.
    """
    return (squared_errors(predicted, target) + FLOOR).log().mean()


def psnr(predicted: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in 0..1, each clamped to that range first: -> `[b]`."""
    return -10 * torch.log10(squared_errors(predicted.clamp(0, 1), target).clamp(min=1e-10))
