"""Cut a picture into overlapping tiles for the page, and blend edited tiles: the reference of what picture.js does.

The editor edits pictures of any size in pieces whose result is that of one pass. A browser runs a whole graph on a
rectangle, so the page cuts large pictures, and near the edges of a tile the network lacks what lies beyond.

Shapes: h and w the sides of a tile, K instruction tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openwu.backbones.embedded.network import noise_plane, place_planes
from openwu.backbones.embedded.piecewise.pieces import as_pixels, as_unit
from openwu.images import Photo

CORE, MARGIN = 768, 128
"""A tile's core and the margin around it, in pixels: multiples of an attention window, and a margin of at most half a
core, so that no more than two tiles overlap."""
WHOLE = 1536 * 1024
"""Pictures of at most so many pixels are edited in one piece."""


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


def tiles_of(width: int, height: int) -> list[Tile]:
    """Return how the page cuts a picture of this size: in one piece, or in overlapping tiles row by row."""
    if height * width <= WHOLE:
        return [Tile(0, 0, height, width)]
    rows, columns = list(_spans(height)), list(_spans(width))
    return [Tile(top, left, bottom - top, right - left) for top, bottom in rows for left, right in columns]


def edited_in_tiles(network: nn.Module, photo: Photo, seed: int, text: Tensor) -> Photo:
    """Edit a photo as the page does; text: instruction tokens `[1, K, text_dim]`.

    Raises OpenwuError where the result holds numbers that are not finite.
    """
    width, height = photo.size
    noise = noise_plane(width, height, seed).float()
    parts = []
    for tile in tiles_of(width, height):
        planes = torch.cat([noise[:, *tile.window], place_planes(height, width, tile.window)])
        edited: Tensor = network(as_unit(photo.pixels[tile.window])[None], planes[None], text)
        parts.append((tile, edited[0]))
    return photo.with_pixels(as_pixels(blended_tiles(parts, width, height), photo.pixels))


def blended_tiles(parts: list[tuple[Tile, Tensor]], width: int, height: int) -> Tensor:
    """Blend edited tiles `[3, h, w]` into a picture `[3, height, width]`."""
    whole = torch.zeros(3, height, width)
    for tile, edited in parts:
        whole[:, *tile.window] += blend_weights(tile, width, height) * edited.float()
    return whole


def blend_weights(tile: Tile, width: int, height: int) -> Tensor:
    """Return weights `[h, w]` of a tile's pixels: 1 in its core, a ramp to 0 where a neighbour takes over."""
    rows, columns = _ramp(tile.top, tile.height, height), _ramp(tile.left, tile.width, width)
    return rows[:, None] * columns[None, :]


def _spans(side: int) -> Iterator[tuple[int, int]]:
    """(first, past the last) pixel of every tile along one side."""
    for start in range(0, side, CORE):
        last = start + CORE + MARGIN >= side
        yield max(0, start - MARGIN), side if last else start + CORE + MARGIN
        if last:
            return


def _ramp(start: int, length: int, side: int) -> Tensor:
    """Neighbours overlap by 2 margins; the two ramps there add up to 1."""
    weights = torch.ones(length)
    overlap = min(2 * MARGIN, length)
    rise = (torch.arange(overlap) + 0.5) / (2 * MARGIN)
    if start > 0:
        weights[:overlap] = rise
    if start + length < side:
        weights[length - overlap :] = torch.minimum(weights[length - overlap :], rise.flip(0))
    return weights
