"""What condition tokens are made of: colours, details and how pictures vary, as numbers of size about 1.

Shapes: b pictures, h and w their sides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cut_details(pictures: Tensor, grid: int, side: int) -> Tensor:
    """Squares at the crossings of a grid: `[b, 3, h, w]` -> `[b, grid * grid, 3, side, side]` float32."""
    height, width = pictures.shape[-2:]
    if min(height, width) < side:
        pictures = F.interpolate(pictures, (max(height, side), max(width, side)), mode="bilinear", align_corners=False)
        height, width = pictures.shape[-2:]
    # Where JPEG's blocks begin is the same in every detail: corners lie on multiples of 8. Whole numbers and indices:
    # sizes may be symbols, while the encoder is exported.
    steps, within = torch.arange(grid, device=pictures.device), torch.arange(side, device=pictures.device)
    rows, columns = (
        ((steps * (length - side) // max(1, grid - 1) // 8 * 8)[:, None] + within).flatten()
        for length in (height, width)
    )
    cut = pictures.index_select(2, rows).index_select(3, columns)
    cut = cut.view(*pictures.shape[:2], grid, side, grid, side)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).float()


QUANTILES = 16
NUM_STATISTICS = 4 * QUANTILES + 3 + 6
"""Quantiles of red, green, blue and luma; means and covariances of the channels."""


def colour_statistics(small: Tensor) -> Tensor:
    """What the colours of thumbnails `[b, 3, s, s]` are, wherever they are: `[b, NUM_STATISTICS]`, of size about 1."""
    colours = small.flatten(2)  # [b, 3, n]
    luma = (colours * colours.new_tensor((0.299, 0.587, 0.114))[:, None]).sum(1, keepdim=True)
    ordered = torch.cat([colours, luma], dim=1).sort(dim=-1).values
    at = torch.linspace(0, ordered.shape[-1] - 1, QUANTILES, device=small.device).round().long()
    mean = colours.mean(-1, keepdim=True)
    covariance = (colours - mean) @ (colours - mean).transpose(1, 2) / colours.shape[-1]
    row, column = torch.triu_indices(3, 3)
    spread = covariance[:, row, column]
    spread = spread.sign() * spread.abs().clamp(min=1e-6).sqrt()
    return torch.cat([4 * (ordered[..., at].flatten(1) - 0.5), 4 * (mean[..., 0] - 0.5), 8 * spread], dim=1)


DIFFERENCES = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 4), (4, 0), (0, 8), (8, 0))
"""Steps down and to the right, in pixels: noise differs at every distance, blur only at larger ones."""


def detail_energy(details: Tensor) -> Tensor:
    """How much details `[b, n, 3, k, k]` vary over each of DIFFERENCES: `[b, n, len(DIFFERENCES)]`, a logarithm."""
    side = details.shape[-1]
    energies = [
        (details[..., down:, right:] - details[..., : side - down, : side - right]).square().mean((-1, -2, -3))
        for down, right in DIFFERENCES
    ]
    return 0.5 * torch.log10(torch.stack(energies, dim=-1) + 1e-6) + 1.5
