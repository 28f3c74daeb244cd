"""Two wishes in one sentence whose parts name edits without commanding them: "cartoon, and more vivid please".

A part counts where it is read as an edit with next to no doubt, describes nothing ("it looks flat"), denies nothing and
does not only point back ("fix it"); and parts that say one thing twice, or a thing and its usual description, are one
wish. What `wishes` finds by commands comes first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from openwu.backbones.embedded.words.language import word_set

if TYPE_CHECKING:
    from openwu.backbones.embedded.words.wishes import Wish

SURE = 0.98
"""Probability from which a part of a sentence counts as a wish beside another one."""
_SAME = 0.1
"""From which probability of one part's edit in another part both say the same."""
_MOST = 4

DESCRIBES = re.compile(
    r"\b(?:is|are|was|were|looks?|seems?|feels?|find|had|has|have|gives?|leaves?|went|got|shot|took|taken|like|as if|"
    r"as in)\b"
    r"|\w['’](?:s|m|ve)\b|(?:[是在有看拍觉]|像(?!素))|[了过片]$|的$|^(?:同|一)|[^一]样$",
    re.IGNORECASE,
)
DENIES = re.compile(
    r"\b(?:not|no|nothing|too|without|instead|but|never|than|or|nor|until|till|because|if|leave|keep|only|just|already|"
    r"same|both|all|ones?)\b|n['’]t\b|[太不没别无但似只留]|有点|保持",
    re.IGNORECASE,
)
POINTS_BACK = re.compile(
    r"(?:please |just |then )*(?:fix|correct|repair|improve|undo|sort|mend|restore|ease|help|flatten|pull|tone|clean|"
    r"bring)(?: (?:it|this|that|them|up|back|down|out))*(?: please)?|"
    r".{0,2}(?:校正|修复|恢复|修正|处理|冷却|改善|纠正)(?:一下|下)?",
    re.IGNORECASE,
)
NEAR = tuple(
    word_set(words)
    for words in (
        "lift_shadows recover_highlights hdr contrast_up contrast_down fade",
        "brighten lift_shadows day recover_highlights",
        "brighten darken",
        "darken night recover_highlights",
        "day night",
        "vignette remove_vignette",
        "warm cool",
        "saturate desaturate",
        "add_noise denoise",
        "rain remove_rain",
        "salt_pepper remove_salt_pepper",
        "add_jpeg remove_jpeg",
        "blur deblur",
        "motion_blur remove_motion_blur",
        "scratches remove_scratches",
        "fog dehaze",
        "soften contrast_down blur",
        "sharpen deblur contrast_up",
        "sharpen soften blur",
        "denoise remove_salt_pepper remove_jpeg",
        "restore age remove_scratches scratches unfade fade add_noise sepia soften",
        "invert darken recover_highlights hue_shift",
        "tint_blue cool",
        "desaturate black_and_white colourise emboss pencil charcoal",
        "warm sunset",
        "white_balance tint_blue tint_green tint_red tint_purple warm cool salt_pepper",
        "tilt_shift blur sharpen",
        "take_palette take_tone take_style take_cast",
        "take_light take_tone",
        "cartoon poster colourise pencil",
        "add_jpeg pixel_art blur",
        "saturate oil unfade",
        "blur soften fog",
        "tint_purple fog",
    )
)
"""Edits that people name together when they ask for one of them; two of one set are no two wishes by this rule."""


def joined(found: Sequence[Wish], alone: Sequence[bool], ordered: bool) -> tuple[Wish, ...] | None:
    """Return the parts of a sentence that are wishes beside one another; None for fewer than two.

    `alone`: whether a part asks for its edit by itself, so that even a single word does. `ordered`: whether the
    sentence says that one comes after the other, so that all of its parts are wishes.
    """
    wishes: list[Wish] = []
    for part, by_itself in zip(found, alone, strict=True):
        counts = ordered or _counts(part, by_itself)
        if part.reading.is_wish(SURE) and counts and not any(_same(part, each) for each in wishes):
            wishes.append(part)
    same = not ordered and near({each.reading.edit for each in wishes})
    return tuple(wishes) if 2 <= len(wishes) <= _MOST and not same else None


def near(edits: AbstractSet[str]) -> bool:
    """Return whether some of these edits are often named together by people who ask for one of them."""
    return any(len(edits & together) > 1 for together in NEAR)


def _counts(part: Wish, by_itself: bool) -> bool:
    word = part.text.isascii() and len(part.text.split()) < 2
    if POINTS_BACK.fullmatch(part.text) or (word and (part.reading.sentence or not by_itself)):
        return False
    if part.reading.sentence:  # A complaint or a name, of which the sentence is the cure.
        return True
    return not DESCRIBES.search(part.text) and not DENIES.search(part.text)


def _same(one: Wish, other: Wish) -> bool:
    """Whether either part may mean the other's edit."""
    return (
        one.reading.edit == other.reading.edit
        or dict(one.reading.ranked).get(other.reading.edit, 0.0) >= _SAME
        or dict(other.reading.ranked).get(one.reading.edit, 0.0) >= _SAME
    )
