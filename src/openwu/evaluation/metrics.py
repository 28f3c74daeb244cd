"""Picture metrics: PSNR and SSIM of edited pictures as their 8-bit files show them."""

from __future__ import annotations

import torch
from torch import Tensor


def as_8bit(picture: Tensor) -> Tensor:
    """Clamp to 0..1 and round to the 256 values of an 8-bit file; float32."""
    return (picture.float().clamp(0, 1) * 255).round() / 255


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR in dB of the 8-bit output against its target in 0..1: `[..., 3, h, w]` twice -> `[...]`."""
    error = (as_8bit(output) - target).square().flatten(-3).mean(-1)
    return -10 * torch.log10(error.clamp(min=1e-10))


def ssim(output: Tensor, target: Tensor) -> float:
    """Return the structural similarity of one 8-bit output `[3, h, w]` to its target."""
    from skimage.metrics import structural_similarity  # slow to import, and training needs none of it

    return float(structural_similarity(as_8bit(output).numpy(), target.numpy(), channel_axis=0, data_range=1.0))
