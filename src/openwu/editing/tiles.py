"""Large pictures in bounded memory: a picture's size enters, overlapping tiles and their blending weights leave.

A tile is a core, which it is there for, and a margin around it for context. Where the margins of neighbours overlap,
their outputs are blended along ramps that sum to 1, so that no seam shows. Corners lie on multiples of `align` pixels:
a base model with windows then cuts a tile into the windows of the whole picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def window(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def tile_grid(height: int, width: int, core: int, margin: int, align: int) -> list[Tile]:
    """Tiles of at most `core + 2 * margin` pixels a side; core and margin must be multiples of `align`."""
    if core <= 0 or core % align or margin % align:
        raise ValueError(f"core, margin: expected multiples of align={align}, got {core} and {margin}")
    if not 0 <= 2 * margin <= core:  # Otherwise more than two tiles would overlap, and their ramps not add up to 1.
        raise ValueError(f"margin: expected from 0 to half of core={core}, got {margin}")
    rows, columns = (list(_spans(side, core, margin)) for side in (height, width))
    return [Tile(top, left, bottom - top, right - left) for top, bottom in rows for left, right in columns]


def blend_weights(tile: Tile, height: int, width: int, margin: int) -> Tensor:
    """`[h, w]` weights of a tile's pixels: 1 in its core, a ramp through both margins where a neighbour takes over."""
    rows = _ramp(tile.top, tile.height, height, margin)
    columns = _ramp(tile.left, tile.width, width, margin)
    return rows[:, None] * columns[None, :]


def _spans(side: int, core: int, margin: int) -> Iterator[tuple[int, int]]:
    """(first, past the last) pixel of every tile along one side."""
    for start in range(0, side, core):
        last = start + core + margin >= side
        yield max(0, start - margin), side if last else start + core + margin
        if last:
            return


def _ramp(start: int, length: int, side: int, margin: int) -> Tensor:
    """Neighbours overlap by 2 margins; the two ramps there add up to 1."""
    weights = torch.ones(length)
    overlap = min(2 * margin, length)
    rise = (torch.arange(overlap) + 0.5) / (2 * margin) if margin else torch.ones(0)
    if start > 0:
        weights[:overlap] = rise
    if start + length < side:
        weights[length - overlap :] = torch.minimum(weights[length - overlap :], rise.flip(0))
    return weights
