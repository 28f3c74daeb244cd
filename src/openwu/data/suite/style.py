"""Style: drawings, paintings, prints and mosaics. A strength below 1 blends the style in."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from openwu.data.suite.core import Edit, blend, whole
from openwu.data.suite.operators import cells, colour, edges, gaussian, in_cell, kuwahara, luma, mirrored, saturation

CELL = 8
"""Side in pixels of what mosaics are made of."""
GLASS, GLASS_TURN = 16, 64
"""Mean side of a piece of stained glass, and the side of the square after which the pattern of pieces repeats."""


def pencil(x: Tensor) -> Tensor:
    """Colour-dodge of the grey picture with its own blurred negative: outlines on white paper."""
    grey = luma(x)
    return (grey / (gaussian(grey, 2.0) + 0.05)).clamp(0, 1).square().expand_as(x)


def charcoal(x: Tensor) -> Tensor:
    """Broad dark strokes along edges, shadows smudged, on grey paper."""
    grey = luma(x)
    strokes = gaussian(edges(grey), 1.0) * 3.5
    return (0.9 * (0.35 + 0.65 * gaussian(grey, 2.0)) - strokes).clamp(0.03, 1).expand_as(x)


def oil(x: Tensor) -> Tensor:
    """Strokes of even colour, a little more colourful."""
    return saturation(kuwahara(x, 3), 1.25)


def watercolour(x: Tensor) -> Tensor:
    """Pale washes with darker rims, on white paper."""
    wash = saturation(gaussian(kuwahara(x, 2), 1.0), 1.3)
    return 0.22 + 0.78 * wash - 0.5 * gaussian(edges(luma(wash)), 0.7)


def cartoon(x: Tensor) -> Tensor:
    """Smooth strong colours inside black outlines."""
    flat = saturation(kuwahara(x, 2), 1.5)
    outline = ((edges(gaussian(luma(x), 1.0)) - 0.06) / 0.06).clamp(0, 1)
    return flat * (1 - 0.9 * outline)


def poster(x: Tensor) -> Tensor:
    """Four levels of every channel."""
    return (x * 3).round() / 3


def halftone(x: Tensor) -> Tensor:
    """Black dots on white, on a grid; the darker the picture, the larger."""
    grey = gaussian(luma(x), 1.5)
    rows, columns = (2 * torch.pi * (index + 0.5) / CELL for index in in_cell(x, CELL))
    screen = 0.5 - 0.25 * (rows.cos() + columns.cos())
    return ((grey - screen) * 6 + 0.5).clamp(0, 1).expand_as(x)


def pixel_art(x: Tensor) -> Tensor:
    return cells(x, CELL)


@cache
def glass_pieces() -> tuple[Tensor, Tensor]:
    """The repeating pattern: nearest piece `[t, t]` and how close a pixel is to a border between pieces `[t, t]`."""
    pieces = GLASS_TURN // GLASS
    jitter = torch.rand(pieces, pieces, 2, generator=torch.Generator().manual_seed(7)) * 0.8 + 0.1
    grid = torch.stack(torch.meshgrid(torch.arange(pieces), torch.arange(pieces), indexing="ij"), dim=-1)
    centres = ((grid + jitter) * GLASS).view(-1, 2)
    pixel = torch.stack(torch.meshgrid(torch.arange(GLASS_TURN), torch.arange(GLASS_TURN), indexing="ij"), dim=-1) + 0.5
    apart = (pixel[:, :, None] - centres).abs()
    apart = torch.minimum(apart, GLASS_TURN - apart).norm(dim=-1)  # [t, t, pieces]: the pattern wraps around
    nearest = apart.topk(2, largest=False)
    lead = (1.5 - (nearest.values[..., 1] - nearest.values[..., 0])).clamp(0, 1)
    return nearest.indices[..., 0], lead


def stained_glass(x: Tensor) -> Tensor:
    """Pieces of even, strong colour, held by dark lead."""
    height, width = x.shape[-2:]
    piece, lead = glass_pieces()
    tiles = -(-height // GLASS_TURN), -(-width // GLASS_TURN)
    turn = (
        torch.arange(tiles[0] * tiles[1]).view(tiles).repeat_interleave(GLASS_TURN, 0).repeat_interleave(GLASS_TURN, 1)
    )
    label = (piece.repeat(tiles) + turn * (int(piece.max()) + 1))[:height, :width].flatten()
    sums = x.new_zeros(3, int(label.max()) + 1).index_add_(1, label, x.flatten(1))
    counts = torch.bincount(label, minlength=sums.shape[1]).clamp(min=1)
    flat = saturation((sums / counts)[:, label].view_as(x), 1.4)
    return flat * (1 - 0.85 * lead.repeat(tiles)[:height, :width])


def cross_stitch(x: Tensor) -> Tensor:
    """A cross of thread in every cell, on pale cloth."""
    rows, columns = in_cell(x, CELL)
    thread = ((rows - columns).abs() <= 1) | ((rows + columns - (CELL - 1)).abs() <= 1)
    return torch.where(thread, cells(x, CELL), colour(x, 0.93, 0.9, 0.84))


def emboss(x: Tensor) -> Tensor:
    """Grey relief in which light areas stand out, lit from the bottom right."""
    grey = luma(x)
    shifted = mirrored(grey, 2, 2)[:, 4:, 4:]  # what lies two pixels further down and to the right
    return (0.5 + 1.2 * (grey - shifted)).clamp(0, 1).expand_as(x)


def neon(x: Tensor) -> Tensor:
    """Glowing coloured edges on black."""
    return gaussian((edges(gaussian(x, 1.0)) * 5).clamp(0, 1), 0.8)


def blueprint(x: Tensor) -> Tensor:
    """Pale lines on blue paper."""
    line = (gaussian(edges(luma(x)), 0.6) * 4).clamp(0, 1)
    return blend(colour(x, 0.08, 0.22, 0.55).expand_as(x), colour(x, 0.92, 0.95, 1.0).expand_as(x), line)


STYLES = (
    pencil,
    charcoal,
    oil,
    watercolour,
    cartoon,
    poster,
    halftone,
    pixel_art,
    stained_glass,
    cross_stitch,
    emboss,
    neon,
    blueprint,
)

STYLE = tuple(Edit(style.__name__, "style", whole(style), limit=1.0) for style in STYLES)
