"""What an edited picture has by construction: grey stays grey, black and white is neutral, sepia has one tone.

A network comes close to these and never quite there: a grey photograph would come back with a faint tint. Only colour
is corrected here, by the edited picture's own luma; light and detail stay as the network drew them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openwu.backbones.embedded.words.language import word_set
from openwu.errors import InstructionError
from openwu.images import Photo
from openwu.images.photo import LUMA, ROWS_AT_ONCE
from openwu.types import Understood

_COLOURING = word_set(
    "warm cool sepia colourise tint_red tint_green tint_blue tint_purple age fade cross_stitch blueprint sunset "
    "night take_palette take_cast take_style"
)
"""Edits that give a grey photograph colours."""
_COMPLETE = word_set(
    "black_and_white sepia invert tilt_shift denoise remove_jpeg remove_salt_pepper age restore remove_scratches "
    "remove_rain pencil charcoal oil watercolour cartoon poster halftone pixel_art stained_glass cross_stitch emboss "
    "neon blueprint take_palette take_tone take_grain take_style take_light take_sharpness take_cast"
)
"""Edits of which there is no more than all: beyond it comes the negative of what they removed or drew over."""
_REVERSIBLE = word_set(
    "brighten darken contrast_up contrast_down vignette remove_vignette warm cool saturate desaturate black_and_white "
    "sharpen soften fade unfade fog dehaze night day"
)
"""Edits whose change turned round is an edit, too: more than 2 dB nearer to their opposite's target than the input is
(one photograph each); "black and white" turned round is more colour."""
SEPIA_TONE, SEPIA_FLOOR = (1.08, 0.86, 0.64), 0.02
"""Red, green and blue of sepia for a luma of 1, and what is added to all three: the tone that training shows."""


def guaranteed(photo: Photo, understood: Sequence[Understood], grey: bool) -> Photo:
    """Return a photo that was edited in full with exact colours where its edits define them.

    `grey`: whether the input was grey; it stays so unless an edit gives colours.
    """
    edits = [each.edit for each in understood]
    full = {each.edit for each in understood if each.degree != "little"}
    if not edits:
        return photo
    if edits == ["sepia"]:
        return _sepia(photo) if full else photo
    if any(edit in _COLOURING for edit in edits):
        return photo
    return photo.neutral() if grey or "black_and_white" in full else photo


def check_reversible(understood: Sequence[Understood], strength: float) -> None:
    """Raise InstructionError for a strength below 0 of an edit whose change has no other direction."""
    fixed = next((each.edit for each in understood if each.edit not in _REVERSIBLE), None)
    if strength < 0 and fixed is not None:
        raise InstructionError(
            f"strength: expected 0 or more for {fixed.replace('_', ' ')}, got {strength:g}: below 0 an edit is turned "
            "round, and this one has no other direction; say in words what to do instead"
        )


def share_of(understood: Sequence[Understood], strength: float) -> tuple[float, str]:
    """Return the share of an edit's change that a strength and the number in its sentence ask for together.

    Beside it a note, where the edit is complete at a smaller share; empty for none.
    """
    share = strength * (understood[0].strength if len(understood) == 1 else 1.0)
    complete = next((each.edit for each in understood if each.edit in _COMPLETE), None)
    if complete is None or share <= 1:
        return share, ""
    return 1.0, f"{complete.replace('_', ' ')} is complete at strength 1, and was not made stronger"


def blended(before: Photo, after: Photo, share: float) -> Photo:
    """Return a share of the change that an edit made, above 1 more of it: a number in a sentence is exact that way.

    A network's own strength is not: what its base does without an adapter does not become less with the adapter.
    """
    if share == 1:
        return after
    pixels = after.pixels.copy()
    for start in range(0, len(pixels), ROWS_AT_ONCE):
        rows = Photo(pixels[start : start + ROWS_AT_ONCE])
        old = Photo(before.pixels[start : start + ROWS_AT_ONCE]).floats()
        pixels[start : start + ROWS_AT_ONCE] = rows.with_pixels(old + np.float32(share) * (rows.floats() - old)).pixels
    return after.with_pixels(pixels)


def _sepia(photo: Photo) -> Photo:
    """Move every pixel to the sepia tone of its luma, at the photo's depth."""
    tone, weights = np.array(SEPIA_TONE, np.float32), np.array(LUMA, np.float32)
    pixels = photo.pixels.copy()
    for start in range(0, len(pixels), ROWS_AT_ONCE):
        rows = Photo(pixels[start : start + ROWS_AT_ONCE])
        level = (rows.floats() @ weights - SEPIA_FLOOR) / float(tone @ weights)
        pixels[start : start + ROWS_AT_ONCE] = rows.with_pixels(
            level[..., None] * tone + np.float32(SEPIA_FLOOR)
        ).pixels
    return photo.with_pixels(pixels)
