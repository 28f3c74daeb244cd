"""What the sentence reader makes of a whole sentence: the likeliest edit at each place in the order of wishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openwu.backbones.embedded.words.language import word_set

NOTHING = "nothing more"
"""The label of places behind the last wish."""
OUT_OF_SCOPE = "out_of_scope"
ALIKE = tuple(
    word_set(words)
    for words in (
        "brighten lift_shadows",
        "darken recover_highlights",
        "cool white_balance",
        "warm white_balance",
        "warm sunset",
        "deblur sharpen",
        "deblur remove_motion_blur",
        "dehaze contrast_up",
        "contrast_up hdr",
        "saturate unfade",
        "restore unfade",
        "restore remove_scratches",
        "denoise remove_salt_pepper",
        "soften blur",
        "age fade",
        "take_palette take_cast",
    )
)
"""Edits of which either is right for many a sentence ("too dark"): their probabilities count together."""


@dataclass(frozen=True)
class Whole:
    """The wishes of a sentence as the sentence reader sees them."""

    edits: tuple[str, ...]
    """In order; none for a sentence that asks for what no edit does."""
    probability: float
    """Of just these edits; edits that people name for one another (`ALIKE`) count together."""


def likeliest(places: Sequence[Mapping[str, float]]) -> Whole:
    """`places`: probability of every label at each place -> the likeliest edits, up to the first place with none."""
    edits: list[str] = []
    probability = 1.0
    for place in places:
        label = max(place, key=lambda name: place[name])
        alike = {each for together in ALIKE if label in together for each in together} | {label}
        probability *= min(1.0, sum(place.get(each, 0.0) for each in alike))
        if label in (NOTHING, OUT_OF_SCOPE):
            break
        if label not in edits:
            edits.append(label)
    return Whole(tuple(edits), probability)
