"""The edit suite: one file per family, each sub-task one small definition; `core.py` says what a definition is.

An edit is added by its definition in a family's file and its phrasings in phrases.json.
"""

from openwu.data.edits import age, colour, light, noise, reference, sharpness, style, weather
from openwu.data.edits.core import LITTLE, NORMAL, STRONG, Edit, Pair, Scene

FAMILIES = {
    "light": light.EDITS,
    "colour": colour.EDITS,
    "sharpness": sharpness.EDITS,
    "noise": noise.EDITS,
    "age": age.EDITS,
    "style": style.EDITS,
    "weather": weather.EDITS,
    "reference": reference.EDITS,
}

EDITS: dict[str, Edit] = {edit.name: edit for family in FAMILIES.values() for edit in family}
"""Every sub-task by name."""

BASE_EDITS = (
    "brighten",
    "contrast_up",
    "lift_shadows",
    "vignette",
    "warm",
    "saturate",
    "hue_shift",
    "invert",
    "tint_blue",
    "deblur",
    "remove_motion_blur",
    "sharpen",
    "denoise",
    "remove_jpeg",
    "remove_salt_pepper",
    "restore",
    "remove_scratches",
    "pencil",
    "charcoal",
    "oil",
    "cartoon",
    "halftone",
    "stained_glass",
    "cross_stitch",
    "emboss",
    "neon",
    "fog",
    "rain",
    "snow",
)
"""What the frozen base learns before any adapter exists: one side of some pairs, so that retention can be measured."""

CONTRADICTORY_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (edit.name, edit.opposite)
    for edit in EDITS.values()
    if edit.opposite is not None and list(EDITS).index(edit.name) < list(EDITS).index(edit.opposite)
)

__all__ = [
    "BASE_EDITS",
    "CONTRADICTORY_PAIRS",
    "EDITS",
    "FAMILIES",
    "LITTLE",
    "NORMAL",
    "STRONG",
    "Edit",
    "Pair",
    "Scene",
]
