"""Cut pictures into overlapping tiles, and blend edited tiles into whole photos of 8 or 16 bits.

Shapes: b photos of equal size, h and w the sides of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openwu.errors import OpenwuError
from openwu.images import Photo
from openwu.images.colour import Pixels

CORE, MARGIN = 768, 128
"""A tile's core and the margin around it, in pixels: what bounds the memory of large pictures."""

WHOLE = 1536 * 1024
"""Pictures (or batches) of at most so many pixels go through the base in one piece."""


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


def tiles_of(width: int, height: int, align: int) -> list[Tile]:
    """How a picture of this size goes through the base: in one piece or in overlapping tiles."""
    if height * width <= WHOLE:
        return [Tile(0, 0, height, width)]
    return tile_grid(height, width, CORE, MARGIN, align)


def pictures_per_pass(width: int, height: int) -> int:
    """How many pictures of this size share a pass of the base, at most."""
    return max(1, WHOLE // (width * height))


def as_unit(pixels: Pixels) -> Tensor:
    """`[h, w, 3]` of 8 or 16 bits -> `[3, h, w]` float32 in 0..1"""
    peak = np.iinfo(pixels.dtype).max
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / peak


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


class Canvas:
    """Collects edited tiles of equally large photos; holds floats only for the rows that are still being blended."""

    def __init__(self, photos: Sequence[Photo], grid: Sequence[Tile], margin: int) -> None:
        self.sources, self.margin = photos, margin
        self.height, self.width = photos[0].pixels.shape[:2]
        self.single = len(grid) == 1
        self.outputs = [np.empty_like(photo.pixels) for photo in photos]
        self.top = 0
        self.rows = torch.zeros(len(photos), 3, 0, self.width)

    @classmethod
    def over(cls, photos: Sequence[Photo], grid: Sequence[Tile]) -> Canvas:
        """A canvas for the tiles of `tiles_of`."""
        return cls(photos, grid, MARGIN)

    def add(self, tile: Tile, edited: Tensor) -> None:
        """edited `[b, 3, h, w]`; tiles come row by row, from the top left."""
        if self.single:
            self._write(0, edited)
            return
        if tile.left == 0 and tile.top > self.top:
            self._write(self.top, self.rows[:, :, : tile.top - self.top])
            self.rows = self.rows[:, :, tile.top - self.top :]
            self.top = tile.top
        missing = tile.height - self.rows.shape[2]
        if missing > 0:
            self.rows = torch.cat([self.rows, torch.zeros(*self.rows.shape[:2], missing, self.width)], dim=2)
        weights = blend_weights(tile, self.height, self.width, self.margin)
        self.rows[:, :, : tile.height, tile.left : tile.left + tile.width] += weights * edited.float()

    def photos(self) -> list[Photo]:
        """The sources with their new pixels, in the depth in which they were read."""
        if not self.single:
            self._write(self.top, self.rows)
        return [photo.with_pixels(pixels) for photo, pixels in zip(self.sources, self.outputs, strict=True)]

    def _write(self, top: int, rows: Tensor) -> None:
        for photo, output, picture in zip(self.sources, self.outputs, rows, strict=True):
            if not bool(picture.isfinite().all()):
                raise OpenwuError("edit: the result holds numbers that are not finite; ask for a smaller strength")
            peak = np.iinfo(photo.pixels.dtype).max
            whole = picture.float().clamp(0, 1).mul(peak).round().permute(1, 2, 0)
            output[top : top + whole.shape[0]] = whole.numpy().astype(photo.pixels.dtype)
