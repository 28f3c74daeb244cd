"""The edit suite: one file per family, each sub-task one small definition; `core.py` defines `Edit`.

An edit is added by its definition in a family's file and its phrasings in phrases.json.
"""

from openwu.data.suite.core import LITTLE, NORMAL, STRONG, Edit, Pair, Scene
from openwu.data.suite.detail import AGE, NOISE, SHARPNESS
from openwu.data.suite.reference import REFERENCE
from openwu.data.suite.style import STYLE
from openwu.data.suite.tone import COLOUR, LIGHT
from openwu.data.suite.weather import WEATHER

FAMILIES = {
    "light": LIGHT,
    "colour": COLOUR,
    "sharpness": SHARPNESS,
    "noise": NOISE,
    "age": AGE,
    "style": STYLE,
    "weather": WEATHER,
    "reference": REFERENCE,
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
"""Sub-tasks of the frozen base, learned before any adapter: one side of some pairs, to measure retention."""

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
