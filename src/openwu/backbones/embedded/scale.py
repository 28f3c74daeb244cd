"""Effects that follow the size of a photo: strokes, dots and blur as large on 24 megapixels as on a small photo.

The network draws them so many pixels large, and on a large photo nobody would see them. Edits that leave nothing of a
photo's fine detail are made on a photo reduced by a whole number, and the result is enlarged. All other edits see every
pixel.

Shapes: h, w the sides of a photo, f its factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
from PIL import Image

from openwu.images import Photo
from openwu.images.colour import Pixels

SIDES: Mapping[str, int] = {
    **dict.fromkeys(("oil", "watercolour"), 512),
    **dict.fromkeys(("blur", "motion_blur", "halftone", "cross_stitch"), 640),
    **dict.fromkeys(("pencil", "charcoal", "cartoon", "emboss", "neon"), 1024),
}
"""Edit -> about how many pixels long a photo is on which the effect is as large as it is meant to be."""


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


def enlarged(edited: Photo, photo: Photo, by: int) -> Photo:
    """Return `photo` with the pixels of an edit of its reduced copy, enlarged by f with a cubic."""
    width, height = photo.size
    # The part of the reduced picture that the photo covers; its last pixels may be means of fewer than f x f.
    box, limit = (0.0, 0.0, width / by, height / by), np.iinfo(edited.pixels.dtype).max
    pixels = np.empty((height, width, 3), edited.pixels.dtype)
    for channel in range(3):
        plane = Image.fromarray(edited.pixels[:, :, channel].astype(np.float32))
        large = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC, box=box))
        pixels[:, :, channel] = np.rint(large.clip(0, limit))
    return photo.with_pixels(cast(Pixels, pixels))
