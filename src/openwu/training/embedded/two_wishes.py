"""Sentences that ask for two edits: composed of sentences of one each, of names, or written by people; and of one."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from openwu.backbones.embedded.words.joined import near
from openwu.data.suite import phrases as suite
from openwu.data.suite.phrases import OUT_OF_SCOPE, load_phrases

PEOPLE, PEOPLE_OF_ONE = 6.0, 2.0
"""Weights of sentences: that people wrote with two wishes, with one or none. Composed ones have
0.5, sentences that the encoder was trained on 1: of these it is too sure."""
SHORT = {"en": 9, "zh": 14}
"""Words, or characters, of a sentence that is put together with another one, at most."""
BARE = 0.66
"""Share of composed sentences in which a side is a name or an adjective, without the words around it."""
_JOINED = {
    "en": (
        "{a} and {b}", "{a}, {b}", "{a}. {b}", "{a} and also {b}", "{a}, then {b}", "{a} but also {b}",
        "{a} plus {b}", "{a}, and {b} please", "{a}, {b} as well", "{a}, {b} too", "{a}; {b}", "{a} & {b}",
        "{a}, also {b}", "first {a}, then {b}", "{a} + {b}", "{a}, oh and {b}", "{a} and then {b}", "{a} with {b}",
        "{a} while you {b}", "{a}! {b}", "{a} - {b}", "{a}, maybe {b} too", "{a} and {b}, for my mum's birthday",
        "{a} and {b}, thanks", "{a}, it's for the album, and {b}",
    ),
    "zh": (
        "{a}，{b}", "{a}，再{b}", "{a}并{b}", "{a}，并且{b}", "{a}同时{b}", "{a}，然后{b}", "{a}，顺便{b}",
        "先{a}，再{b}", "{a}，还要{b}", "{a}，{b}也要", "{a}。{b}", "{a} {b}", "{a}、{b}", "{a}，另外{b}", "{a}加{b}",
        "{a}又{b}", "{a}而且{b}", "{a}，也{b}", "{a}，{b}，谢谢", "{a}，{b}，发朋友圈用", "又{a}又{b}",
    ),
}  # fmt: skip
_DROPPED = {
    "en": re.compile(
        r"^(?:make (?:it|this|the (?:photo|picture|image)) (?:look )?|give (?:it|this|the \w+) |add |apply |can you |"
        r"could you |please |i want )+"
    ),
    "zh": re.compile(r"^(?:请|帮我|麻烦|把|让|给)?(?:这张|这个|整个|整张)?(?:照片|图片|画面|图|相片)?的?"),
}
"""What the second of two wishes leaves out."""
_FILE = Path(suite.__file__).with_name("two_wishes.json")
HELD_OUT = ("held_out", "fresh", "stranger")


@dataclass(frozen=True)
class Sentence:
    """A sentence and the edits that it asks for."""

    text: str
    language: str
    edits: tuple[frozenset[str], ...]
    """For every wish the edits that serve it; none for a sentence out of scope."""
    weight: float = 0.5
    usual: tuple[str, ...] = ()
    """Of a sentence that people wrote, for every wish the edit that a reader names first."""


@cache
def _pool(splits: tuple[str, ...]) -> Mapping[str, Mapping[str, list[str]]]:
    """Language -> edit -> its short sentences, without end marks."""

    def short(text: str, language: str) -> bool:
        return (len(text.split()) if language == "en" else len(text)) <= SHORT[language]

    return {
        language: {
            name: [
                text.rstrip(".!?。！？ ")
                for split in splits
                for text in texts[language][split]
                if short(text, language)
            ]
            for name, texts in load_phrases().items()
            if name != OUT_OF_SCOPE
        }
        for language in suite.LANGUAGES
    }


def composed(count: int, seed: int, splits: tuple[str, ...] = HELD_OUT) -> list[Sentence]:
    """Put sentences of two edits together, `count` times.

    `splits`: of the suite's sentences. Those that no training saw are read with the doubt that people's are.
    """
    draws, pool = random.Random(seed), _pool(splits)
    found: list[Sentence] = []
    while len(found) < count:
        language = draws.choice(suite.LANGUAGES)
        one, other = draws.sample([name for name, texts in pool[language].items() if texts], 2)
        if near({one, other}):
            continue
        first, second = (draws.choice(pool[language][name]) for name in (one, other))
        if language == "en" and not second.startswith(("I ", "I'", "HDR")):
            second = second[0].lower() + second[1:]
        bare = (
            draws.random()
        )  # a third "A and B" whole, a third with the second bare, a third with both: "sepia, softer"
        second = (_DROPPED[language].sub("", second) if bare < BARE else "") or second
        first = (_DROPPED[language].sub("", first) if bare < BARE / 2 else "") or first
        text = draws.choice(_JOINED[language]).format(a=first, b=second)
        found.append(_two(text, language, {one}, {other}))
    return found


def joined_people(one: Sentence, other: Sentence, draws: random.Random) -> Sentence:
    """Put two sentences of one wish each together; the first alone where both may mean the same edit."""
    if one.edits[0] & other.edits[0]:
        return one
    first = one.text.rstrip(".!?。！？ ")
    text = draws.choice(_JOINED[one.language]).format(a=first, b=other.text)
    return Sentence(text, one.language, (*one.edits, *other.edits))


def shared(count: int, seed: int) -> list[Sentence]:
    """Let one verb have two objects, `count` times: "lower the contrast and the saturation", 把亮度和对比度提高."""
    draws, found = random.Random(seed), list[Sentence]()
    for _ in range(count):
        language, up = draws.choice(suite.LANGUAGES), draws.random() < 0.5
        chosen = draws.sample(list(_QUANTITIES), 2)
        names = [each[0 if language == "en" else 1] for each in chosen]
        verb = draws.choice(_VERBS[language][0 if up else 1])
        text = draws.choice(_SHARED[language]).format(verb=verb, a=names[0], b=names[1])
        found.append(_two(text, language, *({each[2 if up else 3]} for each in chosen)))
    return found


def brief(count: int, seed: int) -> list[Sentence]:
    """Join two names, adjectives or complaints, `count` times: "black and white, grainy", "too dark and too yellow"."""
    draws, found, stored = random.Random(seed), list[Sentence](), _stored()
    while len(found) < count:
        language = draws.choice(suite.LANGUAGES)
        table, forms = (stored["brief"], _BRIEFLY) if draws.random() < 0.75 else (stored["faults"], _COMPLAINED)
        one, other = draws.sample(list(table[language]), 2)
        cures = [set(each.split("|")) for each in (one, other)]
        if near(cures[0] | cures[1]):
            continue
        first, second = (draws.choice(table[language][each]) for each in (one, other))
        found.append(_two(draws.choice(forms[language]).format(a=first, b=second), language, *cures))
    return found


def told(count: int, seed: int, splits: tuple[str, ...] = HELD_OUT) -> list[Sentence]:
    """Add where and when a picture was taken to a wish, `count` times: one wish beside words that remind of another."""
    draws, pool, scenes = random.Random(seed), _pool(splits), _stored()["scenes"]
    found: list[Sentence] = []
    while len(found) < count:
        language = draws.choice(suite.LANGUAGES)
        wanted = draws.choice([name for name, texts in pool[language].items() if texts])
        scene = draws.choice(list(scenes[language]))
        if scene == wanted or near({wanted, scene}):
            continue
        first, second = draws.choice(pool[language][wanted]), draws.choice(scenes[language][scene])
        text = draws.choice(_TOLD[language]).format(a=first, b=second)
        found.append(Sentence(text, language, (frozenset({wanted}),), PEOPLE_OF_ONE))
    return found


def _two(text: str, language: str, one: AbstractSet[str], other: AbstractSet[str]) -> Sentence:
    return Sentence(text, language, (frozenset(one), frozenset(other)))


_QUANTITIES = (
    ("brightness", "亮度", "brighten", "darken"),
    ("contrast", "对比度", "contrast_up", "contrast_down"),
    ("saturation", "饱和度", "saturate", "desaturate"),
    ("sharpness", "锐度", "sharpen", "soften"),
)
"""A quantity in English and Chinese, and the edits that raise and lower it."""
_VERBS = {
    "en": (("increase", "raise", "boost", "turn up", "more"), ("decrease", "lower", "reduce", "turn down", "less")),
    "zh": (("提高", "增加", "加强", "调高"), ("降低", "减少", "减弱", "调低")),
}
_SHARED = {
    "en": ("{verb} {a} and {b}", "{verb} the {a} and the {b}", "{verb} the {a} and {b} please", "{verb} {a}, {b}"),
    "zh": ("{verb}{a}和{b}", "把{a}和{b}都{verb}", "{a}和{b}{verb}一点", "{verb}{a}、{b}", "{a}、{b}都{verb}"),
}
_BRIEFLY = {
    "en": (
        "{a} and {b}", "{a}, {b}", "{a} with {b}", "make it {a} and {b}", "{a} but {b}", "{a} + {b}",
        "{a}, and {b} please", "{a} and also {b}", "i want {a} and {b}", "{a}, also {b}", "{a} plus {b}",
        "{a} and {b}, for a poster",
    ),
    "zh": (
        "{a}，{b}", "{a}加{b}", "{a} {b}", "{a}，再{b}", "又{a}又{b}", "{a}、{b}", "要{a}，还要{b}",
        "{a}，{b}，做海报用", "做成{a}，{b}", "{a}{b}", "{a}，{b}的感觉",
    ),
}  # fmt: skip
_TOLD = {
    "en": (
        "{a}, {b}",
        "{b}, {a}",
        "{a} please, {b}",
        "{a}. {b}",
        "{a} because {b}",
        "{b}. {a}",
        "{a} - {b}",
        "{b} so {a}",
    ),
    "zh": ("{a}，{b}", "{b}，{a}", "{b}，帮我{a}", "{a}。{b}", "{a}，因为{b}", "{b} {a}", "{a} {b}"),
}
_COMPLAINED = {
    "en": ("too {a} and too {b}", "it's too {a} and too {b}", "too {a}, and it's {b}", "too {a}, too {b}"),
    "zh": ("太{a}了，也太{b}", "又{a}又{b}", "太{a}，还有点{b}", "太{a}太{b}"),
}


def single(count: int, seed: int, split: str = "train") -> list[Sentence]:
    """Draw `count` sentences of every edit and language that ask for it alone, and 15 times as many out of scope."""
    draws, found = random.Random(seed), list[Sentence]()
    for name, texts in load_phrases().items():
        edits = () if name == OUT_OF_SCOPE else (frozenset({name}),)
        for language in suite.LANGUAGES:
            most = min(len(texts[language][split]), count if edits else 15 * count)
            weight = 1.0 if split == "train" else PEOPLE_OF_ONE
            found += [Sentence(text, language, edits, weight) for text in draws.sample(texts[language][split], most)]
    return found


PEOPLE_GROUPS = ("written", "developed", "idioms")
SEVERAL = ("several",)
"""Sentences that only the sentence reader is trained on: two wishes or three in most."""


def written(group: str = "written") -> list[Sentence]:
    """Return sentences of people with their edits.

    "written" by six who knew the edits' names alone, "developed" by one who knew the rules, "idioms" by five who were
    asked for idioms, complaints, trade names and near misses out of scope, "several" by eighteen, of whom most
    were asked for two and three wishes joined in every way, or by nothing, and two for what is nearly out of scope.
    """
    found = []
    for language, entries in _stored()[group].items():
        for text, wanted in entries:
            edits = tuple(frozenset(each.split("|")) for each in wanted)
            usual = tuple(each.partition("|")[0] for each in wanted)
            found.append(Sentence(text, language, edits, PEOPLE if len(edits) > 1 else PEOPLE_OF_ONE, usual))
    return found


@cache
def _stored() -> dict[str, Any]:
    """What two_wishes.json holds: "brief", edit -> what it is called by people who use no verb; "faults", edits that
    cure a fault -> its adjectives; "scenes", edit -> what reminds of it; sentences of people with their edits."""
    stored: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return stored
