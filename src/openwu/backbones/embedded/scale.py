"""Effects that follow the size of a photo: strokes, dots and blur as large on 24 megapixels as on a small photo.

The network draws them so many pixels large, and on a large photo nobody would see them. Edits that leave nothing of a
photo's fine detail are made on a photo reduced by a whole number, and the result is enlarged. A tilt shift leaves it in
some rows, which get it back from the photo. All other edits see every pixel.

Shapes: h, w the sides of a photo, f its factor; h', w' those of the reduced photo.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openwu.images import Photo
from openwu.images.colour import Pixels

SIDES: Mapping[str, int] = {
    **dict.fromkeys(("oil", "watercolour"), 512),
    **dict.fromkeys(("blur", "motion_blur", "halftone", "cross_stitch"), 640),
    **dict.fromkeys(("pencil", "charcoal", "cartoon", "emboss", "neon"), 1024),
    "tilt_shift": 512,
}
"""Edit -> about how many pixels long a photo is on which the effect is as large as it is meant to be."""
DETAILED = ("tilt_shift",)
"""Edits of `SIDES` that leave the detail of some rows."""
ROWS = 4
"""Rows to each side that are looked at with one, for how much of its detail is left."""
FLAT = 4e-6
"""Mean square of the steps between pixels, of 1, of rows that hardly have any detail."""


def factor(edit: str, size: tuple[int, int]) -> int:
    """Return f, by how much a photo of this size is reduced for an edit; 1 for none."""
    return max(1, round(max(size) / SIDES[edit])) if edit in SIDES else 1


def reduced(photo: Photo, by: int) -> Photo:
    """Return the photo's pixels, means of f x f, `[ceil(h / f), ceil(w / f), 3]`; at the far edges means of fewer."""
    limit = np.iinfo(photo.pixels.dtype).max
    width, height = photo.size
    across, down = np.arange(0, width, by), np.arange(0, height, by)
    small = np.empty((len(down), len(across), 3), photo.pixels.dtype)
    columns = np.diff(np.append(across, width))
    for row, top in enumerate(down):
        rows = photo.pixels[top : top + by].sum(axis=0, dtype=np.uint64)
        count = (min(by, height - top) * columns)[:, None]
        small[row] = np.minimum((np.add.reduceat(rows, across, axis=0) + count // 2) // count, limit)
    return Photo(cast(Pixels, small), grey=photo.grey)


def enlarged(edited: Photo, photo: Photo, by: int, small: Photo | None = None) -> Photo:
    """Return `photo` with the pixels of an edit of its reduced copy, enlarged by f with a cubic.

    `small`: the reduced copy, for edits that leave detail: rows get as much of the photo's as they kept of the copy's.
    """
    width, height = photo.size
    limit = np.iinfo(edited.pixels.dtype).max

    def large(plane: NDArray[np.generic], wide: int = width) -> NDArray[np.float32]:
        # The part of the reduced picture that the photo covers; its last pixels may be means of fewer than f x f.
        box = (0.0, 0.0, wide / by if wide > 1 else 1.0, height / by)
        image = Image.fromarray(plane.astype(np.float32))
        return np.asarray(image.resize((wide, height), Image.Resampling.BICUBIC, box=box))

    kept = None if small is None else large(kept_detail(edited, small)[:, None], 1).clip(0, 1)
    pixels = np.empty((height, width, 3), edited.pixels.dtype)
    for channel in range(3):
        plane = large(edited.pixels[:, :, channel])
        if small is not None and kept is not None:
            plane = plane + kept * (photo.pixels[:, :, channel] - large(small.pixels[:, :, channel]))
        pixels[:, :, channel] = np.rint(plane.clip(0, limit))
    return photo.with_pixels(cast(Pixels, pixels))


def detail_of(edit: str, small: Photo) -> Photo | None:
    """Return the reduced photo for an edit that leaves detail; None for others."""
    return small if edit in DETAILED else None


def kept_detail(edited: Photo, small: Photo) -> NDArray[np.float64]:
    """Return for each row of a reduced photo how much of its detail an edit left, 0 to 1: `[h']`.

    Detail is the steps between neighbours in a row; what the edit has of them is measured by regression.
    """
    own, left = (np.diff(each.floats().astype(np.float64), axis=1) for each in (small, edited))
    rows = np.ones(2 * ROWS + 1)
    count = np.convolve(np.full(len(own), max(1, own[0].size)), rows, "same")
    power, common = (np.convolve(part.sum((1, 2)), rows, "same") / count for part in (own * own, own * left))
    return np.asarray((common / (power + FLAT)).clip(0, 1))
