"""Read the pairs of pictures that show an edit, and refuse those of different scenes.

Shapes: h and w the sides of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.backbones.protocol import with_picture
from openwu.editor.requests import Picture, checked_pairs
from openwu.errors import ExampleError
from openwu.images import Photo, read_picture

LEAST_SIDE = 32
"""Least side of a picture of a pair: that of the thumbnails in which the encoder of examples sees where a picture
changes, and of the squares in which it measures detail. Of a smaller one it would read what enlarging makes up; its few
colours leave the look of others to guesses, which the check on the example itself cannot find."""
RATIO = 0.02
"""How much the shapes of a pair may differ, as a share of the ratio of their sides."""
SIDE = 96
"""Side of the reduced pictures whose outlines are compared."""
REACH = 8
"""Shifts that are looked for, in their pixels."""
ALIKE = 0.12
"""Correlation of outlines below which two pictures show different scenes."""
SHIFTED = 0.15
"""How much better the outlines must match at another place for the pair not to lie on one another."""
SURE = 0.4
"""Correlation there from which the pair counts as shifted, and not as two scenes."""


def read_examples(example: Sequence[tuple[Picture, Picture]]) -> tuple[tuple[Photo, Photo], ...]:
    """Decode pairs before and after; one that comes in another size is scaled to the first.

    Raises PictureError for a picture that cannot be read, and ExampleError for pairs that show no edit: too small, of
    different shapes, of different scenes, or shifted against each other.
    """
    pairs = [(read_picture(before), read_picture(after)) for before, after in checked_pairs(example)]
    return tuple(_matched(*pair, f"example {i}" if len(pairs) > 1 else "example") for i, pair in enumerate(pairs, 1))


def _matched(before: Photo, after: Photo, name: str) -> tuple[Photo, Photo]:
    (width, height), (wide, high) = before.size, after.size
    if min(width, height, wide, high) < LEAST_SIDE:
        raise ExampleError(
            f"{name}: expected two pictures of at least {LEAST_SIDE} pixels on a side, got {width} x {height} before "
            f"and {wide} x {high} after; choose larger ones"
        )
    if abs(wide / high * height / width - 1) > RATIO:
        raise ExampleError(
            f"{name}: expected two pictures of one shape, got {width} x {height} before and {wide} x {high} after; "
            "crop both alike"
        )
    if after.size != before.size:
        picture = torch.from_numpy(after.eight_bit().pixels.copy()).permute(2, 0, 1).float() / 255
        after = with_picture(replace(before, pixels=before.eight_bit().pixels), picture)
    matches = outline_matches(*(_outlines(photo) for photo in (before, after)))
    here = float(matches[REACH, REACH])
    best = int(matches.argmax())
    row, column = best // (2 * REACH + 1) - REACH, best % (2 * REACH + 1) - REACH
    best_match = float(matches.max())
    elsewhere = best_match > here + SHIFTED and bool(row or column)
    if elsewhere and best_match >= SURE:
        right, down = round(column * width / SIDE), round(row * height / SIDE)
        raise ExampleError(
            f"{name}: the picture after is shifted against the one before by about {right} pixels to the right and "
            f"{down} down; align them first"
        )
    if elsewhere or (here < ALIKE and bool(matches.isfinite().all())):
        raise ExampleError(
            f"{name}: the two pictures do not show the same scene; pass the same photograph before and after the edit"
        )
    return before, after


def _outlines(photo: Photo) -> Tensor:
    """Lengths of the gradient of a reduced picture `[SIDE, SIDE]`: what an edit of colours leaves as it is."""
    picture = torch.from_numpy(photo.eight_bit().pixels.copy()).permute(2, 0, 1).float()[None] / 255
    small = F.interpolate(picture, (SIDE + 1, SIDE + 1), mode="area")[0]
    down, across = small[:, 1:, :-1] - small[:, :-1, :-1], small[:, :-1, 1:] - small[:, :-1, :-1]
    return (down.square() + across.square()).sum(0).sqrt()


def outline_matches(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of the first's middle with the second at every shift, `[2 REACH + 1, 2 REACH + 1]`; NaN if flat."""
    inside = slice(REACH, SIDE - REACH)
    a = first[inside, inside]
    size = SIDE - 2 * REACH
    windows = second.unfold(0, size, 1).unfold(1, size, 1)  # [shifts, shifts, size, size]
    a = a - a.mean()
    b = windows - windows.mean((-1, -2), keepdim=True)
    scale = a.square().mean().sqrt() * b.square().mean((-1, -2)).sqrt()
    return torch.where(scale > 1e-6, (a * b).mean((-1, -2)) / scale.clamp(min=1e-6), torch.nan)
