"""Edited tiles enter as floats, whole photos of 8 or 16 bits leave.

Shapes: b photos of equal size, h and w the sides of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from openwu.editing.tiles import Tile, blend_weights
from openwu.errors import OpenwuError
from openwu.pictures import Photo


class Canvas:
    """Collects edited tiles of equally large photos; holds floats only for the rows that are still being blended."""

    def __init__(self, photos: Sequence[Photo], grid: Sequence[Tile], margin: int) -> None:
        self.sources, self.margin = photos, margin
        self.height, self.width = photos[0].pixels.shape[:2]
        self.single = len(grid) == 1
        self.outputs = [np.empty_like(photo.pixels) for photo in photos]
        self.top = 0
        self.rows = torch.zeros(len(photos), 3, 0, self.width)

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
