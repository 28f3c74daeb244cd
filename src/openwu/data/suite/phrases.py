"""Instructions of every sub-task by language and split, from phrases.json, and their random variations.

Training sentences are varied (politeness, reasons, capitals, end marks, typing errors, other words for the picture,
words of strength); held-out sentences are used exactly as written, and no variation of a training sentence ever equals
one.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from openwu.data.suite.core import LITTLE, NORMAL, STRONG
from openwu.files.hashing import of_files

OUT_OF_SCOPE = "out_of_scope"
"""The label of sentences that no sub-task of the suite serves."""

LANGUAGES = ("en", "zh")

DEGREES = {"little": LITTLE, "normal": NORMAL, "strong": STRONG}
"""Strength of each degree; "normal" is the absence of words of strength."""

DATA_FILES = ("phrases.json", "two_wishes.json")
_FILE = Path(__file__).parent / DATA_FILES[0]

Phrases = dict[str, dict[str, dict[str, list[str]]]]

_BEFORE = {
    "en": (
        "please ", "can you ", "could you please ", "hey, ", "i want you to ", "just ",
        "would you ", "hi, ", "ok, ", "i need you to ", "now ", "i'd like you to ", "pls ", "kindly ",
    ),
    "zh": (
        "请", "帮我", "麻烦", "能不能", "请帮我", "我想",
        "请你", "可以", "你好，", "麻烦你", "给我", "那个，", "现在", "我要",
    ),
}  # fmt: skip
_AFTER = {
    "en": (" please", ", thanks", " for me", "!", ".", "?", " pls", ", thank you", " ok?", "...", " if you can"),
    "zh": ("，谢谢", "吧", "！", "。", "？", "好吗", "可以吗", "行吗", "谢谢啦", "～", "，拜托"),
}
_REASONS = {
    "en": (
        (
            "it's for my mum: ",
            "for a school project: ",
            "took this on holiday, ",
            "my boss asked: ",
            "for the poster, ",
        ),
        (", it's for my blog", ", my sister wants that", ", it's a present", ", for the album", ", the client asked"),
    ),
    "zh": (
        ("给我妈的，", "学校作业，", "旅游拍的，", "老板要的，", "做海报用，", "昨天刚拍的，"),
        ("，发朋友圈用", "，要送人的", "，放相册里", "，客户要的", "，做头像", "，朋友托我的"),
    ),
}
"""What people say before and after their wish: of no edit in particular, and of what is out of scope as well."""
_NOUNS = {
    "en": ("photo", "picture", "image", "pic", "shot", "photograph", "snapshot"),
    "zh": ("照片", "图片", "画面", "相片", "图像", "影像"),
}
"""Words for the picture: one as good as another."""
_NO_LETTER = re.compile(r"[\W_]+")
_NOUN = {
    "en": re.compile(rf"\b({'|'.join(_NOUNS['en'])})\b"),
    "zh": re.compile("|".join(_NOUNS["zh"])),
}


@cache
def load_phrases() -> Phrases:
    """Load sub-task (or `OUT_OF_SCOPE`) -> language -> split ("train", "held_out", "fresh", "stranger") -> sentences.

    All but the first are held out of every training; see `openwu.evaluation.sentences`.
    """
    stored = _stored()
    return {**stored["edits"], OUT_OF_SCOPE: stored[OUT_OF_SCOPE]}


@cache
def load_strength_words() -> Phrases:
    """Load degree ("little", "strong") -> language -> split -> frames with {} where the sentence goes."""
    frames: Phrases = _stored()["strength"]
    return frames


def phrases_hash() -> str:
    """Return the SHA-256 of the files with all sentences, those of people included (two_wishes.json)."""
    return of_files(_FILE.with_name(name) for name in DATA_FILES).hexdigest()


@cache
def _stored() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return stored


def sample_phrase(name: str, generator: torch.Generator, language: str | None = None, degree: str = "normal") -> str:
    """Draw a training sentence of the sub-task `name`, varied, with words for a degree (see `DEGREES`)."""
    if language is None:
        language = LANGUAGES[_draw(generator, len(LANGUAGES))]
    sentences = load_phrases()[name][language]["train"]
    sentence = sentences[_draw(generator, len(sentences))]
    if degree != "normal":
        frames = load_strength_words()[degree][language]["train"]
        sentence = frame(frames[_draw(generator, len(frames))], sentence)
    varied = vary(sentence, language, generator)
    return sentence if letters(varied) in _held_out() else varied


def frame(words: str, sentence: str) -> str:
    """Put a sentence into words of strength; its own end mark is dropped."""
    return words.format(sentence.rstrip(".!?。！？"))


def letters(sentence: str) -> str:
    """Strip capitals, spaces and marks: sentences that differ only in these count as equal."""
    return _NO_LETTER.sub("", sentence.lower())


@cache
def _held_out() -> frozenset[str]:
    """Return the letters of all sentences that are never trained on."""
    kept = (
        sentence
        for languages in load_phrases().values()
        for splits in languages.values()
        for split, sentences in splits.items()
        if split != "train"
        for sentence in sentences
    )
    return frozenset(map(letters, kept))


def vary(sentence: str, language: str, generator: torch.Generator) -> str:
    """Vary a sentence at random: another word for the picture, politeness, a reason, capitals, typing errors."""
    if _draw(generator, 3) == 0:
        nouns = _NOUNS[language]
        sentence = _NOUN[language].sub(nouns[_draw(generator, len(nouns))], sentence)
    if _draw(generator, 3) == 0:
        before = _BEFORE[language]
        sentence = before[_draw(generator, len(before))] + sentence
    if _draw(generator, 3) == 0:
        after = _AFTER[language]
        sentence = sentence.rstrip(".!?。！？") + after[_draw(generator, len(after))]
    if _draw(generator, 8) == 0:
        where = _draw(generator, 2)
        reasons = _REASONS[language][where]
        reason = reasons[_draw(generator, len(reasons))]
        sentence = sentence.rstrip(".!?。！？") + reason if where else reason + sentence
    if language == "en" and _draw(generator, 4) == 0:
        sentence = mistype(sentence, generator)
    if _draw(generator, 4) == 0:
        sentence = sentence.capitalize()
    return sentence


def mistype(sentence: str, generator: torch.Generator) -> str:
    """Make one typing error: two neighbouring letters swapped, one dropped, or one doubled."""
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
