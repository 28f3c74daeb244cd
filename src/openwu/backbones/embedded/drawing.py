"""The embedded base draws: photos with their adapters enter, edited photos leave, in the same order.

A picture that is too large for one pass goes through the base in tiles, which overlap by a margin and blend there.

Shapes: b photos of one pass, h and w the sides of a picture or tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openwu.backbones.embedded.model import EmbeddedModel
from openwu.backbones.embedded.network import noise_plane, place_planes
from openwu.backbones.embedded.tiles import Canvas, Tile, tile_grid
from openwu.editor.requests import Progress
from openwu.images import Photo
from openwu.images.photo import Pixels
from openwu.types import Adapter

CORE, MARGIN = 768, 128
"""A tile's core and the margin around it, in pixels: what bounds the memory of large pictures."""

WHOLE = 1536 * 1024
"""Pictures (or batches) of at most so many pixels go through the base in one piece."""


@dataclass(frozen=True)
class Job:
    """What the base needs for one request."""

    photo: Photo
    seed: int
    text: Tensor
    """Instruction tokens `[K, text_dim]`, those of several instructions one after another."""
    adapter: Adapter
    """b = 1, strength included"""


def draw(model: EmbeddedModel, jobs: Sequence[Job], progress: Progress | None = None) -> list[Photo]:
    """Photos of equal size go through the base together, in one piece if they fit, else tile by tile.

    `progress` is called with (parts done, parts in all).
    """
    groups: dict[tuple[tuple[int, int], int], list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault((job.photo.size, job.adapter.rank), []).append(index)
    chunks = [
        chunk
        for ((w, h), _), members in groups.items()
        # One by one where each has its own merged weights; otherwise together, through hooks.
        for chunk in _chunks(members, 1 if model.merging_pays(jobs[members[0]].adapter, w * h) else WHOLE // (w * h))
    ]
    grids = [tiles_of(model, *jobs[chunk[0]].photo.size) for chunk in chunks]
    done, total = 0, sum(len(grid) for grid in grids)
    edited: dict[int, Photo] = {}
    for chunk, grid in zip(chunks, grids, strict=True):
        together = [jobs[i] for i in chunk]
        width, height = together[0].photo.size
        canvas = Canvas([job.photo for job in together], grid, MARGIN)
        noises = [noise_plane(width, height, job.seed) for job in together]
        text = torch.stack([job.text for job in together])
        edit = model.adapted(Adapter.stack([job.adapter for job in together]), width * height)
        for tile in grid:
            picture = torch.stack([as_unit(job.photo.pixels[tile.window]) for job in together])
            place = place_planes(height, width, tile.window)
            planes = torch.stack([torch.cat([noise[:, *tile.window].float(), place]) for noise in noises])
            canvas.add(tile, edit(picture, planes, text))
            done += 1
            if progress:
                progress(done, total)
        edited |= dict(zip(chunk, canvas.photos(), strict=True))
    return [edited[index] for index in range(len(jobs))]


def tiles_of(model: EmbeddedModel, width: int, height: int) -> list[Tile]:
    """How a picture of this size goes through the base: in one piece or in overlapping tiles."""
    if height * width <= WHOLE:
        return [Tile(0, 0, height, width)]
    return tile_grid(height, width, CORE, MARGIN, align=model.config.backbone.cell)


def as_unit(pixels: Pixels) -> Tensor:
    """`[h, w, 3]` of 8 or 16 bits -> `[3, h, w]` float32 in 0..1"""
    peak = np.iinfo(pixels.dtype).max
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / peak


def _chunks(members: list[int], size: int) -> list[list[int]]:
    size = max(1, size)
    return [members[start : start + size] for start in range(0, len(members), size)]
