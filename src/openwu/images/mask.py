"""Limit an edit to part of a picture: a mask's transparency says where.

Shapes: h, w sides of the picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openwu.errors import PictureError
from openwu.images.colour import Pixels
from openwu.images.photo import ROWS_AT_ONCE, Photo

Share = NDArray[np.float32]


def kept_share(mask: Photo, size: tuple[int, int]) -> Share:
    """Return the share of the original `[h, w, 1]` that a mask keeps: 0 where it is transparent, 1 where it is opaque.

    `size`: (width, height) of the picture. Raises PictureError for a mask of another size, and for one without alpha.
    """
    if mask.size != size:
        expected, got = (f"{width}x{height}" for width, height in (size, mask.size))
        raise PictureError(f"mask: expected {expected} as the picture, got {got}; scale the mask")
    if mask.alpha is None:
        raise PictureError("mask: expected a PNG with alpha, transparent where to edit, got a picture without alpha")
    return np.divide(mask.alpha, np.float32(np.iinfo(mask.alpha.dtype).max), dtype=np.float32)[:, :, None]


def masked(original: Pixels, edited: Pixels, share: Share) -> Pixels:
    """Mix pixels `[h, w, 3]` of equal depth; where `share` `[h, w, 1]` is 1, the original's stay bit for bit.

    Raises PictureError where the edit changed the size.
    """
    if edited.shape != original.shape:
        raise PictureError(
            "mask: expected a model that keeps the picture's size, got one that changes it; leave it out"
        )
    mixed: Pixels = np.empty_like(original)
    for start in range(0, len(original), ROWS_AT_ONCE):  # sums of a whole large photo would not fit beside it
        rows = slice(start, start + ROWS_AT_ONCE)
        kept = share[rows].astype(np.float64)
        mixed[rows] = np.rint(original[rows] * kept + edited[rows] * (1 - kept))
    return mixed
