"""What the sentence reader makes of a whole sentence, and whether that stands in place of what was read by parts.

    whole = likeliest(places)                              # ("brighten", "cool"), 0.93
    if stands(whole, ("brighten",), withdrawn) is Standing.WHOLE:
        found = wishes_of(whole, sentence, read, accepted)

Rules and cuts (`wishes`) know numbers, negations and parts of the picture; the sentence reader knows how people put
several wishes into one sentence. Pure functions; English and Chinese.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from openwu.backbones.embedded.catalogue import phrase
from openwu.backbones.embedded.words.amounts import LIGHT, MEASURED, find_amount, strength_of
from openwu.backbones.embedded.words.cuts import SIDE, cuts
from openwu.backbones.embedded.words.language import is_chinese, word_set
from openwu.backbones.embedded.words.wishes import CLAUSES, OUT_OF_SCOPE, REPAIRS, Read, Wish, with_number

NOTHING = "nothing more"
"""The label of places behind the last wish."""
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


TAKEN = 0.6
"""Probability from which the whole's edits are served where rules and cuts found nothing clear."""
AGREED = 0.4
"""The same for two wishes or more where what they found, without being clear, is among them."""
MORE = 0.7
"""The same where they found some of the whole's edits: a wish that they lost."""
OTHER = 0.9
"""The same where they found others, and no rule cured a complaint: "too cold" names what is not asked for; and of the
clauses beside a denial, where something that they found is not among the whole's edits."""
DOUBT = 0.75
"""Probability of other edits, or of none, from which what they found is not served either."""
NEGATES = re.compile(
    r"\b(?:not|no|never|without|instead|rather|except|nor|neither|anything but)\b|n['’]t\b"
    r"|不要|不用|不想|不需|不必|无需|(?<![特分区差级性辨])别(?!的|人)|除了|取消|而不是|不变|不动|勿",
    re.IGNORECASE,
)
"""Sentences that may say what is not to be done: their other clauses are read by themselves."""
EXCESS = re.compile(r"\b(?:not|n['’]t)\b.*\b(?:too|so)\b|[不别]要?太", re.IGNORECASE)
"""Denials that ask for less of something, or for no more than a little."""
BESIDE = re.compile(r"\s+(?:without|instead of|rather than|except)\b|而不是", re.IGNORECASE)
"""What begins a denial at the end of a clause."""
FRAMES = {"little": {"en": "{} a little", "zh": "稍微{}"}, "strong": {"en": "{} a lot", "zh": "大幅{}"}}
"""Words of strength around an edit's own sentence."""


class Standing(Enum):
    """Which of two answers stands."""

    PARTS = "parts"
    """What rules and cuts found, their refusal included."""
    WHOLE = "whole"
    """What the sentence reader found."""
    NEITHER = "neither"
    """They contradict each other."""


@dataclass(frozen=True)
class Whole:
    """The wishes of a sentence as the sentence reader sees them."""

    edits: tuple[str, ...]
    """In order; none for a sentence that asks for what no edit does."""
    probability: float
    """Of just these edits; edits that people name for one another (`ALIKE`) count together."""


def affirmed(sentence: str) -> str:
    """Return a sentence without the clauses that may say what is not to be done; "" where all of them may.

    Of a clause that denies at its end, "make it warm without grain", the rest stays.
    """
    clauses = [BESIDE.split(clause)[0].strip() for clause in CLAUSES.split(sentence)]
    denies = [bool(NEGATES.search(clause)) and not EXCESS.search(clause) for clause in clauses]
    return ", ".join(clause for clause, does in zip(clauses, denies, strict=True) if clause and not does)


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


def same(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two answers name the same edits, in any order; edits of which either is right are the same."""
    left = list(other)
    for edit in one:
        match = next((each for each in left if each == edit or any({each, edit} <= alike for alike in ALIKE)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def stands(
    whole: Whole,
    found: Sequence[str],
    withdrawn: Collection[str] = (),
    *,
    guessed: Sequence[str] = (),
    negated: bool = False,
    cured: bool = False,
) -> Standing:
    """Say whether the whole's edits stand, or those that rules and cuts found (none: nothing clear).

    `withdrawn`: edits that are read and not offered; the whole is not asked about them. `guessed`: what rules and cuts
    found without being clear. `negated`: whether the sentence may say what is not to be done (`NEGATES`); where they
    found something, `whole` then read its other clauses alone (`affirmed`). `cured`: whether a rule read a complaint or
    a name.
    """
    if any(edit in withdrawn for edit in (*whole.edits, *found)):
        return Standing.PARTS
    if not found:
        agreed = bool(guessed) and len(whole.edits) > 1 and _within(guessed, whole.edits)
        return Standing.WHOLE if whole.edits and whole.probability >= (AGREED if agreed else TAKEN) else Standing.PARTS
    if same(found, whole.edits):
        return Standing.PARTS
    if negated:
        return _beside_denials(whole, found)
    fewer, more = sorted((tuple(found), whole.edits), key=len)
    within = len(fewer) < len(more) and _within(fewer, more)
    if within and len(whole.edits) > len(found):
        return Standing.WHOLE if whole.probability >= MORE else Standing.PARTS
    if cured or (within and whole.edits):
        return Standing.PARTS
    if whole.edits and whole.probability >= OTHER:
        return Standing.WHOLE
    return Standing.NEITHER if whole.probability >= DOUBT else Standing.PARTS


def _beside_denials(whole: Whole, found: Sequence[str]) -> Standing:
    """`whole` read the clauses that deny nothing, and `found` is something else.

    What was found beyond that comes out of a denial: the repair that it names ("no fog"), or what was forbidden.
    """
    more = _within(found, whole.edits)
    if not whole.edits or whole.probability < (MORE if more else OTHER):
        return Standing.PARTS
    if more or not any(edit in REPAIRS for edit in found if not _within((edit,), whole.edits)):
        return Standing.WHOLE
    return Standing.PARTS if _within(whole.edits, found) else Standing.NEITHER


def _within(some: Sequence[str], edits: Sequence[str]) -> bool:
    return all(any(same((one,), (other,)) for other in edits) for one in some)


def wishes_of(whole: Whole, sentence: str, read: Read, accepted: float) -> tuple[Wish, ...] | None:
    """Return the whole's edits as wishes, with words of strength and numbers where a part of the sentence has them.

    None where a number belongs to no wish.
    """
    parts = _parts(whole.edits, sentence, read)
    found = tuple(_wish(*each, whole, read, accepted) for each in zip(whole.edits, parts, strict=True))
    numbered = find_amount(sentence) is None or any(each.number for each in found)
    return found if numbered else None


def _parts(edits: Sequence[str], sentence: str, read: Read) -> list[str]:
    """Return the part of a sentence in which each of its edits stands: of two the sides of the likeliest cut.

    Of three, the sentence's own words say too little where one ends: they are empty.
    """
    if len(edits) == 1:
        return [sentence]
    every = cuts(sentence) if len(edits) == 2 else []
    sides = list(dict.fromkeys(text for cut in every for text in (cut.left, cut.right)))
    readings = dict(zip(sides, read(sides), strict=True)) if sides else {}
    best, parts = 0.0, [""] * len(edits)
    for cut in every:
        shares = [dict(readings[text].ranked) for text in (cut.left, cut.right)]
        score = shares[0].get(edits[0], 0.0) * shares[1].get(edits[1], 0.0)
        if score > best:
            best, parts = score, [cut.left, cut.right]
    return parts


def _wish(edit: str, part: str, whole: Whole, read: Read, accepted: float) -> Wish:
    """One wish: the part's own words where they are read as its edit, else the edit's sentence in their strength."""
    reading = read([part])[0] if part else None
    if reading is not None and reading.edit == edit and reading.is_wish(SIDE):
        own = with_number(part, reading, read, accepted)
        if own.reading.edit == edit:
            sure = max(own.reading.probability, whole.probability)
            return replace(own, reading=replace(own.reading, probability=sure), settled=True)
    language = "zh" if is_chinese(part) else "en"
    plain = phrase(edit, language)
    degree = "normal" if reading is None else reading.degree
    framed = FRAMES[degree][language].format(plain) if degree in FRAMES else plain
    said, again = framed, read([framed])[0]
    if again.edit != edit:
        said, again = plain, read([plain])[0]
    strength, number = 1.0, ""
    amount = find_amount(part) if edit in MEASURED else None
    if amount is not None and (not amount.stops or edit in LIGHT):
        strength, number = strength_of(amount, edit), amount.text
    reading = replace(again, edit=edit, probability=whole.probability, sentence=said)
    return Wish(said, reading, strength, number, settled=True)
