"""Numbers in instructions: "20% brighter", "half a stop", 百分之二十 -> a strength, the share of the full edit.

Percentages mean what the suite's edits do to their quantity: brightness at mid-grey, contrast, saturation. For edits
without a quantity, such as fog, they are a share of the full effect. Stops are of light, at display gamma 2.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from openwu.errors import InstructionError

MAX_STRENGTH = 1.5
"""Largest strength that a number may ask for: the strongest that training showed."""
MID_GREY = 0.5
"""The pixel value, of 0 to 1, at which "20% brighter" shall hold."""
LIGHT = ("brighten", "darken")
"""Edits that stops can measure."""

_PERCENT = re.compile(
    r"\s*(?P<to>\bto |到|至|成)?\s*(?:\bby |\babout |\baround )?"
    r"(?:(?P<value>\d+(?:\.\d+)?)\s*(?:%|％|percent\b|per cent\b)|百分之(?P<zh>[\d零一二两三四五六七八九十百]+))"
    r"(?: of)?\s*",
    re.IGNORECASE,
)
_STOPS = re.compile(
    r"\s*(?:\bby |\babout )?"
    r"(?P<value>\d+(?:\.\d+)?|\ba half|\bhalf an?|\bhalf|\ban?|\bone|\btwo|\bthree|[半一二两三])\s*"
    r"(?:-?stops?\b|EVs?\b|档)(?:\s*曝光)?\s*",
    re.IGNORECASE,
)
_SIGNED = re.compile(
    r"(?:^|(?<=[^\d\s\-−–])\s*|(?<=[^\d\s\-−–]\s))[\-−–]\s?"
    r"(?P<value>\d+(?:\.\d+)?\s*(?:%|％|percent\b|-?stops?\b|EVs?\b|档))",
    re.IGNORECASE,
)
"""A number below zero: "saturation -30%", which says less in another way than words do."""
_FACTOR = re.compile(
    r"\bby half\b|\b(?:half|twice) as \w+|\b(?:halve|double|triple)(?! exposure) (?:the |its )?\w+|\b\d+(?:\.\d+)?x\b"
    r"|减半|翻倍|[两二三四五]倍",
    re.IGNORECASE,
)
"""A number that no edit's strength stands for: "half as bright"."""
_NAMED = {"a half": 0.5, "half": 0.5, "half a": 0.5, "half an": 0.5, "a": 1.0, "an": 1.0, "one": 1.0, "two": 2.0} | {
    "three": 3.0,
    "半": 0.5,
    "一": 1.0,
    "二": 2.0,
    "两": 2.0,
    "三": 3.0,
}
_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"两": 2}
_FALLING = frozenset({"darken", "contrast_down", "desaturate"})
_FULL: Mapping[str, float] = {
    "brighten": MID_GREY ** (1 / 1.7) / MID_GREY - 1,
    "darken": 1 - MID_GREY**1.7 / MID_GREY,
    "contrast_up": 0.5,
    "contrast_down": 0.45,
    "saturate": 0.7,
    "desaturate": 0.65,
}
"""Share by which an edit changes its quantity at strength 1, as the edits of `openwu.data.suite.tone` do."""

MEASURED = frozenset(_FULL)
"""Edits whose quantity a percentage measures."""


def check_amounts(sentence: str) -> None:
    """Raise InstructionError for amounts that would be read as something else, or not at all."""
    for pattern in (_SIGNED, _FACTOR):
        if found := pattern.search(sentence):
            raise InstructionError(
                "instruction: expected an amount in words and per cent or stops, as '30% less saturation', 'half a "
                f"stop darker' or 饱和度降低30%, got {found[0].strip()!r}; say it so, or leave it out"
            )


@dataclass(frozen=True)
class Amount:
    """A number in a sentence."""

    text: str
    """As it was written."""
    plain: str
    """The sentence without it."""
    value: float
    """A share (0.2 for 20%), or stops."""
    stops: bool = False
    absolute: bool = False
    """Whether the quantity shall become that share of what it was: "to 80%"."""


def find_amount(sentence: str) -> Amount | None:
    """Return the percentage, or else the stops, that a sentence names; None for neither."""
    found = _PERCENT.search(sentence)
    if found:
        value = float(found["value"]) if found["value"] else _chinese_number(found["zh"])
        return Amount(found[0].strip(), _without(sentence, found), value / 100, absolute=bool(found["to"]))
    found = _STOPS.search(sentence)
    if found:
        written = " ".join(found["value"].lower().split())
        stops = _NAMED[written] if written in _NAMED else float(written)
        return Amount(found[0].strip(), _without(sentence, found), stops, stops=True)
    return None


def strength_of(amount: Amount, edit: str) -> float:
    """Return the strength at which an edit does what the number says, above 0 and at most `MAX_STRENGTH`.

    Raises InstructionError for a number that asks for more, for nothing, or for the opposite.
    """
    share = amount.value
    if amount.stops:
        ratio: float = 2 ** (amount.value / 2.2)
        share = ratio - 1 if edit == "brighten" else 1 - 1 / ratio
    elif amount.absolute and edit in _FULL:
        share = 1 - share if edit in _FALLING else share - 1
    strength = share / _FULL.get(edit, 1.0)
    if not 0 < strength <= MAX_STRENGTH:
        raise InstructionError(
            f"instruction: {amount.text!r} is out of range for {edit.replace('_', ' ')}: expected a change of up to "
            f"{_largest(edit)}; ask for less, or say it without a number"
        )
    return strength


def _largest(edit: str) -> str:
    """Return the largest percentage that `MAX_STRENGTH` allows, rounded down."""
    return f"{int(100 * MAX_STRENGTH * _FULL.get(edit, 1.0))}%"


def _without(sentence: str, found: re.Match[str]) -> str:
    plain = " ".join(f"{sentence[: found.start()]} {sentence[found.end() :]}".split())
    return plain if sentence.isascii() else plain.replace(" ", "")


def _chinese_number(text: str) -> float:
    """Return a number below 101 in Chinese or Arabic digits: 二十五 -> 25."""
    if text.isascii():
        return float(text)
    if text in ("百", "一百"):
        return 100.0
    tens, ten, ones = text.rpartition("十")
    if not ten:
        return float("".join(str(_DIGITS.get(character, 0)) for character in text))
    return float(10 * (_DIGITS.get(tens, 1) if tens else 1) + (_DIGITS.get(ones, 0) if ones else 0))
