"""Take out the pattern of patches: what repeats from patch to patch of an edit where the picture itself is smooth.

A linear layer draws all pixels of a patch at once, and where a picture is smooth, as in a sky, what it draws amiss is
alike from patch to patch: a grid of a few grey levels. It is measured there, in each neighbourhood, and taken back.
What an edit draws on purpose stays: grain differs from patch to patch, and a halftone's dots are far stronger.

Shapes: b pictures, h and w their sides in pixels, p the side of a patch, m = p * p its pixels, H and W the sides of the
grid of patches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

REACH = 4
"""A neighbourhood is a square of patches, with so many to each side of its own."""

SEEN = REACH + 1
"""So many patches to each side count for one: those of its neighbourhood, and the means beside these."""

SMOOTH = 4 / 255
"""Standard deviation about a plane, in 0..1, from which on a patch of the picture is not smooth at all."""

MEANT = 5 / 255
"""Root mean square of a pattern beyond which it begins to be meant; from twice as much on, nothing is taken out."""

TINY = 1e-12
"""Keeps division and root of a pattern of nothing finite; a limit, since torch's ONNX exporter drops such a summand."""


def without_pattern(edited: Tensor, picture: Tensor, patch: int) -> Tensor:
    """Return edited pictures within 0..1 and without their pattern of patches: edited and picture `[b, 3, h, w]`.

    In float32; h and w are multiples of `patch`, two patches at least. What is further than `SEEN` patches from a patch
    does not change it.
    What leaves black and white is cut first, since that is what shows.
    """
    edited = edited.clamp(0, 1)
    slopeless = _about_plane(patch).to(edited)
    grid = edited.shape[-2] // patch, edited.shape[-1] // patch
    residual = _about_neighbours(edited - picture, patch)  # [b, 3, m, H, W]
    rough = (slopeless @ _to_patches(picture, patch)).square().mean(2).amax(1, keepdim=True)  # [b, 1, H * W]
    smooth = (2 - 2 * rough / SMOOTH**2).clamp(0, 1).view(len(rough), 1, *grid)  # [b, 1, H, W]

    count = _around(smooth)[:, :, None]  # [b, 1, 1, H, W]: how many smooth patches a neighbourhood has
    pattern = _around(residual * smooth[:, :, None]) / (count + 1)
    power = pattern.square().mean(2, keepdim=True)  # [b, 3, 1, H, W]
    spread = _around((residual.square() * smooth[:, :, None]).mean(2, keepdim=True)) / (count + 1) - power
    # What chance would leave of patches that have nothing in common, such as grain, is no pattern.
    common = 1 - spread / (count + 1) / power.clamp(min=TINY)
    taken = common.clamp(0, 1) * (2 - power.clamp(min=TINY).sqrt() / MEANT).clamp(0, 1) * smooth[:, :, None]
    return edited - _from_patches(pattern * taken, patch)


def _about_neighbours(change: Tensor, patch: int) -> Tensor:
    """What patches of a change `[b, c, h, w]` have beside their mean and the slope of the means around them.

    `[b, c, m, H, W]`. A slope of a patch's own, against that of the means, shows as steps between patches.
    """
    b, c, h, w = change.shape
    high, wide = h // patch, w // patch
    cells = _to_patches(change, patch).view(b, c, -1, high, wide)
    mean = cells.mean(2)  # [b, c, H, W]
    below = F.pad(mean[:, :, 1:] - mean[:, :, :-1], (0, 0, 1, 1), mode="replicate")
    beside = F.pad(mean[..., 1:] - mean[..., :-1], (1, 1, 0, 0), mode="replicate")
    down, right = (below[:, :, 1:] + below[:, :, :-1]) / (2 * patch), (beside[..., 1:] + beside[..., :-1]) / (2 * patch)
    place = (torch.arange(patch) - (patch - 1) / 2).to(change)
    y, x = place.repeat_interleave(patch)[:, None, None], place.repeat(patch)[:, None, None]
    return cells - mean[:, :, None] - down[:, :, None] * y - right[:, :, None] * x


def _about_plane(patch: int) -> Tensor:
    """The projection that takes the best plane away from the pixels of a patch: `[m, m]`."""
    place = torch.arange(patch) - (patch - 1) / 2
    flat, down = torch.ones(patch, patch), place[:, None].expand(patch, patch)
    planes = torch.stack([flat, down, down.T]).flatten(1)  # Orthogonal to one another.
    planes = planes / torch.linalg.vector_norm(planes, dim=1, keepdim=True).clamp(min=TINY)
    projection: Tensor = torch.eye(patch**2) - planes.T @ planes
    return projection


def _around(x: Tensor) -> Tensor:
    """Sum of every neighbourhood, nothing outside the picture: `[..., H, W]` -> the same."""
    side = 2 * REACH + 1
    flat = x.flatten(0, -3)[None]
    for kernel, padding in (((side, 1), (REACH, 0)), ((1, side), (0, REACH))):
        flat = F.avg_pool2d(flat, kernel, 1, padding) * side
    return flat.view_as(x)


def _to_patches(x: Tensor, patch: int) -> Tensor:
    """`[b, c, h, w]` -> `[b, c, m, H * W]`"""
    b, c, h, w = x.shape
    cells = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(b, c, patch * patch, -1)


def _from_patches(x: Tensor, patch: int) -> Tensor:
    """`[b, c, m, H, W]` -> `[b, c, h, w]`"""
    b, c, _, high, wide = x.shape
    cells = x.reshape(b, c, patch, patch, high, wide)
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(b, c, high * patch, wide * patch)
