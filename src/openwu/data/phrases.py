"""The sentences that people use to ask for an edit, by sub-task, language and split.

Enters: phrases.json beside this file. Leaves: training sentences with everyday variations (politeness, capitals, end
marks, slips of the keyboard, words of strength), and held-out sentences exactly as written.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from openwu.data.edits.core import LITTLE, NORMAL, STRONG

OUT_OF_SCOPE = "out_of_scope"
"""The label of sentences that ask for something that no sub-task of the suite does."""

LANGUAGES = ("en", "zh")

DEGREES = {"little": LITTLE, "normal": NORMAL, "strong": STRONG}
"""What words of strength ask for; "normal" is none of them."""

_FILE = Path(__file__).parent / "phrases.json"

Phrases = dict[str, dict[str, dict[str, list[str]]]]

_BEFORE = {
    "en": ("please ", "can you ", "could you please ", "hey, ", "i want you to ", "just "),
    "zh": ("请", "帮我", "麻烦", "能不能", "请帮我", "我想"),
}
_AFTER = {
    "en": (" please", ", thanks", " for me", "!", ".", "?"),
    "zh": ("，谢谢", "吧", "！", "。", "？", "好吗"),
}


@cache
def load_phrases() -> Phrases:
    """Sub-task name (or `OUT_OF_SCOPE`) -> language -> split ("train", "held_out", "fresh") -> sentences.

    Fresh sentences are held out too; see `openwu.understanding`.
    """
    stored = _stored()
    return {**stored["edits"], OUT_OF_SCOPE: stored[OUT_OF_SCOPE]}


@cache
def load_strength_words() -> Phrases:
    """Degree ("little", "strong") -> language -> split -> frames with {} where the sentence goes."""
    frames: Phrases = _stored()["strength"]
    return frames


def phrases_hash() -> str:
    """SHA-256 of the file with all sentences."""
    return hashlib.sha256(_FILE.read_bytes()).hexdigest()


@cache
def _stored() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return stored


def sample_phrase(name: str, generator: torch.Generator, language: str | None = None, degree: str = "normal") -> str:
    """A training sentence for the sub-task `name`, varied as people vary it, asking for a degree (see `DEGREES`)."""
    if language is None:
        language = LANGUAGES[_draw(generator, len(LANGUAGES))]
    sentences = load_phrases()[name][language]["train"]
    sentence = sentences[_draw(generator, len(sentences))]
    if degree != "normal":
        frames = load_strength_words()[degree][language]["train"]
        sentence = frame(frames[_draw(generator, len(frames))], sentence)
    return vary(sentence, language, generator)


def frame(words: str, sentence: str) -> str:
    """Put a sentence into words of strength; its own end mark goes."""
    return words.format(sentence.rstrip(".!?。！？"))


def vary(sentence: str, language: str, generator: torch.Generator) -> str:
    """Sometimes polite, sometimes capitalised, sometimes mistyped."""
    if _draw(generator, 3) == 0:
        before = _BEFORE[language]
        sentence = before[_draw(generator, len(before))] + sentence
    if _draw(generator, 3) == 0:
        after = _AFTER[language]
        sentence = sentence.rstrip(".!?。！？") + after[_draw(generator, len(after))]
    if language == "en" and _draw(generator, 4) == 0:
        sentence = mistype(sentence, generator)
    if _draw(generator, 4) == 0:
        sentence = sentence.capitalize()
    return sentence


def mistype(sentence: str, generator: torch.Generator) -> str:
    """One slip: two neighbouring letters swapped, one dropped, or one doubled."""
    if len(sentence) < 4:
        return sentence
    at = 1 + _draw(generator, len(sentence) - 2)
    slips = (
        sentence[: at - 1] + sentence[at] + sentence[at - 1] + sentence[at + 1 :],
        sentence[:at] + sentence[at + 1 :],
        sentence[:at] + sentence[at] + sentence[at:],
    )
    return slips[_draw(generator, len(slips))]


def _draw(generator: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=generator))
