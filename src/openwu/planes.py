"""What the embedded base sees of a picture besides its colours: noise, the only randomness, and every pixel's place.

Enters: the sides of a whole picture, a seed. Leaves: planes that a tile cuts its window from, so that a tile knows
where in the picture it lies and gets the noise of its own pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 128


def noise_plane(width: int, height: int, seed: int) -> Tensor:
    """Standard normal `[1, h, w]` in float16, the same for one seed and size."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.empty(1, height, width, dtype=torch.float16)
    for top in range(0, height, ROWS_AT_ONCE):
        rows = plane[:, top : top + ROWS_AT_ONCE]
        rows.copy_(torch.randn(rows.shape, generator=generator))
    return plane


def place_planes(height: int, width: int, window: tuple[slice, slice] | None = None) -> Tensor:
    """`[2, h, w]`: y and x of every pixel's centre from -1 to 1, of the whole picture or of a window in it."""
    y = (2 * torch.arange(height) + 1) / height - 1
    x = (2 * torch.arange(width) + 1) / width - 1
    if window is not None:
        y, x = y[window[0]], x[window[1]]
    return torch.stack([y[:, None].expand(-1, len(x)), x[None, :].expand(len(y), -1)])
